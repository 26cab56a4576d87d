"""Whether photographs are still those that were extracted."""

import math
import os
import random
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from theworld.console import progress
from theworld.images import ImageError, read_bytes, sha256

THREADS = 8  # hashing leaves Python's lock, and a network disk answers several at once
CHUNK = 64
SHOWN = 5


class PhotographsChanged(ValueError):
    """`changes`: path -> (SHA-256 when extracted, SHA-256 now or the reason why there is none)."""

    def __init__(self, folder: Path, changes: Mapping[str, tuple[str, str]], number: int) -> None:
        self.folder, self.changes = folder, dict(changes)
        lines = [f"{len(changes):,} of {number:,} photographs in {folder} changed since they were extracted:"]
        shown = sorted(changes.items())[:SHOWN]
        lines += [f"  {path}: SHA-256 was {old}, now {new}" for path, (old, new) in shown]
        lines += [f"  and {len(changes) - SHOWN:,} more"] if len(changes) > SHOWN else []
        cure = "Put them back, or extract into another --cache"
        super().__init__("\n".join([*lines, cure]))


def check_photographs(
    images: Mapping[str, str],
    folder: Path,
    since: float | None = None,
    seconds: float | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> str:
    """Compares photographs with their SHA-256 (`images`: path -> hash); a line that says how many.

    Without `seconds` all are read. With it those that changed after `since` (seconds since 1970, by the files' own
    time stamps) are read, whatever it takes, and of the others as many, in random order, as the time allows; whether
    they are there is always looked at. Raises PhotographsChanged, which names them.
    """
    changes: dict[str, tuple[str, str]] = {}
    bar = progress(total=len(images), desc="comparing photographs", unit=" images", leave=False)
    with bar, ThreadPoolExecutor(THREADS) as pool:
        changed_at = dict(zip(images, pool.map(lambda path: _changed_at(folder / path), images), strict=True))
        first = [path for path in images if since is None or changed_at[path] > since]
        rest = sorted(images.keys() - set(first))
        random.shuffle(rest)
        compared, end = 0, None if seconds is None else clock() + seconds
        for chunk, must in [(c, True) for c in _chunks(first)] + [(c, False) for c in _chunks(rest)]:
            if not must and end is not None and clock() >= end:
                break
            for path, now in zip(chunk, pool.map(lambda path: _hash_now(folder, path), chunk), strict=True):
                if now != images[path]:
                    changes[path] = (images[path], now)
            compared += len(chunk)
            bar.update(len(chunk))
    if changes:
        raise PhotographsChanged(folder, changes, compared)
    if compared == len(images):
        return f"photographs: all {compared:,} are those that were extracted"
    return (
        f"photographs: {compared:,} of {len(images):,} compared in {seconds:.0f} s ({len(first):,} with newer time "
        "stamps, the others at random): they are those that were extracted; tools/doctor.py compares all"
    )


def _chunks(paths: Sequence[str]) -> list[Sequence[str]]:
    return [paths[start : start + CHUNK] for start in range(0, len(paths), CHUNK)]


def _changed_at(path: Path) -> float:
    """When a file's content or name last changed (not what `touch` or `cp -p` set); infinity if it is not there."""
    try:
        return os.stat(path).st_ctime
    except (OSError, ValueError):
        return math.inf


def _hash_now(folder: Path, path: str) -> str:
    try:
        return sha256(read_bytes(folder, path))
    except ImageError as error:
        return error.reason
