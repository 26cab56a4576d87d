"""Photographs that were edited, replaced or deleted after extraction are noticed before training."""

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from theworld import data as loading
from theworld.cache import VISION, LiveVision, Rows
from theworld.compare import PhotographsChanged, check_photographs
from theworld.config import Config
from theworld.extract import extract
from theworld.gemma import Gemma
from theworld.images import ImageError, sha256
from theworld.train import Trainer


@pytest.fixture
def own(config: Config, tmp_path: Path) -> Config:
    """Settings with photographs of their own and a finished cache beside them."""
    shutil.copytree(str(config.image_folder), tmp_path / "photographs")
    config = replace(config, image_folder=str(tmp_path / "photographs"))
    extract(config, tmp_path / "cache", with_vision=True, allow_missing=False)
    return config


def edited(path: Path) -> None:
    """Another last byte, and the time stamp as before."""
    status, data = path.stat(), bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


CHANGES: dict[str, Callable[[Path], object]] = {
    "edited": edited,
    "replaced": lambda path: shutil.copy(path.with_name("a.png"), path),
    "deleted": lambda path: path.unlink(),
    "emptied": lambda path: path.write_bytes(b""),
    "a FIFO": lambda path: (path.unlink(), os.mkfifo(path)),
}


@pytest.mark.parametrize("change", list(CHANGES))
@pytest.mark.torture(
    "cache", "a photograph edited, replaced, deleted after extraction: noticed before training"
)
def test_training_does_not_start_on_photographs_that_changed(
    own: Config, tmp_path: Path, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = Path(str(own.image_folder)) / "b.png"
    before = sha256(path.read_bytes())
    CHANGES[change](path)
    monkeypatch.setattr(Gemma, "load_weights", None)  # no model loads
    monkeypatch.setattr(loading, "COMPARE_SECONDS", 0.0)  # what has another time stamp is read all the same
    with pytest.raises(PhotographsChanged) as caught:
        Trainer(own, tmp_path / "cache")
    now = {
        "deleted": f"no such file in {path.parent}",
        "emptied": "zero bytes",
        "a FIFO": "not a regular file",
    }
    compared = int(
        str(caught.value).split()[2]
    )  # those with another time stamp; at once after extraction maybe all
    assert compared in (1, 2, 3)
    after = now[change] if change in now else sha256(path.read_bytes())
    assert str(caught.value) == (
        f"1 of {compared} photographs in {path.parent} changed since they were extracted:\n"
        f"  b.png: SHA-256 was {before}, now {after}\n"
        "Put them back, or extract into another --cache"
    )
    assert not Path(own.output_dir).exists()


def test_training_says_what_was_compared(
    own: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    assert "photographs: all 3 are those that were extracted" in Trainer(own, cache).data.notes
    moved = replace(own, image_folder=str(tmp_path / "nowhere"))
    assert f"photographs: not in {tmp_path / 'nowhere'}, so they were not compared with the cache" in (
        Trainer(moved, cache).data.notes
    )
    assert not any(
        "photographs" in note for note in Trainer(replace(own, image_folder=None), cache).data.notes
    )
    monkeypatch.setenv("RANK", "1")  # the first process looks
    edited(Path(str(own.image_folder)) / "a.png")
    assert loading.compared(own, Rows(cache / "latents", "latents"), ["a.png"]) == []


def test_with_too_little_time_all_that_are_newer_and_some_others_are_compared(tmp_path: Path) -> None:
    names = [f"{i:03}.jpg" for i in range(300)]
    for name in names:
        (tmp_path / name).write_bytes(name.encode())
    images = {name: sha256(name.encode()) for name in names}
    newest = max((tmp_path / name).stat().st_ctime for name in names)
    while True:  # until the clock of the file system has gone on
        (tmp_path / "007.jpg").write_bytes(b"007.jpg")
        if (tmp_path / "007.jpg").stat().st_ctime > newest:
            break

    def clock(times: Iterator[float] = iter([0.0, 1.0, 4.0, 6.0])) -> float:  # noqa: B008
        return next(times)

    line = check_photographs(images, tmp_path, newest, 5.0, clock)
    assert line == (
        "photographs: 129 of 300 compared in 5 s (1 with newer time stamps, the others at random): they are those that "
        "were extracted; tools/doctor.py compares all"
    )
    (tmp_path / "008.jpg").write_bytes(b"other")
    with pytest.raises(PhotographsChanged, match=r"008\.jpg: SHA-256 was "):
        check_photographs(images, tmp_path, newest, 0.0)


def test_the_first_few_of_many_are_shown(tmp_path: Path) -> None:
    with pytest.raises(PhotographsChanged) as caught:
        check_photographs({f"{i}.jpg": "0" * 64 for i in range(8)}, tmp_path)
    assert len(caught.value.changes) == 8
    assert str(caught.value).splitlines()[-2:] == [
        "  and 3 more",
        "Put them back, or extract into another --cache",
    ]


@pytest.mark.torture("cache", "a photograph edited while training reads it")
def test_a_photograph_that_changes_while_training_stops_it(own: Config, tmp_path: Path) -> None:
    shutil.rmtree(tmp_path / "cache" / VISION)
    trainer = Trainer(own, tmp_path / "cache")  # reads the photographs at every step
    assert isinstance(trainer.data.vision, LiveVision)
    trainer.output_dir.mkdir()
    trainer.train_step()
    saved = trainer.save()
    content = {path: path.read_bytes() for path in saved.iterdir()}
    for name in ("a.png", "b.png", "c.png"):
        edited(Path(str(own.image_folder)) / name)
    with pytest.raises(
        ImageError, match=r"[abc]\.png: changed since its latents were extracted: SHA-256 was"
    ):
        trainer.train_step()
    assert {path: path.read_bytes() for path in saved.iterdir()} == content
