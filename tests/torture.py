"""`make torture`: every promise about faults, at full counts, and one table of what came out at the end.

A row is a test like any other, marked with the part of the table and what the row says:

    @pytest.mark.torture("cache", "SIGKILL at random moments")
    def test_...(tally):
        for _ in range(tally.number(100, sample=5)):  # 100 times in `make torture`, 5 times in `make test`
            ...
        tally(kills=..., lost=0)                      # what the table shows; numbers of several cases add up

Tests of one row may be many, and in several files; the row holds if all of them pass.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest

PARTS = {"cache": "Extraction and cache", "photographs": "Photographs", "security": "Security"}
PARTS |= {"training": "Training", "evaluation": "Evaluation"}
ROWS: dict[tuple[str, str], "Row"] = {}
STARTED = time.monotonic()


@dataclass
class Row:
    """What came out of all tests of one row."""

    cases: int = 0
    failed: int = 0
    skipped: int = 0
    seconds: float = 0.0
    figures: dict[str, int | str] = field(default_factory=dict)

    def __str__(self) -> str:
        shown = ", ".join(
            f"{key.replace('_', ' ')} {self.show(value)}" for key, value in self.figures.items()
        )
        skipped = f" ({self.skipped} not possible here)" if self.skipped else ""
        return (shown or f"{self.cases} cases") + skipped

    @staticmethod
    def show(value: int | str) -> str:
        return f"{value:,}" if isinstance(value, int) else value


class Tally:
    """How often a test tries, and what it counted."""

    def __init__(self, row: Row, full: bool) -> None:
        self.row = row
        self.full = full

    def number(self, full: int, sample: int) -> int:
        """`full` in `make torture`, else `sample`."""
        return full if self.full else sample

    def __call__(self, **figures: int | str) -> None:
        """Adds figures to the row: numbers add up, words have to agree."""
        for key, value in figures.items():
            if isinstance(value, int):
                value += int(self.row.figures.get(key, 0))
            assert isinstance(value, int) or self.row.figures.get(key, value) == value
            self.row.figures[key] = value


def _row(item: pytest.Item) -> Row | None:
    marker = item.get_closest_marker("torture")
    if marker is None:
        return None
    part, says = marker.args
    assert part in PARTS, f"{item.nodeid}: part {part!r} is none of {list(PARTS)}"
    return ROWS.setdefault((part, says), Row())


@pytest.fixture
def tally(request: pytest.FixtureRequest) -> Tally:
    """Of the row that the test is marked with."""
    row = _row(request.node)
    assert row is not None, f"{request.node.nodeid} has no torture mark"
    return Tally(row, request.config.getoption("torture"))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--torture", action="store_true", help="only the torture rows, at full counts; a table at the end"
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("torture"):
        rows = [item for item in items if _row(item) is not None]
        config.hook.pytest_deselected(items=[item for item in items if item not in rows])
        items[:] = rows


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    report = yield
    row = _row(item)
    if row is not None:
        row.seconds += report.duration
        row.failed += report.failed
        row.skipped += report.skipped
        row.cases += report.when == "call" and report.passed
    return report  # type: ignore[return-value]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if not config.getoption("torture"):
        return
    write = terminalreporter.write_line
    width = max((len(says) for _, says in ROWS), default=0)
    write("")
    for part, title in PARTS.items():
        own = {says: row for (of, says), row in ROWS.items() if of == part}
        if own:
            write(f"== {title}")
        for says, row in own.items():
            state = "FAILED" if row.failed else "holds " if row.cases else "not run"
            write(f"{state}  {says:<{width}}  {row.seconds:6.0f} s  {row}")
    held = sum(row.cases > 0 and not row.failed for row in ROWS.values())
    write(f"{held} of {len(ROWS)} rows hold, {(time.monotonic() - STARTED) / 60:.1f} min")
