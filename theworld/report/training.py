"""The section about training: curves of metrics.jsonl."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from theworld.report.charts import Axis, Plot, Series, scale_of, thinned
from theworld.report.page import Table

MAX_STEP_ROWS = 40  # of the table of training
# Of each figure of metrics.jsonl: its name, and the level of chance.
CURVES: dict[str, tuple[str, tuple[float, str] | None]] = {
    "loss": ("loss at the label, nats", (math.log(2), "chance, 0.693")),
    "accuracy": ("accuracy", (0.5, "chance")),
    "relation_loss": ("next-word loss on relations, nats a statement", None),
    "statement_loss": ("next-word loss on statements or captions, nats a statement", None),
}
Values = dict[str, dict[int, float]]  # of each figure: its value by optimizer step


def training_section(metrics: Path) -> dict[str, Any]:
    """Return the curves of metrics.jsonl, with `lack` for a file that is missing or has no curve yet."""
    if not metrics.is_file():
        return {
            "lack": f"{metrics} is not there, so there are no training curves; training writes it.",
            "command": "",
        }
    lines = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    values = _values(lines)
    steps = sorted({step for found in values.values() for step in found})
    if not steps:
        return {"lack": f"{metrics} has no line of training with the label or words yet.", "command": ""}
    x = Axis(scale_of([0, *steps]), "optimizer step")
    shown = [key for key in values if values[key] or key.removeprefix("dev_") in ("loss", "accuracy")]
    head = ["step", *(key if key.startswith("dev_") else f"training_{key}" for key in shown)]
    some = _some(steps)
    rows = [[f"{s:,}", *(f"{values[k][s]:.4f}" if s in values[k] else "" for k in shown)] for s in some]
    return {
        "lack": "",
        "plots": [plot for key in CURVES if (plot := _curve(values, key, x))],
        "aligned": max((line["step"] for line in lines if line["phase"] == "align"), default=0),
        "words": max((line["step"] for line in lines if line["phase"] == "words"), default=0),
        "num_steps": len(steps),
        "table": Table("Figures while training", [name.replace("_", " ") for name in head], rows),
    }


def _values(lines: Sequence[dict[str, Any]]) -> Values:
    """Return the figures by step. The last line of a step counts: a run that was resumed may have taken it twice. Loss
    and accuracy at the label are shown from the main phase on, in which the label is trained."""
    values: Values = {f"{of}{key}": {} for of in ("", "dev_") for key in CURVES}
    for line in lines:
        for key, found in values.items():
            of_words = key.endswith(("relation_loss", "statement_loss"))
            if key in line and (line["phase"] == "train" or of_words):
                found[line["step"]] = line[key]
    return values


def _curve(values: Values, key: str, x: Axis) -> tuple[Plot, str] | None:
    """Return the plot of a figure on training and dev with its caption, or None without any value."""
    series = [
        Series(kind, label, thinned(sorted(values[name].items())))
        for name, kind, label in ((key, "baseline", "training"), (f"dev_{key}", "dev", "dev"))
        if values[name]
    ]
    if not series:
        return None
    title, level = CURVES[key]
    is_accuracy = key == "accuracy"
    every = [y for s in series for _, y in s.points] + ([level[0]] if level else [])
    scale = scale_of(every, low=None if is_accuracy else 0.0, high=1.0 if is_accuracy else None)
    last = "; ".join(f"{s.label} ends at {s.points[-1][1]:.3f}" for s in series)
    said = f"{title} by optimizer step: {last}"
    return Plot(f"training-{key}", said, series, x, Axis(scale, title), level), last


def _some(steps: Sequence[int]) -> list[int]:
    """Return at most `MAX_STEP_ROWS` steps, evenly spaced, with the last."""
    size = -(-len(steps) // MAX_STEP_ROWS)
    return [step for i, step in enumerate(reversed(steps)) if i % size == 0][::-1]
