"""Batches of photographs, made in this process or in others."""

import multiprocessing
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from theworld import reading
from theworld.images import read_image, sha256
from theworld.reading import Batches, Prepared, Source, in_processes, num_workers, workers_for
from theworld.store import ImageEntry


def corner(pixels: np.ndarray) -> Tensor:
    """uint8[H, W, 3] -> uint8[2, 3]"""
    return torch.from_numpy(pixels[0, :2].copy())


@pytest.fixture
def rows(photographs: Path) -> list[ImageEntry]:
    names = ("a.png", "b.png", "c.png")
    return [ImageEntry(name, sha256((photographs / name).read_bytes())) for name in names]


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_come_in_order_padded_with_zeros_and_timed(
    photographs: Path, rows: list[ImageEntry], workers: int
) -> None:
    source = Source(photographs, 10**6, workers)
    with in_processes(Batches([rows[:2], rows[2:], rows[1:]], source, corner, 2), workers) as items:
        found: list[Prepared] = list(items)
    assert [batch.num_photographs for batch in found] == [2, 1, 2]
    corners = [corner(read_image(photographs, row.path)) for row in rows]
    wanted = [corners[:2], [corners[2], torch.zeros(2, 3, dtype=torch.uint8)], corners[1:]]
    for batch, one in zip(found, wanted, strict=True):
        assert batch.pixels is not None
        assert torch.equal(batch.pixels, torch.stack(one))
        assert batch.seconds.keys() == {"read", "decode"}
        assert all(seconds > 0 for seconds in batch.seconds.values())


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unusable_photograph_comes_back_as_its_error(
    photographs: Path, rows: list[ImageEntry], workers: int
) -> None:
    changed = ImageEntry("b.png", "0" * 64)
    batches = Batches(
        [[rows[0], changed], [ImageEntry("gone.png", "0" * 64)]], Source(photographs, 10**6, 1), corner, 2
    )
    with in_processes(batches, workers) as items:
        first, second = items
    assert first.pixels is None
    assert str(first.error) == (
        f"b.png: changed while extracting: SHA-256 was {'0' * 64}, is {rows[1].sha256}; run again"
    )
    assert str(second.error) == f"gone.png: no such file in {photographs}"


def test_workers_run_on_one_thread_and_leave_signals_to_the_main_process(
    photographs: Path, rows: list[ImageEntry]
) -> None:
    def look(_: np.ndarray) -> Tensor:
        ignored = [signal.getsignal(s) == signal.SIG_IGN for s in (signal.SIGINT, signal.SIGTERM)]
        return torch.tensor([torch.get_num_threads(), *ignored, os.getpid() != main])

    main = os.getpid()
    with in_processes(Batches([rows[:1]], Source(photographs, 10**6, 1), look, 1), 1) as items:
        (batch,) = items
    assert batch.pixels.tolist() == [[1, 1, 1, 1]]


def test_a_killed_worker_is_an_error_in_words(photographs: Path, rows: list[ImageEntry]) -> None:
    def die(_: np.ndarray) -> Tensor:
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError

    batches = Batches([rows[:1]], Source(photographs, 10**6, 1), die, 1)
    words = r"a reading process has died: DataLoader worker .*\. Try fewer --num_workers"
    with pytest.raises(OSError, match=words), in_processes(batches, 1) as items:
        list(items)


def test_workers_end_with_the_block(photographs: Path, rows: list[ImageEntry]) -> None:
    batches = Batches([rows[:1]] * 20, Source(photographs, 10**6, 2), corner, 1)
    with in_processes(batches, 2) as items:
        next(items)
        assert len(multiprocessing.active_children()) == 2
    assert multiprocessing.active_children() == []


def test_workers_are_as_many_as_cores_unless_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(12)))
    assert [num_workers(None), num_workers(None, 4), num_workers(None, 100)] == [12, 3, 1]
    assert [num_workers(0), num_workers(5, 4)] == [0, 5]


def test_few_photographs_start_no_process_and_little_shared_memory_fewer(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert workers_for(63, 8, 4) == (0, "")
    assert workers_for(64, 8, 4) == (4, "")
    assert workers_for(64, 3, 4) == (3, "")
    monkeypatch.setattr(reading, "SHARED_MEMORY", tmp_path)
    free = reading.shutil.disk_usage(tmp_path)._replace(free=64 * 2**20)
    monkeypatch.setattr(reading.shutil, "disk_usage", lambda _: free)
    assert workers_for(64, 8, 4, item_bytes=5 * 2**20) == (4, "")
    workers, note = workers_for(64, 8, 4, item_bytes=8 * 2**20)
    assert workers == 2
    assert note.startswith(
        f"2 of 4 reading processes: {tmp_path} has 64 MiB free and each needs 24; give it more"
    )
