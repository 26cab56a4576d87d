"""The parts of a report about where the world tokens lie and where everything comes from, as HTML."""

import io
import json
import shlex
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image

from theworld.charts import Mark, scale_of, track
from theworld.page import chart, command, data_uri, details, facts, missing, paragraph, row, table
from theworld.report_figures import axis

MAX_PICTURE_BYTES = 4 << 20


def alignment(model: Path, folder: Path) -> str:
    """The figures and the picture that tools/visualize_alignment.py left of a model in `folder`."""
    figures, picture = folder / "alignment.json", folder / "alignment.png"
    make = f"python tools/visualize_alignment.py --model_name {model} --cache cache/ --output {picture}"
    if not figures.is_file():
        return missing(
            f"{figures} is not there: where the world tokens lie was not measured for this run.", make
        )
    result = json.loads(figures.read_text())
    words = (
        f"Cosine of each world token with its partner ({result['comparison']}), {result['images']:,} images of "
        f"{result['split']}. Only what lies above another image's tokens depends on the picture, and likeness is "
        "not use."
    )
    columns = ["what", "mean", "5 %", "95 %", "tokens"]
    parts = [
        paragraph(words),
        chart(_cosines(result), "Mean cosine; the line holds 90 % of the tokens."),
        details("As a table", table("Cosines and norms", columns, _rows(result))),
    ]
    if not picture.is_file():
        return "\n".join([*parts, missing(f"{picture} is not there.", make)])
    return "\n".join([*parts, _picture(picture)])


STATES = ("trained", "untrained")
COSINES = (("cosine", "world", "own image"), ("control_cosine", "baseline", "another image"))


def _cosines(result: dict[str, Any]) -> list[str]:
    """An axis and a row for each mean cosine."""
    every = [q for one in STATES for key, _, _ in COSINES for q in result[one][key]["quantiles"].values()]
    scale = scale_of([0.0, *every])
    drawn = [axis(scale, lambda x: f"{x:.3g}".replace("-", "−"))]
    for one in STATES:
        for key, kind, words in COSINES:
            found = result[one][key]
            low, high = found["quantiles"]["0.05"], found["quantiles"]["0.95"]
            drawing = track([Mark(kind, found["mean"], low, high, hollow=kind == "baseline")], scale, 0.0)
            ends = f"{low:.2f} to {high:.2f}".replace("-", "−")
            drawn.append(row(f"{one}, {words}", drawing, f"{found['mean']:.2f}", ends))
    return drawn


def _rows(result: dict[str, Any]) -> list[list[str]]:
    """The same in figures, and the norms."""
    rows = []
    for one in STATES:
        rows += [_figures(f"cosine, {one}, {words}", result[one][key], 3) for key, _, words in COSINES]
        rows += [_figures(f"norm, {one}, {kind}", norm, 2) for kind, norm in result[one]["norm"].items()]
    return rows


def _figures(what: str, found: dict[str, Any], digits: int) -> list[str]:
    low, high = found["quantiles"]["0.05"], found["quantiles"]["0.95"]
    return [what, *(f"{value:.{digits}f}" for value in (found["mean"], low, high)), f"{found['n']:,}"]


def _picture(path: Path) -> str:
    """The plots of tools/visualize_alignment.py, with few colours, which they have, to be small."""
    with Image.open(path) as image:
        small = image.convert("RGB").quantize(96)
    data = io.BytesIO()
    small.save(data, "PNG", optimize=True)
    if data.tell() > MAX_PICTURE_BYTES:
        return missing(f"{path} has {data.tell():,} bytes, more than this page takes; look at it there.")
    address = data_uri("png", data.getvalue())
    alt = "Untrained above, trained below: tokens by PCA and t-SNE, their cosines, their norms; figures in the table"
    return (
        '<figure><div class="wide" role="region" aria-label="Alignment plots" tabindex="0">'
        f'<img src="{address}" alt="{alt}" width="{small.width}" height="{small.height}"></div>'
        "<figcaption>PCA, t-SNE, cosines and norms of world tokens, image tokens and text. On a narrow screen the "
        "picture scrolls.</figcaption></figure>"
    )


# ---- where it comes from


def source(results: Path, found: dict[str, Any] | None, run: Path, output: Path) -> str:
    """Checkpoints, fingerprints, versions, and the commands that make all of this again. `output`: the page."""
    figures = shlex.join(["python", "tools/eval.py", "--from", str(results)])
    page = shlex.join(
        ["python", "tools/report.py", str(run), "--results", str(results), "--output", str(output)]
    )
    again = f"<h3>The figures again, from the records alone</h3>{command(figures)}"
    again += f"<h3>This page again</h3>{command(page)}"
    if found is None:
        beside = results.with_suffix(".meta.json")
        lack = f"{beside} is not there, so which checkpoint and cache gave these records is unknown."
        return missing(lack, f"python tools/eval.py --model_name {run} --cache cache/") + again
    data = f"{found['dataset']} {found['split']}, {found['statements_in_split']:,} statements"
    scored = [
        ("scored on", found["date"]),
        ("statements", f"{data}, from {found['annotations'] or 'the hub'}"),
        ("records, SHA-256", found["records_sha256"]),
        ("versions", ", ".join(f"{k} {v}" for k, v in found["versions"].items())),
    ]
    parts = [
        "<h3>The records again</h3>",
        command(found["command"]),
        again,
        "<h3>What was scored</h3>",
        facts(scored),
    ]
    for name, one in found["checkpoints"].items():
        parts += [f"<h3>{escape(f'Checkpoint {name}'.strip())}</h3>", facts(_checkpoint(one))]
    return "\n".join([*parts, "<h3>Fingerprint of the cache</h3>", *_fingerprints(found)])


def _checkpoint(one: dict[str, Any]) -> list[tuple[str, str]]:
    return [
        ("folder", one["checkpoint"]),
        ("optimizer steps", "unknown" if one["step"] is None else f"{one['step']:,}"),
        ("seed", str(one["seed"])),
        ("trained on", one["trained_on"]),
        ("of Gemma", f"trained: {', '.join(one['parts'])}" if one["parts"] else "as it was published"),
        ("trained parameters", f"{one['trained_parameters']:,}"),
        ("Gemma", f"{one['model_name']}, {one['model_revision'] or 'a local folder'}"),
        ("computed", f"in {one['dtype']} on {one['device']}"),
        ("projection", json.dumps(one["projection"])),
        ("fingerprint of its latents, SHA-256", one["fingerprint_sha256"]),
    ]


def _fingerprints(found: dict[str, Any]) -> list[str]:
    """The cache's folder and hashes, and all fields of the fingerprints."""
    if found["cache"] is None:
        note = "No cache: the photographs were encoded on the spot, as the checkpoint's fingerprint says."
        head = paragraph(note)
        prints = {name or "latents": one["fingerprint"] for name, one in found["checkpoints"].items()}
    else:
        stores = {k: v for k, v in found["cache"].items() if k != "folder"}
        sums = [(f"{name}, SHA-256", one["sha256"]) for name, one in stores.items()]
        head = facts([("folder", found["cache"]["folder"]), *sums])
        prints = {name: one["fingerprint"] for name, one in stores.items()}
    parts = [head]
    for name, fields in prints.items():
        rows = [[key, json.dumps(value)] for key, value in sorted(fields.items())]
        parts.append(
            details(f"All fields of {name}", table(f"Fingerprint of {name}", ["field", "value"], rows))
        )
    return parts
