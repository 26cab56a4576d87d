"""One writer for one output: who comes second is told of the first, and no death of the first leaves a lock behind."""

import errno
import fcntl
import gc
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from constants import ROOT
from forks import in_child
from jobs import held

from theworld.utils import locks
from theworld.utils.locks import InUse, OutputLock, check_unlocked, empty_folder


def locked_here(output: Path, is_file: bool = False) -> bool:
    """Whether another process is refused, by the lock and by the check alike."""

    def work() -> None:
        for attempt in (OutputLock, check_unlocked):
            try:
                attempt(output, "--output", is_file)
            except InUse:
                continue
            os._exit(2)
        os._exit(3)

    status = os.waitstatus_to_exitcode(os.waitpid(in_child(work), 0)[1])
    assert status in (2, 3)
    return status == 3


@pytest.mark.parametrize("is_file", [False, True])
def test_the_second_writer_is_told_host_process_and_time_of_the_first(tmp_path: Path, is_file: bool) -> None:
    output = tmp_path / "lr-0.001"
    with held(output, is_file) as child:
        for attempt in (OutputLock, check_unlocked):
            with pytest.raises(InUse) as refused:
                attempt(output, "--output_dir", is_file)
            assert re.fullmatch(
                rf"--output_dir {output} is in use: process {child} on {re.escape(socket.gethostname())} has been "
                r"writing there since \d{4}-\d\d-\d\d \d\d:\d\d:\d\d[+-]\d\d:\d\d; wait for its end, or choose another "
                "--output_dir",
                str(refused.value),
            )
        with OutputLock(tmp_path / "lr-0.003", "--output", is_file):  # another output
            pass
    file = locks.lock_file(output, is_file)
    assert file.name == (".lr-0.001.lock" if is_file else ".lock")
    with OutputLock(output, "--output_dir", is_file):  # it was killed
        assert file.exists()
    assert file.exists() != is_file


def test_a_lock_on_a_file_that_its_holder_has_removed_meanwhile_is_taken_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, lock = tmp_path / "r.jsonl", locks._lock

    def slow(*arguments: object) -> None:
        monkeypatch.setattr(locks, "_lock", lock)
        (tmp_path / ".r.jsonl.lock").unlink()
        lock(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(locks, "_lock", slow)
    with OutputLock(output, "--output", is_file=True):
        assert locked_here(output, is_file=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGHUP])
def test_a_lock_ends_with_its_process(tmp_path: Path, number: int) -> None:
    with held(tmp_path) as child:
        assert locked_here(tmp_path)
        os.kill(child, number)
        while os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT) is None:
            pass
        assert not locked_here(tmp_path)


def test_a_process_takes_a_lock_as_often_as_it_likes_and_keeps_it_until_the_last_is_released(
    tmp_path: Path,
) -> None:
    before = dict(locks._held)  # of earlier tests, whose runs may not be collected yet
    first, second = OutputLock(tmp_path, "--output"), OutputLock(tmp_path, "--output")
    check_unlocked(tmp_path, "--output")
    assert locked_here(tmp_path)
    first.release()
    first.release()
    assert locked_here(tmp_path)
    del second
    gc.collect()
    assert not locked_here(tmp_path)
    with OutputLock(tmp_path, "--output"):
        assert locked_here(tmp_path)
    assert not locked_here(tmp_path)
    assert locks._held.items() <= before.items()


def test_a_process_that_was_forked_from_a_holder_holds_nothing_and_takes_nothing(tmp_path: Path) -> None:
    with OutputLock(tmp_path / "r.jsonl", "--output", is_file=True) as lock:
        os.waitpid(in_child(lock.release), 0)
        assert (tmp_path / ".r.jsonl.lock").exists()
        assert locked_here(tmp_path / "r.jsonl", is_file=True)
        child = in_child(lambda: time.sleep(60))
    assert not locked_here(tmp_path / "r.jsonl", is_file=True)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


# Holders in a global, one of a module that outlives this project's at the end of Python, as for a trainer in a script;
# and a child that ends as any script does.
SCRIPT = """
import logging, os, sys
from pathlib import Path
from theworld.utils.locks import OutputLock
logging.held = OutputLock(Path("run"), "--output"), OutputLock(Path("r.jsonl"), "--output", is_file=True)
if os.fork() == 0:
    sys.exit(7)
assert os.waitstatus_to_exitcode(os.wait()[1]) == 7
print(sorted(str(path) for path in Path().rglob("*lock")))
"""


def test_a_script_that_ends_gives_its_locks_back_and_a_forked_child_that_ends_does_not(
    tmp_path: Path,
) -> None:
    command = [sys.executable, "-c", SCRIPT]
    done = subprocess.run(
        command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    # The file beside an output is there after the child's end, and gone after the holder's.
    assert (done.returncode, done.stderr, done.stdout) == (0, "", "['.r.jsonl.lock', 'run/.lock']\n")
    assert [path.name for path in tmp_path.rglob("*lock")] == [".lock"]
    assert not locked_here(tmp_path / "run")


def test_a_holder_on_another_machine_is_given_time_to_vanish(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(locks, "LEASE_SECONDS", 0.05)

    def elsewhere() -> None:
        socket.gethostname = lambda: "node7"

    with held(tmp_path, before=elsewhere) as child:
        with pytest.raises(InUse, match=f"process {child} on node7"):
            OutputLock(tmp_path, "--output")
        assert f"{tmp_path}: process {child} on node7 has been writing there since" in caplog.text
        monkeypatch.setattr(locks, "LEASE_SECONDS", 60)
        monkeypatch.setattr(time, "sleep", lambda _: os.kill(child, signal.SIGKILL))
        check_unlocked(tmp_path, "--output")


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_costs_a_warning(
    tmp_path: Path, code: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def lockf(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "lockf", lockf)
    with OutputLock(tmp_path / "run", "--output"):
        check_unlocked(tmp_path / "run", "--output")
    assert [record.message for record in caplog.records] == [
        f"{tmp_path}/run: its file system has no locks ({os.strerror(code)}); nothing keeps a second run out of it"
    ]


def test_a_lock_that_says_nothing_of_its_holder_is_one(tmp_path: Path) -> None:
    with held(tmp_path):
        for content in ("", "{", "3", json.dumps({"host": "?"})):
            (tmp_path / ".lock").write_text(content)
            with pytest.raises(InUse, match=r"process \? on \? has"):
                OutputLock(tmp_path, "--output")


def test_a_check_writes_nothing(tmp_path: Path) -> None:
    check_unlocked(tmp_path / "run", "--output")
    assert list(tmp_path.iterdir()) == []


def test_an_emptied_folder_keeps_its_lock(tmp_path: Path) -> None:
    with OutputLock(tmp_path, "--output"):
        (tmp_path / "checkpoint-1").mkdir()
        (tmp_path / "checkpoint-1" / ".lock").touch()
        (tmp_path / "metrics.jsonl").touch()
        (tmp_path / "link").symlink_to(tmp_path / "checkpoint-1")
        empty_folder(tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == [".lock"]
        assert locked_here(tmp_path)
