"""Drawings, mark by mark."""

import re
from xml.etree import ElementTree

import pytest

from theworld.report.charts import Axis, Mark, Plot, Scale, Series, Track, number, scale_of, thinned
from theworld.report.page import environment


@pytest.mark.parametrize(
    ("values", "low", "high", "ticks"),
    [
        ([0.45, 0.97], None, 1.0, (0.4, 0.6, 0.8, 1.0)),
        ([0.71, 0.97], None, 1.0, (0.7, 0.8, 0.9, 1.0)),
        ([0, 600], None, None, (0, 200, 400, 600)),
        ([0.02, 0.693], 0.0, None, (0.0, 0.2, 0.4, 0.6, 0.8)),
        ([-3.0, 7.0], None, None, (-5.0, -2.5, 0.0, 2.5, 5.0, 7.5)),
        ([2.0, 2.0], None, None, (0.0, 0.5, 1.0, 1.5, 2.0)),
        # Arms that are always right, always wrong, or equal: no share above 100 % and none below 0.
        ([1.0, 1.0], None, None, (0.0, 0.25, 0.5, 0.75, 1.0)),
        ([1.0], None, 1.0, (0.0, 0.25, 0.5, 0.75, 1.0)),
        ([0.0], None, None, (0.0, 0.25, 0.5, 0.75, 1.0)),
        ([-100.0], None, None, (-100.0, -75.0, -50.0, -25.0, 0.0)),
    ],
)
def test_a_scale_holds_its_values_between_round_ticks(
    values: list[float], low: float | None, high: float | None, ticks: tuple[float, ...]
) -> None:
    scale = scale_of(values, low, high)
    assert scale.ticks == pytest.approx(ticks)
    assert scale.low <= min(values) <= max(values) <= scale.high


def test_a_place_is_between_the_ends() -> None:
    scale = Scale(0.5, 1.0, (0.5, 1.0))
    assert [scale.place(x) for x in (0.4, 0.5, 0.75, 1.0, 2.0)] == [0, 0, 0.5, 1, 1]


def drawing(macro: str, chart: object) -> str:
    """A chart as templates/charts.html draws it."""
    return str(getattr(environment().get_template("charts.html").module, macro)(chart))


def test_a_track_has_its_marks_at_their_values() -> None:
    scale = Scale(0.5, 1.0, (0.5, 0.75, 1.0))
    track = Track([Mark("world", 0.75, 0.6, 0.9), Mark("quoted", 1.0, hollow=True)], scale, reference=0.55)
    root = ElementTree.fromstring(drawing("track", track))
    circles = [(c.get("class"), c.get("cx"), c.get("cy")) for c in root.iter("circle")]
    assert circles == [("dot world", "50.00%", "-5.5"), ("dot hollow quoted", "100.00%", "5.5")]
    lines = {line.get("class"): (line.get("x1"), line.get("x2")) for line in root.iter("line")}
    assert lines["interval world"] == ("20.00%", "80.00%")
    assert lines["reference"] == ("10.00%", "10.00%")
    assert "interval quoted" not in lines
    assert root.get("aria-hidden") == "true"
    assert root.get("style") == "height:34px"


def test_the_words_at_the_ends_stay_within() -> None:
    words = {0: "none", 0.5: "<half>", 1: "all"}
    labels = Scale(0, 1, (0, 0.5, 1)).labels(lambda tick: words[tick])
    root = ElementTree.fromstring(drawing("track_axis", labels))
    assert [(t.text, t.get("x"), t.get("text-anchor")) for t in root.iter("text")] == [
        ("none", "0.00%", "start"),
        ("<half>", "50.00%", "middle"),
        ("all", "100.00%", "end"),
    ]


def test_a_plot_has_a_name_and_its_points_over_its_axes() -> None:
    unit = Scale(0.0, 1.0, (0.0, 0.5, 1.0))
    series = Series("world", "", [(0.0, 0.0), (1.0, 1.0)], bars=[(0.0, 0.5), (0.5, 1.0)])
    x, y = Axis(unit, "P(true)"), Axis(unit, "share")
    plot = Plot("p1", "shares < one", [series], x, y, (0.5, "chance"), diagonal=True)
    root = ElementTree.fromstring(drawing("plot", plot))
    assert root.get("role") == "img"
    assert root.get("aria-labelledby") == "p1"
    assert [(t.get("id"), t.text) for t in root.iter("title")] == [("p1", "shares < one")]
    (line,) = root.iter("polyline")
    assert line.get("points") == "40.0,200.0 350.0,26.0"  # the corners of the axes
    bars = [(x.get("y1"), x.get("y2")) for x in root.iter("line") if x.get("class") == "interval world"]
    assert bars == [("200.0", "113.0"), ("113.0", "26.0")]
    dashed = [(x.get("y1"), x.get("y2")) for x in root.iter("line") if x.get("class") == "reference"]
    assert dashed == [("200.0", "26.0"), ("113.0", "113.0")]  # the diagonal and the level
    assert {"P(true)", "share", "chance"} <= {t.text for t in root.iter("text")}
    assert len(list(root.iter("circle"))) == 2


def test_many_points_become_few_means() -> None:
    points = [(float(i), float(i % 2)) for i in range(1000)]
    found = thinned(points, 100)
    assert len(found) == 100
    assert found[0] == (4.5, 0.5)
    assert thinned(points[:3], 100) == points[:3]
    assert thinned([], 100) == []


def test_numbers_on_axes_are_plain() -> None:
    x = Axis(Scale(0.0, 2000.0, (0.0, 1000.0, 2000.0)), "step")
    y = Axis(scale_of([0, 0.25]), "loss")
    text = drawing("plot", Plot("p", "t", [Series("dev", "", [(0, 0), (2000, 0.25)])], x, y))
    assert re.findall(r">([\d.,]+)</text>", text) == ["0", "0.1", "0.2", "0.3", "0", "1,000", "2,000"]


def test_negative_numbers_have_a_minus_sign() -> None:
    assert [number(-2.5), number(-0.03, ".2f"), number(4.0, "+.1f")] == ["−2.5", "−0.03", "+4.0"]
    x = Axis(Scale(-1.0, 1.0, (-1.0, 0.0, 1.0)), "x")
    assert ">−1</text>" in drawing("plot", Plot("p", "t", [], x, x))
