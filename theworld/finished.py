"""Rows that are finished before their shard is: for work that takes minutes an image, where none may be lost.

    finished/SHA256.row       one row of the store's array, of the photograph with this SHA-256
    finished/SHA256.refused   instead of a row: why there is none

A row belongs to a photograph and a fingerprint, not to a place in an image list, so it outlives every change of the
list. The bytes are specified in cache/README.md.
"""

import contextlib
import os
import secrets
import time
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from theworld import files
from theworld.files import SCHEMA_VERSION, StoreError
from theworld.shards import ArraySpec

FOLDER = "finished"
REFUSAL_KEYS = {"schema_version": int, "fingerprint_sha256": str, "source_sha256": str, "reason": str}


class FinishedRows:
    """The finished rows beside one store. `notes` says what was found damaged: it is moved aside, never used."""

    def __init__(self, root: Path, fingerprint_sha256: str, spec: ArraySpec) -> None:
        """`root`: the store's folder."""
        self.root, self.folder = root, root / FOLDER
        self.fingerprint_sha256, self.spec = fingerprint_sha256, spec
        self.notes: list[str] = []

    def write(self, source_sha256: str, row: np.ndarray) -> None:
        """Publishes the row, [*shape] of the stored dtype, of the photograph with this hash; durable on return.

        Raises StoreError for another shape or dtype, for values that are not finite, or if another row is there
        already; OSError if it cannot be written.
        """
        if row.shape != self.spec.shape or row.dtype != self.spec.storage:
            raise StoreError(
                f"{self.spec.name} is {row.dtype} {row.shape}, expected {self.spec.storage} {self.spec.shape}"
            )
        if not self.spec.finite(row).all():
            raise StoreError(f"{self.spec.name} is not finite for the photograph of SHA-256 {source_sha256}")
        data = np.ascontiguousarray(row).tobytes()
        self._publish(f"{source_sha256}.row", self._header(source_sha256, data) + data)

    def refuse(self, source_sha256: str, reason: str) -> None:
        """Records for good that this photograph has no row, and why."""
        fields = {"schema_version": SCHEMA_VERSION, "fingerprint_sha256": self.fingerprint_sha256}
        fields |= {"source_sha256": source_sha256, "reason": reason}
        self._publish(f"{source_sha256}.refused", files.seal(fields))

    def read(self, source_sha256: str) -> np.ndarray | None:
        """The row, or None if there is none. A file that is not to the byte a row of this photograph and fingerprint
        is set aside, with a note."""
        path = self.folder / f"{source_sha256}.row"
        if not os.path.lexists(path):
            return None
        header_size = len(self._header(source_sha256, b""))
        try:
            whole = files.read_plain(path)
        except StoreError as error:
            self._set_aside(path, str(error))
            return None
        header, data = whole[:header_size], whole[header_size:]
        if len(data) != self.spec.row_nbytes or header != self._header(source_sha256, data):
            self._set_aside(path, "damaged, or not a row of this photograph and fingerprint")
            return None
        return np.frombuffer(data, self.spec.storage).reshape(self.spec.shape)

    def refusal(self, source_sha256: str) -> str | None:
        """Why this photograph has no row; None if it was not refused. A damaged record is set aside, with a note."""
        path = self.folder / f"{source_sha256}.refused"
        if not os.path.lexists(path):
            return None
        try:
            fields, _ = files.read_sealed(path, REFUSAL_KEYS)
        except StoreError as error:
            self._set_aside(path, str(error))
            return None
        if (fields["fingerprint_sha256"], fields["source_sha256"]) != (
            self.fingerprint_sha256,
            source_sha256,
        ):
            self._set_aside(path, "not of this photograph and fingerprint")
            return None
        return fields["reason"]

    def missing(self, hashes: Iterable[str]) -> list[str]:
        """Those with neither a row nor a refusal, by the names of files alone."""
        there = set(os.listdir(self.folder)) if self.folder.is_dir() else set()
        return [sha256 for sha256 in hashes if there.isdisjoint((f"{sha256}.row", f"{sha256}.refused"))]

    def remove(self, hashes: Iterable[str]) -> None:
        """Removes the rows of these photographs, which a published store holds now; refusals stay. Temporary files
        that are a day old, which only a killed run can have left, go too."""
        for sha256 in hashes:
            (self.folder / f"{sha256}.row").unlink(missing_ok=True)
        if not self.folder.is_dir():
            return
        for path in self.folder.iterdir():
            with contextlib.suppress(FileNotFoundError):  # its owner was faster
                if files.TEMPORARY.fullmatch(path.name) and _is_old(path):
                    path.unlink()
        with contextlib.suppress(OSError):  # not empty
            self.folder.rmdir()

    def _header(self, source_sha256: str, data: bytes) -> bytes:
        """The line before the data. Its length does not depend on the data."""
        fields: dict[str, Any] = {
            "schema_version": SCHEMA_VERSION,
            "fingerprint_sha256": self.fingerprint_sha256,
            "source_sha256": source_sha256,
            "array": self.spec.name,
            "shape": list(self.spec.shape),
            "dtype": self.spec.dtype,
            "crc32": f"{zlib.crc32(data):08x}",
        }
        return files.canonical_json(fields) + b"\n"

    def _publish(self, name: str, data: bytes) -> None:
        if not self.folder.is_dir():
            self.folder.mkdir(exist_ok=True)
            files.sync_folder(self.root)
        files.publish_bytes(self.folder / name, data)

    def _set_aside(self, path: Path, reason: str) -> None:
        target = self.root / "set-aside" / f"{path.name}.{secrets.token_hex(4)}"
        target.parent.mkdir(exist_ok=True)
        with contextlib.suppress(FileNotFoundError):  # another process was faster
            os.rename(path, target)
            self.notes.append(f"{path.name} was moved to {target}: {reason}")


def _is_old(path: Path) -> bool:
    return time.time() - path.lstat().st_mtime > files.STALE_SECONDS


def refusals(root: Path) -> dict[str, str]:
    """SHA-256 of a photograph -> why a store has no row of it. Damaged records are left to `FinishedRows.refusal`,
    which sets them aside."""
    found: dict[str, str] = {}
    for path in sorted((root / FOLDER).glob("*.refused")):
        with contextlib.suppress(StoreError):
            fields, _ = files.read_sealed(path, REFUSAL_KEYS)
            found[fields["source_sha256"]] = fields["reason"]
    return found
