"""Which photographs phase 1 encodes: those that statements name and that can be read; the others by name and reason."""

import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from theworld.cache import FAILURES, LATENTS, VISION
from theworld.console import progress
from theworld.images import ImageError, decode, read_bytes, sha256
from theworld.store import ImageEntry, StoreError


@dataclass
class Source:
    """Where photographs come from, under which limits."""

    folder: Path
    max_image_pixels: int
    num_workers: int


def freeze(
    paths: Sequence[str], source: Source, known: dict[str, str]
) -> tuple[list[ImageEntry], list[tuple[str, str]]]:
    """Reads every photograph: (the readable ones with their hashes, sorted; the others with the reason).

    A photograph is decoded before it counts, except where `known` (path -> SHA-256) has seen the same bytes.
    """

    def look(path: str) -> ImageEntry | tuple[str, str]:
        try:
            data = read_bytes(source.folder, path)
            digest = sha256(data)
            if known.get(path) != digest:
                decode(data, path, max_pixels=source.max_image_pixels)
        except ImageError as error:
            return path, error.reason
        return ImageEntry(path, digest)

    with ThreadPoolExecutor(max(1, source.num_workers)) as pool:
        looked = list(
            progress(
                pool.map(look, sorted(paths)),
                total=len(paths),
                desc="reading photographs",
                unit=" images",
                leave=False,
            )
        )
    entries = [x for x in looked if isinstance(x, ImageEntry)]
    return entries, [x for x in looked if not isinstance(x, ImageEntry)]


def write_failures(cache: Path, failures: list[tuple[str, str]]) -> None:
    """`failures.jsonl`, path and reason a line; no file where nothing failed."""
    path = cache / FAILURES
    if not failures:
        path.unlink(missing_ok=True)
        return
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.writelines(json.dumps({"path": p, "reason": r}, ensure_ascii=False) + "\n" for p, r in failures)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def known_hashes(cache: Path) -> dict[str, str]:
    """path -> SHA-256 of photographs that an earlier run on this cache has decoded. StoreError if damaged."""
    known: dict[str, str] = {}
    for name in (LATENTS, VISION):
        path = cache / name / "images.jsonl"
        if path.is_file():
            try:
                rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
                known |= {row["path"]: row["sha256"] for row in rows}
            except (ValueError, KeyError, TypeError) as error:
                raise StoreError(
                    f"{path} is damaged: {error!r}; move {path.parent} away and extract again"
                ) from None
    return known
