"""The reading side of a store: any row of a finished store, checked as it is read. Format: cache/README.md."""

import bisect
import difflib
import os
import resource
from collections import OrderedDict
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np

from theworld.store import shard as shards
from theworld.store.format import (
    Plan,
    Record,
    StoreMismatch,
    check_entry,
    check_fingerprint,
    extraction_command,
    fingerprint_differences,
    paths,
    read_manifest,
)
from theworld.store.verify import examine
from theworld.utils.files import StoreError
from theworld.utils.text import counted


def max_open_files() -> int:
    """Return how many shards of one store stay open: a quarter of the files that this process may have open.

    That limit is often 1,024, while a store can have thousands of shards.
    """
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return 4096 if limit == resource.RLIM_INFINITY else min(max(limit // 4, 1), 4096)


class StoreReader:
    """The reading side of a finished store.

    A shard is opened when it is first used, and the files of the shards used last stay open. Threads may share a
    reader; it can be pickled and forked.
    """

    def __init__(self, root: str | os.PathLike, expected: dict | None = None):
        """`expected`: fields that the fingerprint must have; others may be there. Raises StoreMismatch if
        one differs, StoreError if the store is unfinished or its JSON damaged. Reads no shard."""
        self.root = Path(root)
        try:
            self._plan = plan = Plan.load(self.root)
            manifest = read_manifest(self.root)
        except StoreError as error:
            raise _with_command(error, self.root) from None
        self.fingerprint, self.images, self.num_rows = plan.fingerprint, plan.images, plan.num_rows
        self.arrays = {spec.name: spec for spec in plan.arrays}
        self._shards: dict[int, shards.ShardFile] = {}  # small: offsets and CRCs
        self._recent: OrderedDict[int, shards.ShardFile] = OrderedDict()  # those with an open file
        self.max_open_files = max_open_files()
        expected = check_fingerprint(expected or {})
        cached = {key: value for key, value in self.fingerprint.items() if key in expected}
        differences = fingerprint_differences(cached, expected)
        if differences:
            raise StoreMismatch(self.root, differences)
        if manifest is None:
            there = sum(os.path.lexists(paths(self.root, shard)[1]) for shard in range(plan.num_shards))
            state = f"{there} of {counted(plan.num_shards, 'shard')} written"
            raise StoreError(
                f"{self.root} is unfinished: {state}. Go on with: {extraction_command(self.root)}"
            )
        self._manifest = manifest

    def __contains__(self, path: object) -> bool:
        return path in self.images

    def __len__(self) -> int:
        return len(self.images)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_shards": {}, "_recent": OrderedDict()}

    def row(self, path: str) -> int:
        """Return the row of an image; images of equal bytes share it. Raises StoreError for an unknown image."""
        if path not in self._plan.row_of:
            raise self._unknown(path, self.images)
        return self._plan.row_of[path]

    def read(self, path: str, array: str) -> np.ndarray:
        """Return the row of one image as a new array: [*shape], float32, float16, or uint16 for bfloat16.

        Raises StoreError if path or array is not in the store, and if what is read is not what was written.
        """
        row = self.row(path)
        if array not in self.arrays:
            raise self._unknown(array, self.arrays)
        return self.read_row(row, array)

    def read_row(self, row: int, array: str, out: np.ndarray | None = None) -> np.ndarray:
        """Return a row by its number, as `read` does; in `out` if given, whose values mean nothing after an error."""
        shard, position = divmod(row, self._plan.shard_size)
        try:
            return self._opened(shard).read(position, array, out)
        except StoreError as error:
            raise _with_command(error, self.root) from None

    def _opened(self, shard: int) -> shards.ShardFile:
        """Return the file of a shard, and mark it as the one used last."""
        opened = self._shards.get(shard)
        if opened is None:
            opened = self._shards[shard] = self._open_shard(shard)
        # Without a lock: each call is atomic, and a file closes only with the last reference to it.
        self._recent.pop(shard, None)
        self._recent[shard] = opened
        if len(self._recent) > self.max_open_files:
            self._recent.popitem(last=False)[1].file = None
        return opened

    def nbytes(self, array: str) -> int:
        """Return the bytes of all rows of an array."""
        return self.num_rows * self.arrays[array].row_nbytes

    def close(self) -> None:
        """Close the shards; the next read opens them again."""
        self._recent.clear()
        self._shards.clear()

    def _unknown(self, name: str, known: Collection[str]) -> StoreError:
        return StoreError(
            f"{name!r} is not one of the {len(known)} in {self.root}; nearest: {_nearest(name, known)!r}"
        )

    def _read_record(self, shard: int) -> Record:
        path = paths(self.root, shard)[1]
        record, digest = shards.read_record(path, self._plan.record_fields(shard), self._plan.arrays)
        check_entry(self._manifest, shard, record, digest, path)
        return record

    def _open_shard(self, shard: int) -> shards.ShardFile:
        path, rows = paths(self.root, shard)[0], self._plan.shard_rows(shard)
        return shards.ShardFile(path, self._read_record(shard), self._plan.arrays, rows)

    def verify(self) -> list[str]:
        """Read everything again from disk and return what is wrong, in words; [] if sound. Changes nothing."""
        return verify_store(self.root)


def _with_command(error: StoreError, root: Path) -> StoreError:
    """Return the error with the command that mends the store."""
    return StoreError(f"{error}; mend it with: {extraction_command(root)}")


def _nearest(name: str, known: Collection[str]) -> str:
    """Return the most similar name.

    Among thousands, only names of the same last part and alphabetical neighbours are compared: each comparison takes
    far longer than a read.
    """
    names = sorted(known)
    if len(names) > 2000:
        place, last = bisect.bisect(names, name), name.rpartition("/")[2]
        namesakes = [other for other in names if other.rpartition("/")[2] == last]
        names = names[max(0, place - 500) : place + 500] + namesakes[:500]
    return difflib.get_close_matches(name, names, n=1, cutoff=0)[0]


def verify_store(root: str | os.PathLike) -> list[str]:
    """Return what is wrong, as `StoreReader.verify` does, also for a store too damaged for a reader. Raises nothing."""
    return [str(problem) for problem in examine(root)]
