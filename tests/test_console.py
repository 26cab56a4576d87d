"""What tools print: bars, dry runs, interruptions."""

import io

import pytest

from theworld import console
from theworld.console import NOTHING_WRITTEN, Bar, LogBar, progress, rehearse, status_of


def test_a_log_file_gets_one_line_of_a_short_bar_and_none_of_one_that_vanishes() -> None:
    file = io.StringIO()
    with LogBar(range(3), file=file, desc="train") as bar:
        for number in bar:
            bar.set_postfix(loss=number)
    assert "\r" not in file.getvalue()
    assert file.getvalue().count("\n") == 1
    assert file.getvalue().startswith("train: 100%|")
    assert file.getvalue().endswith("loss=2]\n")
    file = io.StringIO()
    list(LogBar(range(3), file=file, leave=False))
    list(LogBar(range(3), file=file, disable=True))
    assert file.getvalue() == ""


def test_a_log_file_gets_a_line_now_and_then_of_a_long_one(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    file = io.StringIO()
    with LogBar(total=100, file=file) as bar:
        for _ in range(100):  # 2 s each, with a figure at every step
            now[0] += 2
            bar.update()
            bar.set_postfix(loss=1)
    assert [line.split("%")[0].strip() for line in file.getvalue().splitlines()] == [
        "15", "30", "45", "60", "75", "90", "100"
    ]  # fmt: skip


def test_figures_stay_until_they_are_replaced() -> None:
    bar = Bar(total=1, file=io.StringIO())
    bar.set_postfix(loss="1.0", accuracy="50%")
    bar.set_postfix({"dev": "60%"}, accuracy="55%")
    assert bar.postfix == "loss=1.0, accuracy=55%, dev=60%"
    bar.close()


def test_without_a_terminal_bars_are_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    bar = progress(total=1, disable=True)
    assert isinstance(bar, LogBar)


def test_a_dry_run_says_what_it_has_found_before_the_fault(capsys: pytest.CaptureFixture[str]) -> None:
    def plan():  # type: ignore[no-untyped-def]
        yield "reads a"
        raise ValueError("b is missing")

    assert rehearse("eval", plan) == 1
    assert capsys.readouterr() == (f"reads a\n{NOTHING_WRITTEN}\n", "eval: b is missing\n")
    assert rehearse("eval", lambda: ["fine"]) == 0


def test_an_interruption_has_a_status_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted() -> int:
        raise KeyboardInterrupt

    assert status_of("bench", interrupted) == 130
    assert capsys.readouterr().err == "\nbench: interrupted\n"
    assert status_of("bench", lambda: 1) == 1
