"""Processes that start at once: forked from one that has imported everything and done nothing.

There is one such server in a process, from which reading processes are forked, too: whoever starts it first, it has
imported `warm`.
"""

import multiprocessing
import os
import signal
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from theworld.utils import starting

PROCESSES = multiprocessing.get_context("forkserver")
starting.PRELOAD[:] = ["warm"]
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of each process that tests start: the models are tiny
# The server finds the tests' modules by it.
os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])


def fork(target: Callable[..., None], *arguments: Any) -> BaseProcess:
    """Start a process that calls a function of a module."""
    PROCESSES.set_forkserver_preload(starting.PRELOAD)
    process = PROCESSES.Process(target=_hearing, args=(target, *arguments))
    process.start()
    return process


def _hearing(target: Callable[..., None], *arguments: Any) -> None:
    """A process as a shell starts it, even where the server was started for reading processes, which hear no Ctrl-C."""
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    target(*arguments)


def in_child(work: Callable[[], object]) -> int:
    """Return the id of a copy of this process that does `work` and ends with 0, or with 1 on an exception."""
    child = os.fork()
    if child == 0:
        code = 1
        for number in (signal.SIGTERM, signal.SIGHUP):  # which nohup leaves ignored
            signal.signal(number, signal.SIG_DFL)
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return child
