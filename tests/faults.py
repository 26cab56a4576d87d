"""Faults of a disk, at any call that writes: the n-th one fails, as often as there are calls."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from theworld.utils import files

CALLS = {  # what writes: the module and the name in it
    "open": (files, "open"),
    "write": (files, "open"),
    "fsync": (os, "fsync"),
    "replace": (os, "replace"),
    "rename": (os, "rename"),
    "mkdir": (os, "mkdir"),
    "open a folder": (os, "open"),
}


class _FailingFile:
    """A file of which half of what is written arrives, and then the disk fails."""

    def __init__(self, file: Any, error: OSError) -> None:
        self.file, self.error = file, error

    def __enter__(self) -> "_FailingFile":
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def write(self, data: bytes) -> None:
        self.file.write(data[: len(data) // 2])
        self.file.flush()
        raise self.error


class Disk:
    """`calls`: how many of its kind there were; `failed`: whether the n-th came."""

    def __init__(self, kind: str, number: int, code: int) -> None:
        self.kind, self.number, self.code = kind, number, code
        self.calls = 0
        self.failed = False

    def _fails(self) -> bool:
        self.calls += 1
        self.failed = self.failed or self.calls == self.number
        return self.calls == self.number

    def call(self, real: Any) -> Any:
        """`real`, which fails the n-th time."""

        def faulty(*arguments: Any, **options: Any) -> Any:
            if self.kind == "open a folder" and not os.path.isdir(arguments[0]):
                return real(*arguments, **options)
            fails = self._fails()
            error = OSError(self.code, os.strerror(self.code))
            if fails and self.kind != "write":
                raise error
            result = real(*arguments, **options)
            return _FailingFile(result, error) if fails else result

        return faulty


@contextmanager
def failing_disk(kind: str, number: int, code: int = errno.ENOSPC) -> Iterator[Disk]:
    """The `number`-th call (from 1) of a kind fails with an error code; all others are real."""
    module, name = CALLS[kind]
    disk = Disk(kind, number, code)
    with pytest.MonkeyPatch.context() as patch:
        real = open if name == "open" and module is files else getattr(module, name)
        patch.setattr(module, name, disk.call(real), raising=False)
        yield disk
