"""The first seconds of a tool, in which it imports: Ctrl-C ends it at once, with status 130 and one line.

Only the standard library is imported here, so that a tool can import this first.
"""

import contextlib
import gc
import os
import signal
import sys
from collections.abc import Iterator
from multiprocessing import forkserver
from pathlib import Path

PRELOAD = ["theworld.extraction.reading"]  # what the server imports that processes are forked from


@contextlib.contextmanager
def starting(tool: str = "") -> Iterator[None]:
    """For imports: a KeyboardInterrupt inside one may be caught or turned into another error by what is imported.

    Python does not look for garbage meanwhile: nearly all that imports make stays, and looking takes a fifth of their
    time.
    `tool` is the name before the line, by default that of the program.
    """

    def leave(*_: object) -> None:
        with contextlib.suppress(OSError):  # a terminal that is gone
            os.write(2, f"\n{tool or Path(sys.argv[0]).stem}: interrupted\n".encode())
        os._exit(130)

    before = signal.getsignal(signal.SIGINT)
    if before is not signal.SIG_IGN:  # a process in the background of a script
        signal.signal(signal.SIGINT, leave)
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()
        signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def starting_workers() -> Iterator[None]:
    """For the start of processes: they never hear of Ctrl-C, which is for this process, and which it hears afterwards.

    They inherit what is blocked, and so hear nothing from their first moment on.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def start_server() -> None:
    """Start the server that processes are forked from, unless it runs; it goes on importing PRELOAD.

    A tool that will need it calls this before its own imports, which take as long.
    """
    forkserver.set_forkserver_preload(PRELOAD)
    with starting_workers():
        forkserver.ensure_running()
