"""A sharded HDF5 store of arrays by image: freeze the list, write shards, publish, read, verify.

    store.json                           what the numbers mean, and what a row is
    images.jsonl                         the frozen list
    shards/00000.h5, shards/00000.json   a shard and its record
    manifest.json                        written last, when all shards are there

Any number of processes on any number of machines may hold a `Store` on one folder; the files come out the
same. `StoreReader` (reader.py) reads a finished one. The format is specified, byte for byte, in cache/README.md.
"""

import contextlib
import hashlib
import os
import secrets
import time
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from theworld.store import shard as shards
from theworld.store.format import (
    STORE_KEYS,
    Plan,
    StoreMismatch,
    check_entry,
    check_fingerprint,
    entry,
    fingerprint_differences,
    image_differences,
    image_table,
    manifest_fields,
    paths,
    read_manifest,
    surplus,
)
from theworld.store.shard import ArraySpec, ImageEntry
from theworld.utils import files
from theworld.utils.files import StoreError


def check_existing(root: Path, expected: dict[str, Any]) -> None:
    """StoreMismatch if a store that is there, finished or not, has other values in these fields of its fingerprint."""
    if not os.path.lexists(root / "store.json"):
        return
    fields, _ = files.read_sealed(root / "store.json", STORE_KEYS)
    cached = {key: value for key, value in fields["fingerprint"].items() if key in expected}
    differences = fingerprint_differences(cached, check_fingerprint(expected))
    if differences:
        raise StoreMismatch(root, differences)


class Store:
    """The writing side. `notes` says what was found damaged, stale or replaced: nothing is silent."""

    def __init__(self, root: Path, plan: Plan):
        self.root, self.plan = root, plan
        self.num_shards, self.shard_size = plan.num_shards, plan.shard_size
        self.notes: list[str] = []
        self.aside = root / "set-aside"  # where what is replaced goes
        self._unchanged: dict[Path, tuple[int, ...] | None] = {}

    @classmethod
    def create(
        cls,
        root: str | os.PathLike,
        fingerprint: dict,
        images: Sequence[ImageEntry],
        arrays: Sequence[ArraySpec],
        shard_size: int = 512,
    ) -> "Store":
        """A new store, or the existing one if it is the same.

        Another image list replaces that of an unfinished store (see `notes`; shards whose images did not
        change stay valid). Raises StoreMismatch on any other difference, StoreError if store.json or the
        manifest is damaged, OSError if nothing can be written.
        """
        store = cls(Path(root), Plan(fingerprint, image_table(images), arrays, shard_size))
        published = os.path.lexists(store.root / "manifest.json")  # looked for first: it is written last
        exists = os.path.lexists(store.root / "store.json")
        if exists:
            store._compare()
        elif published:
            raise StoreError(f"{store.root} has a manifest but no store.json: restore it, or move the folder")
        if not (exists and store.is_complete):
            store._freeze(exists)
        return store

    def _compare(self) -> None:
        """The store on disk with the wanted one. Raises, or notes what is going to be replaced."""
        cached, _ = files.read_sealed(self.root / "store.json", STORE_KEYS)
        wanted = self.plan.fields
        differences = fingerprint_differences(cached["fingerprint"], wanted["fingerprint"])
        changed = [key for key in ("arrays", "shard_size") if cached[key] != wanted[key]]
        differences += [(key, cached[key], wanted[key]) for key in changed]
        if differences:
            raise StoreMismatch(self.root, differences)
        same_list = files.holds(self.root / "images.jsonl", self.plan.images_bytes)
        if cached == wanted and same_list:
            return
        if self.is_complete:
            before = Plan.load(self.root).images  # StoreError where images.jsonl is damaged
            raise StoreMismatch(self.root, image_differences(before, self.plan.images))
        if cached != wanted:
            self._note(
                f"the image list changed: {cached['num_images']} paths before, {wanted['num_images']} now"
            )
        else:
            self._note("images.jsonl was not the list that store.json names; it is written again")

    def _freeze(self, overwrite: bool) -> None:
        """Writes images.jsonl, then store.json: its rename is the commit."""
        files.make_folder(self.root / "shards")
        files.sync_folder(self.root)
        files.sync_folder(self.root.parent)
        files.publish_bytes(self.root / "images.jsonl", self.plan.images_bytes, overwrite=True)
        files.publish_bytes(self.root / "store.json", self.plan.store_bytes, overwrite)
        for path in surplus(self.root, self.num_shards):
            self.set_aside(path, "no shard of this image list")

    @cached_property
    def rows(self) -> list[ImageEntry]:
        """One for each distinct content: the first path that has it."""
        return [row for shard in range(self.num_shards) for row in self.shard_rows(shard)]

    def shard_rows(self, shard: int) -> list[ImageEntry]:
        """The images of one shard, in the order of its rows. IndexError if there is no such shard."""
        return self.plan.shard_rows(shard)

    @property
    def is_complete(self) -> bool:
        """Whether the manifest is there. StoreError if it is damaged."""
        return read_manifest(self.root) is not None

    def pending(self, shards: Iterable[int] | None = None) -> list[int]:
        """Shards that have to be written, in ascending order. Reads every byte of the others; damaged ones are in
        `notes`.

        `shards`: examine and return only these, so that one of many writers need not read what the others wrote.
        IndexError if there is no such shard.
        """
        return [shard for shard, found in self._entries(shards).items() if found is None]

    def missing(self) -> list[int]:
        """Shards that nobody has committed, from the names of files alone: whether the others are sound `pending` and
        `publish` find out."""
        return [s for s in range(self.num_shards) if not os.path.lexists(paths(self.root, s)[1])]

    def _entries(self, chosen: Iterable[int] | None = None) -> dict[int, dict[str, Any] | None]:
        """What a manifest says of each chosen shard (None: of all); None for those that have to be written."""
        numbers = range(self.num_shards) if chosen is None else sorted(set(chosen))
        if numbers and not 0 <= numbers[0] <= numbers[-1] < self.num_shards:
            raise IndexError(f"shards {numbers[0]} to {numbers[-1]} of {self.num_shards}")
        self._unchanged.clear()  # look at every byte again
        self._check_unchanged()
        manifest = read_manifest(self.root)
        entries: dict[int, dict[str, Any] | None] = dict.fromkeys(numbers)
        for shard in numbers:
            if os.path.lexists(paths(self.root, shard)[1]):
                try:
                    entries[shard] = self._check_committed(shard, manifest)
                except StoreError as error:
                    self._note(f"shard {shard} has to be written again: {error}")
        return entries

    def _check_committed(self, shard: int, manifest: dict | None) -> dict[str, Any]:
        """Its entry in a manifest. StoreError if record or file is not what was committed."""
        path, record_path = paths(self.root, shard)
        record, digest = shards.read_record(record_path, self.plan.record_fields(shard), self.plan.arrays)
        shards.check_file(path, record)
        if manifest:
            check_entry(manifest, shard, record, digest, record_path)
        return entry(record, digest)

    def write_shard(self, shard: int, arrays: dict[str, np.ndarray]) -> None:
        """Publishes one shard: the file, then its record.

        `arrays`: [n, *shape] each, of dtype float32, float16, or uint16 for bfloat16. Writing equal values
        again does nothing. Raises StoreError on a wrong shape or dtype, on values that are not finite, on
        other values than those committed, and if the image list was changed meanwhile; OSError if it cannot
        be written.
        """
        rows = self.shard_rows(shard)
        shards.check_arrays(self.plan.arrays, rows, arrays)
        self._check_unchanged()
        data, described = shards.pack(self.plan.arrays, rows, arrays)
        record = {**self.plan.record_fields(shard), **described}
        path, record_path = paths(self.root, shard)
        wanted = {record_path: files.seal(record), path: data}
        manifest = read_manifest(self.root)
        if manifest:
            digest = hashlib.sha256(wanted[record_path]).hexdigest()
            check_entry(
                manifest, shard, record, digest, f"{self.root} is published, and what is to be written"
            )
        if os.path.lexists(record_path):
            self._make_room(shard, wanted, manifest)
        files.publish_bytes(path, data, overwrite=True)  # without a record it is nobody's
        files.publish_bytes(record_path, wanted[record_path])

    def _check_unchanged(self) -> None:
        """StoreError if another process replaced the image list, or the list is damaged.

        A file that is the very one whose bytes were compared before is not read again: the list grows with the
        number of images, and this is asked for every shard.
        """
        for name, data in (("store.json", self.plan.store_bytes), ("images.jsonl", self.plan.images_bytes)):
            path = self.root / name
            identity = files.identity(path)
            if identity is not None and identity == self._unchanged.get(path):
                continue
            if not files.holds(path, data):
                raise StoreError(f"{path} was changed by another process or damaged: start again")
            self._unchanged[path] = identity

    def _make_room(self, shard: int, wanted: dict[Path, bytes], manifest: dict | None) -> None:
        """Sets what differs from `wanted` aside if the shard is not valid. StoreError if it is valid."""
        differing = [path for path, data in wanted.items() if not files.holds(path, data)]
        try:
            self._check_committed(shard, manifest)
        except StoreError as error:
            for path in differing:
                self.set_aside(path, str(error))
        else:
            for path in differing:
                raise StoreError(
                    f"{path}: shard {shard} is committed, with other values than those given now"
                )

    def set_aside(self, path: Path, reason: str) -> None:
        """Moves a file that is damaged or replaced out of the way, and notes it. Nothing is ever deleted."""
        target = self.aside / f"{path.name}.{secrets.token_hex(4)}"
        files.make_folder(target.parent)
        try:
            os.rename(path, target)
        except FileNotFoundError:  # missing, or another process was faster
            return
        except OSError as error:
            raise files.explained(error, path, f"its move to {target}") from error
        self._note(f"{path.name} was moved to {target}: {reason}")

    def _note(self, note: str) -> None:
        if note not in self.notes:
            self.notes.append(note)

    def publish(self) -> None:
        """Writes the manifest; from then on the store can be read. Reads every byte first.

        Raises StoreError if shards are pending. Temporary files older than a day, which only a killed run
        can have left, are removed; younger ones may be another process's, and are noted.
        """
        entries = self._entries()
        pending = [shard for shard, found in entries.items() if found is None]
        if pending:
            raise StoreError(
                f"{self.root}: {len(pending)} of {self.num_shards} shards are missing: {pending[:10]}; run the "
                "extraction again, or those of its parts that write them"
            )
        manifest = manifest_fields(self.plan, [found for found in entries.values() if found is not None])
        files.publish_bytes(self.root / "manifest.json", files.seal(manifest))
        self._remove_stale()

    def _remove_stale(self) -> None:
        for path in [*self.root.iterdir(), *(self.root / "shards").iterdir()]:
            with contextlib.suppress(FileNotFoundError):  # its owner was faster
                if not files.TEMPORARY.fullmatch(path.name):
                    continue
                old = time.time() - path.lstat().st_mtime > files.STALE_SECONDS
                if old:
                    path.unlink()
                self._note(f"temporary file {path} {'removed' if old else 'left: it is less than a day old'}")
