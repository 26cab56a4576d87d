"""A damaged cache becomes, byte for byte, the one that it was; or nothing is replaced, and the reason is said."""

import errno
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from faults import CALLS, failing_disk
from jobs import config_of, content, flip, make_photographs
from torture import Tally
from video2world import Guardrail

from theworld.config.config import Config
from theworld.data.images import PhotographsChanged
from theworld.extraction import repair as module
from theworld.extraction.audit import audit
from theworld.extraction.extract import extract, verify
from theworld.extraction.repair import repair
from theworld.store.format import StoreMismatch
from theworld.store.verify import DAMAGED, SOUND, UNKNOWN, status
from theworld.store.writer import Store
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
    """Those of a job that was copied."""
    own = {"image_folder": str(job / "photographs"), "annotations": str(job / "annotations")}
    return replace(config_of(job), **own)


def sound(cache: Path) -> dict[str, bytes]:
    """What is in a cache beside the quarantine."""
    return {name: data for name, data in content(cache).items() if "/quarantine/" not in name}


def quarantined(cache: Path) -> list[str]:
    """Names of the files in the quarantine, without their endings of random digits."""
    names = {p.name for p in (cache / "latents/quarantine").rglob("*") if p.is_file()}
    return sorted(
        name if name.endswith(("json", "jsonl")) and name.count(".") == 1 else name[:-9] for name in names
    )


DAMAGE: dict[str, Callable[[Path], None]] = {
    "a shard": lambda root: flip(root / "shards/00001.h5"),
    "a shard is gone": lambda root: (root / "shards/00001.h5").unlink(),
    "a record": lambda root: flip(root / "shards/00001.json"),
    "a record is gone": lambda root: (root / "shards/00001.json").unlink(),
    "the manifest": lambda root: flip(root / "manifest.json"),
    "store.json": lambda root: flip(root / "store.json"),
    "the list": lambda root: flip(root / "images.jsonl"),
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
@pytest.mark.torture("cache", "--repair: byte-identical, what was damaged is kept")
def test_a_repaired_cache_is_the_one_that_was_damaged(finished: Path, job: Path, damage: str) -> None:
    cache = job / "cache"
    DAMAGE[damage](cache / "latents")
    assert status(verify(cache)) == DAMAGED
    before = sound(cache)
    repair(settings(job), cache)
    assert sound(cache) == content(finished / "cache")
    assert verify(cache) == []
    # Nothing was deleted: what was damaged is in the quarantine, bytes and all.
    replaced = {data for name, data in before.items() if content(finished / "cache").get(name) != data}
    kept = {p.read_bytes() for p in (cache / "latents/quarantine").rglob("*") if p.is_file()}
    assert replaced <= kept


def test_only_what_is_damaged_is_made_again(job: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cache = job / "cache"
    root = cache / "latents"
    flip(root / "shards/00001.h5")
    untouched = {p: p.stat().st_mtime_ns for p in root.rglob("*") if p.is_file() and p.name != "00001.h5"}
    repair(settings(job), cache)
    assert {path: path.stat().st_mtime_ns for path in untouched} == untouched
    (folder,) = (root / "quarantine").iterdir()
    assert "Z-damaged-" in folder.name
    assert quarantined(cache) == ["00001.h5", "why.jsonl"]
    why = json.loads((folder / "why.jsonl").read_text())
    assert why["files"] == ["shards/00001.h5"]
    assert why["says"].startswith("shard 1: ")
    out = capsys.readouterr().out
    assert "latents: repaired: shards 1 encoded again" in out
    assert "00001.h5 was moved to " in out


def test_nothing_damaged_needs_no_photographs_and_changes_nothing(
    job: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = content(job / "cache")
    repair(replace(settings(job), image_folder=None), job / "cache")
    assert content(job / "cache") == before
    assert "nothing is known to be damaged" in capsys.readouterr().out


def refused(job: Path, config: Config, error: type[Exception], words: str) -> None:
    """The repair is refused, and nothing in the cache has changed."""
    before = content(job / "cache")
    with pytest.raises(error, match=words):
        repair(config, job / "cache")
    assert content(job / "cache") == before


def test_without_the_photographs_of_the_shard_nothing_is_replaced(job: Path) -> None:
    flip(job / "cache/latents/shards/00001.h5")
    refused(job, replace(settings(job), image_folder=None), ValueError, "image_folder is not set")
    (job / "photographs/0000.png").unlink()  # of a sound shard: not needed
    (job / "photographs/0009.png").write_bytes((job / "photographs/0010.png").read_bytes())
    refused(job, settings(job), PhotographsChanged, r"0009\.png: SHA-256 was [0-9a-f]{64}, now [0-9a-f]{64}")
    (job / "photographs/0009.png").unlink()
    refused(job, settings(job), PhotographsChanged, r"0009\.png: SHA-256 was [0-9a-f]{64}, now no such file")


def test_with_other_settings_nothing_is_replaced(job: Path) -> None:
    flip(job / "cache/latents/shards/00001.h5")
    other = replace(settings(job), encode_batch_size=5)
    refused(job, other, StoreMismatch, "encode_batch_size: cached 3, wanted 5")


@pytest.mark.parametrize("witness", ["manifest.json", "shards/00001.json"])
@pytest.mark.torture("cache", "--repair that would give other numbers replaces nothing")
def test_an_encoder_that_gives_other_numbers_replaces_nothing(
    job: Path, witness: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = job / "cache/latents"
    flip(root / "shards/00001.h5")
    if witness != "manifest.json":
        (root / "manifest.json").unlink()
    before = content(job / "cache")
    write = module.Mended.write_shard

    def other(self: Store, shard: int, arrays: dict[str, np.ndarray]) -> None:
        write(self, shard, {name: values + 1 for name, values in arrays.items()})

    monkeypatch.setattr(module.Mended, "write_shard", other)
    with pytest.raises(StoreError, match=r"shard 1 encoded again has SHA-256 .* nothing was replaced"):
        repair(settings(job), job / "cache")
    assert sound(job / "cache") == before


def test_a_list_that_the_photographs_do_not_give_is_refused_with_the_differences(job: Path) -> None:
    root = job / "cache/latents"
    lines = (root / "images.jsonl").read_text().splitlines(keepends=True)
    (root / "images.jsonl").write_text("".join(lines[:-1]))
    (job / "photographs/0003.png").write_bytes((job / "photographs/0004.png").read_bytes())
    refused(
        job,
        settings(job),
        StoreError,
        r"images\.jsonl cannot be made again: (.|\n)*image 0003\.png: [0-9a-f]{64} on",
    )
    (root / "store.json").unlink()
    (root / "manifest.json").unlink()
    shutil.rmtree(root / "shards")
    (root / "shards").mkdir()
    assert status(verify(job / "cache")) == DAMAGED
    refused(job, settings(job), StoreError, r"store\.json cannot be made again")  # nothing states its hash


def test_images_that_were_left_out_stay_left_out(job: Path) -> None:
    config, cache = settings(job), job / "other"
    (job / "photographs/0004.png").write_bytes(b"")
    extract(config, cache, with_vision=False, allow_missing=True)
    before = content(cache)
    flip(cache / "latents/images.jsonl")
    repair(config, cache)
    assert sound(cache) == before


def test_an_unfinished_store_keeps_what_is_sound_and_stays_unfinished(job: Path, finished: Path) -> None:
    cache = job / "cache"
    root = cache / "latents"
    (root / "manifest.json").unlink()
    (root / "shards/00002.json").unlink()
    assert status(verify(cache)) == UNKNOWN
    flip(root / "shards/00000.h5")
    assert status(verify(cache)) == DAMAGED
    repair(settings(job), cache)
    assert not (root / "shards/00002.json").exists()
    assert status(verify(cache)) == UNKNOWN
    extract(settings(job), cache, with_vision=False, allow_missing=False)
    assert sound(cache) == content(finished / "cache")
    assert status(verify(cache)) == SOUND


@pytest.mark.torture("cache", "--repair stopped at each file it publishes")
def test_a_repair_that_is_killed_is_repaired(
    job: Path, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, publish, interrupted = job / "cache", module.files.publish_bytes, 0
    for stop in range(10):
        for name in FILES:
            if name != "manifest.json":
                flip(cache / "latents" / name)
        calls = iter(range(99))

        def killed(
            *arguments: object, stop: int = stop, calls: Iterator[int] = calls, **options: object
        ) -> None:
            if next(calls) == stop:
                raise KeyboardInterrupt
            publish(*arguments, **options)

        monkeypatch.setattr(module.files, "publish_bytes", killed)
        try:
            repair(settings(job), cache)
        except KeyboardInterrupt:
            interrupted += 1
        monkeypatch.setattr(module.files, "publish_bytes", publish)
        repair(settings(job), cache)
        assert sound(cache) == content(finished / "cache")
    assert interrupted == 9  # why, two lists and their copies, two shards and their records


def test_processes_launched_together_do_not_repair(job: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    flip(job / "cache/latents/shards/00001.h5")
    refused(job, settings(job), ValueError, "--repair runs in one process; 2 were launched")


@pytest.mark.torture("cache", "--repair on a disk that fails at each call")
@pytest.mark.parametrize("kind", list(CALLS))
def test_a_repair_on_a_failing_disk_loses_nothing_and_goes_on(
    job: Path, finished: Path, kind: str, tally: Tally
) -> None:
    cache, number, faults, step = job / "cache", 1, 0, tally.number(1, sample=7)
    while True:
        for name in FILES:
            flip(cache / "latents" / name)
        before = {
            data for name, data in sound(cache).items() if content(finished / "cache").get(name) != data
        }
        words = str(cache)
        with failing_disk(kind, number, (errno.ENOSPC, errno.EIO)[number % 2]) as disk:
            try:
                repair(settings(job), cache)
            except OSError as error:
                words = str(error)
        assert str(cache) in words
        kept = {p.read_bytes() for p in cache.rglob("*") if p.is_file()}
        assert before <= kept  # in their places or in the quarantine
        for name, data in sound(cache).items():  # right, as damaged as before, or gone: never anything else
            assert data in before or data == content(finished / "cache").get(name)
        repair(settings(job), cache)
        if not (cache / "latents/manifest.json").exists():  # it was in the quarantine by then
            extract(settings(job), cache, with_vision=False, allow_missing=False)
        assert sound(cache) == content(finished / "cache")
        if not disk.failed:
            break
        faults += 1
        number += step
    assert faults > 0
    tally(faults=faults, byte_identical="yes")


def test_rollouts_are_made_again_by_the_extraction_and_audited_by_their_photographs(
    rolling: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    extract(rolling, tmp_path, False, False, None, Guardrail())
    before = sound(tmp_path)
    assert audit(rolling, tmp_path, 9) == SOUND
    assert "3 of 3 images encoded again in float32" in capsys.readouterr().out
    flip(tmp_path / "latents/shards/00001.h5")
    with pytest.raises(ValueError, match=r"--repair makes no rollouts\. The extraction itself does"):
        repair(rolling, tmp_path)
    extract(rolling, tmp_path, False, False, None, Guardrail())
    assert {name: data for name, data in content(tmp_path).items() if "set-aside" not in name} == before
    assert verify(tmp_path) == []
    with pytest.raises(StoreMismatch, match="rollout_steps: cached 2, wanted 3"):
        extract(replace(rolling, rollout_steps=3), tmp_path, False, False, None, Guardrail())
