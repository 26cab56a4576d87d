"""The stream of batches through an encoder into shards, with an encoder that takes the mean."""

import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from theworld.data.images import ImageError, read_image, sha256
from theworld.extraction import pipeline, reading
from theworld.extraction.pipeline import ShardWriter, Stages, batches_of, encode_shards, feed
from theworld.extraction.reading import Prepared, Source, Spool
from theworld.models.encoder import EncoderSpec
from theworld.store.reader import StoreReader
from theworld.store.shard import ImageEntry
from theworld.store.writer import Store


class Mean:
    """Photographs to the mean of each channel."""

    name = "means"
    spec = EncoderSpec("means", (3,), "float32", None, {"model": "mean"})
    device = torch.device("cpu")

    def __init__(self) -> None:
        self.shapes: list[tuple[int, ...]] = []

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
    return Store.create(tmp_path / "store", Mean.spec.fingerprint(), rows, [Mean.spec.array], 5)


def encode(store: Store, mean: Mean, folder: Path, workers: int, batch_size: int, quiet: bool = True) -> None:
    source = Source(folder, 10**6, workers)
    with feed(store, mean, [0, 1, 2], source, batch_size, Spool(mean.prepare)) as fed:
        encode_shards(store, mean, [0, 1, 2], fed, quiet)


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
    monkeypatch.setattr(reading, "FEW", 1)
    caplog.set_level("INFO")
    mean = Mean()
    encode(store, mean, folder, workers, 2, quiet=False)
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

    class PendingBatch:
        def __init__(self, encoding: object, batch: Prepared) -> None:
            self.number = batch.num_photographs
            events.append(f"launch {self.number}")

        def wait(self) -> Tensor:
            events.append(f"wait {self.number}")
            return torch.zeros(self.number)

    monkeypatch.setattr(pipeline, "PendingBatch", PendingBatch)
    batches = [Prepared(torch.zeros(1), n, {}, None) for n in range(1, 5)]
    assert [len(rows) for rows in pipeline._encoded(batches, Mean(), Stages())] == [1, 2, 3, 4]
    assert events == [
        *("launch 1", "launch 2", "wait 1", "launch 3", "wait 2", "launch 4", "wait 3", "wait 4"),
    ]


def test_a_photograph_that_changed_stops_the_run_and_full_shards_stay(
    store: Store, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "FEW", 1)
    (folder / "10.png").write_bytes((folder / "09.png").read_bytes())
    with pytest.raises(ImageError, match=r"10\.png: changed while extracting: SHA-256 was"):
        encode(store, Mean(), folder, 2, 5)
    assert store.pending() == [2]


def test_an_error_of_the_writer_stops_the_run(
    store: Store, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(shard: int, arrays: dict[str, np.ndarray]) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store, "write_shard", refuse)
    with pytest.raises(OSError, match="No space left"):
        encode(store, Mean(), folder, 0, 2)
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
