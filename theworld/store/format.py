"""What a store holds, decided before its first shard is written, and what its manifest says at the end."""

import contextlib
import hashlib
import json
import math
import os
import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from theworld.store.shard import ArraySpec, ImageEntry, well_formed
from theworld.utils import files
from theworld.utils.commands import extraction
from theworld.utils.files import FAILURES, SCHEMA_VERSION, StoreError, canonical_json
from theworld.utils.jsonc import json_lines

ABSENT = "(absent)"
MANIFEST, QUARANTINE = "manifest.json", "quarantine"
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
    """A sound store that was made with other settings, or of other photographs, than those of a run.

    `differences`: (field, cached, wanted) each, which the message shows.
    """

    def __init__(self, root: Path, differences: list[Difference]):
        self.root, self.differences = root, differences
        lines = [f"{root} was made with other settings or photographs than those of this run:"]
        for field, cached, wanted in differences:
            lines.append(f"  {field}: cached {_show(cached)}, wanted {_show(wanted)}")
        super().__init__("\n".join([*lines, "Name another --cache, or change the setting back."]))

    def __reduce__(self) -> tuple:
        return StoreMismatch, (self.root, self.differences)


def _show(value: object) -> str:
    return ABSENT if value == ABSENT else json.dumps(value)


def fingerprint_differences(cached: dict, wanted: dict) -> list[Difference]:
    """Return (field, cached, wanted) of every field that differs, by name; 1, 1.0 and true are three values."""
    fields = sorted(cached.keys() | wanted.keys())
    pairs = [(field, cached.get(field, ABSENT), wanted.get(field, ABSENT)) for field in fields]
    return [pair for pair in pairs if canonical_json(pair[1]) != canonical_json(pair[2])]


def image_differences(cached: dict[str, str], wanted: dict[str, str]) -> list[Difference]:
    """Return the numbers of images, and the first paths that differ with their hashes."""
    paths = sorted(path for path in cached.keys() | wanted.keys() if cached.get(path) != wanted.get(path))
    pairs: list[Difference] = [
        (f"image {p}", cached.get(p, ABSENT), wanted.get(p, ABSENT)) for p in paths[:5]
    ]
    return [("number of images", len(cached), len(wanted)), *pairs]


def check_fingerprint(fingerprint: dict) -> dict[str, Any]:
    """Return a copy as JSON gives it back. Raises StoreError unless it maps str to scalars or lists of scalars."""
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


def image_table(images: Sequence[ImageEntry]) -> dict[str, str]:
    """Return path -> SHA-256. Raises StoreError for a path that occurs twice."""
    files.check_unique([entry.path for entry in images], "image")
    return {entry.path: entry.sha256 for entry in images}


class Plan:
    """What a store will hold, decided before its first shard is written: the content of store.json and images.jsonl.

    `images`: path -> SHA-256, as `ImageEntry` takes them; kept sorted, without an object for each. Raises StoreError if
    anything is ill-formed.
    """

    def __init__(
        self, fingerprint: dict, images: dict[str, str], arrays: Sequence[ArraySpec], shard_size: int
    ):
        files.check_unique([spec.name for spec in arrays], "array")
        if not images or not arrays:
            raise StoreError(f"a store needs images and arrays, got {len(images)} and {len(arrays)}")
        if type(shard_size) is not int or not 0 < shard_size < 1 << 31:
            raise StoreError(f"shard_size is {shard_size!r}, expected an integer from 1 to 2,147,483,647")
        self.fingerprint = check_fingerprint(fingerprint)
        self.fingerprint_sha256 = files.canonical_sha256(self.fingerprint)
        self.arrays, self.shard_size = list(arrays), shard_size
        self.images = {path: images[path] for path in sorted(images)}
        rows: dict[str, int] = {}
        self.row_of = {path: rows.setdefault(sha256, len(rows)) for path, sha256 in self.images.items()}
        self.row_hashes = list(rows)
        self.num_rows, self.num_shards = len(rows), math.ceil(len(rows) / shard_size)

    @cached_property
    def row_paths(self) -> list[str]:
        """The first path of each row."""
        first: dict[str, str] = {}
        for path, sha256 in self.images.items():
            first.setdefault(sha256, path)
        return list(first.values())

    @cached_property
    def images_bytes(self) -> bytes:
        """images.jsonl: the canonical JSON of each line, put together by hand because there can be millions."""
        lines = [
            f'{{"path":{json.dumps(path)},"sha256":"{digest}"}}\n' for path, digest in self.images.items()
        ]
        return "".join(lines).encode("ascii")

    @cached_property
    def fields(self) -> dict[str, Any]:
        """store.json without its seal."""
        return {
            "schema_version": SCHEMA_VERSION,
            "fingerprint": self.fingerprint,
            "arrays": [{"name": s.name, "shape": list(s.shape), "dtype": s.dtype} for s in self.arrays],
            "shard_size": self.shard_size,
            "num_images": len(self.images),
            "num_rows": self.num_rows,
            "images_sha256": hashlib.sha256(self.images_bytes).hexdigest(),
        }

    @cached_property
    def store_bytes(self) -> bytes:
        return files.seal(self.fields)

    def shard_rows(self, shard: int) -> list[ImageEntry]:
        """Return the images of one shard, in the order of its rows. Raises IndexError if there is no such shard."""
        here = self._slice(shard)
        return [ImageEntry(*row) for row in zip(self.row_paths[here], self.row_hashes[here], strict=True)]

    def _slice(self, shard: int) -> slice:
        if not 0 <= shard < self.num_shards:
            raise IndexError(f"shard {shard} of {self.num_shards}")
        return slice(shard * self.shard_size, (shard + 1) * self.shard_size)

    def record_fields(self, shard: int) -> Record:
        """Return what the record of a shard states, whatever its file holds."""
        hashes = self.row_hashes[self._slice(shard)]
        return {
            "schema_version": SCHEMA_VERSION,
            "shard": shard,
            "first_row": shard * self.shard_size,
            "num_rows": len(hashes),
            "fingerprint_sha256": self.fingerprint_sha256,
            "rows_sha256": hashlib.sha256(bytes.fromhex("".join(hashes))).hexdigest(),
        }

    @classmethod
    def load(cls, root: Path) -> "Plan":
        """Read store.json and images.jsonl. Raises StoreError unless every byte is as it was written."""
        fields, _ = files.read_sealed(root / "store.json", STORE_KEYS)
        path, stated = root / "images.jsonl", fields["images_sha256"]
        data = files.read_plain(path)
        digest = hashlib.sha256(data).hexdigest()
        if digest != stated:
            raise StoreError(f"{path} is damaged: SHA-256 is {digest}, store.json says {stated}")
        for array in fields["arrays"]:
            files.check_keys(array, ARRAY_KEYS, f"{root / 'store.json'}: arrays")
        arrays = [ArraySpec(**array) for array in fields["arrays"]]
        images = _cut_lines(data) or image_table(parse_images(data, path))
        plan = cls(fields["fingerprint"], images, arrays, fields["shard_size"])
        if plan.images_bytes != data or plan.fields != fields:
            parse_images(data, path)  # names the line, where it is one
            raise StoreError(
                f"{root}: images.jsonl and store.json do not agree, or are not in canonical form"
            )
        return plan


def _cut_lines(data: bytes) -> dict[str, str] | None:
    """Return the images of a canonical images.jsonl, cut from known positions of each line.

    Of any other file the result is None, or images that are written in another way: the caller compares.
    """
    try:
        lines = data.decode("ascii").split("\n")[:-1]
        paths = [line[9:-78] if "\\" not in line else json.loads(line[8:-77]) for line in lines]
    except (ValueError, RecursionError):
        return None
    hashes = [line[-66:-2] for line in lines]
    if not all(isinstance(path, str) for path in paths) or not well_formed(paths, hashes):
        return None
    images = dict(zip(paths, hashes, strict=True))
    return images if len(images) == len(lines) else None


def parse_images(data: bytes, where: Path) -> list[ImageEntry]:
    """Return the images by parsing each line, ten times slower. Raises StoreError that names the line."""
    images = []
    for number, line in enumerate(data.splitlines(), start=1):
        image = files.parse_json(line, f"{where}, line {number}")
        files.check_keys(image, IMAGE_KEYS, f"{where}, line {number}")
        images.append(ImageEntry(**image))
    return images


def paths(root: Path, shard: int) -> tuple[Path, Path]:
    """Return the paths of a shard's file and of its record."""
    return root / "shards" / f"{shard:05}.h5", root / "shards" / f"{shard:05}.json"


def extraction_command(root: Path) -> str:
    """Return the command that goes on with an extraction or mends a store, as far as this process can know it."""
    cache = root.parent
    words = ["--gemma_vision"] if root.name == VISION or (cache / VISION).exists() else []
    words += ["--allow_missing"] if (cache / FAILURES).exists() else []
    return extraction(cache, *words)


def surplus(root: Path, num_shards: int) -> list[Path]:
    """Return the files that are named like shards and belong to none of this store."""
    known = {path for shard in range(num_shards) for path in paths(root, shard)}
    names = (path for path in (root / "shards").iterdir() if re.fullmatch(r"[0-9]+\.(h5|json)", path.name))
    return sorted(path for path in names if path not in known)


def parse_manifest(path: Path) -> dict[str, Any]:
    """Return a manifest without comparing it with a store. Raises StoreError if it is missing or damaged."""
    manifest, _ = files.read_sealed(path, MANIFEST_KEYS, files.MAX_JSON_BYTES)
    for entry in manifest["shards"]:
        files.check_keys(entry, ENTRY_KEYS, f"{path}: shards")
    return manifest


def read_manifest(root: Path) -> dict[str, Any] | None:
    """Return the manifest of a store, or None if there is none.

    Raises StoreError if it is damaged or names another store.json.
    """
    path = root / "manifest.json"
    if not os.path.lexists(path):
        return None
    manifest = parse_manifest(path)
    store, digest = files.read_sealed(root / "store.json", STORE_KEYS)
    store |= {"store_sha256": digest, "shards": math.ceil(store["num_rows"] / max(store["shard_size"], 1))}
    for key, found in {**manifest, "shards": len(manifest["shards"])}.items():
        if found != store[key]:
            raise StoreError(f"{path}: {key} is {found}, store.json has {store[key]}")
    return manifest


def manifest_fields(plan: Plan, entries: list[dict[str, Any]]) -> dict[str, Any]:
    """Return manifest.json without its seal."""
    return {
        "schema_version": SCHEMA_VERSION,
        "store_sha256": hashlib.sha256(plan.store_bytes).hexdigest(),
        "num_images": len(plan.images),
        "num_rows": plan.num_rows,
        "shards": entries,
    }


def entry(record: Record, record_sha256: str) -> dict[str, Any]:
    """Return what the manifest states of a shard."""
    return {key: record[key] for key in ("file_size", "file_sha256")} | {"record_sha256": record_sha256}


def check_entry(manifest: dict, shard: int, record: Record, record_sha256: str, where: object) -> None:
    """Raise StoreError unless a shard's record is the one that the manifest lists."""
    for key, found in entry(record, record_sha256).items():
        listed = manifest["shards"][shard][key]
        if found != listed:
            raise StoreError(f"{where}: {key} of shard {shard} is {found}, the manifest says {listed}")


LATENTS, VISION = "latents", "gemma_vision"


def read_failures(cache: str | Path) -> dict[str, str]:
    """Return path -> reason of the images that were left out of a cache with --allow_missing."""
    path = Path(cache) / FAILURES
    if not path.is_file():
        return {}
    try:
        reasons = {row["path"]: row["reason"] for _, row in json_lines(path)}
        if not all(isinstance(text, str) for pair in reasons.items() for text in pair):
            raise TypeError("path and reason are strings")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise StoreError(
            f"{path} is damaged: {error!r:.200}; mend it with: {extraction(path.parent, '--allow_missing')}"
        ) from None
    return reasons


# ---- the stores of a cache


def stores_of(cache: Path) -> list[Path]:
    """Return the folders of the stores that are in a cache, that of the latents first."""
    known = [cache / name for name in (LATENTS, VISION) if (cache / name).exists()]
    others = sorted(path.parent for path in cache.glob("*/store.json"))
    return known + [root for root in others if root not in known]


def known_hashes(cache: Path) -> dict[str, str]:
    """Return path -> SHA-256 of the photographs that an earlier run on this cache has decoded.

    Of a store with a damaged list nothing is known: `Store.create` says so and mends it.
    """
    known: dict[str, str] = {}
    for root in stores_of(cache):
        with contextlib.suppress(StoreError):
            known |= Plan.load(root).images
    return known
