"""Watches the rest of the project from outside while it works: nothing in it is changed for that."""

import io
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from typing import Any
from unittest.mock import patch

import torch

from theworld.batch import Batch, Packer
from theworld.chip import synchronize
from theworld.model import TheWorld


@contextmanager
def quietly() -> Iterator[None]:
    """Keeps what others print off the terminal, which shows figures here; progress bars and errors stay."""
    with redirect_stdout(io.StringIO()):
        yield


@contextmanager
def packed_batches() -> Iterator[list[Batch]]:
    """The batches that are packed while it runs, by whichever thread."""
    batches: list[Batch] = []
    pack = Packer.pack

    def kept(packer: Packer, *arguments: Any, **options: Any) -> Batch:
        batches.append(pack(packer, *arguments, **options))
        return batches[-1]

    with patch.object(Packer, "pack", kept):
        yield batches


@contextmanager
def stopwatch(device: torch.device) -> Iterator[dict[str, float]]:
    """Seconds inside pack, forward, backward and optimizer while it runs, each waited for: a little slower than
    without. What other threads do meanwhile does not count."""
    seconds: dict[str, float] = {}

    def timed(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*arguments: Any, **options: Any) -> Any:
            if threading.current_thread() is not threading.main_thread():
                return call(*arguments, **options)
            synchronize(device)
            start = time.perf_counter()
            result = call(*arguments, **options)
            synchronize(device)
            seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - start
            return result

        return wrapper

    places: list[tuple[str, Any, str]] = [
        ("pack", Packer, "pack"),
        ("forward", TheWorld, "losses"),
        ("backward", torch.Tensor, "backward"),
        ("optimizer", torch.optim.AdamW, "step"),
    ]
    with ExitStack() as stack:
        for name, owner, attribute in places:
            stack.enter_context(patch.object(owner, attribute, timed(name, getattr(owner, attribute))))
        yield seconds
