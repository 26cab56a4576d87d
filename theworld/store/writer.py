"""The writing side of a store: freeze the image list, write shards, mend what is damaged, publish.

    store.json                           what the numbers mean, and what a row is
    images.jsonl                         the frozen list
    shards/00000.h5, shards/00000.json   a shard and its record
    manifest.json                        written last, when all shards are there
    quarantine/                          damaged or replaced files, never read

Any number of processes on any number of machines may hold a `Store` on one folder; the files come out the
same. `StoreReader` (reader.py) reads a finished one. The format is specified, byte for byte, in cache/README.md.
"""

import contextlib
import hashlib
import logging
import os
import secrets
import time
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from theworld.store import shard as shards
from theworld.store.format import (
    MANIFEST,
    QUARANTINE,
    STORE_KEYS,
    Difference,
    Plan,
    StoreMismatch,
    check_entry,
    entry,
    fingerprint_differences,
    image_differences,
    image_table,
    manifest_fields,
    parse_images,
    parse_manifest,
    paths,
    read_manifest,
    surplus,
)
from theworld.store.shard import RECORD_KEYS, ArraySpec, ImageEntry
from theworld.utils import files
from theworld.utils.files import StoreError, UnknownVersion
from theworld.utils.text import counted

T = TypeVar("T")
OTHER_NUMBERS = "extract on the kind of machine that wrote the shard, or into another --cache"
logger = logging.getLogger(__name__)


def _sound(read: Callable[[], T]) -> T | None:
    """Return what `read` returns, or None if the file that it reads is missing or damaged.

    A file of another version of the format is not damaged: that raises.
    """
    try:
        return read()
    except UnknownVersion:
        raise
    except StoreError:
        return None


def _read_record(path: Path) -> dict[str, Any]:
    """Return a record, of whatever store. Raises StoreError if it is missing or damaged."""
    return files.read_sealed(path, RECORD_KEYS, files.MAX_RECORD_BYTES)[0]


def quarantine(root: Path, path: Path, reason: str) -> None:
    """Move a damaged or replaced file of the store in `root` to its quarantine, and log it. Nothing is deleted."""
    target = root / QUARANTINE / f"{path.name}.{secrets.token_hex(4)}"
    files.make_folder(target.parent)
    try:
        os.rename(path, target)
    except FileNotFoundError:  # missing, or another process was faster
        return
    except OSError as error:
        raise files.explained(error, path, f"its move to {target}") from error
    logger.warning("%s was moved to %s: %s", path.name, target, reason)


class Store:
    """The writing side of one store. Damaged and replaced files go to `quarantine/`, and the log names each."""

    def __init__(self, root: Path, plan: Plan):
        self.root, self.plan = root, plan
        self.num_shards, self.shard_size = plan.num_shards, plan.shard_size
        self._logged: set[str] = set()
        # Files that this process found right, by `files.identity`: they are not read again until they change.
        self._lists: dict[Path, tuple[int, ...] | None] = {}
        self._hashed: dict[Path, tuple[int, ...] | None] = {}

    @classmethod
    def create(
        cls,
        root: str | os.PathLike,
        fingerprint: dict,
        images: Sequence[ImageEntry],
        arrays: Sequence[ArraySpec],
        shard_size: int = 512,
    ) -> "Store":
        """Return a new store, or the existing one if it is the same, with its damaged lists mended.

        Another image list replaces that of an unfinished store; shards whose images did not change stay valid. A
        damaged store.json or images.jsonl is written again unless something sound in the store states that it was
        another. Raises StoreMismatch on any difference, StoreError if a damaged list cannot be made again, OSError
        if nothing can be written.
        """
        store = cls(Path(root), Plan(fingerprint, image_table(images), arrays, shard_size))
        published = os.path.lexists(store.root / MANIFEST)  # looked for first: it is written last
        cached = _sound(lambda: files.read_sealed(store.root / "store.json", STORE_KEYS)[0])
        if cached is None:
            store._check_witnesses(published)
        else:
            store._check_same(cached, published)
        if published and cached == store.plan.fields and not store.is_complete:
            store._log(f"{store.root / MANIFEST} is damaged: it is written again once all shards are checked")
        store._freeze(cached)
        for path in surplus(store.root, store.num_shards):
            quarantine(store.root, path, "no shard of this image list")
        return store

    def _check_same(self, cached: dict[str, Any], published: bool) -> None:
        """Raise StoreMismatch if a sound store.json is another store's, or names another list once published."""
        wanted = self.plan.fields
        differences = fingerprint_differences(cached["fingerprint"], wanted["fingerprint"])
        changed = [key for key in ("arrays", "shard_size") if cached[key] != wanted[key]]
        differences += [(key, cached[key], wanted[key]) for key in changed]
        if differences:
            raise StoreMismatch(self.root, differences)
        if cached == wanted or not published:
            return
        before = _sound(lambda: Plan.load(self.root))
        if before is not None:
            raise StoreMismatch(self.root, image_differences(before.images, self.plan.images))
        path = self.root / "images.jsonl"
        listed = _sound(lambda: image_table(parse_images(files.read_plain(path), path)))
        differences = [] if listed is None else image_differences(listed, self.plan.images)
        stated = f"store.json states SHA-256 {cached['images_sha256']}"
        raise self._cannot_mend(path, stated, self.plan.images_bytes, differences)

    def _check_witnesses(self, published: bool) -> None:
        """Raise StoreError if a sound manifest or record states that a lost store.json was another one.

        Where nothing else is sound either, nothing is left that another store could be mistaken for.
        """
        path, data = self.root / "store.json", self.plan.store_bytes
        manifest = _sound(lambda: parse_manifest(self.root / MANIFEST)) if published else None
        if manifest is not None and manifest["store_sha256"] != hashlib.sha256(data).hexdigest():
            raise self._cannot_mend(path, f"{MANIFEST} states SHA-256 {manifest['store_sha256']}", data)
        # A sound manifest states all that the records could.
        records = [] if manifest is not None else sorted((self.root / "shards").glob("*.json"))
        for record_path in records:
            record = _sound(partial(_read_record, record_path))
            if record is not None and not self._agrees(record, published):
                raise self._cannot_mend(path, f"{record_path} is a record of another store", data)
        if (published or records) and not os.path.lexists(path):
            self._log(f"{path} is missing: it is written again")

    def _agrees(self, record: dict[str, Any], published: bool) -> bool:
        """Whether a record is of this store; before the manifest is written, its list may be another one."""
        if not published:
            return record["fingerprint_sha256"] == self.plan.fingerprint_sha256
        shard = record["shard"]
        return shard < self.num_shards and record.items() >= self.plan.record_fields(shard).items()

    def _cannot_mend(
        self, path: Path, stated: str, data: bytes, differences: Sequence[Difference] = ()
    ) -> StoreError:
        """Return the error of a damaged list that is not the one that these settings and photographs give."""
        given = f"these settings and photographs give {hashlib.sha256(data).hexdigest()}"
        lines = [f"{path} is damaged or missing and cannot be made again: {stated}, {given}"]
        lines += [f"  {what}: {old} on disk, {new} by the photographs" for what, old, new in differences]
        lines.append(
            "Nothing was changed. Give the settings, statements and photographs of the extraction, or move "
            f"{self.root} away and extract again"
        )
        return StoreError("\n".join(lines))

    def _freeze(self, cached: dict[str, Any] | None) -> None:
        """Write images.jsonl, then store.json, unless both are there: the rename of store.json is the commit.

        `cached`: the fields of the store.json on disk, if it is sound.
        """
        lists = {"images.jsonl": self.plan.images_bytes, "store.json": self.plan.store_bytes}
        wrong = {name: data for name, data in lists.items() if not files.holds(self.root / name, data)}
        if not wrong and (self.root / "shards").is_dir():
            return
        if cached is not None and cached != self.plan.fields:
            counts = f"{cached['num_images']} paths before, {self.plan.fields['num_images']} now"
            self._log(f"the image list changed: {counts}", logging.INFO)
        files.make_folder(self.root / "shards")
        files.sync_folder(self.root)
        files.sync_folder(self.root.parent)
        for name, data in wrong.items():
            path = self.root / name
            if not os.path.lexists(path) and cached is not None:
                self._log(f"{path} is missing: it is written again")
            elif not files.holds(path, data) and os.path.lexists(path) and not self._is_sound(name, cached):
                quarantine(self.root, path, "damaged; it is written again")
            files.publish_bytes(path, data, overwrite=cached is not None)

    def _is_sound(self, name: str, cached: dict[str, Any] | None) -> bool:
        """Whether a list on disk is as it was written: store.json by its seal, images.jsonl by store.json."""
        path = self.root / name
        if name == "store.json":
            return _sound(lambda: files.read_sealed(path, STORE_KEYS)) is not None
        return cached is not None and _sound(lambda: files.hash_file(path)[1]) == cached["images_sha256"]

    @cached_property
    def rows(self) -> list[ImageEntry]:
        """The rows of the store: for each distinct content the first path that has it."""
        return [row for shard in range(self.num_shards) for row in self.shard_rows(shard)]

    def shard_rows(self, shard: int) -> list[ImageEntry]:
        """Return the images of one shard, in the order of its rows. Raises IndexError if there is no such shard."""
        return self.plan.shard_rows(shard)

    @property
    def manifest(self) -> dict[str, Any] | None:
        """The manifest; None if there is none or it is damaged."""
        return _sound(lambda: read_manifest(self.root))

    @property
    def is_complete(self) -> bool:
        """Whether a sound manifest is there."""
        return self.manifest is not None

    def pending(self, shards: Iterable[int] | None = None) -> list[int]:
        """Return the shards that have to be written, in ascending order; the log says what is damaged.

        Reads every byte of the others. `shards`: examine only these, so that one of many writers need not read what
        the others wrote. Raises IndexError if there is no such shard.
        """
        self._hashed.clear()
        return [shard for shard, found in self._entries(shards).items() if found is None]

    def missing(self) -> list[int]:
        """Return the shards that nobody has committed, by the names of files alone: `pending` and `publish` read
        them."""
        return [s for s in range(self.num_shards) if not os.path.lexists(paths(self.root, s)[1])]

    def _entries(self, chosen: Iterable[int] | None = None) -> dict[int, dict[str, Any] | None]:
        """Return what a manifest states of each chosen shard (None: of all), or None for one to be written."""
        numbers = range(self.num_shards) if chosen is None else sorted(set(chosen))
        if numbers and not 0 <= numbers[0] <= numbers[-1] < self.num_shards:
            raise IndexError(f"shards {numbers[0]} to {numbers[-1]} of {self.num_shards}")
        self._lists.clear()  # read both lists again
        self._check_unchanged()
        manifest = self.manifest
        entries: dict[int, dict[str, Any] | None] = dict.fromkeys(numbers)
        for shard in numbers:
            if manifest or os.path.lexists(paths(self.root, shard)[1]):
                try:
                    entries[shard] = self._check_committed(shard, manifest)
                except StoreError as error:
                    self._log(f"shard {shard} has to be written again: {error}")
        return entries

    def _check_committed(self, shard: int, manifest: dict | None) -> dict[str, Any]:
        """Return the shard's entry in a manifest. Raises StoreError if record or file is not what was committed."""
        path, record_path = paths(self.root, shard)
        record, digest = shards.read_record(record_path, self.plan.record_fields(shard), self.plan.arrays)
        identity = files.identity(path)
        if identity is None or identity != self._hashed.get(path):
            shards.check_file(path, record)
            self._hashed[path] = identity
        if manifest:
            check_entry(manifest, shard, record, digest, record_path)
        return entry(record, digest)

    def write_shard(self, shard: int, arrays: dict[str, np.ndarray]) -> None:
        """Publish one shard: the file, then its record.

        `arrays`: [n, *shape] each, of dtype float32, float16, or uint16 for bfloat16. Writing equal values again
        does nothing. Damaged files of the shard go to the quarantine. Raises StoreError on a wrong shape or dtype,
        on values that are not finite, on other values than a sound record or manifest states, and if the image list
        was changed meanwhile; OSError if it cannot be written.
        """
        rows = self.shard_rows(shard)
        shards.check_arrays(self.plan.arrays, rows, arrays)
        self._check_unchanged()
        data, described = shards.pack(self.plan.arrays, rows, arrays)
        record = {**self.plan.record_fields(shard), **described}
        path, record_path = paths(self.root, shard)
        wanted = {record_path: files.seal(record), path: data}
        manifest = self.manifest
        if manifest:
            digest = hashlib.sha256(wanted[record_path]).hexdigest()
            what = f"{self.root} is published, and what is to be written differs ({OTHER_NUMBERS})"
            check_entry(manifest, shard, record, digest, what)
        self._make_room(shard, wanted, None if manifest else record["file_sha256"])
        files.publish_bytes(path, data, overwrite=True)  # without a record it is nobody's
        self._hashed[path] = files.identity(path)
        files.publish_bytes(record_path, wanted[record_path])

    def _check_unchanged(self) -> None:
        """Raise StoreError if another process replaced the image list, or the list is damaged.

        A file that is the very one whose bytes were compared before is not read again: the list grows with the
        number of images, and this is called for every shard.
        """
        for name, data in (("store.json", self.plan.store_bytes), ("images.jsonl", self.plan.images_bytes)):
            path = self.root / name
            identity = files.identity(path)
            if identity is not None and identity == self._lists.get(path):
                continue
            if not files.holds(path, data):
                raise StoreError(f"{path} was changed by another process or damaged: start again")
            self._lists[path] = identity

    def _make_room(self, shard: int, wanted: dict[Path, bytes], file_sha256: str | None) -> None:
        """Move the shard's files that differ from `wanted` to the quarantine.

        Raises StoreError, with nothing moved, if a sound record states that the shard's file has another hash than
        `file_sha256`; None: the manifest states that `wanted` is right.
        """
        differing = [p for p, data in wanted.items() if os.path.lexists(p) and not files.holds(p, data)]
        if not differing:
            return
        path, record_path = paths(self.root, shard)
        try:
            expected = self.plan.record_fields(shard)
            stated = shards.read_record(record_path, expected, self.plan.arrays)[0]["file_sha256"]
            reason = f"shard {shard} was damaged; it is written again"
        except StoreError as error:
            stated, reason = None, str(error)
        if None not in (stated, file_sha256) and stated != file_sha256:
            raise StoreError(
                f"{path}: shard {shard} is committed, with other values than those given now: their SHA-256 is "
                f"{file_sha256}, the record states {stated}. Nothing was replaced; {OTHER_NUMBERS}"
            )
        for own in differing:
            quarantine(self.root, own, reason)

    def _log(self, message: str, level: int = logging.WARNING) -> None:
        """Log a message of this store, once."""
        if message not in self._logged:
            self._logged.add(message)
            logger.log(level, message)

    def publish(self) -> None:
        """Write the manifest; from then on the store can be read.

        Reads every byte of the shards first, except of those that this process has hashed and that did not change
        since. Raises StoreError if shards are pending. Temporary files older than a day, which only a killed run can
        have left, are removed; younger ones may be another process's, and the log names them.
        """
        entries = self._entries()
        pending = [shard for shard, found in entries.items() if found is None]
        if pending:
            raise StoreError(
                f"{self.root}: {len(pending)} of {counted(self.num_shards, 'shard')} missing: {pending[:10]}; run "
                "the extraction again, or those of its parts that write them"
            )
        data = files.seal(
            manifest_fields(self.plan, [found for found in entries.values() if found is not None])
        )
        path = self.root / MANIFEST
        if os.path.lexists(path) and not files.holds(path, data):
            quarantine(self.root, path, "damaged; it is written again")
        files.publish_bytes(path, data)
        self._remove_stale()

    def _remove_stale(self) -> None:
        for path in [*self.root.iterdir(), *(self.root / "shards").iterdir()]:
            with contextlib.suppress(FileNotFoundError):  # its owner was faster
                if not files.TEMPORARY.fullmatch(path.name):
                    continue
                old = time.time() - path.lstat().st_mtime > files.STALE_SECONDS
                if old:
                    path.unlink()
                what = "removed" if old else "left: it is less than a day old"
                self._log(f"temporary file {path} {what}", logging.INFO)
