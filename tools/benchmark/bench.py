"""Measure each phase beside the end-to-end baseline, and beside the limit of the machine.

TheWorld and the baseline take turns within one run (ABAB...), after a warm-up; figures are medians with the lowest and
the highest. Parts are independent: an error is recorded in its own part and does not affect the others.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from benchmark.encoders import (
    growth_images,
    growth_statements,
    growth_tokens,
    part_chip,
    part_encode,
    part_extract,
)
from benchmark.models import NUM_IMAGES, SHAPES, gemma_config, statement_images
from benchmark.processes import part_processes, part_sharded
from benchmark.results import Results
from benchmark.setup import Workbench
from benchmark.training import part_evaluate, part_losses, part_run, part_start, part_train, part_variants
from diffusers import AutoencoderKLWan
from transformers import Gemma3ForConditionalGeneration

from theworld.config.fields import nearest_name
from theworld.data.images import missing_photographs
from theworld.utils.device import resolve_device
from theworld.utils.files import check_output, check_room
from theworld.utils.text import byte_size

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


def open_bench(options: dict[str, Any], command: str) -> Workbench:
    """Return the workbench for the tool's flags. Raises ValueError for a bad device, setting or file of figures."""
    shapes, share = SHAPES[options["shapes"]], options["share"]
    if share is not None and not 0 < share <= 1:
        raise ValueError(f"--share is {share}; give more than 0 and at most 1")
    known = [size.name for size in fields(shapes)]
    for name in options["sizes"]:
        if name not in known:
            raise ValueError(f"--sizes: no size {name!r}; the nearest is {nearest_name(name, known)}")
    shapes = replace(shapes, **options["sizes"] | ({} if share is None else {"share": share}))
    bench = Workbench(
        shapes,
        options["folder"].resolve(),
        Results(options["output"], command),
        resolve_device(options["device"]),
        options["annotations"] and options["annotations"].resolve(),
        options["image_folder"] and options["image_folder"].resolve(),
        tuple(options["variants"]),
        options["changes"],
        options["random_cache"],
    )
    bench.config()  # refuses an unknown setting
    return bench


PHOTOGRAPH_BYTES = 160_000  # of a photograph of COCO, and of a stand-in


def plan_parts(bench: Workbench, parts: Sequence[str]) -> Iterator[str]:
    """Yield lines that say what `run_parts` would do. Raises ValueError or OSError if it could not start."""
    config, shapes = bench.config(), bench.shapes
    yield f"measures     {', '.join(parts) or 'the chip alone'}, at the {shapes.name} shapes, on {bench.device}"
    check_output(bench.results.path)
    yield f"adds to      {bench.results.path}"
    with torch.device("meta"):  # shapes without values
        gemma = Gemma3ForConditionalGeneration(gemma_config(shapes, {}))
        vae = AutoencoderKLWan(**shapes.vae)
    size = 0
    for name, model, dtype in (
        (config.model_name, gemma, bench.dtype),
        (config.cosmos_model_name, vae, torch.float32),
    ):
        nbytes = dtype.itemsize * sum(p.numel() for p in model.parameters())
        there = Path(name).exists()
        yield f"{'uses' if there else 'makes':<12} {name}: {byte_size(nbytes)} of random weights"
        size += 0 if there else nbytes
    if bench.annotations is None and not (bench.data_folder / "train.jsonl").exists():
        yield f"makes        {bench.data_folder}: {shapes.share:.1%} of VSR's statements and photographs, drawn"
        size += round(NUM_IMAGES * shapes.share) * PHOTOGRAPH_BYTES
    else:
        names = statement_images(Path(str(config.annotations)))
        missing = missing_photographs(names, Path(str(config.image_folder)))
        yield f"uses         {config.annotations}: {len(names):,} photographs, {len(missing):,} of them not there"
        if missing and bench.image_folder is not None:
            raise ValueError(
                f"{next(iter(missing))} is not in {bench.image_folder}; get it, or leave --image_folder out"
            )
        size += len(missing) * PHOTOGRAPH_BYTES
    free = check_room(bench.folder, size, "--folder")
    yield f"writes       {byte_size(size)} and caches below {bench.folder} ({byte_size(free)} free)"


def run_parts(bench: Workbench, parts: Sequence[str]) -> dict[str, Any]:
    """Run the parts in order, the chip always first, and return the figures of the last line."""
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
