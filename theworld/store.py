"""A sharded HDF5 store of arrays by image: freeze the list, write shards, publish, read, verify.

    store.json                           what the numbers mean, and what a row is
    images.jsonl                         the frozen list
    shards/00000.h5, shards/00000.json   a shard and its record
    manifest.json                        written last, when all shards are there

Any number of processes on any number of machines may hold a `Store` on one folder; the files come out the
same. `StoreReader` reads a finished one. The format is specified, byte for byte, in cache/README.md.
"""

import contextlib
import difflib
import hashlib
import os
import secrets
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from theworld import files, shards
from theworld.files import SCHEMA_VERSION, StoreError
from theworld.plan import (
    STORE_KEYS,
    Plan,
    Record,
    StoreMismatch,
    check_entry,
    check_fingerprint,
    entry,
    fingerprint_differences,
    image_differences,
    paths,
    read_manifest,
    surplus,
)
from theworld.shards import ArraySpec, ImageEntry

__all__ = ["SCHEMA_VERSION", "ArraySpec", "ImageEntry", "StoreError"]
__all__ += ["Store", "StoreMismatch", "StoreReader", "fingerprint_differences", "verify_store"]


class Store:
    """The writing side. `notes` says what was found damaged, stale or replaced: nothing is silent."""

    def __init__(self, root: Path, plan: Plan):
        self.root, self.plan = root, plan
        self.rows = plan.rows
        # one per distinct content: the first path that has it
        self.num_shards, self.shard_size = plan.num_shards, plan.shard_size
        self.notes: list[str] = []

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
        store = cls(Path(root), Plan(fingerprint, images, arrays, shard_size))
        exists = os.path.lexists(store.root / "store.json")
        if exists:
            store._compare()
        elif os.path.lexists(store.root / "manifest.json"):
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
        if self.is_complete:
            before = Plan.load(self.root).images
            if before != self.plan.images:
                raise StoreMismatch(self.root, image_differences(before, self.plan.images))
        elif cached != wanted:
            self._note(
                f"the image list changed: {cached['num_images']} paths before, {wanted['num_images']} now"
            )
        elif not files.holds(self.root / "images.jsonl", self.plan.images_bytes):
            self._note("images.jsonl was not the list that store.json names; it is written again")

    def _freeze(self, overwrite: bool) -> None:
        """Writes images.jsonl, then store.json: its rename is the commit."""
        (self.root / "shards").mkdir(parents=True, exist_ok=True)
        files.sync_folder(self.root)
        files.sync_folder(self.root.parent)
        files.publish_bytes(self.root / "images.jsonl", self.plan.images_bytes, overwrite=True)
        files.publish_bytes(self.root / "store.json", self.plan.store_bytes, overwrite)
        for path in surplus(self.root, self.num_shards):
            self._set_aside(path, "no shard of this image list")

    def shard_rows(self, shard: int) -> list[ImageEntry]:
        """The images of one shard, in the order of its rows. IndexError if there is no such shard."""
        return self.plan.shard_rows(shard)

    @property
    def is_complete(self) -> bool:
        """Whether the manifest is there. StoreError if it is damaged."""
        return read_manifest(self.root) is not None

    def pending(self) -> list[int]:
        """Shards that have to be written. Reads every byte of the others; damaged ones are in `notes`."""
        return [shard for shard, found in enumerate(self._entries()) if found is None]

    def _entries(self) -> list[dict[str, Any] | None]:
        """What a manifest says of each shard; None for those that have to be written."""
        self._check_unchanged()
        manifest = read_manifest(self.root)
        entries: list[dict[str, Any] | None] = [None] * self.num_shards
        for shard in range(self.num_shards):
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
        """StoreError if another process replaced the image list, or the list is damaged."""
        for name, data in (("store.json", self.plan.store_bytes), ("images.jsonl", self.plan.images_bytes)):
            if not files.holds(self.root / name, data):
                raise StoreError(f"{self.root / name} was changed by another process or damaged: start again")

    def _make_room(self, shard: int, wanted: dict[Path, bytes], manifest: dict | None) -> None:
        """Sets what differs from `wanted` aside if the shard is not valid. StoreError if it is valid."""
        differing = [path for path, data in wanted.items() if not files.holds(path, data)]
        try:
            self._check_committed(shard, manifest)
        except StoreError as error:
            for path in differing:
                self._set_aside(path, str(error))
        else:
            for path in differing:
                raise StoreError(
                    f"{path}: shard {shard} is committed, with other values than those given now"
                )

    def _set_aside(self, path: Path, reason: str) -> None:
        target = self.root / "set-aside" / f"{path.name}.{secrets.token_hex(4)}"
        target.parent.mkdir(exist_ok=True)
        with contextlib.suppress(FileNotFoundError):  # missing, or another process was faster
            os.rename(path, target)
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
        if None in entries:
            pending = [shard for shard, found in enumerate(entries) if found is None]
            raise StoreError(
                f"{self.root}: {len(pending)} of {self.num_shards} shards are missing: {pending[:10]}"
            )
        manifest = {
            "schema_version": SCHEMA_VERSION,
            "store_sha256": hashlib.sha256(self.plan.store_bytes).hexdigest(),
            "num_images": len(self.plan.images),
            "num_rows": len(self.rows),
            "shards": entries,
        }
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


class StoreReader:
    """The reading side of a finished store. Opens shards when first used; can be pickled and forked."""

    def __init__(self, root: str | os.PathLike, expected: dict | None = None):
        """`expected`: fields that the fingerprint must have; others may be there. Raises StoreMismatch if
        one differs, StoreError if the store is unfinished or its JSON damaged. Reads no shard."""
        self.root = Path(root)
        self._plan = plan = Plan.load(self.root)
        self.fingerprint, self.images, self.num_rows = plan.fingerprint, plan.images, len(plan.rows)
        self.arrays = {spec.name: spec for spec in plan.arrays}
        self._open: dict[int, shards.ShardFile] = {}
        expected = check_fingerprint(expected or {})
        cached = {key: value for key, value in self.fingerprint.items() if key in expected}
        differences = fingerprint_differences(cached, expected)
        if differences:
            raise StoreMismatch(self.root, differences)
        manifest = read_manifest(self.root)
        if manifest is None:
            there = sum(os.path.lexists(paths(self.root, shard)[1]) for shard in range(plan.num_shards))
            command = f"python tools/extract_latents.py --cache {self.root.parent}"
            state = f"{there} of {plan.num_shards} shards are there"
            raise StoreError(f"{self.root} is unfinished: {state}. Go on with: {command}")
        self._manifest = manifest

    def __contains__(self, path: object) -> bool:
        return path in self.images

    def __len__(self) -> int:
        return len(self.images)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}

    def read(self, path: str, array: str) -> np.ndarray:
        """The row of one image: [*shape], float32, float16, or uint16 for bfloat16; the caller's own.

        Raises StoreError if path or array is not in the store, and if what is read is not what was written.
        """
        for name, known in ((path, self.images), (array, self.arrays)):
            if name not in known:
                nearest = difflib.get_close_matches(name, known, n=1, cutoff=0)
                raise StoreError(
                    f"{name!r} is not one of the {len(known)} in {self.root}; nearest: {nearest[0]!r}"
                )
        shard, row = divmod(self._plan.row_of[self.images[path]], self._plan.shard_size)
        if shard not in self._open:
            self._open[shard] = self._open_shard(shard)
        return self._open[shard].read(row, array)

    def nbytes(self, array: str) -> int:
        """Bytes of all rows of an array."""
        return self.num_rows * self.arrays[array].row_nbytes

    def close(self) -> None:
        """Closes the shards; the next read opens them again."""
        while self._open:
            self._open.popitem()[1].file.close()

    def _read_record(self, shard: int) -> Record:
        path = paths(self.root, shard)[1]
        record, digest = shards.read_record(path, self._plan.record_fields(shard), self._plan.arrays)
        check_entry(self._manifest, shard, record, digest, path)
        return record

    def _open_shard(self, shard: int) -> shards.ShardFile:
        path, rows = paths(self.root, shard)[0], self._plan.shard_rows(shard)
        return shards.ShardFile(path, self._read_record(shard), self._plan.arrays, rows)

    def _verify_shard(self, shard: int) -> None:
        shards.check_file(paths(self.root, shard)[0], self._read_record(shard))  # before HDF5 sees any of it
        opened = self._open_shard(shard)
        with opened.file:
            for spec in self._plan.arrays:
                for row in range(len(opened.rows)):
                    opened.read(row, spec.name)

    def verify(self) -> list[str]:
        """Reads everything again from disk, and changes nothing. What is wrong, in words; [] if sound."""
        return verify_store(self.root)


def verify_store(root: str | os.PathLike) -> list[str]:
    """As `StoreReader.verify`, also for a store too damaged for a reader. Raises nothing."""
    try:
        reader = StoreReader(root)
        unknown = surplus(reader.root, reader._plan.num_shards)
    except (StoreError, OSError) as error:
        return [str(error)]
    problems = []
    for shard in range(reader._plan.num_shards):
        try:
            reader._verify_shard(shard)
        except (StoreError, OSError) as error:
            problems.append(f"shard {shard}: {error}")
    return problems + [f"{path} is no file of this store" for path in unknown]
