"""Rows of a cache as they were written, for any number of threads and processes, in the memory of none of them."""

import hashlib
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from forks import fork
from jobs import read_twice

from theworld.data.vsr import Statement
from theworld.extraction import features
from theworld.extraction.features import CachedFeatures, KeptRows, in_cache, to_numpy
from theworld.store.shard import ArraySpec, ImageEntry
from theworld.store.writer import Store
from theworld.utils import files
from theworld.utils.files import StoreError

NUM_IMAGES, SHARD_SIZE = 3000, 64


def name(number: int) -> str:
    return f"{number:04}.jpg"


def entry(number: int) -> ImageEntry:
    """The images 10 and 11 have equal bytes."""
    content = 10 if number == 11 else number
    return ImageEntry(name(number), hashlib.sha256(str(content).encode()).hexdigest())


def build(root: Path, dtype: str, shape: tuple[int, ...], num_images: int = NUM_IMAGES) -> torch.Tensor:
    """A finished store of random numbers; what its images hold, [num_images, *shape]."""
    images = [entry(number) for number in range(num_images)]
    store = Store.create(root, {"model": "x"}, images, [ArraySpec("latents", shape, dtype)], SHARD_SIZE)
    generator = torch.Generator().manual_seed(0)
    values = torch.randn((num_images, *shape), generator=generator).to(getattr(torch, dtype))
    if num_images > 11:
        values[11] = values[10]
    for shard in store.pending():
        chosen = [int(row.path.removesuffix(".jpg")) for row in store.shard_rows(shard)]
        store.write_shard(shard, {"latents": to_numpy(values[chosen])})
    store.publish()
    return values


def flip(root: Path, shard: int) -> None:
    """Another bit in the last byte of a shard: of its last row."""
    path = root / f"shards/{shard:05}.h5"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("dtype", "shape"), [("bfloat16", (4, 3)), ("float32", (2,)), ("float16", ()), ("float32", (1, 4000))]
)
def test_rows_are_those_that_were_written(tmp_path: Path, dtype: str, shape: tuple[int, ...]) -> None:
    values = build(tmp_path, dtype, shape)
    rows = CachedFeatures(tmp_path)
    for chosen in (range(NUM_IMAGES), [11, 10, 11], [2999], np.random.default_rng(0).integers(0, 3000, 500)):
        chosen = list(map(int, chosen))
        found = rows([name(number) for number in chosen])
        assert found.dtype == values.dtype
        assert torch.equal(found, values[chosen])
    assert rows([]).shape == (0, *shape)


def test_rows_are_the_callers_own(tmp_path: Path) -> None:
    values = build(tmp_path, "bfloat16", (3,), 100)
    rows = CachedFeatures(tmp_path)
    found = rows([name(11), name(3), name(11)])
    found += 1
    assert torch.equal(rows([name(11), name(3)]), values[[10, 3]])


def test_many_threads_read_at_the_same_time(tmp_path: Path) -> None:
    values = build(tmp_path, "bfloat16", (512,))
    rows, wrong = CachedFeatures(tmp_path), []

    def step(seed: int) -> None:
        generator = np.random.default_rng(seed)
        for _ in range(50):
            chosen = generator.integers(0, NUM_IMAGES, 16).tolist()
            if not torch.equal(rows([name(number) for number in chosen]), values[chosen]):
                wrong.append(chosen)

    threads = [threading.Thread(target=step, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert wrong == []


def test_processes_that_read_at_the_same_time_hold_no_copy_of_the_store(tmp_path: Path) -> None:
    values = build(tmp_path, "float32", (8192,))  # 94 MiB
    outputs = [tmp_path / f"{number}.txt" for number in range(2)]
    processes = [fork(read_twice, str(tmp_path), str(output)) for output in outputs]
    wanted = hashlib.sha256(values.numpy().tobytes() * 2).hexdigest()
    for process, output in zip(processes, outputs, strict=True):
        process.join(120)
        assert process.exitcode == 0
        digest, grown = output.read_text().split()
        assert digest == wanted
        assert int(grown) < 8 * 1024  # KiB: batches of half a MiB, and what the allocator keeps of them


def test_a_damaged_row_is_found_with_the_same_words_by_each_call(tmp_path: Path) -> None:
    values = build(tmp_path, "bfloat16", (8,))
    flip(tmp_path, 7)
    last, shard = 7 * SHARD_SIZE + SHARD_SIZE, [name(n) for n in range(7 * SHARD_SIZE, 8 * SHARD_SIZE + 1)]
    rows, messages = CachedFeatures(tmp_path), []
    for call in (
        lambda: rows.reader.read(name(last), "latents"),
        lambda: rows([name(last)]),
        lambda: rows(shard),
        lambda: rows([name(last)]),
    ):
        with pytest.raises(StoreError) as caught:
            call()
        messages.append(str(caught.value))
    assert set(messages) == {messages[0]}
    assert f"00007.h5 is damaged: latents of image '{name(last)}' has CRC-32" in messages[0]
    flip(tmp_path, 7)
    assert torch.equal(rows([name(last)]), values[[last]])


def test_an_image_that_is_not_there_is_named(tmp_path: Path) -> None:
    build(tmp_path, "float32", (1,), 20)
    rows = CachedFeatures(tmp_path)
    with pytest.raises(StoreError, match=r"'0004.jpeg' is not one of the 20 in .*; nearest: '0004.jpg'"):
        rows([name(3), "0004.jpeg"])
    with pytest.raises(
        StoreError,
        match=r"none is not there; name another --cache, or make it with: python tools/extract_latents.py ",
    ):
        CachedFeatures(tmp_path / "none")


def test_bfloat16_goes_to_the_store_as_its_bits_in_the_same_memory() -> None:
    tensor = torch.tensor([1.0, -2.0], dtype=torch.bfloat16)
    bits = to_numpy(tensor)
    assert bits.tolist() == [0x3F80, 0xC000]
    bits[0] = 0x4040
    assert tensor.tolist() == [3.0, -2.0]


def test_rows_on_the_fly_are_computed_once_and_bounded_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "KEPT_BYTES", 3 * 8)  # three rows
    computed: list[str] = []

    def compute(image: str) -> torch.Tensor:
        computed.append(image)
        return torch.full((2,), float(image))

    rows = KeptRows(compute)
    assert rows(["1", "2", "1"]).tolist() == [[1.0, 1.0], [2.0, 2.0], [1.0, 1.0]]
    rows(["3", "2", "1"])
    assert computed == ["1", "2", "3"]
    rows(["4"])  # in place of 3, which was used longest ago
    rows(["1", "2", "4"])
    assert computed == ["1", "2", "3", "4"]
    rows(["3"])
    assert computed == ["1", "2", "3", "4", "3"]
    assert (len(rows.rows), rows.num_bytes) == (3, 24)


def test_statements_about_images_that_were_left_out_are_counted(tmp_path: Path) -> None:
    build(tmp_path / "latents", "float32", (1,), 20)
    rows = CachedFeatures(tmp_path / "latents")
    images = [name(1), name(1), "lost.jpg", name(2)]
    statements = [Statement(image, "caption", 1, "on", index) for index, image in enumerate(images)]
    with pytest.raises(StoreError, match=r"lacks 1 of 3 images that the statements name, such as lost.jpg"):
        in_cache(statements, rows, tmp_path)
    other = [Statement(name(1).upper(), "caption", 1, "on", 0)]
    with pytest.raises(
        StoreError, match=rf"such as {name(1).upper()} \(it has '{name(1)}', which differs in upper"
    ):
        in_cache(other, rows, tmp_path)
    (tmp_path / files.FAILURES).write_text('{"path": "lost.jpg", "reason": "missing"}\n')
    kept, note = in_cache(statements, rows, tmp_path)
    assert [statement.index for statement in kept] == [0, 1, 3]
    assert note == "3 of 4 statements, 2 of 3 images (1 left out by --allow_missing)"
