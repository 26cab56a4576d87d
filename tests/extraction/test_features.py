"""Rows in memory: read ahead, beside the steps that need them, or not at all."""

import hashlib
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from theworld.data.vsr import Statement
from theworld.extraction import features
from theworld.extraction.features import Rows, as_tensor, in_cache, to_numpy
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


@pytest.mark.parametrize("num_threads", [1, 4])
@pytest.mark.parametrize(
    ("dtype", "shape"), [("bfloat16", (4, 3)), ("float32", (2,)), ("float16", ()), ("float32", (1, 4000))]
)
def test_rows_are_the_same_with_and_without_reading_ahead(
    tmp_path: Path, dtype: str, shape: tuple[int, ...], num_threads: int
) -> None:
    values = build(tmp_path, dtype, shape)
    ahead, behind = Rows(tmp_path, "latents"), Rows(tmp_path, "latents")
    assert ahead.preload(map(name, range(NUM_IMAGES)), num_threads) == NUM_IMAGES - 1
    for chosen in (range(NUM_IMAGES), [11, 10, 11], [2999], np.random.default_rng(0).integers(0, 3000, 500)):
        chosen = list(map(int, chosen))
        for rows in (ahead, behind):
            found = rows([name(number) for number in chosen])
            assert found.dtype == values.dtype
            assert torch.equal(found, values[chosen])


def test_what_is_in_memory_is_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = build(tmp_path, "bfloat16", (3,), 100)
    rows, read = Rows(tmp_path, "latents"), []
    real = rows.reader.read_row
    monkeypatch.setattr(rows.reader, "read_row", lambda row, *rest: (read.append(row), real(row, *rest))[1])
    rows([name(5), name(3), name(5)])
    assert read == [5, 3]
    assert rows.preload([name(7), name(3), name(10), name(11), name(6)], num_threads=1) == 4
    assert read == [5, 3, 6, 7, 10]  # in file order; 10 and 11 are one row
    found = rows([name(11), name(3)])
    assert read == [5, 3, 6, 7, 10]
    found += 1  # the caller's own
    assert torch.equal(rows([name(11), name(3)]), values[[10, 3]])


def test_rows_that_do_not_fit_are_read_each_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = build(tmp_path, "float32", (4,), 200)
    monkeypatch.setattr(features, "room_for_rows", lambda: 16 * 50)
    rows = Rows(tmp_path, "latents")
    assert rows.preload(map(name, range(100, 152))) == 0
    assert torch.equal(rows([name(100), name(1)]), values[[100, 1]])
    assert rows.preload(map(name, range(100, 150))) == 50
    assert torch.equal(rows([name(149), name(100)]), values[[149, 100]])
    assert torch.equal(rows([name(99), name(100)]), values[[99, 100]])
    assert rows.preload([name(100), name(1)]) == 1
    flip(tmp_path, 2)  # the row of image 192, which has no place
    with pytest.raises(StoreError, match=r"00002.h5 is damaged: latents of image '0192.jpg' has CRC-32"):
        rows([name(192)])


def test_steps_go_on_while_rows_are_read_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = build(tmp_path, "float32", (4,), 200)
    rows, go_on, waiting = Rows(tmp_path, "latents"), threading.Event(), threading.Semaphore(0)
    real, main = rows.reader.read_row, threading.current_thread()

    def read_row(row: int, array: str, out: np.ndarray | None = None) -> np.ndarray:
        if threading.current_thread() is not main:
            waiting.release()
            assert go_on.wait(30)
        return real(row, array, out)

    monkeypatch.setattr(rows.reader, "read_row", read_row)
    read: list[int] = []
    thread = threading.Thread(target=lambda: read.append(rows.preload(map(name, range(200)), 2)))
    thread.start()
    waiting.acquire()
    waiting.acquire()  # both threads are in the middle of a row
    everything = [name(number) for number in range(200)]
    assert torch.equal(rows(everything), values)
    assert read == []
    go_on.set()
    thread.join(30)
    assert read == [199]
    assert torch.equal(rows(everything), values)


def test_reading_ahead_ends_after_the_row_under_way(tmp_path: Path) -> None:
    build(tmp_path, "float32", (4,), 200)
    rows, stop = Rows(tmp_path, "latents"), threading.Event()
    stop.set()
    assert rows.preload(map(name, range(200)), 3, stop) == 3  # one for each thread


def test_many_threads_ask_for_rows_that_others_read_ahead(tmp_path: Path) -> None:
    values = build(tmp_path, "bfloat16", (512,))
    rows, wrong = Rows(tmp_path, "latents"), []

    def step(seed: int) -> None:
        generator = np.random.default_rng(seed)
        for _ in range(50):
            chosen = generator.integers(0, NUM_IMAGES, 16).tolist()
            if not torch.equal(rows([name(number) for number in chosen]), values[chosen]):
                wrong.append(chosen)

    threads = [threading.Thread(target=step, args=(seed,)) for seed in range(3)]
    threads += [
        threading.Thread(target=rows.preload, args=(list(map(name, range(NUM_IMAGES))), 2)) for _ in (0, 1)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert wrong == []
    assert rows.preload(map(name, range(NUM_IMAGES))) == NUM_IMAGES - 1


def test_a_damaged_row_is_found_with_the_same_words_and_never_kept(tmp_path: Path) -> None:
    values = build(tmp_path, "bfloat16", (8,))
    flip(tmp_path, 7)
    last, shard = 7 * SHARD_SIZE + SHARD_SIZE, [name(n) for n in range(7 * SHARD_SIZE, 8 * SHARD_SIZE + 1)]
    rows, messages = Rows(tmp_path, "latents"), []
    calls = [
        lambda: rows.reader.read(name(last), "latents"),
        lambda: rows([name(last)]),
        lambda: rows.preload(shard),
        lambda: rows.preload(map(name, range(NUM_IMAGES)), 1),
        lambda: rows(shard),
    ]
    for call in calls:
        with pytest.raises(StoreError) as caught:
            call()
        messages.append(str(caught.value))
    assert set(messages) == {messages[0]}
    assert f"00007.h5 is damaged: latents of image '{name(last)}' has CRC-32" in messages[0]
    flip(tmp_path, 7)
    assert torch.equal(rows([name(last)]), values[[last]])


def test_an_image_that_is_not_there_is_named(tmp_path: Path) -> None:
    build(tmp_path, "float32", (1,), 20)
    rows = Rows(tmp_path, "latents")
    for call in (lambda: rows([name(3), "0004.jpeg"]), lambda: rows.preload([name(3), "0004.jpeg"])):
        with pytest.raises(StoreError, match=r"'0004.jpeg' is not one of the 20 in .*; nearest: '0004.jpg'"):
            call()
    assert rows.preload([]) == 0


def test_rows_for_a_gpu_lie_in_locked_memory_and_only_there(tmp_path: Path) -> None:
    values = build(tmp_path, "bfloat16", (4,), 20)
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="pin is True, but there is no CUDA device"):
            Rows(tmp_path, "latents", pin=True)
        return
    rows = Rows(tmp_path, "latents", pin=True)
    for _ in range(2):
        found = rows([name(3), name(1)])
        assert found.is_pinned()
        assert torch.equal(found, values[[3, 1]])


def test_arrays_and_tensors_are_the_same_memory() -> None:
    bits = np.array([0x3F80, 0xC000], np.uint16)
    tensor = as_tensor(bits)
    assert tensor.dtype == torch.bfloat16
    assert tensor.tolist() == [1.0, -2.0]
    bits[0] = 0x4040
    assert tensor.tolist() == [3.0, -2.0]
    assert np.array_equal(to_numpy(tensor), bits)


def test_statements_about_images_that_were_left_out_are_counted(tmp_path: Path) -> None:
    build(tmp_path / "latents", "float32", (1,), 20)
    rows = Rows(tmp_path / "latents", "latents")
    images = [name(1), name(1), "lost.jpg", name(2)]
    statements = [Statement(image, "caption", 1, "on", index) for index, image in enumerate(images)]
    with pytest.raises(StoreError, match=r"1 of 3 images that the statements name .* such as lost.jpg"):
        in_cache(statements, rows, tmp_path)
    (tmp_path / files.FAILURES).write_text('{"path": "lost.jpg", "reason": "missing"}\n')
    kept, note = in_cache(statements, rows, tmp_path)
    assert [statement.index for statement in kept] == [0, 1, 3]
    assert note == "3 of 4 statements, 2 of 3 images (1 left out by --allow_missing)"
