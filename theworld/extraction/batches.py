"""Micro-batches, put together on the host while the device computes the one before."""

from collections import deque
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from threading import Event
from typing import Any, TypeVar

import torch
from torch import Tensor

from theworld.data.vsr import Statement
from theworld.models.attention import prepare_masks
from theworld.models.packing import Batch, Packer, WorldSource
from theworld.models.theworld import TheWorld
from theworld.utils.device import pin

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
            return pin(value) if isinstance(value, Tensor) else value.pin_memory()

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
    """Pack statements (see `Packer.pack`) and fetch the latents and vision features of their images, all of it on the
    model's device: a thread that prepares batches copies while the device computes."""
    batch = packer.pack(statements, worlds, captions)
    if model.gemma.attention == "flex_attention":
        batch = prepare_masks(batch, model.gemma.sliding_window)
    features = vision(batch.images) if vision is not None and batch.images else None
    rows = model.latents(batch, latents)
    device = model.gemma.device
    return Microbatch(tuple(statements), batch, rows, features).pin(device).to(device)


def prefetch(items: Iterable[T], depth: int = 2, gate: Event | None = None) -> Generator[T, None, None]:
    """Yield the items, made by a thread up to `depth` ahead. An error in making one is raised in its place.

    `gate`: the thread begins an item only while this is set, or once the item is waited for. While the thread packs, it
    holds Python's lock, and a caller that launches kernels meanwhile falls behind its GPU; so the caller opens the gate
    while it waits for the GPU.
    """
    iterator, end = iter(items), object()

    def make() -> Any:
        if gate is not None:
            gate.wait()
        return next(iterator, end)

    with ThreadPoolExecutor(1) as thread:
        waiting = deque(thread.submit(make) for _ in range(depth))
        try:
            while True:
                if gate is not None and not waiting[0].done():
                    gate.set()
                if (item := waiting.popleft().result()) is end:
                    break
                waiting.append(thread.submit(make))
                yield item
        finally:
            if gate is not None:
                gate.set()
            thread.shutdown(wait=True, cancel_futures=True)
