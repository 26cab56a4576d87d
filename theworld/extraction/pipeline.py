"""The way of photographs through an encoder into the shards of a store.

    read ─> decode ─> encode ─> write      read and decode in processes ahead of the encoder, write in a thread behind

A batch depends on nothing but the frozen list, the shard size and the batch size, and all batches have one shape, so
any run, however often interrupted and among however many processes shared, gives the same files. Batches follow
each other without a gap from shard to shard.

Photographs read and decoded in processes of their own, ahead of the encoder, in batches of fixed membership.

The processes are those of torch's DataLoader. They are forked, so nothing of the encoder is sent to them, and they do
nothing but PIL and NumPy on one thread each: a GPU that the main process uses does not matter to them.
"""

import os
import shutil
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from theworld.data.images import ImageError, decode, read_bytes, sha256
from theworld.extraction.features import to_numpy
from theworld.models.encoder import Encoder
from theworld.store.shard import ImageEntry
from theworld.store.writer import Store
from theworld.utils.console import progress

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

    def __init__(self, encoder: Encoder, batch: Prepared) -> None:
        assert batch.pixels is not None
        rows = encoder.encode(batch.pixels)[: batch.num_photographs].contiguous()
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
    encoder: Encoder,
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
    blank = encoder.prepare(np.zeros((16, 16, 3), np.uint8))
    workers, note = workers_for(total, len(batches), source.num_workers, blank.nbytes * batch_size)
    if note and not quiet:
        log(f"{encoder.spec.name}: {note}")
    items = Batches(batches, source, encoder.prepare, batch_size)
    bar = progress(total=total, desc=encoder.spec.name, unit=" images", smoothing=0.1, disable=quiet)
    with bar, in_processes(items, workers, pinned=encoder.device.type == "cuda") as prepared:
        writer = ShardWriter(store, pending, stages)
        try:
            for rows in _encoded(prepared, encoder, stages):
                writer.add(rows)
                bar.set_postfix_str(f"bound by {stages.bound(workers)}", refresh=False)
                bar.update(len(rows))
            writer.close()
        finally:
            writer.thread.shutdown()  # after an error too: a shard that is full is not lost
        elapsed = bar.format_dict["elapsed"]
    if not quiet:
        rate = total / max(elapsed, 1e-9)
        log(f"{encoder.spec.name}: {total:,} images, {rate:,.1f} images/s, bound by {stages.bound(workers)}")


def _encoded(loader: Iterable[Prepared], encoder: Encoder, stages: Stages) -> Iterator[Tensor]:
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
            flying.append(Flight(encoder, batch))
            rows = flying.popleft().land() if len(flying) == IN_FLIGHT else None
        if rows is not None:
            yield rows
    for flight in flying:
        with stages.timed("encode"):
            rows = flight.land()
        yield rows
    if error is not None:
        raise error
