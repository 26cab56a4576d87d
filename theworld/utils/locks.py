"""One writer for one output: a lock that the kernel holds for a process, and that ends with it, however it ends.

An output that is a folder has its lock in the file `.lock` in it, which stays there; an output that is a file, in
`.<name>.lock` beside it, which its holder removes. Who holds a lock is asked of the kernel (fcntl's record locks, which
work over NFS as well), and the content of the file only says who that is: a file that was left means nothing.
"""

import errno
import fcntl
import json
import logging
import os
import shutil
import socket
import time
import weakref
from collections.abc import Collection
from datetime import datetime
from pathlib import Path
from typing import Any

from theworld.utils.files import make_folder

logger = logging.getLogger(__name__)

NAME = ".lock"
# An NFS server keeps the locks of a machine that is gone for its lease, 90 seconds by default.
LEASE_SECONDS = 100.0
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # of file systems without locks

# The locks that this process holds: (process, device, inode) -> [descriptor, number of holders]. A process has only one
# record lock on a file, and loses it as soon as it closes any descriptor of that file.
_held: dict[tuple[int, int, int], list[int]] = {}


class InUse(OSError):
    """Another process writes to the same output; the message names it."""


class OutputLock:
    """The right to write to an output, until `release`, the end of a `with` block, or the end of the process.

    A process may take it several times. On a file system without locks a warning says so, and nothing is locked.
    """

    def __init__(self, output: Path, flag: str, is_file: bool = False) -> None:
        """`flag` is the one that names `output`. The folder of the lock is made. Raises InUse as `check_unlocked`."""
        path = lock_file(output, is_file)
        make_folder(path.parent)
        key = _take(path, output, flag)
        # Also called when nobody holds this object any more, and at the end of the process while modules are whole.
        self._give_back = weakref.finalize(self, _give_back, key, path if is_file else None)

    def release(self) -> None:
        """Give the lock back; a second call changes nothing."""
        self._give_back()

    def __enter__(self) -> "OutputLock":
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def check_unlocked(output: Path, flag: str, is_file: bool = False) -> None:
    """Raise InUse if another process holds the lock of an output, a folder unless `is_file`. Writes nothing.

    A process on another machine is given LEASE_SECONDS to vanish: if that machine is gone, its lock outlives it.
    """
    path = lock_file(output, is_file)
    if not path.exists() or _key(path) in _held:
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        _lock(descriptor, fcntl.LOCK_SH, output, flag)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
    finally:
        os.close(descriptor)


def empty_folder(folder: Path, keep: Collection[str] = ()) -> None:
    """Delete everything in a folder but its lock and the names to `keep`."""
    for path in folder.iterdir():
        if path.name in (NAME, *keep):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def lock_file(output: Path, is_file: bool) -> Path:
    """Return the path of the lock of an output, which need not exist yet."""
    return output.with_name(f".{output.name}{NAME}") if is_file else output / NAME


def _take(path: Path, output: Path, flag: str) -> tuple[int, int, int]:
    """Make this process a holder of a lock file, once more if it is one, and return the file's key. Raises InUse."""
    key = _key(path)
    if key in _held:
        _held[key][1] += 1
        return key
    while True:
        descriptor = _locked(path, output, flag)
        key = _key_of(os.fstat(descriptor))
        if key == _key(path):
            break
        os.close(descriptor)  # the file of a holder that has ended, and removed it
    _held[key] = [descriptor, 1]
    return key


def _give_back(key: tuple[int, int, int], removed: Path | None) -> None:
    """End one holding of a lock file by this process; with the last one unlock it, and remove it if it is `removed`."""
    if key not in _held or key[0] != os.getpid():  # a copy of the holder, made by fork
        return
    _held[key][1] -= 1
    if _held[key][1] == 0:
        if removed is not None:
            removed.unlink(missing_ok=True)
        os.close(_held.pop(key)[0])


def _key(path: Path) -> tuple[int, int, int]:
    """Return what identifies a lock file in this process; zeros if there is none yet."""
    try:
        return _key_of(path.stat())
    except FileNotFoundError:
        return 0, 0, 0


def _key_of(status: os.stat_result) -> tuple[int, int, int]:
    return os.getpid(), status.st_dev, status.st_ino


def _locked(path: Path, output: Path, flag: str) -> int:
    """Return the descriptor of a lock file that this process holds. Raises InUse."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        _lock(descriptor, fcntl.LOCK_EX, output, flag)
        _write_holder(descriptor)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            os.close(descriptor)
            raise
        logger.warning(
            "%s: its file system has no locks (%s); nothing keeps a second run out of it",
            output,
            error.strerror,
        )
    return descriptor


def _lock(descriptor: int, kind: int, output: Path, flag: str) -> None:
    """Lock a file for this process. Raises InUse."""
    end = time.monotonic() + LEASE_SECONDS
    told = False
    while True:
        try:
            fcntl.lockf(descriptor, kind | fcntl.LOCK_NB, 1)
            return
        except (BlockingIOError, PermissionError):  # EAGAIN or EACCES, depending on the system
            holder = _read_holder(descriptor)
        who = (
            f"process {holder['process']} on {holder['host']} has been writing there since {holder['since']}"
        )
        if holder["host"] in ("?", socket.gethostname()) or time.monotonic() > end:
            raise InUse(f"{flag} {output} is in use: {who}; wait for its end, or choose another {flag}")
        if not told:
            logger.warning(
                "%s: %s; waiting up to %.0f s, in case that machine is gone", output, who, LEASE_SECONDS
            )
            told = True
        time.sleep(min(1.0, LEASE_SECONDS))


def _write_holder(descriptor: int) -> None:
    since = datetime.now().astimezone().isoformat(" ", "seconds")
    holder = {"host": socket.gethostname(), "process": os.getpid(), "since": since}
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, json.dumps(holder).encode() + b"\n", 0)
    os.fsync(descriptor)  # for readers on other machines


def _read_holder(descriptor: int) -> dict[str, Any]:
    """Return who holds a lock; question marks in the moment before that is written."""
    unknown = {"host": "?", "process": "?", "since": "?"}
    try:
        return unknown | json.loads(os.pread(descriptor, 4096, 0))
    except (ValueError, TypeError):
        return unknown
