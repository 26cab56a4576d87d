"""Which photographs phase 1 encodes: those that statements name and that can be read; the others by name and reason."""

import json
from collections.abc import Sequence
from pathlib import Path

from torch.utils.data import Dataset

from theworld.cache import FAILURES, LATENTS, VISION
from theworld.console import progress
from theworld.files import publish_bytes
from theworld.images import ImageError, decode, read_bytes, sha256
from theworld.reading import Source, in_processes, workers_for
from theworld.store import ImageEntry, StoreError

CHUNK = 16  # photographs that a process looks at before it answers

Look = ImageEntry | tuple[str, str]  # a readable photograph, or the path and reason of another


class Looks(Dataset[list[Look]]):
    """Item n is what was found at the n-th `CHUNK` paths."""

    def __init__(self, paths: Sequence[str], source: Source, known: dict[str, str]) -> None:
        self.paths = paths
        self.source = source
        self.known = known

    def __len__(self) -> int:
        return -(-len(self.paths) // CHUNK)

    def __getitem__(self, number: int) -> list[Look]:
        return [self._look(path) for path in self.paths[number * CHUNK : (number + 1) * CHUNK]]

    def _look(self, path: str) -> Look:
        try:
            data = read_bytes(self.source.folder, path)
            digest = sha256(data)
            if self.known.get(path) != digest:
                decode(data, path, max_pixels=self.source.max_image_pixels)
        except ImageError as error:
            return path, error.reason
        return ImageEntry(path, digest)


def freeze(
    paths: Sequence[str], source: Source, known: dict[str, str]
) -> tuple[list[ImageEntry], list[tuple[str, str]]]:
    """Reads every photograph: (the readable ones with their hashes, sorted; the others with the reason).

    A photograph is decoded before it counts, except where `known` (path -> SHA-256) has seen the same bytes.
    """
    looks = Looks(sorted(paths), source, known)
    # One process beside this one, which only waits, would gain nothing.
    workers = workers_for(len(paths), len(looks), source.num_workers)[0] if source.num_workers > 1 else 0
    looked: list[Look] = []
    bar = progress(total=len(paths), desc="reading photographs", unit=" images", leave=False)
    with bar, in_processes(looks, workers) as chunks:
        for found in chunks:
            looked += found
            bar.update(len(found))
    entries = [x for x in looked if isinstance(x, ImageEntry)]
    return entries, [x for x in looked if not isinstance(x, ImageEntry)]


def write_failures(cache: Path, failures: list[tuple[str, str]]) -> None:
    """`failures.jsonl`, path and reason a line; no file where nothing failed."""
    path = cache / FAILURES
    if not failures:
        path.unlink(missing_ok=True)
        return
    lines = (json.dumps({"path": p, "reason": r}, ensure_ascii=False) + "\n" for p, r in failures)
    publish_bytes(path, "".join(lines).encode(), overwrite=True)


def known_hashes(cache: Path) -> dict[str, str]:
    """path -> SHA-256 of photographs that an earlier run on this cache has decoded. StoreError if damaged."""
    known: dict[str, str] = {}
    for name in (LATENTS, VISION):
        path = cache / name / "images.jsonl"
        if path.is_file():
            try:
                rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
                known |= {row["path"]: row["sha256"] for row in rows}
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                raise StoreError(
                    f"{path} is damaged: {error!r:.200}; mend it with tools/extract_latents.py --repair, or move "
                    f"{path.parent} away and extract again"
                ) from None
    return known
