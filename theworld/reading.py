"""Photographs read and decoded in processes of their own, ahead of the encoder, in batches of fixed membership.

The processes are those of torch's DataLoader. They are forked, so nothing of the encoder is sent to them, and they do
nothing but PIL and NumPy on one thread each: a GPU that the main process uses does not matter to them.
"""

import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from theworld.images import ImageError, decode, read_bytes, sha256
from theworld.store import ImageEntry

FEW = 64  # photographs that are read in this process: to start others takes longer
AHEAD = 2  # batches that each process is ahead
SHARED_MEMORY = Path("/dev/shm")

Prepare = Callable[[np.ndarray], Tensor]


@dataclass
class Source:
    """Where photographs come from, under which limits; `num_workers` processes read them, 0: this one."""

    folder: Path
    max_image_pixels: int
    num_workers: int


class Prepared(NamedTuple):
    """A batch as a worker hands it over: `num_photographs`, then padding up to the batch size."""

    pixels: Tensor | None
    # uint8 or float32 [batch size, ...], as the encoder's `prepare` makes one; None with an error
    num_photographs: int
    seconds: dict[str, float]
    # of work in the stages read and decode
    error: ImageError | None
    # a value, not raised: DataLoader cannot raise an exception of two arguments again


class Batches(Dataset[Prepared]):
    """Item n is the n-th batch: read, decoded, prepared and padded to `batch_size`."""

    def __init__(
        self, batches: Sequence[Sequence[ImageEntry]], source: Source, prepare: Prepare, batch_size: int
    ) -> None:
        self.batches = batches
        self.source = source
        self.prepare = prepare
        self.batch_size = batch_size

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, number: int) -> Prepared:
        rows = self.batches[number]
        seconds = {"read": 0.0, "decode": 0.0}
        pixels: Tensor | None = None
        for i, row in enumerate(rows):
            try:
                photograph = read_photograph(row, self.source, seconds)
            except ImageError as error:
                return Prepared(None, len(rows), seconds, error)
            start = time.perf_counter()
            one = self.prepare(photograph)
            if pixels is None:
                pixels = one.new_zeros((self.batch_size, *one.shape))
            pixels[i] = one
            seconds["decode"] += time.perf_counter() - start
        return Prepared(pixels, len(rows), seconds, None)


def read_photograph(row: ImageEntry, source: Source, seconds: dict[str, float]) -> np.ndarray:
    """The pixels uint8[H, W, 3] of a listed photograph; adds the time it took to `seconds`.

    Raises ImageError if it cannot be read, or is not the one that was listed.
    """
    start = time.perf_counter()
    data = read_bytes(source.folder, row.path)
    seconds["read"] += time.perf_counter() - start
    start = time.perf_counter()
    digest = sha256(data)
    if digest != row.sha256:
        raise ImageError(
            row.path, f"changed while extracting: SHA-256 was {row.sha256}, is {digest}; run again"
        )
    pixels = decode(data, row.path, max_pixels=source.max_image_pixels)
    seconds["decode"] += time.perf_counter() - start
    return pixels


def num_workers(configured: int | None, processes_here: int = 1) -> int:
    """How many processes read: as configured, or one for each core, of which `processes_here` runs have a share."""
    if configured is not None:
        return configured
    return max(1, len(os.sched_getaffinity(0)) // processes_here)


def workers_for(num_photographs: int, num_items: int, wanted: int, item_bytes: int = 0) -> tuple[int, str]:
    """The number of processes to start for `num_items` items, and a note where there is no memory for all of them.

    Items of `item_bytes` come back through /dev/shm, of which a container may have little.
    """
    workers = min(wanted, num_items) if num_photographs >= FEW else 0
    if workers == 0 or item_bytes == 0 or not SHARED_MEMORY.is_dir():
        return workers, ""
    free = shutil.disk_usage(SHARED_MEMORY).free
    room = free // ((AHEAD + 1) * item_bytes)
    if room >= workers:
        return workers, ""
    return room, (
        f"{room} of {workers} reading processes: {SHARED_MEMORY} has {free / 2**20:,.0f} MiB free and each needs "
        f"{(AHEAD + 1) * item_bytes / 2**20:,.0f}; give it more (docker run --shm-size), or fewer --num_workers"
    )


@contextmanager
def in_processes(items: Dataset[Any], workers: int, pinned: bool = False) -> Iterator[Iterator[Any]]:
    """The items in their order, made by so many processes (0: this one), a few ahead; `pinned`: for copies to a GPU.

    The processes have ended when the block is left, however it is left. Raises OSError if one of them is killed, as
    Linux does where memory is short.
    """
    loader = DataLoader(
        items,
        batch_size=None,
        num_workers=workers,
        collate_fn=_as_it_is,
        pin_memory=pinned,
        prefetch_factor=AHEAD if workers else None,
        multiprocessing_context="fork" if workers else None,
        worker_init_fn=_leave_signals_to_main if workers else None,
    )
    iterator: Any = iter(loader)
    try:
        yield iterator
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker"):
            raise
        reason = str(error).rstrip(" .")
        raise OSError(f"a reading process has died: {reason}. Try fewer --num_workers") from error
    finally:
        if workers:
            # The garbage collector would do it too, but perhaps in the thread that has to tell the workers to stop.
            iterator._shutdown_workers()


def _as_it_is(item: Any) -> Any:
    return item


def _leave_signals_to_main(_: int) -> None:
    """A signal to the whole group is the main process's to answer: it then ends its workers. They also end by
    themselves once it is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    torch.set_num_threads(1)
