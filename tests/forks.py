"""Processes that start at once: forked from one that has imported everything and done nothing."""

import multiprocessing
import os
from collections.abc import Callable
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["warm"])


def fork(target: Callable[..., None], *arguments: Any) -> BaseProcess:
    """Starts a process that calls a function of a module."""
    with pytest.MonkeyPatch.context() as patch:  # the server finds the tests' modules by it
        patch.setenv(
            "PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
        )
        patch.setenv("OMP_NUM_THREADS", "1")
        forkserver.ensure_running()
    process = PROCESSES.Process(target=target, args=arguments)
    process.start()
    return process
