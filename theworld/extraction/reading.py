"""Photographs read, hashed and decoded, in processes of their own.

    list     each photograph's hash, and whether it decodes (`ListPhotographs`); what is decoded goes into the spool
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
from itertools import islice
from multiprocessing import connection, get_context, parent_process, reduction
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from theworld.data.images import ImageError, decode, read_bytes, sha256
from theworld.store.shard import ImageEntry
from theworld.utils.starting import start_server
from theworld.utils.text import byte_size, counted

FEW = 64  # photographs that are read in this process: to start others takes longer
AHEAD = 2  # tasks that each process is ahead
SHARED_MEMORY = Path("/dev/shm")
SPOOL_MEMORY = 256 * 2**20  # bytes of the largest spool that stays in memory

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
    processes = counted(workers, "reading process", "reading processes")
    return room, (
        f"{room} of {processes}: {SHARED_MEMORY} has {byte_size(free)} free and each needs "
        f"{byte_size((AHEAD + 1) * result_bytes)}; give it more (docker run --shm-size), or fewer --num_workers"
    )


@contextmanager
def in_processes(
    work: Callable[[Task], Result], tasks: Sequence[Task], workers: int
) -> Iterator[Iterator[Result]]:
    """Yield the results of `work` in the order of its tasks, made by so many processes (0: this one), a few ahead.

    Processes begin at once; this one does a task when its result is wanted. `work`, tasks and results are pickled;
    tensors of results come through shared memory. The processes have ended when the block is left, however it is left.
    Raises OSError if one of them is killed, as Linux does when memory is short.
    """
    if workers == 0:
        yield map(work, tasks)
        return
    start_server()
    pool = ProcessPoolExecutor(workers, get_context("forkserver"), _begin, (work,))
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
    rest = iter(tasks)
    waiting = deque[Future[Any]](pool.submit(_do, task) for task in islice(rest, ahead))

    def results() -> Iterator[Any]:
        for task in rest:
            waiting.append(pool.submit(_do, task))
            yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()

    return results()


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


def item_bytes(prepare: Prepare) -> int:
    """Return the bytes of one prepared photograph."""
    return prepare(np.zeros((16, 16, 3), np.uint8)).nbytes


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


class Spool:
    """Photographs between their listing, which decodes them, and their batch, so that each is decoded once.

    They are kept as an encoder takes them, side by side in a file without a name, which is gone with the last process
    that has it: in memory, or from SPOOL_MEMORY on in the system's folder for temporary files ($TMPDIR). Reading
    processes write into the file themselves: a spool that is pickled for them as they start has the same file.
    """

    def __init__(self, prepare: Prepare, num_places: int = 0) -> None:
        """`num_places`: photographs that it can hold."""
        self.prepare = prepare
        self.item_bytes = item_bytes(prepare)
        self._places: dict[str, int] = {}  # by SHA-256
        if num_places * self.item_bytes <= SPOOL_MEMORY:
            self._file: Any = open(os.memfd_create("photographs"), "r+b", buffering=0)  # noqa: SIM115 - closed with the spool
        else:
            self._file = TemporaryFile(buffering=0)  # noqa: SIM115 - closed with the spool

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_file": reduction.DupFd(self._file.fileno())}

    def __setstate__(self, state: dict[str, Any]) -> None:
        file = open(state["_file"].detach(), "r+b", buffering=0)  # noqa: SIM115 - open as long as the process is
        self.__dict__ = state | {"_file": file}

    def __contains__(self, sha256: str) -> bool:
        return sha256 in self._places

    def write(self, place: int, prepared: Tensor) -> None:
        """Write a prepared photograph at a place. Raises OSError if the disk is full."""
        data = prepared.contiguous().numpy().reshape(-1).view(np.uint8).data
        assert len(data) == self.item_bytes
        done = 0
        while done < len(data):
            done += os.pwrite(self._file.fileno(), data[done:], place * self.item_bytes + done)

    def note(self, place: int, sha256: str) -> None:
        """Note that the photograph with this hash is at a place."""
        self._places.setdefault(sha256, place)

    def read_into(self, out: Tensor, sha256: str) -> None:
        """Copy a photograph that is here into `out`, which is contiguous."""
        data = out.numpy().reshape(-1).view(np.uint8).data
        assert len(data) == self.item_bytes
        start, done = self._places[sha256] * self.item_bytes, 0
        while done < len(data):
            count = os.preadv(self._file.fileno(), [data[done:]], start + done)
            assert count > 0
            done += count

    def close(self) -> None:
        """Give back the room."""
        self._file.close()


class Listed(NamedTuple):
    """What was found at some paths."""

    images: list[ImageEntry]
    failures: list[tuple[str, str]]  # path and reason
    spooled: list[tuple[int, str]]  # place in the spool and SHA-256


@dataclass(frozen=True)
class ListPhotographs:
    """The listing of some paths: each photograph is decoded, but for those that `known` has with the same bytes."""

    source: Source
    spool: Spool | None  # None: what is decoded is not kept

    def __call__(self, task: tuple[int, Mapping[str, str | None]]) -> Listed:
        """`task`: the place of the first path in the spool; the paths, with the SHA-256 of photographs that are known
        to decode."""
        first, known = task
        found = Listed([], [], [])
        for place, (path, digest) in enumerate(known.items(), first):
            try:
                data = read_bytes(self.source.folder, path, follow_links=self.source.follow_links)
                actual = sha256(data)
                if actual != digest:
                    pixels = decode(data, path, max_pixels=self.source.max_image_pixels)
                    if self.spool is not None:
                        self.spool.write(place, self.spool.prepare(pixels))
                        found.spooled.append((place, actual))
            except ImageError as error:
                found.failures.append((path, error.reason))
            else:
                found.images.append(ImageEntry(path, actual))
        return found


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
