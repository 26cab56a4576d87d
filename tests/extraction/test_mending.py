"""A rerun of the same extraction makes a damaged cache, byte for byte, the one that it was, or replaces nothing."""

import errno
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from constants import ROOT
from faults import CALLS, failing_disk
from jobs import config_of, content, flip, make_photographs, sound
from torture import Tally

from theworld.config.config import Config
from theworld.extraction.extract import extract, verify
from theworld.store.format import StoreMismatch, extraction_command
from theworld.store.verify import DAMAGED, SOUND, UNKNOWN, status
from theworld.store.writer import Store
from theworld.utils import files
from theworld.utils.distributed import Part
from theworld.utils.files import StoreError


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A job of 20 photographs with a finished `cache` of latents: shards of 8, 8 and 4."""
    job = tmp_path_factory.mktemp("job")
    make_photographs(job, 20, 20)
    assert extract(config_of(job), job / "cache", with_vision=False, allow_missing=False)
    return job


@pytest.fixture
def job(finished: Path, tmp_path: Path) -> Path:
    shutil.copytree(finished, tmp_path / "job")
    return tmp_path / "job"


def settings(job: Path) -> Config:
    """The settings of a job that was copied."""
    own = {"image_folder": str(job / "photographs"), "annotations": str(job / "annotations")}
    return replace(config_of(job), **own)


def again(job: Path, part: Part | None = None) -> bool:
    """Run the same extraction on the copied cache."""
    return extract(settings(job), job / "cache", with_vision=False, allow_missing=False, part=part)


def kept(cache: Path) -> list[bytes]:
    """Return the files of the quarantine, with everything below a folder."""
    return [path.read_bytes() for path in (cache / "latents/quarantine").rglob("*") if path.is_file()]


DAMAGE: dict[str, Callable[[Path], object]] = {
    "a shard": lambda root: flip(root / "shards/00001.h5"),
    "a shard is gone": lambda root: (root / "shards/00001.h5").unlink(),
    "a record": lambda root: flip(root / "shards/00001.json"),
    "a record is gone": lambda root: (root / "shards/00001.json").unlink(),
    "a shard and its record are gone": lambda root: [p.unlink() for p in (root / "shards").glob("00001.*")],
    "the manifest": lambda root: flip(root / "manifest.json"),
    "the manifest and a shard": lambda root: [flip(root / n) for n in ("manifest.json", "shards/00001.h5")],
    "store.json": lambda root: flip(root / "store.json"),
    "store.json is gone": lambda root: (root / "store.json").unlink(),
    "the list": lambda root: flip(root / "images.jsonl"),
    "the list is gone": lambda root: (root / "images.jsonl").unlink(),
    "a file that is none of the store's": lambda root: (root / "shards/00009.h5").write_bytes(b"x"),
}
FILES = ["store.json", "images.jsonl", "manifest.json", "shards/00000.h5", "shards/00002.json"]
DAMAGE |= {
    "all but the manifest": lambda root: [flip(root / name) for name in FILES if "manifest" not in name],
    "all but store.json": lambda root: [flip(root / name) for name in FILES if "store" not in name],
    "both lists and the manifest": lambda root: [flip(root / name) for name in FILES[:3]],
    "a shard that is a folder": lambda root: (
        (root / "shards/00000.h5").unlink(),
        (root / "shards/00000.h5").mkdir(),
    ),
    "every file cut": lambda root: [(root / n).write_bytes((root / n).read_bytes()[:99]) for n in FILES[1:]],
}


@pytest.mark.parametrize("damage", list(DAMAGE))
@pytest.mark.torture("cache", "a rerun mends: byte-identical, what was damaged is kept")
def test_a_rerun_makes_the_cache_that_was_damaged(
    finished: Path, job: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    cache = job / "cache"
    DAMAGE[damage](cache / "latents")
    assert status(verify(cache)) == DAMAGED
    before, expected = sound(cache), content(finished / "cache")
    lost = [name for name in expected if not (cache / name).exists()]
    assert again(job)
    assert sound(cache) == expected
    assert verify(cache) == []
    # Nothing was deleted: what was damaged is in the quarantine, bytes and all, and the log says where.
    replaced = [data for name, data in before.items() if expected.get(name) != data]
    assert sorted(kept(cache)) == sorted(replaced)
    folders = [path for path in (cache / "latents/quarantine").glob("*") if path.is_dir()]
    moved = [line for line in caplog.messages if f" was moved to {cache / 'latents/quarantine'}" in line]
    assert len(moved) == len(replaced) + len(folders)
    assert any(" is missing" in line for line in caplog.messages) == bool(lost)


def test_only_what_is_damaged_is_made_again(job: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    root = job / "cache/latents"
    flip(root / "shards/00001.h5")
    untouched = {p: p.stat().st_mtime_ns for p in root.rglob("*") if p.is_file() and p.name != "00001.h5"}
    again(job)
    assert {path: path.stat().st_mtime_ns for path in untouched} == untouched
    assert [path.name[:-9] for path in (root / "quarantine").iterdir()] == ["00001.h5"]
    said, resuming, work, moved, _ = caplog.messages
    assert said.startswith(f"shard 1 has to be written again: {root / 'shards/00001.h5'} is damaged: ")
    assert resuming == "resuming: 2 of 3 shards valid"
    assert work.startswith("latents: 8 of 20 images to encode in 1 of 3 shards")
    assert moved.startswith(f"00001.h5 was moved to {root / 'quarantine/00001.h5'}.")
    assert moved.endswith(": shard 1 was damaged; it is written again")


def test_a_rerun_on_a_sound_cache_changes_nothing(job: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    before = {p: p.stat().st_mtime_ns for p in (job / "cache").rglob("*")}
    assert again(job)
    assert {p: p.stat().st_mtime_ns for p in (job / "cache").rglob("*")} == before
    (work,) = caplog.messages
    assert work.startswith("latents: 0 of 20 images to encode in 0 of 3 shards")


def refused(job: Path, config: Config, error: type[Exception], words: str) -> None:
    """The rerun is refused, and nothing in the store has changed."""
    before = content(job / "cache/latents")
    with pytest.raises(error, match=words):
        extract(config, job / "cache", with_vision=False, allow_missing=False)
    assert content(job / "cache/latents") == before


def test_without_the_photographs_nothing_is_replaced(job: Path) -> None:
    flip(job / "cache/latents/shards/00001.h5")
    refused(job, replace(settings(job), image_folder=None), ValueError, "image_folder is not set")
    sound_bytes = (job / "photographs/0009.png").read_bytes()
    (job / "photographs/0009.png").write_bytes((job / "photographs/0010.png").read_bytes())
    refused(
        job,
        settings(job),
        StoreMismatch,
        r"image 0009\.png: cached \"[0-9a-f]{64}\", wanted \"[0-9a-f]{64}\"",
    )
    (job / "photographs/0009.png").unlink()
    refused(job, settings(job), ValueError, r"1 of 20 photographs cannot be read:\n  0009\.png: no such file")
    (job / "photographs/0009.png").write_bytes(sound_bytes)
    assert again(job)


@pytest.mark.parametrize("name", ["shards/00001.h5", "store.json"])
def test_with_other_settings_nothing_is_replaced(job: Path, name: str) -> None:
    flip(job / "cache/latents" / name)
    other = replace(settings(job), encode_batch_size=5)
    if name == "store.json":
        refused(
            job, other, StoreError, r"store\.json is damaged or missing and cannot be made again: manifest"
        )
    else:
        refused(job, other, StoreMismatch, "encode_batch_size: cached 3, wanted 5")


@pytest.mark.parametrize("witness", ["manifest.json", "shards/00001.json"])
@pytest.mark.torture("cache", "a rerun that would give other numbers replaces nothing")
def test_an_encoder_that_gives_other_numbers_replaces_nothing(
    job: Path, witness: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = job / "cache/latents"
    flip(root / "shards/00001.h5")
    if witness != "manifest.json":
        (root / "manifest.json").unlink()
    write = Store.write_shard

    def other(self: Store, shard: int, arrays: dict[str, np.ndarray]) -> None:
        write(self, shard, {name: values + 1 for name, values in arrays.items()})

    monkeypatch.setattr(Store, "write_shard", other)
    refused(
        job, settings(job), StoreError, "extract on the kind of machine that wrote the shard, or into another"
    )


def test_images_that_were_left_out_stay_left_out(job: Path) -> None:
    config, cache = settings(job), job / "other"
    (job / "photographs/0004.png").write_bytes(b"")
    extract(config, cache, with_vision=False, allow_missing=True)
    before = content(cache)
    flip(cache / "latents/images.jsonl")
    extract(config, cache, with_vision=False, allow_missing=True)
    assert sound(cache) == before
    with pytest.raises(ValueError, match="1 of 20 photographs cannot be read"):
        extract(config, cache, with_vision=False, allow_missing=False)


def test_an_unfinished_store_keeps_what_is_sound(job: Path, finished: Path) -> None:
    cache = job / "cache"
    root = cache / "latents"
    (root / "manifest.json").unlink()
    (root / "shards/00002.json").unlink()
    assert status(verify(cache)) == UNKNOWN
    flip(root / "shards/00000.h5")
    assert status(verify(cache)) == DAMAGED
    kept_since = (root / "shards/00001.h5").stat().st_mtime_ns
    assert again(job)
    assert (root / "shards/00001.h5").stat().st_mtime_ns == kept_since
    assert sound(cache) == content(finished / "cache")
    assert status(verify(cache)) == SOUND


def test_a_part_mends_its_own_shards(job: Path, finished: Path) -> None:
    """And whichever part finds all shards there writes a damaged manifest."""
    cache, expected = job / "cache", content(finished / "cache")
    for name in ("shards/00000.h5", "shards/00001.h5", "manifest.json"):
        flip(cache / "latents" / name)
    with pytest.raises(StoreError, match=r"1 of 3 shards missing: \[1\]; run the extraction again, or those"):
        again(job, Part(0, 2))
    assert again(job, Part(1, 2))
    assert sound(cache) == expected


@pytest.mark.torture("cache", "a rerun stopped at each file it publishes")
def test_a_rerun_that_is_killed_goes_on(job: Path, finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, publish, interrupted = job / "cache", files.publish_bytes, 0
    for stop in range(10):
        for name in FILES:
            flip(cache / "latents" / name)
        calls = iter(range(99))

        def killed(
            *arguments: object, stop: int = stop, calls: Iterator[int] = calls, **options: object
        ) -> None:
            if next(calls) == stop:
                raise KeyboardInterrupt
            publish(*arguments, **options)

        monkeypatch.setattr(files, "publish_bytes", killed)
        try:
            again(job)
        except KeyboardInterrupt:
            interrupted += 1
        monkeypatch.setattr(files, "publish_bytes", publish)
        assert again(job)
        assert sound(cache) == content(finished / "cache")
    assert interrupted == 7  # two lists, two shards and their records, the manifest


@pytest.mark.torture("cache", "a rerun on a disk that fails at each call")
@pytest.mark.parametrize("kind", list(CALLS))
def test_a_rerun_on_a_failing_disk_loses_nothing_and_goes_on(
    job: Path, finished: Path, kind: str, tally: Tally
) -> None:
    cache, number, faults, step = job / "cache", 1, 0, tally.number(1, sample=7)
    expected = content(finished / "cache")
    while True:
        for name in FILES:
            flip(cache / "latents" / name)
        before = {data for name, data in sound(cache).items() if expected.get(name) != data}
        words = str(cache)
        with failing_disk(kind, number, (errno.ENOSPC, errno.EIO)[number % 2]) as disk:
            try:
                again(job)
            except OSError as error:
                words = str(error)
        assert str(cache) in words
        everything = {p.read_bytes() for p in cache.rglob("*") if p.is_file()}
        assert before <= everything  # in their places or in the quarantine
        for name, data in sound(cache).items():  # right, as damaged as before, or gone: never anything else
            assert data in before or data == expected.get(name)
        assert again(job)
        assert sound(cache) == expected
        if not disk.failed:
            break
        faults += 1
        number += step
    assert faults > 0
    tally(faults=faults, byte_identical="yes")


def test_the_command_that_mends_is_that_of_the_verification_with_what_it_lacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["tools/extract_latents.py", "--verify", "--cache", "my cache"]
    monkeypatch.setattr("sys.argv", words)
    root = Path("my cache") / "latents"
    tool = f"python {ROOT / 'tools' / 'extract_latents.py'}"
    assert extraction_command(root) == f"{tool} --config FILE --image_folder FOLDER --cache 'my cache'"
    monkeypatch.setattr("sys.argv", [*words, "--config", "c.json"])
    assert extraction_command(root) == f"{tool} --config c.json --cache 'my cache'"
    (root.parent / "gemma_vision").mkdir(parents=True)
    (root.parent / "failures.jsonl").touch()
    assert extraction_command(root) == (
        f"{tool} --config c.json --cache 'my cache' --gemma_vision --allow_missing"
    )


def test_failures_are_listed_anew_where_their_list_is_damaged(job: Path) -> None:
    (job / "photographs/0004.png").write_bytes(b"")
    cache = job / "other"
    extract(settings(job), cache, with_vision=False, allow_missing=True)
    before = content(cache)
    (cache / "failures.jsonl").write_bytes(b"{")
    extract(settings(job), cache, with_vision=False, allow_missing=True)
    assert content(cache) == before
    assert json.loads(before["failures.jsonl"])["path"] == "0004.png"
