"""The project's tools, run as a user runs them."""

import multiprocessing.connection
import os
import re
import runpy
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from constants import ROOT
from forks import fork
from runs import free_port

from theworld.config.cli import ArgumentParser
from theworld.config.config import Config, save_config
from theworld.training.trainer import Trainer

OFFLINE = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def as_a_tool(name: str, arguments: Sequence[str], output: str, variables: dict[str, str]) -> None:
    """A tool in this process, from the project's root; what it writes goes to `output`.out and `output`.err."""
    for number, suffix in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{output}.{suffix}", os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o600), number)
    os.chdir(ROOT)
    os.environ.update(variables)
    sys.argv = [f"{name}.py", *arguments]
    runpy.run_path(f"tools/{name}.py", run_name="__main__")


def held_sweep(arguments: Sequence[str], output: str, hold: int) -> None:
    """The sweep as `as_a_tool` runs it, at the head of a group, whose runs wait before a step until asked to stop."""
    os.setsid()
    train_step = Trainer.train_step

    def held(self: Trainer, *given: Any) -> dict[str, float]:
        if self.step == hold:
            Path(f"{self.config.output_dir}.held-{hold}").touch()
        while self.step == hold and not self.stop.asked:
            time.sleep(0.001)
        return train_step(self, *given)

    Trainer.train_step = held  # type: ignore[method-assign]
    as_a_tool("sweep", arguments, output, OFFLINE)


def forked(
    name: str, arguments: Sequence[str], variables: Sequence[dict[str, str]], timeout: float
) -> subprocess.CompletedProcess[str]:
    """A tool in a process for each of the `variables`, all of which end when one fails.

    They are forked from one that has imported everything: to load torch in each would take longer than the tests.
    """
    with tempfile.TemporaryDirectory() as folder:
        output = f"{folder}/output"
        processes = [fork(as_a_tool, name, arguments, output, own) for own in variables]
        end = time.monotonic() + timeout
        while any(process.is_alive() for process in processes) and time.monotonic() < end:
            multiprocessing.connection.wait(
                [process.sentinel for process in processes if process.is_alive()], 1.0
            )
            if any(process.exitcode not in (None, 0) for process in processes):
                end = min(end, time.monotonic() + 10)  # seconds: the others may be ending, too
        late = [process for process in processes if process.is_alive()]
        for process in late:
            process.kill()
            process.join()
        texts = [Path(f"{output}.{suffix}").read_text() for suffix in ("out", "err")]
    codes = [process.exitcode for process in processes]
    assert not late or any(code not in (0, -signal.SIGKILL) for code in codes), (
        f"{name} takes longer: {texts}"
    )
    return subprocess.CompletedProcess([name, *arguments], next((c for c in codes if c), 0) or 0, *texts)


def launch(
    config: Config, cache: Path, settings: Path, count: int = 2, flags: Sequence[str] = (), **variables: str
) -> subprocess.CompletedProcess[str]:
    """tools/train.py in `count` processes that know of each other as `accelerate launch --multi_cpu` tells them."""
    save_config(config, settings)
    words = ["--config", str(settings), "--cache", str(cache), *flags]
    return forked("train", words, ranks(count, **variables), 120)


def ranks(count: int, **variables: str) -> list[dict[str, str]]:
    """The variables by which `accelerate launch --multi_cpu` tells each of its processes of the others."""
    together = OFFLINE | variables | {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    together |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return [together | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]


def really_launch(
    config: Config, cache: Path, settings: Path, count: int = 2
) -> subprocess.CompletedProcess[str]:
    """The same by torchrun, which is what `accelerate launch` runs."""
    save_config(config, settings)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}"]
    arguments = ["tools/train.py", "--config", str(settings), "--cache", str(cache)]
    return subprocess.run(
        [*launcher, *arguments],
        cwd=ROOT,
        env=os.environ | OFFLINE,
        capture_output=True,
        text=True,
        timeout=120,
    )


Trace = dict[str, tuple[int, int, bytes]]


def trace(folder: Path) -> Trace:
    """Every path below a folder with what a write would change: mode, time and content."""
    return {
        str(path.relative_to(folder)): (
            path.lstat().st_mode,
            path.lstat().st_mtime_ns,
            path.read_bytes() if path.is_file() else b"",
        )
        for path in sorted([folder, *folder.rglob("*")])
    }


# ---- every tool, as a process


def main_of(
    name: str, arguments: list, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> tuple[object, str, str]:
    """Status, output and errors of a tool's dry run, in this process: to load torch in each would take a minute."""
    return in_this_process(name, [*arguments, "--dry_run"], monkeypatch, capsys)


def in_this_process(
    name: str, arguments: list, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> tuple[object, str, str]:
    """Status, output and errors of a tool that changes nothing in its process that a later test sees."""
    monkeypatch.chdir(ROOT)
    return _run_script(f"tools/{name}.py", arguments, monkeypatch, capsys)


def run_command(
    line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> tuple[object, str, str]:
    """Status, output and errors of a shown command, read as a shell reads it and run in this process."""
    python, script, *arguments = shlex.split(line)
    assert python == "python"
    return _run_script(script, arguments, monkeypatch, capsys)


def _run_script(
    script: str,
    arguments: Sequence[object],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> tuple[object, str, str]:
    monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(script, run_name="__main__")
    return ended.value.code, *capsys.readouterr()


def shown_commands(text: str) -> list[str]:
    """The commands of the project's tools in a text; each ends with its line."""
    return re.findall(r"python \S*tools/\w+\.py.*", text)


def flags_of(name: str, monkeypatch: pytest.MonkeyPatch) -> tuple[list[str], ArgumentParser]:
    """The flags of a tool, as its help lists them, and its parser."""
    found: list[ArgumentParser] = []

    def parse(parser: ArgumentParser, *arguments: object) -> None:
        found.append(parser)
        raise SystemExit(0)

    with monkeypatch.context() as patch:
        patch.setattr(ArgumentParser, "parse_args", parse)
        patch.setattr(sys, "argv", [f"tools/{name}.py"])
        with pytest.raises(SystemExit):
            runpy.run_path(str(ROOT / "tools" / f"{name}.py"), run_name="__main__")
    return found[0].flags(), found[0]


def tool(
    name: str, *arguments: object, check: bool = True, fresh: bool = False
) -> subprocess.CompletedProcess[str]:
    """Runs tools/<name>.py from the project's root, without a network. `fresh`: in a Python of its own."""
    words = list(map(str, arguments))
    if fresh:
        command = [sys.executable, f"tools/{name}.py", *words]
        done = subprocess.run(
            command, cwd=ROOT, env=os.environ | OFFLINE, capture_output=True, text=True, timeout=300
        )
    else:
        done = forked(name, words, [os.environ | OFFLINE], 300)
    if check:
        assert done.returncode == 0, done.stderr
    return done
