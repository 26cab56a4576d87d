"""The processes of a run: one by itself, or those that `accelerate launch` (or torchrun) started together."""

from collections.abc import Sequence

import torch
from accelerate import PartialState
from accelerate.utils import reduce
from torch import Tensor

from theworld.parts import num_launched
from theworld.weights import resolve_device


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
        """Float tensors of the same shapes in every process, each added up over them: in one message, whose order of
        addition is that of the processes, so that all get the same bits."""
        if self.count == 1:
            return list(tensors)
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        parts = reduce(flat, "sum").split([tensor.numel() for tensor in tensors])
        return [part.view_as(tensor) for part, tensor in zip(parts, tensors, strict=True)]
