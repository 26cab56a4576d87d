"""One cache for many: extractors at the same time, users who may only read, file systems without locks."""

import ctypes
import fcntl
import os
import platform
import random
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from constants import ROOT
from jobs import config_of, make_photographs, published, start_extraction
from locks import FLOCK
from torture import Tally

from theworld.extraction.extract import extract, verify
from theworld.extraction.features import CachedFeatures
from theworld.store.format import LATENTS
from theworld.store.reader import StoreReader


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with 40 photographs (5 shards), settings, and `cache`, what a single run makes of them."""
    job = tmp_path_factory.mktemp("job")
    make_photographs(job, 40, 20)
    assert extract(config_of(job), job / "cache", with_vision=False, allow_missing=False)
    return job


@pytest.mark.torture("cache", "two or three extractors on one cache, each doing all of it")
def test_extractors_at_the_same_time_make_the_files_of_one(job: Path, tmp_path: Path, tally: Tally) -> None:
    expected, chance = published(job / "cache"), random.Random(0)
    caches = tally.number(30, sample=2)
    for number in range(caches):
        cache = tmp_path / str(number)
        running = []
        for _ in range(2 + number % 2):
            running.append(start_extraction(job, cache))
            time.sleep(chance.uniform(0, 0.2))
        for process in running:
            process.join(120)
        log = cache.with_suffix(".log").read_text()
        assert [process.exitcode for process in running] == [0] * len(running), log
        assert published(cache) == expected
        assert not list(cache.rglob("*.tmp"))
        assert not (cache / LATENTS / "quarantine").exists()
        tally(extractors=len(running))
    tally(caches=caches, byte_identical="yes")


# --- read-only -----------------------------------------------------------------------------------

CAP_DAC_OVERRIDE = 1


def obey_permissions() -> None:
    """Gives up root's right to write anywhere, in this process."""
    if os.geteuid() != 0:
        return
    header, data = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.capget(header, data) == 0
    for word in (0, 1):  # effective, permitted
        data[word] &= ~(1 << CAP_DAC_OVERRIDE)
    assert libc.capset(header, data) == 0


@contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """Nobody may write anything in a folder meanwhile."""
    paths = [folder, *folder.rglob("*")]
    for path in paths:
        path.chmod(0o555 if path.is_dir() else 0o444)
    try:
        yield
    finally:
        for path in paths:
            path.chmod(0o755 if stat.S_ISDIR(path.stat().st_mode) else 0o644)


def in_child(work: Callable[[], object]) -> str:
    """What `work` returns or raises, as text, in a process that obeys permissions."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            obey_permissions()
            result = repr(work())
        except BaseException as error:  # noqa: BLE001 - whatever it is, the test wants to see it
            result = f"{type(error).__name__}: {error}"
        os.write(writing, result.encode())
        os._exit(0)
    os.close(writing)
    with open(reading, encoding="utf-8") as file:
        result = file.read()
    os.waitpid(child, 0)
    return result


@pytest.mark.torture("cache", "a read-only cache: everything reads, only extraction fails")
def test_a_read_only_cache_is_read_and_verified_and_only_extraction_fails(
    job: Path, tmp_path: Path, tally: Tally
) -> None:
    config, cache = config_of(job), tmp_path / "cache"
    extract(config, cache, with_vision=False, allow_missing=False)
    before = published(cache)
    with read_only(cache):
        assert in_child(lambda: (cache / "x").touch()).startswith("PermissionError")
        assert in_child(lambda: verify(cache)) == "[]"
        assert (
            in_child(lambda: CachedFeatures(cache / LATENTS)(["0007.png"]).shape)
            == "torch.Size([1, 16, 4, 4])"
        )
        assert in_child(lambda: extract(config, cache, False, False)) == "True"  # there is nothing to do
    assert published(cache) == before
    (cache / LATENTS / "manifest.json").unlink()
    for name in ("00004.h5", "00004.json"):
        (cache / LATENTS / "shards" / name).unlink()
    before = published(cache)
    with read_only(cache):
        words = in_child(lambda: extract(config, cache, False, False))
    assert (
        words == f"PermissionError: --cache {cache}: {cache} is not yours to write to; choose another --cache"
    )
    assert published(cache) == before
    tally(reads=4, refused_in_one_line=1, files_changed=0)


PROGRAM = """
import sys
from pathlib import Path
from locks import refuse_locks, locks_are_refused
refuse_locks()
assert locks_are_refused(Path(sys.argv[2]))
from jobs import config_of, published
from theworld.extraction.extract import extract, verify
from theworld.store.format import LATENTS; from theworld.extraction.features import CachedFeatures
job, cache = Path(sys.argv[1]), Path(sys.argv[2]) / "cache"
assert extract(config_of(job), cache, False, False)
assert published(cache) == published(job / "cache")
assert verify(cache) == []
assert CachedFeatures(cache / LATENTS)(["0007.png"]).shape == (1, 16, 4, 4)
"""


@pytest.mark.torture("cache", "every lock refused with ENOLCK")
def test_nothing_needs_a_lock(job: Path, tmp_path: Path, tally: Tally) -> None:
    if platform.machine() not in FLOCK or sys.platform != "linux":
        pytest.skip("the filter is written for Linux on x86_64 and aarch64")
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", PROGRAM, str(job), str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    if "no filters on system calls" in done.stderr:
        pytest.skip("no filters on system calls here")
    assert done.returncode == 0, done.stderr
    tally(extracted_verified_read="yes")


def test_a_shard_that_another_process_has_locked_is_read(job: Path) -> None:
    root = job / "cache" / LATENTS
    with open(root / "shards/00000.h5", "rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert StoreReader(root).read("0000.png", LATENTS).shape == (16, 4, 4)
