"""Measures each phase beside what a user would otherwise run, and beside what the machine could do at best.

Ours and the end-to-end baseline take turns within one run (ABAB...), each warmed up first; figures are medians with the
lowest and the highest. Every part is independent, and what goes wrong in one is recorded there and costs no other.
"""

from collections.abc import Callable, Sequence
from typing import Any

from theworld.bench_encoders import part_chip, part_encode, part_extract
from theworld.bench_growth import growth_images, growth_statements, growth_tokens
from theworld.bench_processes import part_processes, part_sharded
from theworld.bench_runs import part_losses, part_run, part_start
from theworld.bench_setup import Workbench
from theworld.bench_training import part_evaluate, part_train, part_variants

PARTS: dict[str, Callable[[Workbench], None]] = {
    "encode": part_encode,
    "extract": part_extract,
    "train": part_train,
    "variants": part_variants,
    "evaluate": part_evaluate,
    "losses": part_losses,
    "start": part_start,
    "run": part_run,
    "processes": part_processes,
    "sharded": part_sharded,
    "growth_images": growth_images,
    "growth_statements": growth_statements,
    "growth_tokens": growth_tokens,
}


def run_parts(bench: Workbench, parts: Sequence[str]) -> dict[str, Any]:
    """Runs the parts in order, the chip always first, and returns what the last line shows."""
    results = bench.results
    bench.prepare()
    results.begin("chip")
    part_chip(bench)
    for name in parts:
        results.begin(name)
        with results.attempt(name, "the rest"):
            PARTS[name](bench)
        bench.free()
    bench.clean()
    return {
        "extract_speedup": results.ratio("encode", "ours", "diffusers as it is"),
        "train_speedup": results.ratio("train", "ours", "end to end"),
        "extract_command_speedup": results.ratio("extract", "ours", "plain loop"),
        "encode_images_per_second": results.rate("encode", "ours"),
        "train_statements_per_second": results.rate("train", "ours"),
        "failed": sum(len(part["failed"]) for part in results.content["parts"].values()),
    }
