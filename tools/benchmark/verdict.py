"""The verdict of a measurement at the real shapes: each figure beside its aim, its share of the machine's floor, and
what bounds it."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

Rows = dict[str, dict[str, Any]]
MATRIX = "matrix products, then flex attention backwards and pointwise kernels"
IN_8_BITS = "matrix products, flex attention backwards, and rounding to 8 bits"
ESTIMATE_ERROR = 0.10  # of memory, for every variant


@dataclass(frozen=True)
class Aim:
    """A figure of one row, the value that it should reach, and what bounds it."""

    part: str
    row: str
    figure: str
    value: float
    bound: str
    at_most: bool = False


AIMS = (
    Aim("encode", "ours", "rate", 700, "convolutions, and norms in float32"),
    Aim("extract", "command with vision", "seconds", 80, "SigLIP's products", at_most=True),
    Aim("extract", "command, compiled before", "seconds", 20, "convolutions, and imports", at_most=True),
    Aim("train", "ours", "rate", 100, MATRIX),
    Aim("variants", "exact", "rate", 100, MATRIX),
    Aim("variants", "fp8", "rate", 135, IN_8_BITS),
    Aim("variants", "fp8", "memory_gib", 22, "values kept in 16 bits for the backward pass", at_most=True),
    Aim("variants", "batch 8 x 2", "rate", 85, f"{MATRIX} of short rows"),
    Aim("variants", "batch 8 x 2", "memory_gib", 18, "frozen weights, and a micro-batch", at_most=True),
    Aim("variants", "world_patch 1", "rate", 9, "attention, and its mask of 4,096 tokens"),
    Aim("start", "nothing compiled", "first_step_s", 25, "imports, weights, compiling", at_most=True),
    Aim("start", "compiled before", "first_step_s", 12, "imports, weights", at_most=True),
    Aim("losses", "fp8", "of_exact", 1.01, "rounding to 8 bits", at_most=True),
    Aim("run", "three epochs", "seconds", 260, MATRIX, at_most=True),
    Aim("run", "three epochs, fp8", "seconds", 210, IN_8_BITS, at_most=True),
    Aim("evaluate", "command, all four", "seconds", 45, "matrix products, after compiling", at_most=True),
    Aim("processes", "train, 2", "times_one", 1.9, "the longest part of each step"),
    Aim("processes", "train, 4", "times_one", 3.6, "the longest part of each step"),
    Aim("processes", "extract, 2", "times_one", 1.9, "start and decoding"),
)


def verdict(parts: dict[str, Any]) -> Iterator[str]:
    """Yield a line for each figure that was measured and has an aim, and for each estimate of memory."""
    measured: dict[str, Rows] = {name: part["rows"] for name, part in parts.items()}
    for aim in AIMS:
        row = measured.get(aim.part, {}).get(aim.row, {})
        if aim.figure in row:
            yield _line(aim, row, measured)
    for name, row in measured.get("variants", {}).items():
        if "estimate_error" in row:
            met = abs(row["estimate_error"]) <= ESTIMATE_ERROR
            what = f"variants, {name}: estimate of memory off by {row['estimate_error']:+.1%}"
            yield f"{_word(met)} {what}, aim at most {ESTIMATE_ERROR:.0%}"


def _line(aim: Aim, row: dict[str, Any], measured: dict[str, Rows]) -> str:
    value = row[aim.figure]
    met = value <= aim.value if aim.at_most else value >= aim.value
    kernels = measured.get("train", {}).get("kernels", {})
    busy = f" (GPU busy {kernels['busy_share']:.0%})" if aim.part == "train" and kernels else ""
    floor = f", {row['mfu']:.0%} of the floor" if "mfu" in row and aim.figure != "memory_gib" else ""
    unit = row.get("unit", "") if aim.figure == "rate" else aim.figure.replace("_", " ")
    limit = "at most" if aim.at_most else "at least"
    return (
        f"{_word(met)} {aim.part}, {aim.row}: {value:,.4g} {unit}, aim {limit} {aim.value:,.4g}{floor}; bound by "
        f"{aim.bound}{busy}"
    )


def _word(met: bool) -> str:
    return "reached" if met else "MISSED "
