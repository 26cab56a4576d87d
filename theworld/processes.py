"""The processes of a run: one by itself, or those that `accelerate launch` (or torchrun) started together."""

from collections.abc import Iterator, Sequence

import torch
from accelerate import PartialState
from accelerate.utils import reduce
from torch import Tensor

from theworld.parts import num_launched
from theworld.weights import resolve_device

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
