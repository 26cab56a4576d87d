"""How several processes share the shards of a store: shard s is written by part s modulo the number of parts.

accelerate launch tools/extract_latents.py ...    processes that know of each other, one a GPU
tools/extract_latents.py --part 3/8 ...           tasks that do not, such as those of an array job

The processes of a run: one by itself, or those that `accelerate launch` (or torchrun) started together.
"""

import argparse
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import reduce
from torch import Tensor

from theworld.utils.device import resolve_device

T = TypeVar("T")

PATIENCE = timedelta(days=7)  # the processes wait for the slowest of them


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
    def speaks(self) -> bool:
        """Whether this process prints: of those that were launched together only the first does."""
        return self.index == 0 or not self.together

    def owns(self, shard: int) -> bool:
        """Whether this process writes a shard."""
        return shard % self.count == self.index

    def device(self, name: str) -> str:
        """The device of this process: of processes launched together each has a GPU of its own. ValueError for a name
        that gives all of them the same one, or if there are too few."""
        import torch

        if not self.together or name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
            return name
        if name not in ("auto", "cuda"):
            raise ValueError(f"device {name!r} is one GPU for {self.count} processes; use --device cuda")
        if self.local_index >= torch.cuda.device_count():
            raise ValueError(
                f"{self.local_count} processes on this machine and {torch.cuda.device_count()} GPUs; launch as many"
            )
        return f"cuda:{self.local_index}"

    def from_first(self, work: Callable[[], T]) -> T:
        """What `work` returns in the first process, in all of them.

        Where it raises ValueError or OSError, that is raised in the first, and the others end without a word.
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
    def first_goes_first(self) -> Iterator[None]:
        """The others enter the block when the first process has left it."""
        if self.index > 0:
            self.wait()
        yield
        if self.index == 0:
            self.wait()

    def wait(self) -> None:
        """Until all processes that were launched together are here. OSError if one of them has stopped."""
        if self.together:
            import torch

            with _partners():
                torch.distributed.barrier()

    def leave(self) -> None:
        """Ends what connects the processes, once all are here."""
        if self.together:
            import torch

            self.wait()
            torch.distributed.destroy_process_group()


@contextmanager
def _partners() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # what gloo raises when a connection breaks
        raise OSError(f"another process of this run has stopped ({str(error).splitlines()[0]})") from None


def _broadcast(value: Any) -> Any:
    """What the first process gave, in all of them."""
    import torch

    values = [value]
    with _partners():
        torch.distributed.broadcast_object_list(values, src=0)
    return values[0]


def part_of(text: str) -> Part:
    """ "3/8" is the third of eight independent tasks. Raises ArgumentTypeError for anything else."""
    match = re.fullmatch(r"([1-9][0-9]{0,5})/([1-9][0-9]{0,5})", text)
    if not match or int(match[1]) > int(match[2]):
        raise argparse.ArgumentTypeError(f"{text!r} is not I/N with I from 1 to N, such as 3/8")
    return Part(int(match[1]) - 1, int(match[2]))


def num_launched() -> int:
    """How many processes `accelerate launch` or torchrun started together, this one included."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def this_part(given: Part | None) -> Part:
    """The part of this process: as `accelerate launch` or torchrun says, or as given, or all.

    Raises ValueError if it is both. Only a launched process is connected with others, through gloo: they exchange
    the list of photographs and wait for each other, which needs no GPU.
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

    state = PartialState(cpu=True, timeout=PATIENCE)
    local_count = int(os.environ.get("LOCAL_WORLD_SIZE", launched))
    return Part(state.process_index, state.num_processes, True, state.local_process_index, local_count)


MESSAGE = 2**26  # values


class Processes:
    """Which of how many this process is, on which device. By itself it takes part in nothing and waits for nobody."""

    def __init__(self, device: str) -> None:
        """`device` as in the settings. ValueError where it names one GPU and several processes were started."""
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
    def is_main(self) -> bool:
        """Whether this is the one that prints and writes."""
        return self.rank == 0

    def wait(self) -> None:
        """Until all are here."""
        if self.count > 1:
            self._state.wait_for_everyone()

    def sum(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Float tensors of the same shapes in every process, each added up over them: in few messages, whose order of
        addition is that of the processes, so that all get the same bits."""
        if self.count == 1:
            return list(tensors)
        sums: list[Tensor] = []
        for message in _messages(tensors):
            flat = torch.cat([tensor.flatten() for tensor in message])
            parts = reduce(flat, "sum").split([tensor.numel() for tensor in message])
            sums += [part.view_as(tensor) for part, tensor in zip(parts, message, strict=True)]
        return sums


def _messages(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """The tensors in their order, together as far as MESSAGE goes: a message is held twice beside them."""
    message: list[Tensor] = []
    for tensor in tensors:
        if message and sum(t.numel() for t in message) + tensor.numel() > MESSAGE:
            yield message
            message = []
        message.append(tensor)
    yield message
