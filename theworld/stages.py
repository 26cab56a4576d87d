"""The way of photographs through an encoder into the shards of a store.

    read ─> decode ─> encode ─> write      read and decode in processes ahead of the encoder, write in a thread behind

A batch depends on nothing but the frozen list, the shard size and the batch size, and all batches have one shape, so
any run, however often interrupted and among however many processes shared, gives the same files. Batches follow
each other without a gap from shard to shard.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from theworld.cache import to_numpy
from theworld.console import progress
from theworld.encodings import Encoding
from theworld.images import ImageError
from theworld.reading import Batches, Prepared, Source, in_processes, workers_for
from theworld.store import ImageEntry, Store

IN_FLIGHT = 2  # batches on the GPU: the next one is there before the host has the last one's result
WAITING = 2  # full shards in memory that are not written yet


@dataclass
class Stages:
    """Seconds of work in each stage; read and decode are shared by several processes."""

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
        """Adds the time the block takes to `stage`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.add({stage: time.perf_counter() - start})

    def bound(self, num_workers: int) -> str:
        """The stage that the others wait for."""
        shared = {"read": num_workers, "decode": num_workers}
        return max(self.seconds, key=lambda s: self.seconds[s] / max(1, shared.get(s, 1)))


def batches_of(store: Store, shards: Sequence[int], batch_size: int) -> list[list[ImageEntry]]:
    """The photographs of the shards in batches, none of which reaches into the next shard."""
    batches = []
    for shard in shards:
        rows = store.shard_rows(shard)
        batches += [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]
    return batches


class Flight:
    """A batch that was given to the encoder, and its rows on their way to the host: nothing waits until `land`."""

    def __init__(self, encoding: Encoding, batch: Prepared) -> None:
        assert batch.pixels is not None
        rows = encoding.encode(batch.pixels)[: batch.num_photographs].contiguous()
        self.rows, self.done = rows, None
        if rows.is_cuda:
            self.rows = torch.empty(rows.shape, dtype=rows.dtype, pin_memory=True)
            self.rows.copy_(rows, non_blocking=True)
            self.done = torch.cuda.Event()
            self.done.record(torch.cuda.current_stream(rows.device))

    def land(self) -> Tensor:
        """The rows, on the host."""
        if self.done is not None:
            self.done.synchronize()
        return self.rows


class ShardWriter:
    """Takes rows in the order of the shards; hashes and writes each full shard in a thread of its own.

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
        """Waits until all is written. Raises the first error of what was left."""
        while self.writing:
            self.writing.popleft().result()


def encode_shards(
    store: Store,
    encoding: Encoding,
    pending: Sequence[int],
    source: Source,
    batch_size: int,
    quiet: bool = False,
    log: Callable[[str], None] = tqdm.write,
) -> None:
    """Encodes and commits the pending shards. Raises ImageError if a photograph changed since it was listed."""
    stages = Stages()
    batches = batches_of(store, pending, batch_size)
    total = sum(len(batch) for batch in batches)
    blank = encoding.prepare(np.zeros((16, 16, 3), np.uint8))
    workers, note = workers_for(total, len(batches), source.num_workers, blank.nbytes * batch_size)
    if note and not quiet:
        log(f"{encoding.name}: {note}")
    items = Batches(batches, source, encoding.prepare, batch_size)
    bar = progress(total=total, desc=encoding.name, unit=" images", smoothing=0.1, disable=quiet)
    with bar, in_processes(items, workers, pinned=encoding.device.type == "cuda") as prepared:
        writer = ShardWriter(store, pending, stages)
        try:
            for rows in _encoded(prepared, encoding, stages):
                writer.add(rows)
                bar.set_postfix_str(f"bound by {stages.bound(workers)}", refresh=False)
                bar.update(len(rows))
            writer.close()
        finally:
            writer.thread.shutdown()  # after an error too: a shard that is full is not lost
        elapsed = bar.format_dict["elapsed"]
    if not quiet:
        rate = total / max(elapsed, 1e-9)
        log(f"{encoding.name}: {total:,} images, {rate:,.1f} images/s, bound by {stages.bound(workers)}")


def _encoded(loader: Iterable[Prepared], encoding: Encoding, stages: Stages) -> Iterator[Tensor]:
    """The rows of each batch on the host, while the encoder already has the batch after it.

    Raises the error of a batch after the rows of those before it.
    """
    flying: deque[Flight] = deque()
    error: ImageError | None = None
    for batch in loader:
        stages.add(batch.seconds)
        error = batch.error
        if error is not None:
            break
        with stages.timed("encode"):
            flying.append(Flight(encoding, batch))
            rows = flying.popleft().land() if len(flying) == IN_FLIGHT else None
        if rows is not None:
            yield rows
    for flight in flying:
        with stages.timed("encode"):
            rows = flight.land()
        yield rows
    if error is not None:
        raise error
