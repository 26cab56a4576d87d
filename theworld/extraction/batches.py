"""Micro-batches, put together on the host while the device computes the one before."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from theworld.data.vsr import Statement
from theworld.models.packing import Batch, Packer, WorldSource
from theworld.models.theworld import TheWorld

FeatureSource = Callable[[Sequence[str]], Tensor]  # image paths -> one row an image
T = TypeVar("T")


@dataclass(frozen=True)
class Microbatch:
    """The inputs of one forward pass: packed statements, and the latents and vision features of their images."""

    statements: tuple[Statement, ...]
    batch: Batch | None  # None where the language model has no part (`align_steps`)
    latents: Tensor | None  # float[W, *row_shape]
    vision: Tensor | None  # float[G, I, V], or photographs, float[G, 3, S, S]
    weight: float = 1.0  # factor of its losses in the step

    def to(self, device: torch.device) -> "Microbatch":
        """Return it on a device; copies overlap with other work where memory is pinned."""

        def move(value: Any) -> Any:
            if isinstance(value, Tensor):
                return value.to(device, non_blocking=True)
            return None if value is None else value.to(device)

        return replace(self, batch=move(self.batch), latents=move(self.latents), vision=move(self.vision))

    def pin(self, device: torch.device) -> "Microbatch":
        """Return it in page-locked memory, from which a GPU copies by itself, or as it is for another device."""

        def pinned(value: Any) -> Any:
            if value is None or (isinstance(value, Tensor) and value.is_cuda):
                return value
            return value.pin_memory()

        if device.type != "cuda":
            return self
        return replace(
            self, batch=pinned(self.batch), latents=pinned(self.latents), vision=pinned(self.vision)
        )


def make_microbatch(
    model: TheWorld,
    packer: Packer,
    statements: Sequence[Statement],
    latents: FeatureSource,
    vision: FeatureSource | None,
    worlds: Sequence[WorldSource] | None = None,
    captions: Mapping[str, str] | None = None,
) -> Microbatch:
    """Pack statements (see `Packer.pack`) and fetch the latents and vision features of their images."""
    batch = packer.pack(statements, worlds, captions)
    features = vision(batch.images) if vision is not None and batch.images else None
    rows = model.latents(batch, latents)
    return Microbatch(tuple(statements), batch, rows, features).pin(model.gemma.device)


def prefetch(items: Iterable[T], depth: int = 2) -> Iterator[T]:
    """Yield the items, made by a thread up to `depth` ahead. An error in making one is raised in its place."""
    iterator, end = iter(items), object()
    with ThreadPoolExecutor(1) as thread:
        waiting = deque(thread.submit(next, iterator, end) for _ in range(depth))
        try:
            while (item := waiting.popleft().result()) is not end:
                waiting.append(thread.submit(next, iterator, end))
                yield item  # type: ignore[misc]
        finally:
            thread.shutdown(wait=True, cancel_futures=True)
