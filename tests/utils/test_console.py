"""What tools print: bars, dry runs, interruptions."""

import io
import logging
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from runs import Run

from theworld.config.config import Config
from theworld.utils import console
from theworld.utils.console import (
    NOTHING_WRITTEN,
    Bar,
    ExplainedError,
    LogBar,
    configure_logging,
    keep_bytecode,
    keep_compiled_code,
    progress,
    rehearse,
    run_tool,
)


def test_a_log_file_has_one_line_of_a_short_bar_and_none_of_a_vanishing_one() -> None:
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


def test_a_bar_with_nothing_left_is_not_shown(capsys: pytest.CaptureFixture[str]) -> None:
    for counts in ({"total": 4, "initial": 4}, {"total": 0}):
        with progress(desc="train", **counts) as bar:
            bar.set_postfix(loss="1.0")
    assert capsys.readouterr().err == ""
    with progress(desc="train", total=4, initial=3) as bar:
        bar.update()
    assert capsys.readouterr().err.startswith("train: 100%")


def test_a_dry_run_prints_its_lines_and_last_its_error_or_that_nothing_was_written(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def plan():  # type: ignore[no-untyped-def]
        yield "reads a"
        raise ValueError("b is missing")

    assert run_tool("eval", lambda: rehearse(plan)) == 1
    assert capsys.readouterr() == ("reads a\n", "eval: b is missing\n")
    assert rehearse(lambda: ["fine"]) == 0
    assert capsys.readouterr() == (f"fine\n{NOTHING_WRITTEN}\n", "")


def test_an_interruption_has_a_status_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted() -> int:
        raise KeyboardInterrupt

    assert run_tool("bench", interrupted) == 130
    assert capsys.readouterr().err == "\nbench: interrupted\n"
    assert run_tool("train", interrupted, interrupted="go on with the same command") == 130
    assert capsys.readouterr().err == "\ntrain: go on with the same command\n"
    assert run_tool("bench", lambda: 1) == 1


@pytest.mark.parametrize("kind", [ValueError, OSError, ExplainedError])
def test_an_error_of_a_user_costs_one_line(kind: type[Exception], capsys: pytest.CaptureFixture[str]) -> None:
    def failing() -> int:
        raise kind("a.jpg is missing")

    assert run_tool("eval", failing) == 1
    assert capsys.readouterr() == ("", "eval: a.jpg is missing\n")


def test_an_error_of_ours_keeps_its_traceback() -> None:
    def failing() -> int:
        raise RuntimeError("unforeseen")

    with pytest.raises(RuntimeError, match="unforeseen"):
        run_tool("eval", failing)


def test_tools_wait_without_spinning_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    def policy() -> int:
        seen.append(os.environ["OMP_WAIT_POLICY"])
        return 0

    seen: list[str] = []
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    run_tool("train", policy)
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    run_tool("train", policy)
    assert seen == ["passive", "active"]


@pytest.fixture
def package_logger() -> Iterator[logging.Logger]:
    """The logger of the package, which is as it was after the test."""
    logger = logging.getLogger("theworld")
    before = list(logger.handlers), logger.level, logger.propagate
    yield logger
    logger.handlers[:], logger.level, logger.propagate = before
    logger.setLevel(before[1])


def test_log_messages_are_printed_once_and_unchanged(
    package_logger: logging.Logger, capsys: pytest.CaptureFixture[str]
) -> None:
    configure_logging()
    configure_logging()
    logger = logging.getLogger("theworld.hub.publish")
    logger.debug("not shown")
    logger.info("a line")
    logger.warning("hub: %s", "another")
    assert capsys.readouterr() == ("a line\nhub: another\n", "")


def test_a_tool_draws_into_files_whatever_backend_it_inherits() -> None:
    program = (
        "from theworld.utils.console import run_tool\n"
        "def main():\n"
        "    from matplotlib import pyplot\n"
        "    print(pyplot.get_backend())\n"
        "    return 0\n"
        "raise SystemExit(run_tool('tool', main))"
    )
    variables = os.environ | {"MPLBACKEND": "module://matplotlib_inline.backend_inline"}
    done = subprocess.run([sys.executable, "-c", program], env=variables, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "agg\n"), done.stderr


TALKER = """
import logging, sys
from pathlib import Path
from theworld.utils.console import configure_logging, progress, run_tool
def main():
    configure_logging()
    for number in progress(range(3)):
        print('0.5 \\u00b1 0.1', flush=True)
        logging.getLogger('theworld').warning('near \\u00bd')
    Path(sys.argv[1]).write_text('done')
    return 0
raise SystemExit(run_tool('tool', main, prints=len(sys.argv) > 2))
"""


def talk(*words: object, end: str = "", **variables: str) -> tuple[int, bytes, bytes]:
    """Status, output and errors of a tool that says things outside of ASCII; `end`: redirections of a shell."""
    command = shlex.join([sys.executable, "-c", TALKER, *map(str, words)])
    done = subprocess.run(f"{command} {end}", shell=True, env=os.environ | variables, capture_output=True)
    return done.returncode, done.stdout, done.stderr


def test_a_character_that_the_terminal_lacks_is_replaced(tmp_path: Path) -> None:
    status, output, errors = talk(tmp_path / "a", PYTHONIOENCODING="ascii")
    assert (status, output) == (0, b"0.5 ? 0.1\nnear ?\n" * 3)
    assert errors.endswith(b"it/s]\n")
    assert b"Traceback" not in errors


@pytest.mark.parametrize(
    ("end", "words", "wanted"),
    [
        ("2> /dev/null | true", [], (0, b"", b"")),
        (">&- 2>&-", [], (0, b"", b"")),
        ("> /dev/full", [], (0, b"", b"tool: output could not be written: No space left on device\n")),
        ("> /dev/full", ["p"], (1, b"", b"tool: output could not be written: No space left on device\n")),
    ],
)
def test_output_that_cannot_be_written_ends_nothing(
    end: str, words: list[str], wanted: tuple[int, bytes, bytes], tmp_path: Path
) -> None:
    status, output, errors = talk(tmp_path / "a", *words, end=end)
    assert (status, output, errors[errors.rfind(b"\n", 0, -1) + 1 :]) == wanted
    assert (
        tmp_path / "a"
    ).read_bytes() == b"done"  # nothing else: the descriptor of a message was not its own


def test_a_pipe_that_is_full_is_waited_for(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    program = TALKER.replace("range(3)", "range(9000)")
    command = [sys.executable, "-c", program, str(tmp_path / "a")]
    with subprocess.Popen(command, stdout=writing, stderr=subprocess.PIPE) as child:
        os.close(writing)
        with open(reading, "rb") as file:
            assert file.read() == "0.5 ± 0.1\nnear ½\n".encode() * 9000
    assert child.returncode == 0


def ascii_and_closed() -> None:
    """Make the standard streams those of a terminal that shows ASCII, and of a reader that has gone."""
    reading, writing = os.pipe()
    os.close(reading)
    os.dup2(writing, 1)
    for number, name in ((1, "stdout"), (2, "stderr")):
        setattr(sys, name, io.TextIOWrapper(io.FileIO(number, "w", closefd=False), "ascii"))


def test_a_training_whose_reader_has_gone_saves_its_checkpoint(config: Config, session_cache: Path) -> None:
    run = Run(config, session_cache, prepare=ascii_and_closed)
    assert run.wait() == {0}
    assert (run.folder / "checkpoint-4" / "projection.safetensors").is_file()
    assert "Traceback" not in run.log.read_text()


def test_compiled_code_is_kept_in_the_users_cache_unless_the_environment_says_where(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def kept(**environment: str) -> str | None:
        with monkeypatch.context() as patch:
            for name in ("TORCHINDUCTOR_CACHE_DIR", "XDG_CACHE_HOME"):
                patch.delenv(name, raising=False)
            patch.setenv("HOME", "/dev/null/nowhere")
            for name, value in environment.items():
                patch.setenv(name, value)
            keep_compiled_code()
            return os.environ.pop("TORCHINDUCTOR_CACHE_DIR", None)

    assert kept(HOME=str(tmp_path)) == f"{tmp_path}/.cache/theworld/compiled"
    assert kept(HOME=str(tmp_path), XDG_CACHE_HOME=f"{tmp_path}/x") == f"{tmp_path}/x/theworld/compiled"
    assert kept(HOME=str(tmp_path), TORCHINDUCTOR_CACHE_DIR="/elsewhere") == "/elsewhere"
    assert kept() is None  # no home folder to write to: torch's own place
    assert list(tmp_path.iterdir()) == []  # nothing is written for it


def test_bytecode_is_kept_in_the_users_cache_where_python_keeps_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = sys.modules[console.tqdm.__module__].__spec__
    assert spec is not None
    beside = tmp_path / "std.pyc"

    def kept(
        prefix: str | None = None, home: str = f"{tmp_path}/home"
    ) -> tuple[str | None, bool, str | None]:
        with monkeypatch.context() as patch:
            patch.delenv("XDG_CACHE_HOME", raising=False)
            patch.setenv("HOME", home)
            patch.setenv("PYTHONPYCACHEPREFIX", "as before")
            patch.setattr(spec, "cached", str(beside))
            patch.setattr(sys, "pycache_prefix", prefix)
            patch.setattr(sys, "dont_write_bytecode", True)
            keep_bytecode()
            return sys.pycache_prefix, sys.dont_write_bytecode, os.environ["PYTHONPYCACHEPREFIX"]

    folder = f"{tmp_path}/home/.cache/theworld/bytecode"
    assert kept() == (folder, False, folder)
    assert kept(prefix="/elsewhere") == ("/elsewhere", True, "as before")
    assert kept(home="/dev/null/nowhere") == (None, True, "as before")
    beside.touch()  # Python keeps it beside the library
    assert kept() == (None, True, "as before")
