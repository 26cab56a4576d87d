"""Photographs read, hashed and decoded, in processes of their own.

    list     each photograph's hash, and whether it decodes (`ListPhotographs`)
    batch    the photographs of a batch as an encoder takes them (`ReadBatch`), but for those that are in the spool

The processes come from a server that is started afresh and has imported this module alone: nothing of the encoder, of
CUDA or of OpenMP in the main process reaches them. They ignore signals, and end with the main process.
"""

import os
import shutil
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import connection, forkserver, get_context, parent_process
from pathlib import Path
from tempfile import SpooledTemporaryFile
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from theworld.data.images import ImageError, decode, read_bytes, sha256
from theworld.store.shard import ImageEntry
from theworld.utils.starting import starting_workers

FEW = 64  # photographs that are read in this process: to start others takes longer
AHEAD = 2  # tasks that each process is ahead
SHARED_MEMORY = Path("/dev/shm")
SPOOL_MEMORY = 256 * 2**20  # bytes of a spool that stay in memory
PRELOAD = [__name__]  # what the server imports

Prepare = Callable[[np.ndarray], Tensor]
Task = TypeVar("Task")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Source:
    """Where photographs come from, under which limits; `num_workers` processes read them, 0: this one."""

    folder: Path
    max_image_pixels: int
    num_workers: int
    follow_links: bool = False


# ---- processes


def num_workers(configured: int | None, processes_here: int = 1) -> int:
    """Return how many processes read: as configured, or one per core, shared by the runs `processes_here`."""
    if configured is not None:
        return configured
    return max(1, len(os.sched_getaffinity(0)) // processes_here)


def workers_for(num_photographs: int, num_tasks: int, wanted: int, result_bytes: int = 0) -> tuple[int, str]:
    """Return the number of processes to start for `num_tasks`, and a note if memory is too short for all of them.

    Results of `result_bytes` come back through /dev/shm, of which a container may have little.
    """
    workers = min(wanted, num_tasks) if num_photographs >= FEW else 0
    if workers == 0 or result_bytes == 0 or not SHARED_MEMORY.is_dir():
        return workers, ""
    free = shutil.disk_usage(SHARED_MEMORY).free
    room = free // ((AHEAD + 1) * result_bytes)
    if room >= workers:
        return workers, ""
    return room, (
        f"{room} of {workers} reading processes: {SHARED_MEMORY} has {free / 2**20:,.0f} MiB free and each needs "
        f"{(AHEAD + 1) * result_bytes / 2**20:,.0f}; give it more (docker run --shm-size), or fewer --num_workers"
    )


@contextmanager
def in_processes(
    work: Callable[[Task], Result], tasks: Sequence[Task], workers: int
) -> Iterator[Iterator[Result]]:
    """Yield the results of `work` in the order of its tasks, made by so many processes (0: this one), a few ahead.

    `work`, tasks and results are pickled; tensors of results come through shared memory. The processes have ended when
    the block is left, however it is left. Raises OSError if one of them is killed, as Linux does when memory is short.
    """
    if workers == 0:
        yield map(work, tasks)
        return
    context = get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    with starting_workers():
        forkserver.ensure_running()
    pool = ProcessPoolExecutor(workers, context, _begin, (work,))
    try:
        yield _in_order(pool, tasks, AHEAD * workers)
    except BrokenProcessPool as error:
        raise OSError(
            "a reading process has died, perhaps because memory is short: try fewer --num_workers. A program that "
            'calls theworld.extract has to do so under `if __name__ == "__main__":`'
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _in_order(pool: ProcessPoolExecutor, tasks: Sequence[Task], ahead: int) -> Iterator[Any]:
    waiting: deque[Future[Any]] = deque()
    for task in tasks:
        waiting.append(pool.submit(_do, task))
        if len(waiting) > ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


_work: Callable[[Any], Any]  # of a reading process


def _begin(work: Callable[[Any], Any]) -> None:
    """Begin a reading process. A signal to the whole group is for the main process, which ends its workers."""
    global _work
    _work = work
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    torch.set_num_threads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)


def _do(task: Any) -> Any:
    return _work(task)


# ---- what they do


def read_photograph(row: ImageEntry, source: Source, seconds: dict[str, float]) -> np.ndarray:
    """Return the pixels uint8[H, W, 3] of a listed photograph; adds the time it took to `seconds`.

    Raises ImageError if it cannot be read, or is not the one that was listed.
    """
    start = time.perf_counter()
    data = read_bytes(source.folder, row.path, follow_links=source.follow_links)
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


class Listed(NamedTuple):
    """What was found at some paths."""

    images: list[ImageEntry]
    failures: list[tuple[str, str]]  # path and reason
    decoded: list[str]  # the SHA-256 of each of `prepared`
    prepared: Tensor | None  # [len(decoded), ...]


@dataclass(frozen=True)
class ListPhotographs:
    """The listing of some paths: each photograph is decoded, but for those that `known` has with the same bytes."""

    source: Source
    prepare: Prepare | None  # None: what is decoded is not kept

    def __call__(self, known: Mapping[str, str | None]) -> Listed:
        """`known`: the paths, with the SHA-256 of photographs that are known to decode."""
        found = Listed([], [], [], None)
        prepared = []
        for path, digest in known.items():
            try:
                data = read_bytes(self.source.folder, path, follow_links=self.source.follow_links)
                actual = sha256(data)
                if actual != digest:
                    pixels = decode(data, path, max_pixels=self.source.max_image_pixels)
                    if self.prepare is not None:
                        prepared.append(self.prepare(pixels))
                        found.decoded.append(actual)
            except ImageError as error:
                found.failures.append((path, error.reason))
            else:
                found.images.append(ImageEntry(path, actual))
        return found._replace(prepared=torch.stack(prepared) if prepared else None)


class Prepared(NamedTuple):
    """A batch as a reading process hands it over: `num_photographs`, then padding up to the batch size."""

    # uint8 or float32 [batch size, ...], as the encoder's `prepare` makes one; None with an error
    pixels: Tensor | None
    num_photographs: int
    # of work in the stages read and decode
    seconds: dict[str, float]
    # a value, not raised: the rows of the batches before it come first
    error: ImageError | None


@dataclass(frozen=True)
class ReadBatch:
    """The reading of a batch: its photographs are read, decoded, prepared and padded to `batch_size`."""

    source: Source
    prepare: Prepare
    batch_size: int

    def __call__(self, rows: Sequence[ImageEntry | None]) -> Prepared:
        """`rows`: the photographs; None: one whose place is left blank."""
        seconds = {"read": 0.0, "decode": 0.0}
        blank = self.prepare(np.zeros((16, 16, 3), np.uint8))
        pixels = blank.new_zeros((self.batch_size, *blank.shape))
        for i, row in enumerate(rows):
            if row is None:
                continue
            try:
                photograph = read_photograph(row, self.source, seconds)
            except ImageError as error:
                return Prepared(None, len(rows), seconds, error)
            start = time.perf_counter()
            pixels[i] = self.prepare(photograph)
            seconds["decode"] += time.perf_counter() - start
        return Prepared(pixels, len(rows), seconds, None)


class Spool:
    """Photographs between their listing, which decodes them, and their batch, so that each is decoded once.

    They are kept as an encoder takes them: in memory, and from SPOOL_MEMORY on in a file without a name in the system's
    folder for temporary files ($TMPDIR), which is gone with this process. A JPEG of 640 x 480 pixels and 130 KB, kept
    as 512 x 512, takes 12 to 13 ms of one core on the whole way, and 16 if it is read and decoded twice.
    """

    def __init__(self, prepare: Prepare) -> None:
        self.prepare = prepare
        self._file = SpooledTemporaryFile(SPOOL_MEMORY)  # noqa: SIM115 - closed with the spool
        self._places: dict[str, int] = {}  # by SHA-256

    def __contains__(self, sha256: str) -> bool:
        return sha256 in self._places

    @property
    def item_bytes(self) -> int:
        """The bytes of one prepared photograph."""
        return self.prepare(np.zeros((16, 16, 3), np.uint8)).nbytes

    def put(self, sha256: str, prepared: Tensor) -> None:
        """Keep a prepared photograph. Raises OSError if the disk is full."""
        if sha256 not in self._places:
            self._places[sha256] = self._file.seek(0, os.SEEK_END)
            self._file.write(prepared.contiguous().numpy().reshape(-1).data)

    def read_into(self, out: Tensor, sha256: str) -> None:
        """Copy a photograph that was put here into `out`, which is contiguous."""
        data = out.numpy().reshape(-1).view(np.uint8).data
        self._file.seek(self._places[sha256])
        assert self._file.readinto(data) == len(data)

    def close(self) -> None:
        """Give back the room."""
        self._file.close()
