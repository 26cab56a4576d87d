"""Several processes on one task: independent parts of the work, or processes that were launched together.

tools/extract_latents.py --part 3/8 ...           independent tasks, such as those of a SLURM job array; sweeps too
accelerate launch tools/extract_latents.py ...    processes that wait for each other, one per GPU

Item n of the work (a shard, a run of a sweep) belongs to part n modulo the number of parts. torch is imported where it
is used, so that tools can parse `--part` and show `--help` without it.
"""

from __future__ import annotations

import argparse
import logging
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from theworld.utils.text import counted

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")

TIMEOUT = timedelta(days=7)  # the processes wait for the slowest of them


@dataclass(frozen=True)
class Part:
    """One of `count` processes, numbered from 0; `local_index` of `local_count` on this machine.

    `together`: they were launched together and wait for each other.
    """

    index: int = 0
    count: int = 1
    together: bool = False
    local_index: int = 0
    local_count: int = 1

    @property
    def is_main_process(self) -> bool:
        """Whether this process prints and publishes: of processes launched together, only the first does."""
        return self.index == 0 or not self.together

    @property
    def log_level(self) -> int:
        """The level at which this process logs what is the same in all processes: INFO in the main process alone."""
        return logging.INFO if self.is_main_process else logging.DEBUG

    def owns(self, item: int) -> bool:
        """Whether an item of the work belongs to this part."""
        return item % self.count == self.index

    def device(self, name: str) -> str:
        """Return the device of this process; each of the processes launched together has a GPU of its own.

        Raises ValueError for a name that gives all of them the same GPU, or if there are too few GPUs.
        """
        import torch

        if not self.together or name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
            return name
        if name not in ("auto", "cuda"):
            raise ValueError(f"device {name!r} is one GPU for {self.count} processes; use --device cuda")
        if self.local_index >= torch.cuda.device_count():
            gpus = counted(torch.cuda.device_count(), "GPU")
            raise ValueError(f"{self.local_count} processes on this machine and {gpus}; launch as many")
        return f"cuda:{self.local_index}"

    def broadcast_from_main(self, work: Callable[[], T]) -> T:
        """Call `work` in the main process and return its result in every process.

        If it raises ValueError or OSError, the main process raises that, and the others exit with status 1.
        """
        if not self.together:
            return work()
        if self.index == 0:
            try:
                result = work()
            except (ValueError, OSError):
                _broadcast(None)
                raise
            _broadcast((result,))
            return result
        received = _broadcast(None)
        if received is None:
            raise SystemExit(1)
        return received[0]

    @contextmanager
    def main_process_first(self) -> Iterator[None]:
        """Let the other processes enter the block after the main process has left it."""
        if self.index > 0:
            self.barrier()
        yield
        if self.index == 0:
            self.barrier()

    def barrier(self) -> None:
        """Wait until every process that was launched together is here. Raises OSError if one has stopped."""
        if self.together:
            import torch

            with _stopped_processes_named():
                torch.distributed.barrier()

    def close(self) -> None:
        """Disconnect the processes once all of them are here."""
        if self.together:
            import torch

            self.barrier()
            torch.distributed.destroy_process_group()


@contextmanager
def _stopped_processes_named() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # what gloo raises when a connection breaks
        raise OSError(f"another process of this run has stopped ({str(error).splitlines()[0]})") from None


def _broadcast(value: Any) -> Any:
    """Return the value of the main process in every process."""
    import torch

    values = [value]
    with _stopped_processes_named():
        torch.distributed.broadcast_object_list(values, src=0)
    return values[0]


def part_of(text: str) -> Part:
    """Return the part that `--part` names: "3/8" is the third of eight. Raises ArgumentTypeError otherwise."""
    match = re.fullmatch(r"([1-9][0-9]{0,5})/([1-9][0-9]{0,5})", text)
    if not match or int(match[1]) > int(match[2]):
        raise argparse.ArgumentTypeError(f"{text!r} is not I/N with I from 1 to N, such as 3/8")
    return Part(int(match[1]) - 1, int(match[2]))


def num_launched() -> int:
    """Return how many processes `accelerate launch` or torchrun started together, including this one."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def this_part(given: Part | None) -> Part:
    """Return the part of this process: as `accelerate launch` or torchrun says, or as given, or everything.

    Raises ValueError for a given part of a launched process. Launched processes are connected through gloo: they
    exchange the list of photographs and wait for each other, which needs no GPU.
    """
    launched = num_launched()
    if launched == 1:
        return given or Part()
    if given is not None:
        raise ValueError(
            f"--part {given.index + 1}/{given.count} in one of {launched} processes launched together, which share "
            "the shards by themselves; leave --part out"
        )
    from accelerate import PartialState

    state = PartialState(cpu=True, timeout=TIMEOUT)
    local_count = int(os.environ.get("LOCAL_WORLD_SIZE", launched))
    return Part(state.process_index, state.num_processes, True, state.local_process_index, local_count)


MESSAGE = 2**26  # values


class Processes:
    """This process among those of a training run, and its device. A single process exchanges nothing."""

    def __init__(self, device: str) -> None:
        """`device`: as in the settings. Raises ValueError if it names one GPU and several processes were started."""
        from accelerate import PartialState

        from theworld.utils.device import resolve_device

        self.count = num_launched()
        self.rank = 0
        self.device = resolve_device(device)
        if self.count > 1:
            if ":" in device:
                raise ValueError(
                    f"device {device!r} names one GPU, but {self.count} processes were started; use --device cuda"
                )
            self._state = PartialState(cpu=self.device.type == "cpu")
            self.rank = self._state.process_index
            if self.device.type == "cuda":
                self.device = self._state.device

    @property
    def is_main_process(self) -> bool:
        """Whether this process prints and writes files."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait until every process is here."""
        if self.count > 1:
            self._state.wait_for_everyone()

    def sum(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return the sums over all processes of float tensors that have the same shapes in each.

        The order of addition is that of the processes, so that every process gets the same bits.
        """
        if self.count == 1:
            return list(tensors)
        import torch
        from accelerate.utils import reduce

        sums: list[Tensor] = []
        for message in _messages(tensors):
            flat = torch.cat([tensor.flatten() for tensor in message])
            parts = reduce(flat, "sum").split([tensor.numel() for tensor in message])
            sums += [part.view_as(tensor) for part, tensor in zip(parts, message, strict=True)]
        return sums


def _messages(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Yield the tensors in order, in groups of at most MESSAGE values: a message needs twice its memory."""
    message: list[Tensor] = []
    for tensor in tensors:
        if message and sum(t.numel() for t in message) + tensor.numel() > MESSAGE:
            yield message
            message = []
        message.append(tensor)
    yield message
