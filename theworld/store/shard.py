"""One shard of a store: its HDF5 file of one exact schema, and its record.

The bytes are specified in cache/README.md. Nothing here knows of models.
"""

import hashlib
import io
import math
import os
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from theworld.utils import files
from theworld.utils.files import (
    HEX_SHA256,
    PlainFile,
    StoreError,
    check_keys,
    hash_file,
    open_plain,
    read_sealed,
)
from theworld.utils.text import counted

STORAGE: dict[str, np.dtype] = {
    d: np.dtype(s) for d, s in [("float32", "<f4"), ("float16", "<f2"), ("bfloat16", "<u2")]
}
SOURCE = "source_sha256"
SURROGATE = re.compile("[\ud800-\udfff]")
MAX_ROW_BYTES = 1 << 30
MAX_HDF5_OVERHEAD = 1 << 20
# The oldest format: HDF5 1.14 and 2.0 write the same bytes with it; with newer ones they do not.
LIBVER = ("earliest", "v110")
RECORD_KEYS = {
    "schema_version": int,
    "shard": int,
    "first_row": int,
    "num_rows": int,
    "fingerprint_sha256": str,
    "rows_sha256": str,
    "file_size": int,
    "file_sha256": str,
    "index_sha256": str,
    "offsets": dict,
}


@dataclass(frozen=True, slots=True)
class ImageEntry:
    """One photograph of the frozen list."""

    path: str
    # relative to the image folder, with "/" between its parts
    sha256: str
    # of the file's bytes, 64 lower-case hex digits

    def __post_init__(self) -> None:
        if not isinstance(self.path, str) or not isinstance(self.sha256, str):
            raise StoreError(f"an image entry needs two strings, got {self.path!r} and {self.sha256!r}")
        bad_parts = not {"", ".", ".."}.isdisjoint(self.path.split("/"))
        if bad_parts or "\0" in self.path or "\\" in self.path or re.match("[A-Za-z]:", self.path):
            raise StoreError(f"image path {self.path!r}: only relative paths with '/' and without '..'")
        if len(self.path) > 4096 or (not self.path.isascii() and SURROGATE.search(self.path)):
            raise StoreError(f"image path {self.path[:200]!r}: not Unicode, or longer than 4096 characters")
        if not HEX_SHA256.fullmatch(self.sha256):
            raise StoreError(f"image {self.path!r}: sha256 is {self.sha256!r}, expected 64 hex digits")


def well_formed(paths: Sequence[str], hashes: Sequence[str]) -> bool:
    """Whether `ImageEntry` takes all of these: the same rules, ten times faster and without a message."""
    joined = "\0".join(["", *paths, ""])
    parted, digits = joined.replace("\0", "/"), "".join(hashes)
    return (
        joined.count("\0") == len(paths) + 1
        and not any(bad in parted for bad in ("//", "/./", "/../", "\\"))
        and not re.search("\0[A-Za-z]:", joined)
        and (joined.isascii() or not SURROGATE.search(joined))
        and max(map(len, paths), default=0) <= 4096
        and set(map(len, hashes)) <= {64}
        and re.fullmatch("[0-9a-f]*", digits) is not None
    )


@dataclass(frozen=True)
class ArraySpec:
    """One array of a store: the shape and dtype of a row."""

    name: str
    shape: tuple[int, ...]
    # of one row
    dtype: str
    # logical: "float32", "float16" or "bfloat16"; NumPy has no bfloat16, its bits are kept as uint16

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", tuple(self.shape))
        if not re.fullmatch("[a-z][a-z0-9_]{0,63}", self.name) or self.name.endswith(("_crc32", "_sha256")):
            raise StoreError(f"array name {self.name!r}: a-z, 0-9 and _, not ending in _crc32 or _sha256")
        if self.dtype not in STORAGE:
            raise StoreError(f"array {self.name}: dtype is {self.dtype!r}, expected one of {list(STORAGE)}")
        if len(self.shape) > 8 or not all(type(size) is int and size > 0 for size in self.shape):
            raise StoreError(f"array {self.name}: shape is {self.shape}, expected up to 8 positive integers")
        if self.row_nbytes > MAX_ROW_BYTES:
            raise StoreError(f"array {self.name}: {self.row_nbytes:,} bytes a row, limit {MAX_ROW_BYTES:,}")

    @property
    def storage(self) -> np.dtype:
        """The little-endian NumPy dtype in the file."""
        return STORAGE[self.dtype]

    @property
    def row_nbytes(self) -> int:
        return math.prod(self.shape) * self.storage.itemsize

    def finite(self, values: np.ndarray) -> np.ndarray:
        """Return bool, of the shape of `values`: neither infinite nor NaN."""
        return (values & 0x7F80) != 0x7F80 if self.dtype == "bfloat16" else np.isfinite(values)


def schema(specs: Sequence[ArraySpec], num_rows: int) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """Return name -> (shape, dtype) of every dataset in a shard's file, in the order in which they are written.

    The small ones come first, so that opening a shard reads little more than its first pages.
    """
    tables: dict[str, tuple[tuple[int, ...], np.dtype]] = {SOURCE: ((num_rows, 32), np.dtype("u1"))}
    tables |= {f"{spec.name}_crc32": ((num_rows,), np.dtype("<u4")) for spec in specs}
    return tables | {spec.name: ((num_rows, *spec.shape), spec.storage) for spec in specs}


def row_crc32(values: np.ndarray) -> np.ndarray:
    """Return <u4 [n], the CRC-32 of each row's bytes; `values` [n, ...] is C-contiguous."""
    rows = values.reshape(len(values), -1).view(np.uint8)
    return np.array([zlib.crc32(row.data) for row in rows], "<u4")


def source_table(rows: Sequence[ImageEntry]) -> np.ndarray:
    """Return u1 [n, 32], the SHA-256 of each row's photograph."""
    return np.frombuffer(bytes.fromhex("".join(row.sha256 for row in rows)), np.uint8).reshape(-1, 32)


def check_arrays(
    specs: Sequence[ArraySpec], rows: Sequence[ImageEntry], arrays: dict[str, np.ndarray]
) -> None:
    """Raise StoreError unless there is [n, *shape] of the stored dtype for each array, with finite values only."""
    names = [spec.name for spec in specs]
    if arrays.keys() != set(names):
        raise StoreError(f"arrays are {sorted(arrays)}, expected {sorted(names)}")
    for spec in specs:
        values, shape = arrays[spec.name], (len(rows), *spec.shape)
        if values.shape != shape or values.dtype != spec.storage:
            found, wanted = f"{values.dtype} {values.shape}", f"{spec.storage} {shape}"
            raise StoreError(f"{spec.name} is {found}, expected {wanted}")
        finite = spec.finite(values).reshape(len(rows), -1).all(1)
        bad = [rows[row].path for row in np.flatnonzero(~finite).tolist()]
        if bad:
            raise StoreError(
                f"{spec.name} is not finite for {len(bad)} of {counted(len(rows), 'image')}: {bad[:3]}"
            )


def pack(
    specs: Sequence[ArraySpec], rows: Sequence[ImageEntry], arrays: dict[str, np.ndarray]
) -> tuple[bytes, dict]:
    """Return the bytes of a shard's HDF5 file, and the fields of its record that describe them.

    The file is made in memory (three times the shard at most), so that it is published as any other file and a full
    disk is an ordinary OSError. Equal data give equal bytes.
    """
    tables = {SOURCE: source_table(rows)}
    contiguous = {spec.name: np.ascontiguousarray(arrays[spec.name]) for spec in specs}
    tables |= {f"{name}_crc32": row_crc32(values) for name, values in contiguous.items()} | contiguous
    offsets = {}
    with h5py.File("shard", "w", driver="core", backing_store=False, libver=LIBVER) as file:
        for name, (shape, dtype) in schema(specs, len(rows)).items():
            dataset = file.create_dataset(name, shape, dtype, data=tables[name], track_times=False)
            if name in contiguous:
                offsets[name] = dataset.id.get_offset()
        file.flush()
        data = file.id.get_file_image()
    fields = {"file_size": len(data), "file_sha256": hashlib.sha256(data).hexdigest(), "offsets": offsets}
    fields["index_sha256"] = index_sha256(io.BytesIO(data), payload(specs, len(rows), offsets), len(data))
    return data, fields


def payload(specs: Sequence[ArraySpec], num_rows: int, offsets: dict[str, int]) -> list[tuple[int, int]]:
    """Return (start, end) of each array's bytes in the file, in file order."""
    return sorted((offsets[s.name], offsets[s.name] + num_rows * s.row_nbytes) for s in specs)


def index_sha256(file: io.BytesIO | io.FileIO, spans: list[tuple[int, int]], size: int) -> str:
    """Return the SHA-256 of everything in the file but the arrays: HDF5's own structures, CRCs and source hashes."""
    digest = hashlib.sha256()
    for start, end in zip(
        [0, *(end for _, end in spans)], [*(start for start, _ in spans), size], strict=True
    ):
        file.seek(start)
        digest.update(file.read(end - start))
    return digest.hexdigest()


def read_record(
    path: Path, expected: dict[str, Any], specs: Sequence[ArraySpec]
) -> tuple[dict[str, Any], str]:
    """Return a shard's record and the SHA-256 of its bytes.

    Raises StoreError unless it agrees with `expected` and its offsets lie apart from each other and inside the file.
    """
    record, digest = read_sealed(path, RECORD_KEYS, files.MAX_RECORD_BYTES)
    for key, wanted in expected.items():
        if record[key] != wanted:
            raise StoreError(f"{path}: {key} is {record[key]}, the store says {wanted}")
    check_keys(record["offsets"], {spec.name: int for spec in specs}, f"{path}: offsets")
    edges = [edge for span in payload(specs, record["num_rows"], record["offsets"]) for edge in span]
    size = record["file_size"]
    datasets = schema(specs, record["num_rows"]).values()
    overhead = size - sum(math.prod(shape) * dtype.itemsize for shape, dtype in datasets)
    if edges != sorted(edges) or edges[-1] > size or not 0 <= overhead <= MAX_HDF5_OVERHEAD:
        raise StoreError(f"{path}: file_size {size:,} and offsets {record['offsets']} do not fit the arrays")
    return record, digest


def check_file(path: Path, record: dict[str, Any]) -> None:
    """Read the whole of a shard's file. Raises StoreError if its size or hash is not the record's."""
    found = hash_file(path)
    if found != (record["file_size"], record["file_sha256"]):
        wanted = f"{record['file_size']:,} bytes, SHA-256 {record['file_sha256']}"
        raise StoreError(
            f"{path} is damaged: {found[0]:,} bytes, SHA-256 {found[1]}; its record says {wanted}"
        )


def check_index(path: Path, record: dict[str, Any], specs: Sequence[ArraySpec]) -> None:
    """Read everything but the arrays. Raises StoreError if size or hash is not the record's."""
    spans = payload(specs, record["num_rows"], record["offsets"])
    with open_plain(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size != record["file_size"]:
            raise StoreError(f"{path} is damaged: {size:,} bytes, its record says {record['file_size']:,}")
        digest, wanted = index_sha256(file, spans, size), record["index_sha256"]
    if digest != wanted:
        raise StoreError(f"{path} is damaged: index_sha256 is {digest}, its record says {wanted}")


class ShardFile:
    """One shard, open for reading.

    Rows are read by position (pread): a descriptor that a fork inherits is safe to use, threads may share it, and a
    file that shrinks meanwhile is an error and not a SIGBUS.
    """

    def __init__(self, path: Path, record: dict, specs: Sequence[ArraySpec], rows: Sequence[ImageEntry]):
        self.path, self.offsets = path, record["offsets"]
        self.images = [row.path for row in rows]
        self.file: PlainFile | None = None
        self.specs = {spec.name: spec for spec in specs}
        # HDF5 can hang or answer wrongly on damaged structures: it sees only bytes whose hash is right.
        check_index(path, record, specs)
        tables = read_tables(path, specs, len(rows), self.offsets)
        if not np.array_equal(tables[SOURCE], source_table(rows)):
            raise StoreError(f"{path}: {SOURCE} is not that of the store's images")
        self.crc32 = {spec.name: tables[f"{spec.name}_crc32"] for spec in specs}
        self.file = open_plain(path)

    def read(self, row: int, array: str, out: np.ndarray | None = None) -> np.ndarray:
        """Return row `row` of this shard, [*shape], in a new array or in `out`.

        `out` is C-contiguous, of this shape and the stored dtype; after an error its values mean nothing. Raises
        StoreError if the CRC-32 is not the stored one. `file` may be set to None at any time: it is opened again.
        """
        spec = self.specs[array]
        values = np.empty(spec.shape, spec.storage) if out is None else out
        assert (values.shape, values.dtype, values.flags.c_contiguous) == (spec.shape, spec.storage, True)
        data, what = values.reshape(-1).view(np.uint8).data, f"{array} of image {self.images[row]!r}"
        file = self.file
        if file is None:
            file = self.file = open_plain(self.path)
        position, num_read = self.offsets[array] + row * spec.row_nbytes, 0
        while num_read < len(data):
            part = os.preadv(file.fileno(), [data[num_read:]], position + num_read)
            if not part:
                raise StoreError(f"{self.path} is damaged: it ends within {what}")
            num_read += part
        actual, expected = zlib.crc32(data), int(self.crc32[array][row])
        if actual != expected:
            raise StoreError(
                f"{self.path} is damaged: {what} has CRC-32 {actual:08x}, expected {expected:08x}"
            )
        return values


def read_tables(
    path: Path, specs: Sequence[ArraySpec], num_rows: int, offsets: dict
) -> dict[str, np.ndarray]:
    """Return the CRCs and source hashes of a shard. Raises StoreError unless the file has exactly the schema.

    Each name must be a hard link before it is opened: HDF5 follows external links, external storage and virtual
    datasets into other files.
    """
    wanted, tables = schema(specs, num_rows), {}
    try:
        with h5py.File(path, "r", locking=False) as file:
            if sorted(file) != sorted(wanted) or len(file.attrs):
                raise StoreError(f"{sorted(file)}, {len(file.attrs)} attributes; expected {sorted(wanted)}")
            for name, (shape, dtype) in wanted.items():
                if type(file.get(name, getlink=True)) is not h5py.HardLink:
                    raise StoreError(f"{name} is a link to elsewhere")
                if file.get(name, getclass=True) is not h5py.Dataset:
                    raise StoreError(f"{name} is no dataset")
                dataset = file[name]
                _check_dataset(dataset, shape, dtype, offsets.get(name))
                if name not in offsets:
                    tables[name] = dataset[()]
    except StoreError as error:
        raise StoreError(f"{path}: {error}") from None
    except Exception as error:  # h5py raises nearly anything on a damaged file
        raise StoreError(f"{path} is no readable HDF5 file: {type(error).__name__}: {error}") from error
    return tables


def _check_dataset(
    dataset: h5py.Dataset, shape: tuple[int, ...], dtype: np.dtype, offset: int | None
) -> None:
    creation = dataset.id.get_create_plist()
    found = {
        "layout": (creation.get_layout(), h5py.h5d.CONTIGUOUS),
        "number of external files": (creation.get_external_count(), 0),
        "number of filters": (creation.get_nfilters(), 0),
        "shape": (dataset.shape, shape),
        "largest shape": (dataset.maxshape, shape),
        "dtype": (dataset.dtype.str, dtype.str),
        "number of attributes": (len(dataset.attrs), 0),
    }
    if offset is not None:
        found["offset"] = (dataset.id.get_offset(), offset)
    for what, (value, expected) in found.items():
        if value != expected:
            raise StoreError(f"{dataset.name}: {what} is {value}, expected {expected}")
