"""Measures runs of phase 2: its start, what 8 bits do to its loss, the whole of it."""

import os
import time
from dataclasses import replace
from unittest.mock import patch

from theworld.bench_results import Row, spread
from theworld.bench_setup import Workbench, last_metrics, run_tool, statements_a_step, stepper
from theworld.vsr import load_statements

LOSSES: dict[str, dict[str, object]] = {"exact": {}, "fp8": {"fp8": True}}


def part_losses(bench: Workbench) -> None:
    """The same steps with frozen matrices in 16 and in 8 bits: mean losses beside each other, and sustained rates."""
    means: dict[str, float] = {}
    for name, changes in LOSSES.items():
        if changes and bench.device.type != "cuda":
            continue  # a CPU has no 8-bit products
        with bench.results.attempt("losses", name):
            row = _loss_row(bench, **changes)
            means[name] = row["mean_loss"]
            if "exact" in means:
                row["of_exact"] = means[name] / means["exact"]
            bench.results.add("losses", name, row)
        bench.free()


def _loss_row(bench: Workbench, **changes: object) -> Row:
    """`loss_steps` steps from the same start; their mean loss a statement, and the rates of those after the warm-up."""
    bench.free()
    trainer = bench.trainer(max_steps=bench.shapes.loss_steps, **changes)
    step = stepper(trainer)
    seconds: list[float] = []
    losses: list[float] = []
    for _ in range(bench.shapes.loss_steps):
        trainer.window = dict.fromkeys(trainer.window, 0.0)
        seconds += bench.call_seconds(step, 1)
        losses.append(trainer.window["loss"] / trainer.window["statements"])
    own, statements = seconds[bench.shapes.warm_up :], statements_a_step(trainer.config)
    row = spread([statements / s for s in own]) | {"unit": "statements/s"}
    row |= {"sustained": statements * len(own) / sum(own), "memory_gib": bench.peak_gib()}
    return row | {"mean_loss": sum(losses) / len(losses), "first_loss": losses[0], "last_loss": losses[-1]}


def part_start(bench: Workbench) -> None:
    """tools/train.py from its start to the end of the first optimizer step: without compiled code, and with what the
    first run left."""
    cache, compiled = bench.cache(), bench.fresh("compiled")
    with patch.dict(os.environ, {"TORCHINDUCTOR_CACHE_DIR": str(compiled)}):
        for name in ("nothing compiled", "compiled before"):
            with bench.results.attempt("start", name):
                output = bench.fresh("start") / "checkpoints"
                config = bench.config(max_steps=1, logging_steps=1, output_dir=str(output))
                start = time.time()
                seconds, _ = run_tool("train.py", config, cache, [])
                # The line of metrics is written after the step, before the checkpoint.
                first = (output / "metrics.jsonl").stat().st_mtime - start
                bench.results.add("start", name, {"first_step_s": first, "all_s": seconds})


def part_run(bench: Workbench) -> None:
    """Three epochs from a cold start to the saved checkpoint, with evaluation on dev, as a user runs it."""
    output = bench.fresh("run")
    config = replace(bench.config(), num_epochs=3, do_eval=True, output_dir=str(output / "checkpoints"))
    cache = bench.cache()
    statements = len(load_statements(config.annotations, "train", config.dataset_name))
    seconds, _ = run_tool("train.py", config, cache, [])
    checkpoints = [path.name for path in (output / "checkpoints").glob("checkpoint-*")]
    assert checkpoints, "a run that ended well has saved something"
    row = {
        "rate": 3 * statements / seconds,
        "unit": "statements/s",
        "seconds": seconds,
        "statements": statements,
    }
    loss = last_metrics(output / "checkpoints").get("loss")
    bench.results.add("run", "three epochs", row | {"last_loss": loss, "checkpoints": len(checkpoints)})
