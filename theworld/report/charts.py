"""Geometry of the page's charts: from numbers to positions, which templates/charts.html draws as SVG.

Colours are CSS classes, so a chart follows the page's theme. A track is as wide as the space it is given, with
positions in percent, so that it fits a phone without shrinking its marks; a plot has a size of its own, close to the
width of a phone.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

MINUS = "\N{MINUS SIGN}"
MANY_POINTS = 12  # a line of more points is drawn without a dot at each of them


@dataclass(frozen=True)
class Tick:
    """A label of an axis: its position as an SVG coordinate, its anchor there and its text."""

    position: str
    anchor: str
    text: str


@dataclass(frozen=True)
class Scale:
    """The ends of an axis and the values that have ticks."""

    low: float
    high: float
    ticks: tuple[float, ...]

    def place(self, value: float) -> float:
        """Return the position of a value: 0 at the low end, 1 at the high end, and never beyond them."""
        return min(1.0, max(0.0, (value - self.low) / (self.high - self.low)))

    def percent(self, value: float) -> str:
        """Return the position of a value in percent, as "37.50%"."""
        return f"{self.place(value):.2%}"

    def labels(self, text: Callable[[float], str]) -> list[Tick]:
        """Return the labels of the ticks; those at the ends are anchored so that they stay within the axis."""
        found = []
        for tick in self.ticks:
            place = self.place(tick)
            anchor = "start" if place < 0.02 else "end" if place > 0.98 else "middle"
            found.append(Tick(self.percent(tick), anchor, text(tick)))
        return found


def scale_of(values: Sequence[float], low: float | None = None, high: float | None = None) -> Scale:
    """Return a scale with round ticks that holds the values; from 0 to a value that is the only one, so that it has no
    share beyond 0 and 1. `low` and `high` fix an end of it."""
    least = min(values) if low is None else low
    most = max(values) if high is None else high
    if most <= least:
        least, most = min(least, 0.0), max(most, 0.0) or (0.0 if least < 0 else 1.0)
    rough = (most - least) / 4
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough * 0.999)
    first, last = math.ceil(least / step - 1e-9), math.floor(most / step + 1e-9)
    if low is None:
        first = math.floor(least / step + 1e-9)
    if high is None:
        last = math.ceil(most / step - 1e-9)
    ticks = tuple(round(i * step, 12) for i in range(first, last + 1))
    return Scale(ticks[0] if low is None else least, ticks[-1] if high is None else most, ticks)


def number(value: float, form: str = ",.10g") -> str:
    """Format a number, with U+2212 as its minus sign."""
    return format(value, form).replace("-", MINUS)


# ---- tracks: marks with intervals on one horizontal line


@dataclass(frozen=True)
class Mark:
    """A value with its interval. `kind` is a CSS class, which gives the colour. Hollow marks are secondary: quoted
    results and controls."""

    kind: str
    value: float
    low: float | None = None
    high: float | None = None
    hollow: bool = False


@dataclass(frozen=True)
class Track:
    """A row of a chart: marks one below the other, and a dashed line at `reference`.

    `dots` are the single values, such as those of seeds, that the first mark is the mean of. They lie above it.
    """

    marks: Sequence[Mark]
    scale: Scale
    reference: float | None = None
    dots: Sequence[float] = ()

    @property
    def height(self) -> int:
        """The least height in pixels. A higher row keeps the marks in its middle."""
        return 12 + 11 * max(1, len(self.marks) + bool(self.dots))

    def offset(self, index: int) -> float:
        """Return the distance in pixels of a mark below the middle of the track; of the dots, for -1."""
        return 11 * index - 5.5 * (len(self.marks) - 1 - bool(self.dots))


# ---- plots: series over two axes


@dataclass(frozen=True)
class Axis:
    """A scale, the name of the quantity on it, and how its ticks are written."""

    scale: Scale
    label: str
    text: Callable[[float], str] = number


@dataclass(frozen=True)
class Series:
    """Points (x, y) of a plot, joined by a line unless `joined` is False. `bars` are the intervals of the points.
    Hollow points are single values, such as those of seeds."""

    kind: str
    label: str
    points: Sequence[tuple[float, float]]
    joined: bool = True
    bars: Sequence[tuple[float, float]] = ()
    hollow: bool = False

    @property
    def dotted(self) -> bool:
        """Whether each point is drawn: not where a line has too many of them."""
        return not self.joined or len(self.points) <= MANY_POINTS


@dataclass(frozen=True)
class Plot:
    """Series over two axes. `id` is the id of its title in the page, `level` a dashed line (value, label), `diagonal`
    the dashed line of equal values."""

    id: str
    title: str
    series: Sequence[Series]
    x: Axis
    y: Axis
    level: tuple[float, str] | None = None
    diagonal: bool = False

    # Size, and the box of the axes within it, in the plot's own units: about the pixels of a phone.
    width, height = 360, 236
    left, right, top, bottom = 40, 350, 26, 200

    def across(self, x: float) -> str:
        """Return the horizontal SVG coordinate of a value."""
        return f"{self.left + self.x.scale.place(x) * (self.right - self.left):.1f}"

    def down(self, y: float, shift: float = 0.0) -> str:
        """Return the vertical SVG coordinate of a value, `shift` units further down."""
        return f"{self.bottom - self.y.scale.place(y) * (self.bottom - self.top) + shift:.1f}"

    def points(self, series: Series) -> str:
        """Return the points of a series as a polyline has them."""
        return " ".join(f"{self.across(x)},{self.down(y)}" for x, y in series.points)

    def x_labels(self) -> list[Tick]:
        """Return the labels below the horizontal axis; one close to the right edge ends there."""
        places = [(self.across(tick), self.x.text(tick)) for tick in self.x.scale.ticks]
        return [Tick(x, "end" if float(x) > self.right - 12 else "middle", text) for x, text in places]

    def y_labels(self) -> list[Tick]:
        """Return the labels beside the vertical axis."""
        return [Tick(self.down(tick, 4), "end", self.y.text(tick)) for tick in self.y.scale.ticks]


def thinned(points: Sequence[tuple[float, float]], most: int = 200) -> list[tuple[float, float]]:
    """Reduce points to at most `most` of them, each the mean of neighbours."""
    size = -(-len(points) // most) if points else 1
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    return [(sum(x for x, _ in g) / len(g), sum(y for _, y in g) / len(g)) for g in groups]
