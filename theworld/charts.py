"""Charts as SVG for a page without scripts: plain functions from numbers to text.

Colours are CSS classes, so a chart follows the page's theme. A track is as wide as its place, with positions in
percent, so that it fits a phone without shrinking its marks; a plot has a size of its own, near that of a phone.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

PLOT = (360, 236)  # width and height of a plot, in its own units: about the pixels of a phone
_LEFT, _RIGHT, _TOP, _BOTTOM = 40, 10, 26, 36  # margins around the axes


@dataclass(frozen=True)
class Scale:
    """The ends of an axis and where it has ticks."""

    low: float
    high: float
    ticks: tuple[float, ...]

    def place(self, value: float) -> float:
        """0 at the low end, 1 at the high one; what lies beyond stays at the end."""
        return min(1.0, max(0.0, (value - self.low) / (self.high - self.low)))


def scale_of(values: Sequence[float], low: float | None = None, high: float | None = None) -> Scale:
    """A scale with round ticks around the values, or with the ends given."""
    least = min(values) if low is None else low
    most = max(values) if high is None else high
    if most <= least:
        least, most = least - 0.5, most + 0.5
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


@dataclass(frozen=True)
class Mark:
    """A value with its interval; `kind` is a CSS class, which gives the colour. Hollow marks are quoted or beside the
    point."""

    kind: str
    value: float
    low: float | None = None
    high: float | None = None
    hollow: bool = False


def track(marks: Sequence[Mark], scale: Scale, reference: float | None = None) -> str:
    """A row of a chart: marks with their intervals on a line, one below another where there are several. It may be
    drawn higher than it asks for: the marks stay in the middle."""
    height = 12 + 11 * max(1, len(marks))
    parts = [
        f'<svg class="track" width="100%" style="height:{height}px" aria-hidden="true" focusable="false">'
    ]
    for tick in scale.ticks:
        parts.append(_vertical(scale.place(tick), "grid"))
    if reference is not None:
        parts.append(_vertical(scale.place(reference), "reference"))
    parts.append('<svg y="50%" width="100%" height="1" overflow="visible">')
    for number, mark in enumerate(marks):
        y = 11 * number - 5.5 * (len(marks) - 1)
        if mark.low is not None and mark.high is not None:
            low, high = scale.place(mark.low), scale.place(mark.high)
            parts.append(
                f'<line class="interval {mark.kind}" x1="{low:.2%}" x2="{high:.2%}" y1="{y}" y2="{y}"/>'
            )
        shape = "dot hollow" if mark.hollow else "dot"
        parts.append(
            f'<circle class="{shape} {mark.kind}" cx="{scale.place(mark.value):.2%}" cy="{y}" r="4.5"/>'
        )
    return "".join([*parts, "</svg></svg>"])


def track_axis(scale: Scale, shown: Sequence[str]) -> str:
    """The words of the ticks, to stand above or below tracks."""
    parts = ['<svg class="track axis" width="100%" height="18" aria-hidden="true" focusable="false">']
    for tick, text in zip(scale.ticks, shown, strict=True):
        place = scale.place(tick)
        anchor = "start" if place < 0.02 else "end" if place > 0.98 else "middle"
        parts.append(f'<text x="{place:.2%}" y="13" text-anchor="{anchor}">{escape(text)}</text>')
    return "".join([*parts, "</svg>"])


def _vertical(place: float, kind: str) -> str:
    return f'<line class="{kind}" x1="{place:.2%}" x2="{place:.2%}" y1="0" y2="100%"/>'


@dataclass(frozen=True)
class Series:
    """Points of a plot, joined by a line unless `joined` is False; `label` stands at the last one."""

    kind: str
    label: str
    points: Sequence[tuple[float, float]]
    joined: bool = True
    bars: Sequence[tuple[float, float]] | None = None  # the intervals of the points


@dataclass(frozen=True)
class _Axes:
    """Two axes, (scale, label) each, in a plot's own units."""

    x: tuple[Scale, str]
    y: tuple[Scale, str]

    left, right, top, bottom = _LEFT, PLOT[0] - _RIGHT, _TOP, PLOT[1] - _BOTTOM

    def across(self, x: float) -> float:
        return self.left + self.x[0].place(x) * (self.right - self.left)

    def down(self, y: float) -> float:
        return self.bottom - self.y[0].place(y) * (self.bottom - self.top)

    def level(self, y: float, kind: str) -> str:
        """A line over the whole width."""
        at = f"{self.down(y):.1f}"
        return f'<line class="{kind}" x1="{self.left}" x2="{self.right}" y1="{at}" y2="{at}"/>'

    def drawn(self) -> list[str]:
        """Grid, ticks and labels."""
        parts = [f'<text x="0" y="12">{escape(self.y[1])}</text>']
        for tick in self.y[0].ticks:
            place = f'x="{self.left - 6}" y="{self.down(tick) + 4:.1f}" text-anchor="end"'
            parts += [self.level(tick, "grid"), f"<text {place}>{_number(tick)}</text>"]
        for tick in self.x[0].ticks:
            at = self.across(tick)
            anchor = "end" if at > self.right - 12 else "middle"
            place = f'x="{at:.1f}" y="{self.bottom + 16}" text-anchor="{anchor}"'
            parts.append(f"<text {place}>{_number(tick)}</text>")
        ends = f'x1="{self.left}" x2="{self.right}" y1="{self.bottom}" y2="{self.bottom}"'
        middle = (self.left + self.right) / 2
        label = f'<text x="{middle}" y="{PLOT[1] - 4}" text-anchor="middle">{escape(self.x[1])}</text>'
        return [*parts, f'<line class="base" {ends}/>', label]

    def diagonal(self) -> str:
        """The line of equal values."""
        x, y = self.x[0], self.y[0]
        start = f'x1="{self.across(x.low):.1f}" y1="{self.down(y.low):.1f}"'
        end = f'x2="{self.across(x.high):.1f}" y2="{self.down(y.high):.1f}"'
        return f'<line class="reference" {start} {end}/>'

    def series(self, one: Series) -> list[str]:
        """Its line, its intervals and, where they are few, its points."""
        parts = []
        places = [(self.across(x), self.down(y)) for x, y in one.points]
        if one.joined and len(places) > 1:
            path = " ".join(f"{a:.1f},{b:.1f}" for a, b in places)
            parts.append(f'<polyline class="line {one.kind}" points="{path}"/>')
        for (at, _), (low, high) in zip(places, one.bars or [], strict=False):
            ends = f'x1="{at:.1f}" x2="{at:.1f}" y1="{self.down(low):.1f}" y2="{self.down(high):.1f}"'
            parts.append(f'<line class="interval {one.kind}" {ends}/>')
        if not one.joined or len(places) <= 12:
            parts += [
                f'<circle class="dot {one.kind}" cx="{a:.1f}" cy="{b:.1f}" r="3.5"/>' for a, b in places
            ]
        return parts


def plot(
    identity: str,
    title: str,
    series: Sequence[Series],
    x: tuple[Scale, str],
    y: tuple[Scale, str],
    line: tuple[float, str] | None = None,
    diagonal: bool = False,
) -> str:
    """Series over two axes, (scale, label) each. `identity` is the id of its title in the page; `line` a level with its
    label, `diagonal` the line of equal values."""
    axes, (width, height) = _Axes(x, y), PLOT
    parts = [
        f'<svg class="plot" viewBox="0 0 {width} {height}" role="img" aria-labelledby="{identity}">',
        f'<title id="{identity}">{escape(title)}</title>',
        *axes.drawn(),
    ]
    if diagonal:
        parts.append(axes.diagonal())
    if line is not None:
        level, label = line
        place = f'x="{axes.right}" y="{axes.down(level) - 4:.1f}" text-anchor="end"'
        parts += [axes.level(level, "reference"), f"<text {place}>{escape(label)}</text>"]
    for one in series:
        parts += axes.series(one)
    return "".join([*parts, "</svg>"])


def _number(value: float) -> str:
    return f"{value:,.10g}"


def thinned(points: Sequence[tuple[float, float]], most: int = 200) -> list[tuple[float, float]]:
    """At most so many points: each the mean of some that follow one another."""
    size = -(-len(points) // most) if points else 1
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    return [(sum(x for x, _ in g) / len(g), sum(y for _, y in g) / len(g)) for g in groups]
