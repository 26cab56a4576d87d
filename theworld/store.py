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
import json
import math
import os
import re
import secrets
import time
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from theworld import shards as files
from theworld.shards import SCHEMA_VERSION, ArraySpec, ImageEntry, StoreError, canonical_json

__all__ = ["SCHEMA_VERSION", "ArraySpec", "ImageEntry", "StoreError"]
__all__ += ["Store", "StoreMismatch", "StoreReader", "fingerprint_differences", "verify_store"]

ABSENT = "(absent)"
STALE_SECONDS = 24 * 3600
STORE_KEYS = {"schema_version": int, "fingerprint": dict, "arrays": list, "shard_size": int}
STORE_KEYS |= {"num_images": int, "num_rows": int, "images_sha256": str}
ARRAY_KEYS = {"name": str, "shape": list, "dtype": str}
IMAGE_KEYS = {"path": str, "sha256": str}
MANIFEST_KEYS = {"schema_version": int, "store_sha256": str, "num_images": int, "num_rows": int}
MANIFEST_KEYS |= {"shards": list}
ENTRY_KEYS = {"file_size": int, "file_sha256": str, "record_sha256": str}

Difference = tuple[str, object, object]
Record = dict[str, Any]


class StoreMismatch(StoreError):
    """A sound store that holds something else than what is wanted.

    `differences`: (field, cached, wanted) each; the message shows them.
    """

    def __init__(self, root: Path, differences: list[Difference]):
        self.root, self.differences = root, differences
        lines = [f"{root} holds something else than what is wanted:"]
        for field, cached, wanted in differences:
            lines.append(f"  {field}: cached {_show(cached)}, wanted {_show(wanted)}")
        super().__init__("\n".join([*lines, "Use another --cache folder, or change the setting back."]))

    def __reduce__(self) -> tuple:
        return StoreMismatch, (self.root, self.differences)


def _show(value: object) -> str:
    return ABSENT if value == ABSENT else json.dumps(value)


def fingerprint_differences(cached: dict, wanted: dict) -> list[Difference]:
    """(field, cached, wanted) of every field that differs, by name; 1, 1.0 and true are three values."""
    fields = sorted(cached.keys() | wanted.keys())
    pairs = [(field, cached.get(field, ABSENT), wanted.get(field, ABSENT)) for field in fields]
    return [pair for pair in pairs if canonical_json(pair[1]) != canonical_json(pair[2])]


def _image_differences(cached: dict[str, str], wanted: dict[str, str]) -> list[Difference]:
    """How many images, and the first paths that differ, with their hashes."""
    paths = sorted(path for path in cached.keys() | wanted.keys() if cached.get(path) != wanted.get(path))
    pairs: list[Difference] = [
        (f"image {p}", cached.get(p, ABSENT), wanted.get(p, ABSENT)) for p in paths[:5]
    ]
    return [("number of images", len(cached), len(wanted)), *pairs]


def _check_fingerprint(fingerprint: dict) -> dict[str, Any]:
    """A copy as JSON gives it back. StoreError unless flat: str to scalars or lists of scalars."""
    for key, value in fingerprint.items():
        scalars = value if isinstance(value, list | tuple) else [value]
        if not isinstance(key, str) or not all(isinstance(x, str | int | float | None) for x in scalars):
            raise StoreError(
                f"fingerprint: {key!r} is {value!r:.100}, expected a scalar or a list of scalars"
            )
    try:
        return json.loads(canonical_json(fingerprint))
    except ValueError as error:
        raise StoreError(f"fingerprint: {error}") from None


class Plan:
    """What a store will hold, decided before its first shard is written: the content of store.json and
    images.jsonl. StoreError if anything in it is ill-formed."""

    def __init__(
        self, fingerprint: dict, images: Sequence[ImageEntry], arrays: Sequence[ArraySpec], shard_size: int
    ):
        files.check_unique([entry.path for entry in images], "image")
        files.check_unique([spec.name for spec in arrays], "array")
        if not images or not arrays:
            raise StoreError(f"a store needs images and arrays, got {len(images)} and {len(arrays)}")
        if type(shard_size) is not int or not 0 < shard_size < 1 << 31:
            raise StoreError(f"shard_size is {shard_size!r}, expected a positive integer")
        self.fingerprint = _check_fingerprint(fingerprint)
        self.fingerprint_sha256 = files.canonical_sha256(self.fingerprint)
        self.arrays, self.shard_size = list(arrays), shard_size
        self.images = {entry.path: entry.sha256 for entry in sorted(images, key=lambda entry: entry.path)}
        first_paths: dict[str, str] = {}
        for path, sha256 in self.images.items():
            first_paths.setdefault(sha256, path)
        self.rows = [ImageEntry(path, sha256) for sha256, path in first_paths.items()]
        self.row_of = {sha256: row for row, sha256 in enumerate(first_paths)}
        self.num_shards = math.ceil(len(self.rows) / shard_size)

    @cached_property
    def images_bytes(self) -> bytes:
        """images.jsonl"""
        return b"".join(canonical_json({"path": p, "sha256": s}) + b"\n" for p, s in self.images.items())

    @cached_property
    def fields(self) -> dict[str, Any]:
        """store.json, without its seal"""
        return {
            "schema_version": SCHEMA_VERSION,
            "fingerprint": self.fingerprint,
            "arrays": [{"name": s.name, "shape": list(s.shape), "dtype": s.dtype} for s in self.arrays],
            "shard_size": self.shard_size,
            "num_images": len(self.images),
            "num_rows": len(self.rows),
            "images_sha256": hashlib.sha256(self.images_bytes).hexdigest(),
        }

    @cached_property
    def store_bytes(self) -> bytes:
        return files.seal(self.fields)

    def shard_rows(self, shard: int) -> list[ImageEntry]:
        if not 0 <= shard < self.num_shards:
            raise IndexError(f"shard {shard} of {self.num_shards}")
        return self.rows[shard * self.shard_size : (shard + 1) * self.shard_size]

    def record_fields(self, shard: int) -> Record:
        """What the record of a shard says, whatever its file holds."""
        rows = self.shard_rows(shard)
        return {
            "schema_version": SCHEMA_VERSION,
            "shard": shard,
            "first_row": shard * self.shard_size,
            "num_rows": len(rows),
            "fingerprint_sha256": self.fingerprint_sha256,
            "rows_sha256": hashlib.sha256(b"".join(bytes.fromhex(row.sha256) for row in rows)).hexdigest(),
        }

    @classmethod
    def load(cls, root: Path) -> "Plan":
        """Reads store.json and images.jsonl. StoreError unless every byte is as it was written."""
        fields, _ = files.read_sealed(root / "store.json", STORE_KEYS)
        path, stated = root / "images.jsonl", fields["images_sha256"]
        data = files.read_plain(path)
        digest = hashlib.sha256(data).hexdigest()
        if digest != stated:
            raise StoreError(f"{path} is damaged: SHA-256 is {digest}, store.json says {stated}")
        images = []
        for number, line in enumerate(data.splitlines(), start=1):
            image = files.parse_json(line, f"{path}, line {number}")
            files.check_keys(image, IMAGE_KEYS, f"{path}, line {number}")
            images.append(ImageEntry(**image))
        for array in fields["arrays"]:
            files.check_keys(array, ARRAY_KEYS, f"{root / 'store.json'}: arrays")
        arrays = [ArraySpec(**array) for array in fields["arrays"]]
        plan = cls(fields["fingerprint"], images, arrays, fields["shard_size"])
        if plan.images_bytes != data or plan.fields != fields:
            raise StoreError(
                f"{root}: images.jsonl and store.json do not agree, or are not in canonical form"
            )
        return plan


def _paths(root: Path, shard: int) -> tuple[Path, Path]:
    """A shard's file and its record."""
    return root / "shards" / f"{shard:05}.h5", root / "shards" / f"{shard:05}.json"


def _surplus(root: Path, num_shards: int) -> list[Path]:
    """Files named like shards that are none of this store's."""
    known = {path for shard in range(num_shards) for path in _paths(root, shard)}
    names = (path for path in (root / "shards").iterdir() if re.fullmatch(r"[0-9]+\.(h5|json)", path.name))
    return sorted(path for path in names if path not in known)


def _read_manifest(root: Path) -> dict[str, Any] | None:
    """None if there is none. StoreError if it is damaged or names another store.json."""
    path = root / "manifest.json"
    if not os.path.lexists(path):
        return None
    manifest, _ = files.read_sealed(path, MANIFEST_KEYS)
    for entry in manifest["shards"]:
        files.check_keys(entry, ENTRY_KEYS, f"{path}: shards")
    store, digest = files.read_sealed(root / "store.json", STORE_KEYS)
    store |= {"store_sha256": digest, "shards": math.ceil(store["num_rows"] / max(store["shard_size"], 1))}
    for key, found in {**manifest, "shards": len(manifest["shards"])}.items():
        if found != store[key]:
            raise StoreError(f"{path}: {key} is {found}, store.json has {store[key]}")
    return manifest


def _entry(record: Record, record_sha256: str) -> dict[str, Any]:
    """What the manifest says of a shard."""
    return {key: record[key] for key in ("file_size", "file_sha256")} | {"record_sha256": record_sha256}


def _check_entry(manifest: dict, shard: int, record: Record, record_sha256: str, where: object) -> None:
    """StoreError unless a shard's record is the one that the manifest lists."""
    for key, found in _entry(record, record_sha256).items():
        listed = manifest["shards"][shard][key]
        if found != listed:
            raise StoreError(f"{where}: {key} of shard {shard} is {found}, the manifest says {listed}")


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
                raise StoreMismatch(self.root, _image_differences(before, self.plan.images))
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
        for path in _surplus(self.root, self.num_shards):
            self._set_aside(path, "no shard of this image list")

    def shard_rows(self, shard: int) -> list[ImageEntry]:
        """The images of one shard, in the order of its rows. IndexError if there is no such shard."""
        return self.plan.shard_rows(shard)

    @property
    def is_complete(self) -> bool:
        """Whether the manifest is there. StoreError if it is damaged."""
        return _read_manifest(self.root) is not None

    def pending(self) -> list[int]:
        """Shards that have to be written. Reads every byte of the others; damaged ones are in `notes`."""
        return [shard for shard, entry in enumerate(self._entries()) if entry is None]

    def _entries(self) -> list[dict[str, Any] | None]:
        """What a manifest says of each shard; None for those that have to be written."""
        self._check_unchanged()
        manifest = _read_manifest(self.root)
        entries: list[dict[str, Any] | None] = [None] * self.num_shards
        for shard in range(self.num_shards):
            if os.path.lexists(_paths(self.root, shard)[1]):
                try:
                    entries[shard] = self._check_committed(shard, manifest)
                except StoreError as error:
                    self._note(f"shard {shard} has to be written again: {error}")
        return entries

    def _check_committed(self, shard: int, manifest: dict | None) -> dict[str, Any]:
        """Its entry in a manifest. StoreError if record or file is not what was committed."""
        path, record_path = _paths(self.root, shard)
        record, digest = files.read_record(record_path, self.plan.record_fields(shard), self.plan.arrays)
        files.check_file(path, record)
        if manifest:
            _check_entry(manifest, shard, record, digest, record_path)
        return _entry(record, digest)

    def write_shard(self, shard: int, arrays: dict[str, np.ndarray]) -> None:
        """Publishes one shard: the file, then its record.

        `arrays`: [n, *shape] each, of dtype float32, float16, or uint16 for bfloat16. Writing equal values
        again does nothing. Raises StoreError on a wrong shape or dtype, on values that are not finite, on
        other values than those committed, and if the image list was changed meanwhile; OSError if it cannot
        be written.
        """
        rows = self.shard_rows(shard)
        self._check_arrays(rows, arrays)
        self._check_unchanged()
        data, described = files.pack(self.plan.arrays, rows, arrays)
        record = {**self.plan.record_fields(shard), **described}
        path, record_path = _paths(self.root, shard)
        wanted = {record_path: files.seal(record), path: data}
        manifest = _read_manifest(self.root)
        if manifest:
            digest = hashlib.sha256(wanted[record_path]).hexdigest()
            _check_entry(
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

    def _check_arrays(self, rows: list[ImageEntry], arrays: dict[str, np.ndarray]) -> None:
        names = [spec.name for spec in self.plan.arrays]
        if arrays.keys() != set(names):
            raise StoreError(f"arrays are {sorted(arrays)}, expected {sorted(names)}")
        for spec in self.plan.arrays:
            values, shape = arrays[spec.name], (len(rows), *spec.shape)
            if values.shape != shape or values.dtype != spec.storage:
                found, wanted = f"{values.dtype} {values.shape}", f"{spec.storage} {shape}"
                raise StoreError(f"{spec.name} is {found}, expected {wanted}")
            finite = spec.finite(values).reshape(len(rows), -1).all(1)
            bad = [rows[row].path for row in np.flatnonzero(~finite)]
            if bad:
                raise StoreError(f"{spec.name} is not finite for {len(bad)} of {len(rows)} images: {bad[:3]}")

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
            pending = [shard for shard, entry in enumerate(entries) if entry is None]
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
                old = time.time() - path.lstat().st_mtime > STALE_SECONDS
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
        self._open: dict[int, files.ShardFile] = {}
        expected = _check_fingerprint(expected or {})
        cached = {key: value for key, value in self.fingerprint.items() if key in expected}
        differences = fingerprint_differences(cached, expected)
        if differences:
            raise StoreMismatch(self.root, differences)
        manifest = _read_manifest(self.root)
        if manifest is None:
            there = sum(os.path.lexists(_paths(self.root, shard)[1]) for shard in range(plan.num_shards))
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
        for opened in self._open.values():
            opened.file.close()
        self._open = {}

    def _read_record(self, shard: int) -> Record:
        path = _paths(self.root, shard)[1]
        record, digest = files.read_record(path, self._plan.record_fields(shard), self._plan.arrays)
        _check_entry(self._manifest, shard, record, digest, path)
        return record

    def _open_shard(self, shard: int) -> files.ShardFile:
        path, rows = _paths(self.root, shard)[0], self._plan.shard_rows(shard)
        return files.ShardFile(path, self._read_record(shard), self._plan.arrays, rows)

    def _verify_shard(self, shard: int) -> None:
        files.check_file(_paths(self.root, shard)[0], self._read_record(shard))  # before HDF5 sees any of it
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
        surplus = _surplus(reader.root, reader._plan.num_shards)
    except (StoreError, OSError) as error:
        return [str(error)]
    problems = []
    for shard in range(reader._plan.num_shards):
        try:
            reader._verify_shard(shard)
        except (StoreError, OSError) as error:
            problems.append(f"shard {shard}: {error}")
    return problems + [f"{path} is no file of this store" for path in surplus]
