"""The stream of batches through an encoder into shards, with an encoder that takes the mean.

Batches of photographs, made in this process or in others.
"""

import multiprocessing
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from theworld.data.images import ImageError, read_image, sha256
from theworld.extraction import pipeline
from theworld.extraction.pipeline import (
    Batches,
    Prepared,
    ShardWriter,
    Source,
    Stages,
    batches_of,
    encode_shards,
    in_processes,
    num_workers,
    workers_for,
)
from theworld.store.reader import StoreReader
from theworld.store.shard import ArraySpec, ImageEntry
from theworld.store.writer import Store


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
    monkeypatch.setattr(pipeline, "SHARED_MEMORY", tmp_path)
    free = pipeline.shutil.disk_usage(tmp_path)._replace(free=64 * 2**20)
    monkeypatch.setattr(pipeline.shutil, "disk_usage", lambda _: free)
    assert workers_for(64, 8, 4, item_bytes=5 * 2**20) == (4, "")
    workers, note = workers_for(64, 8, 4, item_bytes=8 * 2**20)
    assert workers == 2
    assert note.startswith(
        f"2 of 4 reading processes: {tmp_path} has 64 MiB free and each needs 24; give it more"
    )


class Mean:
    """Photographs to the mean of each channel."""

    name = "means"
    arrays = [ArraySpec("means", (3,), "float32")]  # noqa: RUF012
    device = torch.device("cpu")
    compiled = False

    def __init__(self) -> None:
        self.shapes: list[tuple[int, ...]] = []

    def fingerprint(self) -> dict[str, Any]:
        return {"model": "mean"}

    def prepare(self, pixels: np.ndarray) -> Tensor:
        return torch.from_numpy(pixels.astype(np.float32).mean((0, 1)))

    def encode(self, prepared: Tensor) -> Tensor:
        self.shapes.append(tuple(prepared.shape))
        return prepared * 1.0


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """11 photographs."""
    folder = tmp_path / "photographs"
    folder.mkdir()
    generator = np.random.default_rng(0)
    for i in range(11):
        Image.fromarray(generator.integers(0, 256, (4, 5, 3), dtype=np.uint8)).save(folder / f"{i:02}.png")
    return folder


@pytest.fixture
def store(folder: Path, tmp_path: Path) -> Store:
    """Shards of 5, 5 and 1."""
    rows = [ImageEntry(p.name, sha256(p.read_bytes())) for p in sorted(folder.iterdir())]
    return Store.create(tmp_path / "store", Mean().fingerprint(), rows, Mean.arrays, 5)


def test_no_batch_reaches_into_the_next_shard(store: Store) -> None:
    names = [[row.path[:2] for row in batch] for batch in batches_of(store, [0, 2, 1], 2)]
    wanted = [["00", "01"], ["02", "03"], ["04"], ["10"], ["05", "06"], ["07", "08"], ["09"]]
    assert names == wanted


@pytest.mark.parametrize("workers", [0, 2])
def test_every_batch_has_one_shape_and_every_row_its_photograph(
    store: Store,
    folder: Path,
    workers: int,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(pipeline, "FEW", 1)
    caplog.set_level("INFO")
    mean = Mean()
    encode_shards(store, mean, [0, 1, 2], Source(folder, 10**6, workers), 2)
    assert mean.shapes == [(2, 3)] * 7
    store.publish()
    reader = StoreReader(store.root)
    for path in sorted(p.name for p in folder.iterdir()):
        assert np.array_equal(reader.read(path, "means"), mean.prepare(read_image(folder, path)).numpy())
    (line,) = caplog.messages
    assert line.startswith("means: 11 images, ")


def test_a_batch_is_with_the_encoder_before_the_one_before_it_is_fetched(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    events: list[str] = []

    class Flight:
        def __init__(self, encoding: object, batch: Prepared) -> None:
            self.number = batch.num_photographs
            events.append(f"launch {self.number}")

        def land(self) -> Tensor:
            events.append(f"land {self.number}")
            return torch.zeros(self.number)

    monkeypatch.setattr(pipeline, "Flight", Flight)
    batches = [Prepared(torch.zeros(1), n, {}, None) for n in range(1, 5)]
    assert [len(rows) for rows in pipeline._encoded(batches, Mean(), Stages())] == [1, 2, 3, 4]
    assert events == [
        *("launch 1", "launch 2", "land 1", "launch 3", "land 2", "launch 4", "land 3", "land 4"),
    ]


def test_a_photograph_that_changed_stops_the_run_and_full_shards_stay(
    store: Store, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "FEW", 1)
    (folder / "10.png").write_bytes((folder / "09.png").read_bytes())
    with pytest.raises(ImageError, match=r"10\.png: changed while extracting: SHA-256 was"):
        encode_shards(store, Mean(), [0, 1, 2], Source(folder, 10**6, 2), 5, quiet=True)
    assert store.pending() == [2]


def test_an_error_of_the_writer_stops_the_run(
    store: Store, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(shard: int, arrays: dict[str, np.ndarray]) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store, "write_shard", refuse)
    with pytest.raises(OSError, match="No space left"):
        encode_shards(store, Mean(), [0, 1, 2], Source(folder, 10**6, 0), 2, quiet=True)
    assert store.pending() == [0, 1, 2]


def test_at_most_two_full_shards_wait_to_be_written(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    free, written = threading.Event(), []

    def write(shard: int, arrays: dict[str, np.ndarray]) -> None:
        free.wait(10)
        written.append((shard, len(arrays["means"])))

    monkeypatch.setattr(store, "write_shard", write)
    writer = ShardWriter(store, [0, 1, 2], Stages())
    writer.add(torch.zeros(5, 3))
    writer.add(torch.zeros(5, 3))
    assert len(writer.writing) == 2
    last = threading.Thread(target=writer.add, args=(torch.zeros(1, 3),))
    last.start()
    time.sleep(0.1)
    assert last.is_alive()  # it waits for the first
    free.set()
    last.join(10)
    writer.close()
    writer.thread.shutdown()
    assert written == [(0, 5), (1, 5), (2, 1)]


def test_the_bound_is_the_slowest_stage_with_its_processes() -> None:
    found = Stages()
    found.add({"read": 1.0, "decode": 8.0})
    found.add({"decode": 4.0, "encode": 5.0})
    assert found.seconds == {"read": 1.0, "decode": 12.0, "encode": 5.0, "write": 0.0}
    assert [found.bound(n) for n in (0, 1, 2, 3)] == ["decode", "decode", "decode", "encode"]
