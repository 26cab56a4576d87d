"""Measure both phases in one process and in several: one for each GPU, or two on a CPU."""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from benchmark.models import statement_images
from benchmark.setup import Workbench, run_command, run_tool

from theworld.config.config import save_config


def part_processes(bench: Workbench) -> None:
    """Measure sustained rates of the commands, with the same work for each process; on a CPU they share its cores."""
    most = torch.cuda.device_count() if bench.device.type == "cuda" else 2
    measures: dict[str, tuple[Callable[[Workbench, int], float], str]] = {
        "train": (_train_rate, "statements/s"),
        "extract": (_extract_rate, "images/s"),
    }
    for name, (measure, unit) in measures.items():
        rates: dict[int, float] = {}
        for count in sorted({1, most}):
            with bench.results.attempt("processes", f"{name}, {count}"):
                rates[count] = measure(bench, count)
                row = {"rate": rates[count], "unit": unit, "times_one": rates[count] / rates[1]}
                bench.results.add("processes", f"{name}, {count}", row)


def part_sharded(bench: Workbench) -> None:
    """Measure steps of a trained language model, LoRA and all weights, sharded over all GPUs or two processes."""
    count = torch.cuda.device_count() if bench.device.type == "cuda" else 2
    kinds: dict[str, dict[str, Any]] = {"LoRA": {"lora_rank": 16}, "all weights": {}}
    for name, changes in kinds.items():
        with bench.results.attempt("sharded", f"{name}, {count}"):
            folder, cache = bench.fresh("sharded"), bench.cache()
            bench.free()
            changes = {"freeze_gemma_language": False, "device": bench.device.type, **changes}
            settings = folder / "settings.json"
            save_config(bench.config(**changes, output_dir=str(folder / "run")), settings)
            launcher = ["torch.distributed.run", "--standalone", f"--nproc_per_node={count}", "-m"]
            steps = [str(settings), str(cache), str(bench.shapes.steps)]
            command = [sys.executable, "-m", *launcher, "benchmark.steps", *steps]
            said = run_command(command, ACCELERATE_USE_FSDP="true")
            bench.results.add("sharded", f"{name}, {count}", json.loads(said.splitlines()[-1]))


def _train_rate(bench: Workbench, count: int) -> float:
    """Return the statements per second in the last steps of a short run, after all compilation."""
    output, steps = bench.fresh(f"train-{count}"), 4 * bench.shapes.steps
    changes = {"max_steps": 3 * steps, "logging_steps": steps, "device": bench.device.type}
    config = bench.config(**changes, output_dir=str(output / "run"))
    run_tool("train.py", config, bench.cache(), [], count)
    lines = (output / "run" / "metrics.jsonl").read_text().splitlines()
    return float(json.loads(lines[-1])["statements_per_second"])


def _extract_rate(bench: Workbench, count: int) -> float:
    """Return the images per second into committed shards: the rate of the first process times their number.

    Shards are so small that each process has several.
    """
    images = len(statement_images(Path(str(bench.config().annotations))))
    changes = {"shard_size": max(1, min(512, images // (4 * count))), "device": bench.device.type}
    config = bench.config(**changes)
    _, said = run_tool("extract_latents.py", config, bench.fresh(f"extract-{count}"), [], count)
    found = re.search(r"latents: [\d,]+ images, ([\d,.]+) images/s", said)
    assert found, f"no rate in {said[-300:]!r}"
    return count * float(found[1].replace(",", ""))
