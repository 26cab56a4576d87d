"""Processes that share items: what signals do, sent to the main one or to all, and that none is left behind."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

# `a` and `b` take steps until they are told to stop, `deaf` for ever; all are asked to while `signal` is given.
SCRIPT = """
import os, signal, sys, time
from theworld.console import status_of
from theworld.stopping import StopRequest
from theworld.workers import SPAWN, in_processes

class AsItIsGiven:
    def __reduce__(self):
        os.killpg(0, signal.SIGTERM)
        return str, ("signal",)

def task(item, stop):
    if item == "fails":
        raise OSError(28, "no room", "there")
    if item == "dies":
        os._exit(3)
    if item.isdecimal():
        return int(item) ** 2
    os.write(1, f"{item} begins {os.getpid()}\\n".encode())
    while item == "deaf" or not stop.asked:
        time.sleep(0.001)
    SPAWN.Lock()  # needs Python's resource tracker, and complains if that is gone
    return f"{item} stopped"

def main():
    items = [AsItIsGiven() if item == "signal" else item for item in sys.argv[1:]]
    with StopRequest("sweep") as stop, stop.working():
        for outcome in in_processes(task, items, 2, stop):
            print(outcome, flush=True)
        print("asked by", stop.reason)
    return 0

if __name__ == "__main__":
    sys.exit(status_of("sweep", main))
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    return path


def start(script: Path, *items: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(script), *items],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def end(process: subprocess.Popen[str]) -> tuple[list[str], str]:
    """What it still prints, sorted, and its errors. It has ended when no process of its holds the pipes any more."""
    try:
        out, errors = process.communicate(timeout=60)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return sorted(out.splitlines()), errors


def begun(process: subprocess.Popen[str]) -> list[int]:
    """Waits for two tasks to begin, and returns the processes that they are in."""
    assert process.stdout is not None
    return [int(process.stdout.readline().split(" begins ")[1]) for _ in range(2)]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
@pytest.mark.parametrize("targets", [["process"], ["group"], ["group", "process"], ["process", "group"]])
def test_all_stop_after_their_step_and_nothing_else_is_begun(
    script: Path, number: signal.Signals, targets: list[str]
) -> None:
    process = start(script, "a", "b", "c", "d", "7")
    begun(process)
    for target in targets:
        (os.killpg if target == "group" else os.kill)(process.pid, number)
    out, errors = end(process)
    assert out == ["a stopped", f"asked by {number.name}", "b stopped"]
    assert process.returncode == 0
    assert (
        errors == f"\nsweep: {number.name}: saving after this step (a second signal ends the run at once)\n"
    )


def test_a_signal_to_one_that_works_changes_nothing(script: Path) -> None:
    process = start(script, "a", "b", "7")
    for worker in begun(process):
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            os.kill(worker, number)
    os.kill(process.pid, signal.SIGTERM)
    assert end(process)[0] == ["a stopped", "asked by SIGTERM", "b stopped"]


def test_a_signal_to_all_kills_no_process_that_just_begins(script: Path) -> None:
    process = start(script, "signal", "b")
    out, errors = end(process)
    assert (out[0], out[1][:14], out[2:]) == ("asked by SIGTERM", "signal begins ", ["signal stopped"])
    assert (process.returncode, errors.count("\n")) == (0, 2)


@pytest.mark.parametrize("target", ["process", "group"])
def test_an_interrupted_one_leaves_no_process_behind(script: Path, target: str) -> None:
    process = start(script, "a", "deaf", "c")
    begun(process)
    (os.killpg if target == "group" else os.kill)(process.pid, signal.SIGINT)
    out, errors = end(process)
    assert (out, errors, process.returncode) == ([], "\nsweep: interrupted\n", 130)


def test_processes_end_at_once_when_the_main_one_is_gone(script: Path) -> None:
    process = start(script, "a", "deaf", "c")
    begun(process)
    os.kill(process.pid, signal.SIGKILL)
    assert end(process) == ([], "")


def test_items_are_shared_until_there_are_no_more(script: Path) -> None:
    process = start(script, *"12345")
    assert end(process) == (["1", "16", "25", "4", "9", "asked by "], "")
    few = start(script, "3")
    assert end(few) == (["9", "asked by "], "")


@pytest.mark.parametrize(
    ("item", "message"),
    [("fails", "[Errno 28] no room: 'there'"), ("dies", "ChildProcessError: a process ended with status 3")],
)
def test_an_error_stops_the_others_and_is_raised(script: Path, item: str, message: str) -> None:
    process = start(script, "a", item, "c")
    out, errors = end(process)
    assert (out[0][:9], out[1:], process.returncode) == ("a begins ", ["a stopped"], 1)
    assert message in errors.splitlines()[-1]
