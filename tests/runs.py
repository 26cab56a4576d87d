"""Trainings that the tests stop, kill and resume: `tools/train.py` in processes of their own, and what came of it."""

import json
import os
import runpy
import socket
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from constants import ROOT
from forks import fork

from theworld.config.config import Config, save_config


def train(
    arguments: Sequence[str], log: str, variables: dict[str, str], leader: int | None, prepare: Any
) -> None:
    """tools/train.py in this process, which leads a process group or joins that of `leader`."""
    descriptor = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    while True:
        try:
            os.setpgid(0, leader or 0)
            break
        except (PermissionError, ProcessLookupError):  # the leader does not lead yet
            time.sleep(0.001)
    os.environ.update(variables)
    torch.set_num_threads(1)
    if prepare is not None:
        prepare()
    sys.argv = ["train", *arguments]
    runpy.run_path(str(ROOT / "tools/train.py"), run_name="__main__")


class Run:
    """A training of `ranks` processes in one group, as a cluster's launcher starts them."""

    def __init__(
        self, config: Config, cache: Path, ranks: int = 1, prepare: Any = None, **variables: str
    ) -> None:
        """`prepare`: a function of a module, called in each process before it trains."""
        self.folder = Path(config.output_dir)
        self.log = self.folder.with_suffix(".log")
        settings = self.folder.with_suffix(".json")
        settings.parent.mkdir(parents=True, exist_ok=True)
        save_config(config, settings)
        arguments = ["--config", str(settings), "--cache", str(cache)]
        variables = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **variables}
        if ranks > 1:
            address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
            variables |= address | {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
        self.processes: list[BaseProcess] = []
        for rank in range(ranks):
            own = variables | ({"RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {})
            leader = self.processes[0].pid if self.processes else None
            self.processes.append(fork(train, arguments, str(self.log), own, leader, prepare))

    @property
    def pid(self) -> int:
        """Of the first process, and of the group."""
        assert self.processes[0].pid is not None
        return self.processes[0].pid

    def lines(self) -> int:
        """How many lines metrics.jsonl has."""
        path = self.folder / "metrics.jsonl"
        return path.read_bytes().count(b"\n") if path.exists() else 0

    def reach(self, lines: int) -> bool:
        """Waits until metrics.jsonl has so many lines; False if the run ended before."""
        while self.lines() < lines:
            if not self.processes[0].is_alive():
                return False
            time.sleep(0.001)
        return True

    def wait(self, seconds: float = 120) -> set[int | None]:
        """The exit statuses of all processes, which end in time."""
        for process in self.processes:
            process.join(seconds)
        statuses = {process.exitcode for process in self.processes}
        if None in statuses:
            for process in self.processes:
                process.kill()
        return statuses


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def resumed(config: Config) -> Config:
    """The same run, from where it is: from its start if nothing was saved."""
    there = list(Path(config.output_dir).glob("checkpoint-*"))
    return replace(config, resume_from=config.output_dir) if there else config


def metrics(folder: Path) -> list[dict[str, float]]:
    """The lines of metrics.jsonl without what the clock says."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "statements_per_second"} for line in lines]


def same_state(one: Any, other: Any) -> bool:
    """Whether two nests of tensors and numbers are bitwise the same."""
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same_state(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same_state, one, other))
    return bool(one == other)


def same_run(one: Path, other: Path, step: int) -> bool:
    """Whether two runs have the same figures in each step, each once, and bitwise the same weights and optimiser."""
    if metrics(one) != metrics(other):
        return False
    first, second = (folder / f"checkpoint-{step}" for folder in (one, other))
    names = sorted(path.name for path in first.glob("*.safetensors"))
    assert names == sorted(path.name for path in second.glob("*.safetensors"))
    states = [torch.load(path / "trainer.pt", weights_only=True) for path in (first, second)]
    return same_state(*states) and all((first / n).read_bytes() == (second / n).read_bytes() for n in names)
