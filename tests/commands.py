"""The project's tools, run as a user runs them."""

import os
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from constants import ROOT

from theworld.config.cli import ArgumentParser
from theworld.config.config import Config, save_config


def launch(
    config: Config, cache: Path, settings: Path, count: int = 2, flags: Sequence[str] = (), **variables: str
) -> subprocess.CompletedProcess[str]:
    """tools/train.py in `count` processes, as `accelerate launch --multi_cpu` starts them, with these variables."""
    save_config(config, settings)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}"]
    arguments = ["tools/train.py", "--config", str(settings), "--cache", str(cache), *flags]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **variables}
    return subprocess.run(
        [*launcher, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
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
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments), "--dry_run"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(f"tools/{name}.py", run_name="__main__")
    return ended.value.code, *capsys.readouterr()


def run_command(
    line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> tuple[object, str, str]:
    """Status, output and errors of a shown command, read as a shell reads it and run in this process."""
    python, script, *arguments = shlex.split(line)
    assert python == "python"
    monkeypatch.setattr(sys, "argv", [script, *arguments])
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


def tool(name: str, *arguments: object, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Runs tools/<name>.py from the project's root, without a network."""
    done = subprocess.run(
        [sys.executable, f"tools/{name}.py", *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    if check:
        assert done.returncode == 0, done.stderr
    return done
