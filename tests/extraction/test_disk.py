"""A disk that is full or fails, at every place where an extraction writes."""

import errno
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from constants import ROOT
from faults import CALLS, failing_disk
from jobs import config_of, finish_extraction, flip, make_photographs, published
from torture import Tally

from theworld.extraction.extract import extract, verify
from theworld.store.reader import StoreReader
from theworld.utils.files import StoreError

BYTES, NAME = r"[\d,]+ bytes", "its names on disk"
NEEDED = {
    "open": BYTES,
    "write": BYTES,
    "fsync": f"({BYTES}|{NAME})",
    "replace": BYTES,
    "rename": "its move to .*",
}
NEEDED |= {"mkdir": "a folder", "open a folder": f"({BYTES}|{NAME})"}


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 photographs of which one cannot be read (3 shards), settings, and `cache`, what becomes of them."""
    job = tmp_path_factory.mktemp("job")
    make_photographs(job, 20, 20)
    (job / "photographs/0005.png").write_bytes(b"<html>")
    assert extract(config_of(job), job / "cache", with_vision=False, allow_missing=True)
    assert sorted(published(job / "cache")) == [
        "failures.jsonl",
        "latents/images.jsonl",
        "latents/manifest.json",
        *(f"latents/shards/0000{i}.{kind}" for i in range(3) for kind in ("h5", "json")),
        "latents/store.json",
    ]
    return job


def nothing_there(job: Path, cache: Path) -> None:
    pass


def half_of_it_damaged(job: Path, cache: Path) -> None:
    """An interrupted run whose second shard was damaged since, record and all, and of another failure."""
    shutil.copytree(job / "cache", cache)
    for name in ("manifest.json", "shards/00002.json", "shards/00002.h5"):
        (cache / "latents" / name).unlink()
    flip(cache / "latents/shards/00001.h5")
    flip(cache / "latents/shards/00001.json")
    (cache / "failures.jsonl").write_text("")


STARTS = [nothing_there, half_of_it_damaged]


def attempt(job: Path, cache: Path, kind: str, number: int, code: int) -> tuple[bool, OSError | None]:
    """An extraction of which one call fails: whether it came to that call, and the error."""
    with failing_disk(kind, number, code) as disk:
        try:
            extract(config_of(job), cache, with_vision=False, allow_missing=True)
        except OSError as error:
            return disk.failed, error
    return disk.failed, None


def own(files: dict[str, bytes]) -> dict[str, bytes]:
    """Without the quarantine."""
    return {name: data for name, data in files.items() if "/quarantine/" not in name}


def check_nothing_unpublished_is_read(
    cache: Path, expected: dict[str, bytes], before: dict[str, bytes]
) -> None:
    """What is published is right or was there before; a reader takes the store only if it is finished and right."""
    found = own(published(cache))
    for name, data in found.items():
        assert data in (expected.get(name), before.get(name)), name
    left = [path for path in cache.rglob("*.tmp")]
    assert left == []
    if "latents/manifest.json" in found:
        assert verify(cache) == []
    else:
        with pytest.raises(StoreError, match=r"is unfinished|is missing"):
            StoreReader(cache / "latents")


@pytest.mark.torture("cache", "ENOSPC and EIO at each open, write, fsync, rename, mkdir")
@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("kind", list(CALLS))
def test_a_disk_that_fails_at_any_call_publishes_nothing_wrong(
    job: Path, tmp_path: Path, kind: str, start: Callable[[Path, Path], None], tally: Tally
) -> None:
    expected, number, faults = own(published(job / "cache")), 0, 0
    step = tally.number(1, sample=9)
    while True:
        code = (errno.ENOSPC, errno.EIO)[faults % 2]
        codes = (errno.ENOSPC, errno.EIO) if tally.full else (code,)
        number += 1 if not faults else step
        for code in codes:
            cache = tmp_path / f"{number}-{code}"
            start(job, cache)
            before = own(published(cache)) if cache.exists() else {}
            came, error = attempt(job, cache, kind, number, code)
            if not came:
                break
            faults += 1
            if error is None:
                assert kind == "mkdir"  # of a folder that is there, so nothing came of it
                assert own(published(cache)) == expected
                continue
            assert error.errno == code
            assert re.search(NEEDED[kind] + r" needed, [\d,]+ (bytes )?free", str(error)), str(error)
            assert str(cache) in str(error)
            if cache.exists():
                check_nothing_unpublished_is_read(cache, expected, before)
            finish_extraction(job, cache)
            assert own(published(cache)) == expected
        if not came:
            break
    assert faults > 0 or (kind, start) == ("rename", nothing_there)
    tally(faults=faults)


PROGRAM = """
import gc; gc.disable()  # most of its time goes into imports
import contextlib, io, subprocess, sys
from pathlib import Path
from theworld.extraction import extract
from jobs import config_of
job, cache = map(Path, sys.argv[1:])
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8k", "none", str(cache)], check=True)
extract.preflight = lambda *arguments: ""  # which sees in time that the disk is too small: here it is filled later
full, size = 0, 8
while True:
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            done = extract.extract(config_of(job), cache, False, True)
        break
    except OSError as error:
        assert error.errno == 28 and "free" in str(error) and str(cache) in str(error), error
        assert not (cache / "latents/manifest.json").exists()
        assert not list(cache.rglob("*.tmp"))
        full += 1
        size += 4
        subprocess.run(["mount", "-o", f"remount,size={size}k", "none", str(cache)], check=True)
assert done
files = {str(p.relative_to(cache)): p.read_bytes() for p in cache.rglob("*") if p.is_file()}
wanted = {str(p.relative_to(job / "cache")): p.read_bytes() for p in (job / "cache").rglob("*") if p.is_file()}
assert files == wanted
print(full)
"""


@pytest.mark.torture("cache", "a disk that is really full, and gets 4 KiB more each time")
def test_a_small_disk_that_fills_up_again_and_again(job: Path, tmp_path: Path, tally: Tally) -> None:
    mount = ["unshare", "--user", "--map-root-user", "--mount"]
    if shutil.which("unshare") is None or subprocess.run([*mount, "true"], capture_output=True).returncode:
        pytest.skip("no mounts in a namespace of one's own here")
    done = subprocess.run(
        [*mount, sys.executable, "-c", PROGRAM, str(job), str(tmp_path)],
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 10
    tally(disks_full=int(done.stdout), byte_identical="yes")


def test_a_disk_without_room_is_refused_before_anything_is_encoded(
    job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10_000))
    with pytest.raises(ValueError, match=r"latents: 19,456 bytes are needed and 10,000 are free; make room"):
        extract(config_of(job), tmp_path / "cache", with_vision=False, allow_missing=True)
