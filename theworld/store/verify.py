"""What is wrong with a store, file by file: each against the hash that the file above it names. Changes nothing.

manifest.json ─> store.json ─> images.jsonl
              └> each record, each shard's file          without a manifest: record ─> file
"""

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from theworld.store import shard as shards
from theworld.store.format import (
    STORE_KEYS,
    Plan,
    entry,
    extraction_command,
    manifest_fields,
    parse_manifest,
    paths,
    surplus,
)
from theworld.utils import files
from theworld.utils.files import StoreError
from theworld.utils.text import counted

T = TypeVar("T")
SOUND, DAMAGED, UNKNOWN = 0, 1, 2


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong: a file, or a shard with its record."""

    message: str
    paths: tuple[Path, ...]  # the files that are missing or damaged
    shard: int | None = None
    damaged: bool = True  # False: nothing is known to be damaged, and nothing can be said for sure

    def __str__(self) -> str:
        return self.message if self.shard is None else f"shard {self.shard}: {self.message}"


def status(problems: Sequence[Problem]) -> int:
    """Return SOUND, DAMAGED, or UNKNOWN if no file is known to be damaged but something could not be read."""
    return DAMAGED if any(p.damaged for p in problems) else UNKNOWN if problems else SOUND


def examine(root: str | os.PathLike) -> list[Problem]:
    """Read every byte of a store, finished or not, and return its problems: [] if it is finished and sound.

    Raises nothing.
    """
    found = Examination(Path(root))
    try:
        found.examine()
    except OSError as error:  # the folder itself cannot be looked at
        found.cannot_say(error, Path(root))
    return found.problems


class Examination:
    """The files of a store, from the manifest down."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.problems: list[Problem] = []
        self.plan: Plan | None = None
        self.manifest: dict[str, Any] | None = None

    def examine(self) -> None:
        names = [self.root / name for name in ("store.json", "images.jsonl", "manifest.json")]
        if not any(map(os.path.lexists, names)):
            self._note(
                f"{self.root}: no store in it; make it with: {extraction_command(self.root)}", self.root
            )
            return
        path = self.root / "manifest.json"
        published = os.path.lexists(path)
        if published:
            self.manifest = self._try(lambda: parse_manifest(path), path)
        self._lists()
        entries = self._shards()
        if published and self.manifest is None:
            self._expected_manifest(path, entries)
        elif not published and self.plan is not None:
            self._unfinished(entries)

    def _lists(self) -> None:
        """Examine store.json and images.jsonl."""
        store = self.root / "store.json"
        stated = None if self.manifest is None else str(self.manifest["store_sha256"])
        fields = self._try(lambda: _read_store(store, stated), store)
        if fields is None:
            return
        path = self.root / "images.jsonl"
        self.plan = self._try(lambda: self._load_plan(path, fields["images_sha256"]), path)
        if self.plan is not None and self.manifest is not None:
            wanted = manifest_fields(self.plan, self.manifest["shards"])
            if wanted != self.manifest or len(self.manifest["shards"]) != self.plan.num_shards:
                self._note(
                    f"{self.root / 'manifest.json'} is not the manifest of this store.json",
                    self.root / "manifest.json",
                    True,
                )
                self.manifest = None

    def _load_plan(self, path: Path, stated: str) -> Plan:
        _expect(path, stated, "store.json")
        return Plan.load(self.root)

    def _shards(self) -> list[dict[str, Any] | None]:
        """Return the manifest's entry of each shard as it is on disk; None for a damaged or missing shard."""
        listed = self.manifest["shards"] if self.manifest is not None else None
        count = self.plan.num_shards if self.plan is not None else len(listed or [])
        entries = [self._shard(k, listed[k] if listed is not None else None) for k in range(count)]
        if self.plan is not None or listed is not None:
            for path in self._try(lambda: surplus(self.root, count), self.root / "shards") or []:
                self._note(f"{path} is no file of this store", path, True)
        return entries

    def _shard(self, shard: int, listed: dict[str, Any] | None) -> dict[str, Any] | None:
        path, record_path = paths(self.root, shard)
        if listed is None and not os.path.lexists(record_path):
            return None  # of an unfinished store: a file without a record is nobody's
        errors: list[StoreError | OSError] = []
        bad: list[Path] = []

        def attempt(work: Callable[[], T], *blamed: Path) -> T | None:
            try:
                return work()
            except (StoreError, OSError) as error:
                errors.append(error)
                bad.extend(blamed)
                return None

        record = attempt(lambda: self._record(shard, listed), record_path)
        expected = listed or (record[0] if record else None)
        if expected is not None:
            attempt(lambda: _check_file(path, expected, "the manifest" if listed else "its record"), path)
        if record is not None and not errors and self.plan is not None:
            attempt(lambda: self._read_rows(shard, record[0]), path, record_path)
        if errors:
            damaged = any(isinstance(error, StoreError) for error in errors)
            self.problems.append(Problem("; ".join(map(str, errors)), tuple(bad), shard, damaged))
            return None
        return entry(*record) if record else None

    def _record(self, shard: int, listed: dict[str, Any] | None) -> tuple[dict[str, Any], str]:
        """Return a record and the SHA-256 of its bytes."""
        path = paths(self.root, shard)[1]
        if listed is not None:
            _expect(path, listed["record_sha256"], "the manifest")
        if self.plan is None:
            return files.read_sealed(path, shards.RECORD_KEYS, files.MAX_RECORD_BYTES)
        return shards.read_record(path, self.plan.record_fields(shard), self.plan.arrays)

    def _read_rows(self, shard: int, record: dict[str, Any]) -> None:
        """Read every row through HDF5's tables and its CRC. The hashes are right: only a forgery can fail."""
        assert self.plan is not None
        rows = self.plan.shard_rows(shard)
        opened = shards.ShardFile(paths(self.root, shard)[0], record, self.plan.arrays, rows)
        for spec in self.plan.arrays:
            for row in range(len(rows)):
                opened.read(row, spec.name)

    def _expected_manifest(self, path: Path, entries: list[dict[str, Any] | None]) -> None:
        """Add to the problem of a damaged manifest what it should be, if everything else is sound."""
        sound = [entry for entry in entries if entry is not None]
        if self.plan is None or len(sound) < len(entries):
            return
        expected = hashlib.sha256(files.seal(manifest_fields(self.plan, sound))).hexdigest()
        for number, problem in enumerate(self.problems):
            if problem.paths == (path,) and path.is_file() and not path.is_symlink():
                says = f"{problem.message}; SHA-256 is {files.hash_file(path)[1]}, expected {expected}"
                self.problems[number] = Problem(says, problem.paths, damaged=problem.damaged)

    def _unfinished(self, entries: list[dict[str, Any] | None]) -> None:
        there = sum(os.path.lexists(paths(self.root, shard)[1]) for shard in range(len(entries)))
        state = f"{there} of {counted(len(entries), 'shard')} written"
        self._note(
            f"{self.root} is unfinished: manifest.json is missing, {state}. "
            f"Go on with: {extraction_command(self.root)}",
            self.root / "manifest.json",
        )

    def _try(self, work: Callable[[], T], path: Path) -> T | None:
        try:
            return work()
        except StoreError as error:
            self._note(str(error), path, True)
        except OSError as error:
            self.cannot_say(error, path)
        return None

    def _note(self, says: str, path: Path, damaged: bool = False) -> None:
        self.problems.append(Problem(says, (path,), damaged=damaged))

    def cannot_say(self, error: OSError, path: Path) -> None:
        self._note(f"{error.filename or path} cannot be read: {error.strerror or error}", path)


def _expect(path: Path, stated: str, by: str) -> None:
    """Raise StoreError unless a file has the SHA-256 that is stated."""
    size, digest = files.hash_file(path)
    if digest != stated:
        raise StoreError(f"{path} is damaged: {size:,} bytes, SHA-256 {digest}; expected {stated} by {by}")


def _check_file(path: Path, expected: dict[str, Any], by: str) -> None:
    size, digest = files.hash_file(path)
    if (size, digest) != (expected["file_size"], expected["file_sha256"]):
        raise StoreError(
            f"{path} is damaged: {size:,} bytes, SHA-256 {digest}; expected {expected['file_size']:,} bytes, "
            f"{expected['file_sha256']} by {by}"
        )


def _read_store(path: Path, stated: str | None) -> dict[str, Any]:
    """Return the fields of store.json. Raises StoreError unless it has the SHA-256 that the manifest states, if any."""
    if stated is not None:
        _expect(path, stated, "the manifest")
    return files.read_sealed(path, STORE_KEYS)[0]
