"""Ctrl-C in the first seconds of a tool, and while processes start."""

import ast
import gc
import os
import signal
import subprocess
import sys
import threading
from multiprocessing import forkserver
from pathlib import Path

import pytest
from constants import ROOT
from forks import in_child

from theworld.extraction.reading import in_processes
from theworld.utils import starting as module
from theworld.utils.starting import starting, starting_workers

TOOLS = [*sorted((ROOT / "tools").glob("*.py")), ROOT / "theworld" / "demo.py"]


@pytest.mark.parametrize("tool", ["report", "train", "demo", "theworld.demo"])
def test_a_tool_that_is_interrupted_while_it_imports_says_one_line(tool: str, tmp_path: Path) -> None:
    # Every tool imports tqdm early. As Ctrl-C in the middle of it, which a library takes for another error:
    (tmp_path / "tqdm.py").write_text(
        "import os, signal\n"
        "try:\n    os.kill(os.getpid(), signal.SIGINT)\n    signal.pause()\n"
        "except KeyboardInterrupt as error:\n    raise ImportError('no tqdm') from error\n"
    )
    program = ["-m", tool] if "." in tool else [f"tools/{tool}.py"]
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
    done = subprocess.run(
        [sys.executable, *program], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "", f"\n{tool.split('.')[-1]}: interrupted\n")


def test_whatever_a_tool_imports_of_the_package_at_its_start_can_be_interrupted() -> None:
    for path in TOOLS:
        tree = ast.parse(path.read_text())
        outside = [node.module for node in tree.body if isinstance(node, ast.ImportFrom)]
        assert [name for name in outside if str(name).startswith("theworld")] == [
            "theworld.utils.starting"
        ], path
    text = Path(str(module.__file__)).read_text()
    own = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ImportFrom)]
    assert not [node.module for node in own if str(node.module).startswith("theworld")]


def test_an_interruption_while_starting_ends_the_process_and_afterwards_is_as_before(
    capfd: pytest.CaptureFixture[str],
) -> None:
    def interrupted() -> None:
        with starting("eval"):
            os.kill(os.getpid(), signal.SIGINT)

    assert os.waitstatus_to_exitcode(os.waitpid(in_child(interrupted), 0)[1]) == 130
    assert capfd.readouterr().err == "\neval: interrupted\n"
    before = signal.getsignal(signal.SIGINT)
    with starting():
        assert signal.getsignal(signal.SIGINT) != before
        assert not gc.isenabled()
    assert signal.getsignal(signal.SIGINT) == before
    assert gc.isenabled()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with starting():  # in the background of a script
            assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_processes_that_start_hear_no_interruption_and_this_one_hears_it_afterwards() -> None:
    reached = []

    def interrupted() -> None:
        with starting_workers():
            assert signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, ())
            signal.pthread_kill(threading.get_ident(), signal.SIGINT)
            reached.append("the end of the block")

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert reached == ["the end of the block"]
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, ())


def test_reading_processes_hear_none_from_their_first_moment_on(monkeypatch: pytest.MonkeyPatch) -> None:
    blocked: list[bool] = []

    def ensure_running() -> None:
        blocked.append(signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, ()))

    monkeypatch.setattr(forkserver, "ensure_running", ensure_running)
    with in_processes(abs, [], 1) as results:
        assert list(results) == []
    assert blocked == [True]
