"""What one pass through the model reads, put together on the host while the device computes the one before."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from threading import Event
from typing import Any, TypeVar

import torch
from torch import Tensor

from theworld.data.vsr import Statement
from theworld.models.attention import prepare_masks
from theworld.models.packing import Batch, Packer
from theworld.models.theworld import TheWorld

FeatureSource = Callable[[Sequence[str]], Tensor]  # image paths -> one row an image
T = TypeVar("T")


@dataclass(frozen=True)
class Pass:
    """One forward pass: packed statements with the rows that their images have in the cache."""

    statements: tuple[Statement, ...]
    batch: Batch | None  # None where no language model reads it (the start at the image tokens)
    latents: Tensor | None  # float[W, *row_shape]
    vision: Tensor | None  # float[G, I, V], or photographs, float[G, 3, S, S]
    weight: float = 1.0  # of its losses in the step

    def to(self, device: torch.device) -> "Pass":
        """The same on a device; copies overlap with other work where memory is pinned."""

        def move(value: Any) -> Any:
            if isinstance(value, Tensor):
                return value.to(device, non_blocking=True)
            return None if value is None else value.to(device)

        return replace(self, batch=move(self.batch), latents=move(self.latents), vision=move(self.vision))

    def pin(self, device: torch.device) -> "Pass":
        """The same in page-locked memory, from which a GPU copies by itself; as it is for another device."""

        def pinned(value: Any) -> Any:
            if value is None or (isinstance(value, Tensor) and value.is_cuda):
                return value
            return value.pin_memory()

        if device.type != "cuda":
            return self
        return replace(
            self, batch=pinned(self.batch), latents=pinned(self.latents), vision=pinned(self.vision)
        )


def make_pass(
    model: TheWorld,
    packer: Packer,
    statements: Sequence[Statement],
    latents: FeatureSource,
    vision: FeatureSource | None,
    worlds: Sequence[str | None] | None = None,
    captions: Mapping[str, str] | None = None,
) -> Pass:
    """Packs statements (see `Packer.pack`) and fetches what their images have, all of it on the model's device: a
    thread that runs ahead copies while the device computes."""
    batch = packer.pack(statements, worlds, captions)
    if model.gemma.attention == "flex_attention":
        batch = prepare_masks(batch, model.gemma.sliding_window)
    seen = vision(batch.images) if vision is not None and batch.images else None
    device = model.gemma.device
    return Pass(batch.statements, batch, model.latents(batch, latents), seen).pin(device).to(device)


def ahead(items: Iterable[T], depth: int = 2, gate: Event | None = None) -> Iterator[T]:
    """The same items, made by a thread up to `depth` ahead. What making one raises is raised in its place.

    `gate`: an item is begun only while this is set, or once it is waited for. A thread that packs holds Python's lock,
    so a caller that launches kernels meanwhile falls behind its GPU; it opens the gate while it waits for the GPU.
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
