"""The parts of a report that show the training and the photographs, as HTML."""

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image

from theworld.charts import Scale, Series, plot, scale_of, thinned
from theworld.images import ImageError, read_image
from theworld.metrics import KINDS, Row, models_in, system_of
from theworld.page import data_uri, details, missing, paragraph, percent, table
from theworld.report_figures import name_of

CHANCE = 0.6931471805599453  # nats: the logarithm of 2
NUM_PHOTOGRAPHS = 6  # of each kind
MAX_SIDE = 480  # pixels of a photograph on the page


# ---- training


# Of each figure of metrics.jsonl: what it is called, and the level that says nothing.
CURVES: dict[str, tuple[str, tuple[float, str] | None]] = {
    "loss": ("loss at the label, nats", (CHANCE, "chance, 0.693")),
    "accuracy": ("accuracy", (0.5, "chance")),
    "relation_loss": ("next-word loss on relations, nats a statement", None),
    "statement_loss": ("next-word loss on statements or captions, nats a statement", None),
}
Values = dict[str, dict[int, float]]  # of each figure, its value at each step that has one


def training(metrics: Path) -> str:
    """Loss and accuracy by optimizer step, and the losses of words where there are any, from metrics.jsonl."""
    if not metrics.is_file():
        return missing(
            f"{metrics} is not there, so there are no training curves; training writes it.",
            f"python tools/train.py --config configs/vsr_training.json --cache cache/ --output_dir {metrics.parent}",
        )
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    values = _values(lines)
    steps = sorted({step for found in values.values() for step in found})
    if not steps:
        return missing(f"{metrics} has no line of training with the label or words yet.")
    drawings = [_curve(values, key, scale_of([0, *steps])) for key in CURVES]
    shown = [key for key in values if values[key] or key.removeprefix("dev_") in ("loss", "accuracy")]
    head = ["step", *(_called(key) for key in shown)]
    every_step = [[f"{s:,}", *(_figure(values[key].get(s)) for key in shown)] for s in _some(steps)]
    return (
        paragraph(
            f"Solid grey: training, the mean since the line before. Dashed: dev, with world tokens.{_start(lines)}"
        )
        + f'<div class="pair">{"".join(drawings)}</div>'
        + details(
            f"{len(every_step)} of {len(steps)} steps as a table",
            table("Figures while training", head, every_step),
        )
    )


def _values(lines: Sequence[dict[str, Any]]) -> Values:
    """The last line of a step and figure holds: a run that was resumed may have taken a step twice. Label and accuracy
    are shown from the main phase on, in which they are trained."""
    values: Values = {f"{of}{key}": {} for of in ("", "dev_") for key in CURVES}
    for line in lines:
        for key, found in values.items():
            if key in line and (
                line["phase"] == "train" or key.endswith(("relation_loss", "statement_loss"))
            ):
                found[line["step"]] = line[key]
    return values


def _curve(values: Values, key: str, x: Scale) -> str:
    """The figure on training and on dev, or nothing where neither has it."""
    series = [
        Series(kind, label, thinned(sorted(values[name].items())))
        for name, kind, label in ((key, "baseline", "training"), (f"dev_{key}", "dev", "dev"))
        if values[name]
    ]
    if not series:
        return ""
    title, line = CURVES[key]
    accuracy = key == "accuracy"
    every = [y for s in series for _, y in s.points] + ([line[0]] if line else [])
    y = scale_of(every, low=None if accuracy else 0.0, high=1.0 if accuracy else None), title
    last = "; ".join(f"{s.label} ends at {s.points[-1][1]:.3f}" for s in series)
    said = f"{title} by optimizer step: {last}"
    drawing = plot(f"training-{key}", said, series, (x, "optimizer step"), y, line)
    return f"<figure>{drawing}<figcaption>{escape(last)}</figcaption></figure>"


def _called(key: str) -> str:
    of = "dev" if key.startswith("dev_") else "training"
    return f"{of} {key.removeprefix('dev_').replace('_', ' ')}"


def _start(lines: Sequence[dict[str, Any]]) -> str:
    """What of the run is left out, as its loss is another one."""
    aligned = max((line["step"] for line in lines if line["phase"] == "align"), default=0)
    words = max((line["step"] for line in lines if line["phase"] == "words"), default=0)
    said = ""
    if aligned:
        said += (
            f" The first {aligned:,} steps took the world tokens to Gemma's own image tokens, by another loss, and are "
            "left out."
        )
    if words:
        said += f" Up to step {words:,} words alone were trained, so loss at the label and accuracy begin after it."
    return said


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _some(steps: Sequence[int], most: int = 40) -> list[int]:
    """At most so many of them, evenly, with the last."""
    size = -(-len(steps) // most)
    return [step for i, step in enumerate(reversed(steps)) if i % size == 0][::-1]


# ---- photographs


@dataclass(frozen=True)
class Photographs:
    """Where photographs are, or why there are none."""

    folder: Path | None
    lack: str = ""


def examples(rows: Sequence[Row], photographs: Photographs) -> str:
    """The most confident errors, and the statements that world tokens helped and harmed most."""
    names = list(rows[0]["systems"])
    model = models_in(names)[0]
    world, baseline = (system_of(names, model, kind) for kind in ("world", "baseline"))
    if world is None:
        return missing("No system with world tokens was scored, so there is nothing to show.")

    def sure(row: Row, system: str) -> float:
        """The probability of the right answer."""
        p = row["systems"][system]["p_true"]
        return p if row["label"] else 1 - p

    def right(row: Row, system: str) -> bool:
        return bool(row["systems"][system]["correct"])

    parts = [paragraph(f"By {name_of(world)}, one statement an image, with P(true) of each system.")]
    if photographs.folder is None:
        parts.append(missing(photographs.lack, "python tools/report.py RUN --image-dir images/"))
    wrong = sorted((r for r in rows if not right(r, world)), key=lambda r: sure(r, world))
    kinds = [("Most confident errors with world tokens", wrong)]
    if baseline:
        gain = {id(r): sure(r, world) - sure(r, baseline) for r in rows}
        helped = [r for r in rows if right(r, world) and not right(r, baseline)]
        harmed = [r for r in rows if not right(r, world) and right(r, baseline)]
        kinds.append(
            (
                "Most helped: right with world tokens, wrong without",
                sorted(helped, key=lambda r: -gain[id(r)]),
            )
        )
        kinds.append(
            ("Most harmed: wrong with world tokens, right without", sorted(harmed, key=lambda r: gain[id(r)]))
        )
    shown = [s for kind in KINDS if (s := system_of(names, model, kind))]
    for title, found in kinds:
        chosen = list({r["image"]: r for r in reversed(found)}.values())[::-1][:NUM_PHOTOGRAPHS]
        parts.append(f"<h3>{escape(title)} ({len(found):,})</h3>")
        cards = "".join(_card(r, shown, photographs) for r in chosen)
        parts.append(f'<ul class="photos">{cards}</ul>' if cards else paragraph("There are none."))
    return "\n".join(parts)


def _card(row: Row, shown: Sequence[str], photographs: Photographs) -> str:
    said = "true" if row["label"] else "false"
    figures = "".join(
        f"<dt>{escape(name_of(s))}</dt><dd>{percent(row['systems'][s]['p_true'])} "
        f'<span class="{_word(row, s)}">{_word(row, s)}</span></dd>'
        for s in shown
    )
    return (
        f'<li>{_photograph(row["image"], photographs)}<div class="body"><p class="said">{escape(row["statement"])} '
        f'<span class="tag">{said}</span></p><dl>{figures}</dl>'
        f'<p class="file">{escape(row["image"])}, {escape(row["relation"])}</p></div></li>'
    )


def _word(row: Row, system: str) -> str:
    return "right" if row["systems"][system]["correct"] else "wrong"


def _photograph(name: str, photographs: Photographs) -> str:
    if photographs.folder is None:
        return '<div class="none">photograph not at hand</div>'
    try:
        image = Image.fromarray(read_image(photographs.folder, name))
    except (ImageError, OSError) as error:
        return f'<div class="none">{escape(str(error))}</div>'
    image.thumbnail((MAX_SIDE, MAX_SIDE))
    data = io.BytesIO()
    image.save(data, "JPEG", quality=82, optimize=True)
    return (
        f'<img src="{data_uri("jpeg", data.getvalue())}" alt="Photograph {escape(name)}" width="{image.width}" '
        f'height="{image.height}">'
    )
