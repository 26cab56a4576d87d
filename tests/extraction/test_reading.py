"""Photographs read, hashed and decoded, in this process or in others, each once."""

import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from constants import ROOT
from jobs import config_of, content, make_photographs
from torch import Tensor

from theworld.config.config import Config
from theworld.data.images import ImageError, decode, read_image, sha256
from theworld.data.square import Square
from theworld.extraction import extract as phase_1
from theworld.extraction import reading
from theworld.extraction.extract import extract, freeze, has_room
from theworld.extraction.reading import (
    Prepared,
    ReadBatch,
    Source,
    Spool,
    in_processes,
    num_workers,
    workers_for,
)
from theworld.store.shard import ImageEntry
from theworld.utils.distributed import Part


def corner(pixels: np.ndarray) -> Tensor:
    """uint8[H, W, 3] -> uint8[2, 3]"""
    return torch.from_numpy(pixels[0, :2].copy())


@pytest.fixture
def rows(photographs: Path) -> list[ImageEntry]:
    names = ("a.png", "b.png", "c.png")
    return [ImageEntry(name, sha256((photographs / name).read_bytes())) for name in names]


# ---- batches


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_come_in_order_padded_with_zeros_and_timed(
    photographs: Path, rows: list[ImageEntry], workers: int
) -> None:
    work = ReadBatch(Source(photographs, 10**6, workers), corner, 2)
    with in_processes(work, [rows[:2], rows[2:], rows[1:]], workers) as items:
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
    work = ReadBatch(Source(photographs, 10**6, 1), corner, 2)
    with in_processes(work, [[rows[0], changed], [ImageEntry("gone.png", "0" * 64)]], workers) as items:
        first, second = items
    assert first.pixels is None
    assert isinstance(first.error, ImageError)
    assert str(first.error) == (
        f"b.png: changed while extracting: SHA-256 was {'0' * 64}, is {rows[1].sha256}; run again"
    )
    assert str(second.error) == f"gone.png: no such file in {photographs}"


def test_a_place_that_the_spool_fills_is_left_blank(photographs: Path, rows: list[ImageEntry]) -> None:
    batch = ReadBatch(Source(photographs, 10**6, 0), corner, 3)([None, rows[1]])
    assert batch.pixels is not None
    zeros = torch.zeros(2, 3, dtype=torch.uint8)
    assert torch.equal(batch.pixels, torch.stack([zeros, corner(read_image(photographs, "b.png")), zeros]))
    assert batch.num_photographs == 2


# ---- processes


def look(main: int) -> list[bool]:
    """What is as it should be in a reading process."""
    ignored = [signal.getsignal(number) == signal.SIG_IGN for number in (signal.SIGINT, signal.SIGTERM)]
    return [torch.get_num_threads() == 1, *ignored, main not in (os.getpid(), os.getppid())]


def test_workers_run_on_one_thread_leave_signals_to_the_main_process_and_are_no_forks_of_it() -> None:
    with in_processes(look, [os.getpid()], 1) as items:
        assert list(items) == [[True, True, True, True]]


def die(_: int) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_worker_is_an_error_in_words() -> None:
    words = "a reading process has died, perhaps because memory is short: try fewer --num_workers"
    with pytest.raises(OSError, match=words), in_processes(die, [0], 1) as items:
        list(items)


def test_workers_end_with_the_block() -> None:
    with in_processes(abs, range(-50, 0), 2) as items:
        assert [next(items), next(items)] == [50, 49]
        assert len(multiprocessing.active_children()) == 2
    assert multiprocessing.active_children() == []


def touch(path: Path) -> None:
    path.touch()


def test_processes_begin_before_their_first_result_is_wanted(tmp_path: Path) -> None:
    paths, deadline = [tmp_path / name for name in "abcd"], time.monotonic() + 60
    with in_processes(touch, paths, 1) as items:
        while not all(path.exists() for path in paths[:2]):  # as many as a process is ahead
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert not paths[3].exists()
        assert list(items) == [None] * 4
    assert all(path.exists() for path in paths)


MAIN = """
import os, sys, time
from theworld.extraction.reading import in_processes

def tell(_):
    os.write(1, f"{os.getpid()} {os.getppid()}\\n".encode())
    time.sleep(600)

if __name__ == "__main__":
    with in_processes(tell, range(4), 2) as items:
        list(items)
"""


def test_workers_end_when_the_main_process_is_killed(tmp_path: Path) -> None:
    (tmp_path / "main.py").write_text(MAIN)
    main = subprocess.Popen(
        [sys.executable, str(tmp_path / "main.py")],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    assert main.stdout is not None
    assert len({main.stdout.readline() for _ in range(2)}) == 2
    main.kill()
    main.communicate(timeout=60)  # ends when no process holds the pipe any more


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
    assert workers_for(64, 8, 4, result_bytes=5 * 2**20) == (4, "")
    workers, note = workers_for(64, 8, 4, result_bytes=8 * 2**20)
    assert workers == 2
    assert note.startswith(
        f"2 of 4 reading processes: {tmp_path} has 64.0 MiB free and each needs 24.0 MiB; give it more"
    )


# ---- once


@pytest.mark.parametrize("memory", [2**20, 10])
def test_a_spool_gives_back_what_was_put_there(
    tmp_path: Path, memory: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From memory, and from a file that no name leads to."""
    monkeypatch.setattr(reading, "SPOOL_MEMORY", memory)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    spool = Spool(lambda pixels: corner(pixels).float(), 3)
    values = {name: torch.arange(6, dtype=torch.float32).reshape(2, 3) * n for n, name in enumerate("abc")}
    for place, name in enumerate("cab"):
        spool.write(place, values[name])
        spool.note(place, name)
    spool.note(1, "c")  # it is there already, and another photograph is at this place
    out = torch.full((2, 2, 3), 9.0)
    for name in "abc":
        spool.read_into(out[1], name)
        assert torch.equal(out[1], values[name])
    assert torch.equal(out[0], torch.full((2, 3), 9.0))
    assert ("a" in spool, "d" in spool) == (True, False)
    assert list(tmp_path.iterdir()) == []
    spool.close()


@pytest.fixture
def job(tmp_path: Path) -> Path:
    """20 photographs, two of equal bytes and one that cannot be decoded."""
    make_photographs(tmp_path / "job", 20, 20)
    photographs = tmp_path / "job/photographs"
    (photographs / "0011.png").write_bytes((photographs / "0003.png").read_bytes())
    (photographs / "0005.png").write_bytes(b"<html>")
    return tmp_path / "job"


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The path of each photograph that is decoded, each time."""
    paths: list[str] = []

    def counted(data: bytes, path: str, **options: Any) -> np.ndarray:
        paths.append(path)
        return decode(data, path, **options)

    monkeypatch.setattr(reading, "decode", counted)
    return paths


NAMES = [f"{i:04}.png" for i in range(20)]


def test_each_photograph_is_decoded_once_on_the_way_to_its_shard(job: Path, decoded: list[str]) -> None:
    cache = job / "cache"
    with pytest.raises(ValueError, match="1 of 20 photographs cannot be read"):
        extract(config_of(job), cache, with_vision=False, allow_missing=False)
    assert decoded == NAMES
    decoded.clear()
    extract(config_of(job), cache, with_vision=False, allow_missing=True)
    assert decoded == NAMES
    decoded.clear()
    # What an earlier run has decoded is decoded again for the shards that are missing, and only there.
    for name in ("manifest.json", "shards/00001.json"):
        (cache / "latents" / name).unlink()
    extract(config_of(job), cache, with_vision=False, allow_missing=True)
    again = [name for name in NAMES[9:18] if name != "0011.png"]  # its bytes are those of 0003.png
    assert sorted(decoded) == ["0005.png", *again]
    decoded.clear()
    extract(config_of(job), cache, with_vision=False, allow_missing=True)
    assert decoded == ["0005.png"]


def test_the_listing_and_a_resumed_run_share_a_batch(job: Path, decoded: list[str]) -> None:
    """Of photographs of which the list of an earlier run has some, each is decoded once, too."""
    cache, config = job / "cache", config_of(job)
    sound = {path.name: path.read_bytes() for path in (job / "photographs").iterdir()}
    for name in NAMES[8:12]:
        (job / "photographs" / name).unlink()
    extract(config, cache, with_vision=False, allow_missing=True)
    for path in [cache / "latents/manifest.json", *(cache / "latents/shards").glob("*.json")]:
        path.unlink()
    for name in NAMES[8:12]:
        (job / "photographs" / name).write_bytes(sound[name])
    decoded.clear()
    extract(config, cache, with_vision=False, allow_missing=True)
    # whose bytes are those of 0011.png
    assert sorted(decoded) == [name for name in NAMES if name != "0003.png"]
    extract(config, job / "whole", with_vision=False, allow_missing=True)
    shards = {name: data for name, data in content(cache).items() if "quarantine" not in name}
    assert shards == content(job / "whole")


def test_with_no_room_for_a_spool_or_as_one_part_photographs_are_decoded_again(
    job: Path, decoded: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(job)
    extract(config, job / "whole", with_vision=False, allow_missing=True)
    decoded.clear()
    monkeypatch.setattr(phase_1, "has_room", lambda *arguments: False)
    extract(config, job / "cache", with_vision=False, allow_missing=True)
    rows = [name for name in NAMES if name not in ("0005.png", "0011.png")]
    assert sorted(decoded) == sorted(NAMES + rows)
    assert content(job / "cache") == content(job / "whole")
    monkeypatch.undo()


def test_a_part_keeps_nothing_of_what_it_lists(job: Path) -> None:
    config = config_of(job)
    extract(config, job / "whole", with_vision=False, allow_missing=True)
    complete = [extract(config, job / "parts", False, True, Part(index, 2)) for index in (1, 0)]
    assert complete == [False, True]
    assert content(job / "parts") == content(job / "whole")


def test_a_spool_needs_twice_its_room_unless_it_stays_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    prepare, config = Square(512), Config(latent_size=512)
    size = 512 * 512 * 3
    monkeypatch.setattr(phase_1, "free_bytes", lambda _: 2 * 1000 * size)
    assert has_room(prepare, config, 1000)
    assert not has_room(prepare, config, 1001)
    assert not has_room(prepare, replace(config, num_world_steps=1), 1)
    monkeypatch.setattr(phase_1, "free_bytes", lambda _: 0)
    assert [has_room(prepare, config, count) for count in (341, 342)] == [True, False]  # 256 MiB


@pytest.mark.parametrize("workers", [0, 2])
def test_the_listing_spools_what_it_decodes(
    photographs: Path, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "FEW", 1)
    known = {"b.png": sha256((photographs / "b.png").read_bytes()), "c.png": "0" * 64}
    spool = Spool(Square(16), 4)
    images, failures = freeze(
        ["c.png", "a.png", "b.png", "d.png"], Source(photographs, 10**6, workers), known, spool
    )
    assert [image.path for image in images] == ["a.png", "b.png", "c.png"]
    assert failures == [("d.png", f"no such file in {photographs}")]
    hashes = {image.path: image.sha256 for image in images}
    assert [hashes[name] in spool for name in hashes] == [True, False, True]
    out = torch.zeros(16, 16, 3, dtype=torch.uint8)
    for name in ("a.png", "c.png"):
        spool.read_into(out, hashes[name])
        assert torch.equal(out, Square(16)(read_image(photographs, name)))
