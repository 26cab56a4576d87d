"""The way of photographs through an encoder into the shards of a store.

    read ─> decode ─> encode ─> write      read and decode in processes ahead of the encoder, write in a thread behind

A batch depends on nothing but the frozen list, the shard size and the batch size, and all batches have one shape, so
any run, however often interrupted and among however many processes shared, gives the same files. Batches follow
each other without a gap from shard to shard.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from theworld.data.images import ImageError
from theworld.extraction.features import to_numpy
from theworld.extraction.reading import (
    Prepared,
    ReadBatch,
    Source,
    Spool,
    in_processes,
    item_bytes,
    workers_for,
)
from theworld.models.encoder import Encoder
from theworld.store.shard import ImageEntry
from theworld.store.writer import Store
from theworld.utils.console import progress
from theworld.utils.text import counted

logger = logging.getLogger(__name__)

IN_FLIGHT = 2  # batches on the GPU: the next one is there before the host has the last one's result
WAITING = 2  # full shards in memory that are not written yet


@dataclass
class Stages:
    """Seconds of work in each stage; several processes share reading and decoding."""

    seconds: dict[str, float] = field(
        default_factory=lambda: dict.fromkeys(("read", "decode", "encode", "write"), 0.0)
    )
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, seconds: dict[str, float]) -> None:
        """Adds work that another process timed."""
        with self.lock:
            for stage, duration in seconds.items():
                self.seconds[stage] += duration

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Add the time that the block takes to `stage`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.add({stage: time.perf_counter() - start})

    def bound(self, num_workers: int) -> str:
        """Return the stage that the others wait for."""
        shared = {"read": num_workers, "decode": num_workers}
        return max(self.seconds, key=lambda s: self.seconds[s] / max(1, shared.get(s, 1)))


def batches_of(store: Store, shards: Sequence[int], batch_size: int) -> list[list[ImageEntry]]:
    """Return the photographs of the shards in batches, none of which reaches into the next shard."""
    batches = []
    for shard in shards:
        rows = store.shard_rows(shard)
        batches += [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]
    return batches


class PendingBatch:
    """A batch that was given to the encoder; its rows are on their way to the host."""

    def __init__(self, encoder: Encoder, batch: Prepared) -> None:
        assert batch.pixels is not None
        pixels = batch.pixels.pin_memory() if encoder.device.type == "cuda" else batch.pixels
        rows = encoder.encode(pixels)[: batch.num_photographs].contiguous()
        self.rows, self.done = rows, None
        if rows.is_cuda:
            self.rows = torch.empty(rows.shape, dtype=rows.dtype, pin_memory=True)
            self.rows.copy_(rows, non_blocking=True)
            self.done = torch.cuda.Event()
            self.done.record(torch.cuda.current_stream(rows.device))

    def wait(self) -> Tensor:
        """Return the rows, on the host."""
        if self.done is not None:
            self.done.synchronize()
        return self.rows


class ShardWriter:
    """Takes rows in the order of the shards; a thread of its own hashes and writes each full shard.

    At most `WAITING` full shards are in memory. An error while writing is raised by the next `add`, or by `close`.
    """

    def __init__(self, store: Store, shards: Sequence[int], stages: Stages) -> None:
        self.store = store
        self.shards = iter(shards)
        self.stages = stages
        self.spec = store.plan.arrays[0]
        self.thread = ThreadPoolExecutor(1)
        self.writing: deque[Future[None]] = deque()
        self._next_shard()

    def _next_shard(self) -> None:
        self.shard = next(self.shards, -1)
        num_rows = len(self.store.shard_rows(self.shard)) if self.shard >= 0 else 0
        self.values = np.empty((num_rows, *self.spec.shape), self.spec.storage)
        self.filled = 0

    def add(self, rows: Tensor) -> None:
        """The next rows; none of them belongs to another shard than the first."""
        while self.writing and self.writing[0].done():
            self.writing.popleft().result()
        self.values[self.filled : self.filled + len(rows)] = to_numpy(rows)
        self.filled += len(rows)
        if self.filled == len(self.values):
            while len(self.writing) >= WAITING:
                self.writing.popleft().result()
            self.writing.append(self.thread.submit(self._write, self.shard, self.values))
            self._next_shard()

    def _write(self, shard: int, values: np.ndarray) -> None:
        with self.stages.timed("write"):
            self.store.write_shard(shard, {self.spec.name: values})

    def close(self) -> None:
        """Wait until everything is written. Raises the first error."""
        while self.writing:
            self.writing.popleft().result()


@dataclass
class Feed:
    """The batches of some shards, in order, as reading processes hand them over."""

    batches: Iterator[Prepared]
    num_workers: int

    def peek(self) -> Prepared:
        """Return the next batch, which is still to come."""
        first = next(self.batches)
        self.batches = chain([first], self.batches)
        return first


@contextmanager
def feed(
    store: Store, encoder: Encoder, pending: Sequence[int], source: Source, batch_size: int, spool: Spool
) -> Iterator[Feed]:
    """Read the batches of the pending shards ahead, from the start of the block on.

    `spool`: photographs that need not be read again.
    """
    batches = batches_of(store, pending, batch_size)
    tasks = [[None if row.sha256 in spool else row for row in batch] for batch in batches]
    num_to_read = sum(row is not None for task in tasks for row in task)
    batch_bytes = item_bytes(encoder.prepare) * batch_size
    workers, note = workers_for(num_to_read, len(batches), source.num_workers, batch_bytes)
    if note:
        logger.info("%s: %s", encoder.spec.name, note)
    with in_processes(ReadBatch(source, encoder.prepare, batch_size), tasks, workers) as prepared:
        yield Feed(_filled(prepared, batches, spool), workers)


def encode_shards(
    store: Store, encoder: Encoder, pending: Sequence[int], fed: Feed, quiet: bool = False
) -> None:
    """Encode and commit the pending shards. Raises ImageError if a photograph changed since it was listed."""
    stages = Stages()
    total = sum(len(store.shard_rows(shard)) for shard in pending)
    bar = progress(total=total, desc=encoder.spec.name, unit=" images", smoothing=0.1, disable=quiet)
    with bar:
        writer = ShardWriter(store, pending, stages)
        try:
            for rows in _encoded(fed.batches, encoder, stages):
                writer.add(rows)
                bar.set_postfix_str(f"bound by {stages.bound(fed.num_workers)}", refresh=False)
                bar.update(len(rows))
            writer.close()
        finally:
            writer.thread.shutdown()  # after an error too: a shard that is full is not lost
        elapsed = bar.format_dict["elapsed"]
    if not quiet:
        rate, bound = total / max(elapsed, 1e-9), stages.bound(fed.num_workers)
        logger.info(f"{encoder.spec.name}: {counted(total, 'image')}, {rate:,.1f} images/s, bound by {bound}")


def _filled(
    prepared: Iterable[Prepared], batches: Sequence[Sequence[ImageEntry]], spool: Spool
) -> Iterator[Prepared]:
    """Yield the batches with the photographs of the spool in their places."""
    for batch, rows in zip(prepared, batches, strict=True):
        if batch.pixels is not None:
            start = time.perf_counter()
            for place, row in zip(batch.pixels, rows, strict=False):
                if row.sha256 in spool:
                    spool.read_into(place, row.sha256)
            batch.seconds["read"] += time.perf_counter() - start
        yield batch


def _encoded(batches: Iterable[Prepared], encoder: Encoder, stages: Stages) -> Iterator[Tensor]:
    """Yield the rows of each batch on the host, while the encoder already has the batch after it.

    Raises the error of a batch after the rows of the batches before it.
    """
    waiting: deque[PendingBatch] = deque()
    error: ImageError | None = None
    for batch in batches:
        stages.add(batch.seconds)
        error = batch.error
        if error is not None:
            break
        with stages.timed("encode"):
            waiting.append(PendingBatch(encoder, batch))
            rows = waiting.popleft().wait() if len(waiting) == IN_FLIGHT else None
        if rows is not None:
            yield rows
    for last in waiting:
        with stages.timed("encode"):
            rows = last.wait()
        yield rows
    if error is not None:
        raise error
