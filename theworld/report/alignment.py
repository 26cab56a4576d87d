"""The section of alignment: what tools/visualize_alignment.py measured and drew."""

import io
import json
from pathlib import Path
from typing import Any

from PIL import Image

from theworld.report.charts import Mark, Track, number, scale_of
from theworld.report.examples import embedded
from theworld.report.page import Chart, ChartRow, Table
from theworld.utils.commands import command

MAX_PICTURE_BYTES = 4 << 20  # of the alignment plots
STATES = ("trained", "untrained")
COSINES = (("cosine", "world", "own image"), ("control_cosine", "baseline", "another image"))


def alignment_section(run: Path, folder: Path, cache: object) -> dict[str, Any]:
    """Return the figures and plots that tools/visualize_alignment.py wrote, with `lack` if there are none."""
    path, picture = folder / "alignment.json", folder / "alignment.png"
    drawing = command("visualize_alignment", "--model", run, "--cache", cache, "--output", picture)
    if not path.is_file():
        lack = f"{path} is not there: where the world tokens lie was not measured for this run."
        return {"lack": lack, "command": drawing}
    result = json.loads(path.read_text(encoding="utf-8"))
    return {
        "lack": "",
        "command": drawing,
        "result": result,
        "chart": _cosines(result),
        "table": _alignment_table(result),
        "picture": _picture(picture),
    }


def _cosines(result: dict[str, Any]) -> Chart:
    """Return the chart of the mean cosines."""
    every = [q for state in STATES for key, *_ in COSINES for q in result[state][key]["quantiles"].values()]
    scale = scale_of([0.0, *every])
    rows = []
    for state in STATES:
        for key, kind, words in COSINES:
            found = result[state][key]
            low, high = found["quantiles"]["0.05"], found["quantiles"]["0.95"]
            mark = Mark(kind, found["mean"], low, high, hollow=kind == "baseline")
            mean, ends = number(found["mean"], ".2f"), f"{number(low, '.2f')} to {number(high, '.2f')}"
            rows.append(ChartRow(f"{state}, {words}", Track([mark], scale, 0.0), mean, ends))
    axis = scale.labels(lambda cosine: number(cosine, ".3g"))
    return Chart(axis, rows, "Mean cosine; the line holds 90 % of the tokens.")


def _alignment_table(result: dict[str, Any]) -> Table:
    def row(name: str, found: dict[str, Any], form: str) -> list[str]:
        values = (found["mean"], found["quantiles"]["0.05"], found["quantiles"]["0.95"])
        return [name, *(number(value, form) for value in values), f"{found['n']:,}"]

    rows = []
    for state in STATES:
        rows += [row(f"cosine, {state}, {words}", result[state][key], ".3f") for key, _, words in COSINES]
        rows += [row(f"norm, {state}, {kind}", norm, ".2f") for kind, norm in result[state]["norm"].items()]
    return Table("Cosines and norms", ["quantity", "mean", "5 %", "95 %", "tokens"], rows)


def _picture(path: Path) -> dict[str, Any]:
    """Return the alignment plots, reduced to 96 colours: they have few, and become small."""
    if not path.is_file():
        return {"lack": f"{path} is not there."}
    with Image.open(path) as image:
        reduced = image.convert("RGB").quantize(96)
    data = io.BytesIO()
    reduced.save(data, "PNG", optimize=True)
    if data.tell() > MAX_PICTURE_BYTES:
        return {"lack": f"{path} has {data.tell():,} bytes, too many for this page; open the file itself."}
    return embedded("png", data.getvalue(), reduced)
