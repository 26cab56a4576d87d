"""One page about the arms of a study on other benchmarks."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from theworld.evaluation.comparison import NO_INTERVAL
from theworld.report.charts import Mark, Track, scale_of
from theworld.report.page import Chart, ChartRow, Table, rendered
from theworld.report.study import KINDS, OTHER_KIND
from theworld.report.text import between, p_value, percent, signed
from theworld.utils.files import publish_bytes


def write_transfer(results: dict[str, Any], folder: Path, caution: str = "") -> Path:
    """Write the page, transfer.html, of the content of transfer.json; return its path. `caution`: a warning beside the
    figures, such as of toy models."""
    text = rendered(
        "transfer.html",
        name=folder.resolve().name,
        reference=results["reference"],
        caution=caution,
        left_out=", ".join(results["left_out"]),
        chart_data=_chart(results["benchmarks"]),
        accuracies=_accuracies(results["benchmarks"]),
        differences=_differences(results["benchmarks"], results["reference"]),
    )
    path = folder / "transfer.html"
    publish_bytes(path, text.encode("utf-8"), overwrite=True)
    return path


def _chart(benchmarks: dict[str, Any]) -> Chart:
    """Return the accuracy of every arm on every benchmark, each with the benchmark's own level of chance."""
    ends = [x for b in benchmarks.values() for one in b["arms"].values() for x in (one["low"], one["high"])]
    scale = scale_of([*ends, *(b["chance"] for b in benchmarks.values())], high=1.0)
    rows = []
    for name, benchmark in benchmarks.items():
        for arm, one in benchmark["arms"].items():
            mark = Mark(KINDS.get(arm, OTHER_KIND), one["mean"], one["low"], one["high"])
            track = Track([mark], scale, benchmark["chance"], dots=tuple(one["each"].values()))
            rows.append(ChartRow(arm, track, percent(one["mean"]), _interval(benchmark, one), note=name))
    caption = "Accuracy with 95 % intervals over photographs and seeds. Dots: seeds. Dashed: chance on the benchmark."
    return Chart(scale.labels(lambda share: f"{100 * share:.3g}\u00a0%"), rows, caption)


def _accuracies(benchmarks: dict[str, Any]) -> Table:
    head = ["benchmark", "items", "photographs", "seen in training", "chance", *_arms(benchmarks)]
    rows = []
    for name, found in benchmarks.items():
        what = "choices" if found["choices"] == found["items"] else "statements"
        cells = [
            f"{found['items']:,} {what}",
            f"{found['images']:,}",
            percent(found["seen"]),
            percent(found["chance"]),
        ]
        shown = [found["arms"].get(arm) for arm in _arms(benchmarks)]
        rows.append(
            [
                name,
                *cells,
                *((one and f"{percent(one['mean'])} ({_interval(found, one)})") or "–" for one in shown),
            ]
        )
    return Table("Accuracy of each arm on each benchmark", head, rows)


def _differences(benchmarks: dict[str, Any], reference: str) -> Table:
    head = ["benchmark", f"{reference} less", "points", "95 %", "p", "p, adjusted for all rows (Holm)"]
    rows = [
        [
            name,
            arm,
            signed(one["mean"]),
            f"{signed(one['low'])} to {signed(one['high'])}" if found["images"] > 1 else NO_INTERVAL,
            p_value(one["p_value"]),
            p_value(one["adjusted_p_value"]),
        ]
        for name, found in benchmarks.items()
        for arm, one in found["differences"].items()
    ]
    return Table(f"Differences of {reference} to each arm", head, rows)


def _interval(benchmark: dict[str, Any], one: dict[str, Any]) -> str:
    return between(one["low"], one["high"]) if benchmark["images"] > 1 else NO_INTERVAL


def _arms(benchmarks: dict[str, Any]) -> Sequence[str]:
    return list(dict.fromkeys(arm for found in benchmarks.values() for arm in found["arms"]))
