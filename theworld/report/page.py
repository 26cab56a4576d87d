"""What every page is made of: tables, charts and templates, in which all text is escaped."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from theworld.report.charts import Tick, Track
from theworld.report.text import signed, small, typeset

TEMPLATES = Path(__file__).parent / "templates"


@dataclass(frozen=True)
class Table:
    """A table of plain text. The first cell of a row is its heading."""

    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class ChartRow:
    """A row of a chart: its name with a note, its track, and a value with an addition in small type."""

    name: str
    track: Track
    value: str
    small: str = ""
    note: str = ""
    kind: str = ""  # CSS classes


@dataclass(frozen=True)
class Key:
    """The meaning of a mark of a chart."""

    kind: str
    hollow: bool
    meaning: str


@dataclass(frozen=True)
class Chart:
    """Rows of tracks over a common axis."""

    axis: Sequence[Tick]
    rows: Sequence[ChartRow]
    caption: str
    key: Sequence[Key] = ()


def environment() -> Environment:
    """Return the environment of the templates, in which every value is escaped and an unknown name is an error."""
    found = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found.filters |= {"typeset": typeset, "signed": signed, "small": small}
    return found


def rendered(template: str, **data: Any) -> str:
    """Return a page as text, with the style sheets in it."""
    styles = (files("theworld.utils") / "theme.css", TEMPLATES / "report.css")
    text = "".join(style.read_text(encoding="utf-8") for style in styles)
    return environment().get_template(template).render(styles=Markup(text), **data) + "\n"
