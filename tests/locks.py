"""A file system without locks, made by a seccomp filter."""

import ctypes
import errno
import fcntl
import platform
from pathlib import Path

import h5py

# --- locks ---------------------------------------------------------------------------------------

# What refuses every lock, as a network file system without a lock server does: a filter on system calls, in machine
# words (load the number, compare, return ENOLCK or allow); for fcntl the command is compared too.
FLOCK = {"x86_64": 73, "aarch64": 32}
FCNTL = {"x86_64": 72, "aarch64": 25}
REFUSE, ALLOW = 0x00050000 | errno.ENOLCK, 0x7FFF0000


def refuse_locks() -> None:
    """From now on flock and fcntl's locks fail with ENOLCK in this process. OSError if the system has no filters."""

    class Instruction(ctypes.Structure):
        _fields_ = (
            ("code", ctypes.c_ushort),
            ("yes", ctypes.c_ubyte),
            ("no", ctypes.c_ubyte),
            ("k", ctypes.c_uint),
        )

    class Filter(ctypes.Structure):
        _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.POINTER(Instruction)))

    load, equal, answer = 0x20, 0x15, 0x06
    locks = (fcntl.F_SETLK, fcntl.F_SETLKW, 37, 38)  # the last two: open file description locks
    words = [
        (load, 0, 0, 0),
        (equal, 7, 0, FLOCK[platform.machine()]),
        (equal, 0, 5, FCNTL[platform.machine()]),
    ]
    words += [(load, 0, 0, 24)]  # the second argument
    words += [(equal, 4 - i, 0, command) for i, command in enumerate(locks)]
    words += [(answer, 0, 0, ALLOW), (answer, 0, 0, REFUSE)]
    program = (Instruction * len(words))(*(Instruction(*word) for word in words))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(38, 1, 0, 0, 0) or libc.prctl(22, 2, ctypes.byref(Filter(len(words), program)), 0, 0):
        raise OSError(ctypes.get_errno(), "no filters on system calls")


def locks_are_refused(folder: Path) -> bool:
    """Whether both kinds of locks fail with ENOLCK, and HDF5 with its own locking."""
    refused = 0
    with open(folder / "locked", "wb") as file:
        for lock in (fcntl.flock, fcntl.lockf):
            try:
                lock(file, fcntl.LOCK_EX)
            except OSError as error:
                refused += error.errno == errno.ENOLCK
    try:
        h5py.File(folder / "locked.h5", "w", locking=True).close()
    except OSError:
        refused += 1
    return refused == 3
