"""SIGKILL at any moment of an extraction: nothing is lost, nothing is wrong, and the same command goes on."""

import os
import random
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from constants import ROOT
from jobs import config_of, finish_extraction, make_photographs, published, start_extraction
from torture import Tally

from theworld.extraction.extract import extract

NUM_RENAMES = 2 + 2 * 9 + 1  # the lists, file and record of each shard, the manifest


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with 68 photographs (9 shards), settings, and `cache`, what an uninterrupted run makes of them."""
    job = tmp_path_factory.mktemp("job")
    make_photographs(job, 68, 20)
    assert extract(config_of(job), job / "cache", with_vision=False, allow_missing=False)
    return job


def committed(files: dict[str, bytes]) -> set[str]:
    """The records that are there."""
    return {name for name in files if re.search(r"shards/\d+\.json$", name)}


def check_nothing_wrong(cache: Path, expected: dict[str, bytes], before: set[str]) -> dict[str, bytes]:
    """What is published is what an uninterrupted run publishes, and no shard that was committed is gone."""
    files = published(cache)
    assert files.items() <= expected.items()
    assert before <= committed(files)
    return files


@pytest.mark.torture("cache", "SIGKILL at random moments, 1 to 3 workers, their number changing")
def test_killed_at_random_moments(job: Path, tmp_path: Path, tally: Tally) -> None:
    expected, moments = published(job / "cache"), random.Random(0)
    for name in ("first", "timed"):  # the first one starts what the others are forked from
        start = time.monotonic()
        once = start_extraction(job, tmp_path / name)
        once.join(60)
        assert once.exitcode == 0
        duration = time.monotonic() - start
    kills, rounds, caches, resumed = 0, 0, 0, 0
    cache, before = tmp_path / "0", set[str]()
    while kills < tally.number(100, sample=5):
        workers = moments.randint(1, 3)
        shared = moments.random() < 0.5  # by parts, or all of them do everything
        parts = [f"{i + 1}/{workers}" if shared else None for i in range(workers)]
        running = [start_extraction(job, cache, part) for part in parts]
        rounds += 1
        # Busy machines are slower, and what was committed makes the next round shorter: at all times some are hit.
        for process in moments.sample(running, workers):
            time.sleep(moments.uniform(0, duration) / workers)
            process.kill()
            process.join()
            kills += process.exitcode == -9
        files = check_nothing_wrong(cache, expected, before)
        before = committed(files)
        if len(files) == len(expected) or rounds % 4 == 0:  # and on with another one, from the start
            resumed += _goes_on(job, cache, expected, len(before), tally)
            caches += 1
            cache, before = tmp_path / str(caches), set()
    resumed += _goes_on(job, cache, expected, len(before), tally)
    tally(kills=kills, caches=caches + 1, resumed_in_the_middle=resumed)


def _goes_on(job: Path, cache: Path, expected: dict[str, bytes], num_committed: int, tally: Tally) -> bool:
    """The same command finishes the cache, and says from where; whether that was in the middle."""
    out = finish_extraction(job, cache)
    found = published(cache)
    lost, wrong = len(expected.keys() - found.keys()), sum(expected.get(k) != v for k, v in found.items())
    tally(files_lost=lost, files_wrong=wrong, byte_identical="yes" if found == expected else "NO")
    assert found == expected
    in_the_middle = 0 < num_committed < 9
    assert (f"resuming: {num_committed} of 9 shards valid\n" in out) == in_the_middle
    return in_the_middle


@pytest.mark.torture("cache", "SIGKILL before and after each rename")
def test_killed_at_each_rename(job: Path, tmp_path: Path, tally: Tally) -> None:
    expected = published(job / "cache")
    cases = [(side, rename) for rename in range(NUM_RENAMES) for side in ("before", "after")]
    chosen = cases if tally.full else random.Random(0).sample(cases, 4)
    for number, (side, rename) in enumerate(chosen):
        cache = tmp_path / str(number)
        process = start_extraction(job, cache, kill_at=(side, rename))
        process.join(60)
        assert process.exitcode == -9
        files = check_nothing_wrong(cache, expected, set())
        assert len(files) == rename + (side == "after")
        _goes_on(job, cache, expected, len(committed(files)), tally)
    past = start_extraction(job, tmp_path / "past", kill_at=("before", NUM_RENAMES))
    past.join(60)
    assert past.exitcode == 0  # there is no further rename
    tally(kills=len(chosen))


@pytest.mark.heavy  # the rows above are its sample
@pytest.mark.torture("cache", "SIGKILL of the tool itself, with its reading processes")
def test_a_killed_tool_leaves_no_process_and_the_same_command_goes_on(tmp_path: Path, tally: Tally) -> None:
    make_photographs(tmp_path, 200, 60)
    chance, words = random.Random(0), ["--num_workers", "2", "--latent_size", "128"]
    command = [
        sys.executable,
        "tools/extract_latents.py",
        "--config",
        str(tmp_path / "config.json"),
        *words,
        "--cache",
    ]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}

    def start(cache: Path) -> subprocess.Popen[bytes]:
        log = cache.with_suffix(".log").open("wb")
        return subprocess.Popen(
            [*command, str(cache)], cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True
        )

    assert start(tmp_path / "once").wait(200) == 0
    expected = published(tmp_path / "once")
    for kill in range(tally.number(8, sample=2)):
        cache = tmp_path / str(kill)
        tool = start(cache)
        shards, wanted = cache / "latents/shards", chance.randrange(1, 20)
        while len(list(shards.glob("*.json"))) < wanted:
            assert tool.poll() is None
            time.sleep(0.01)
        tool.kill()
        tool.wait()
        deadline = time.monotonic() + 60
        # reading processes look every few seconds whether the tool is still there
        while _group_lives(tool.pid):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        files = check_nothing_wrong(cache, expected, set())
        assert start(cache).wait(200) == 0
        valid = len(committed(files))
        assert f"resuming: {valid} of 25 shards valid" in cache.with_suffix(".log").read_text()
        assert published(cache) == expected
        tally(kills=1, processes_left=int(_group_lives(tool.pid)), byte_identical="yes")


def _group_lives(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True
