"""A task for each of many items, in processes of their own: they stop when the main one is asked to, and end with it.

the main process    hears signals, gives out the items, takes what is made of them
a worker            is deaf to signals: the end of a pipe tells it to stop; it ends at once when the main one is gone
"""

import contextlib
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import get_context, parent_process, resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, TypeVar

from theworld.stopping import SIGNALS, StopRequest

Item = TypeVar("Item")
Result = TypeVar("Result")

SPAWN = get_context("spawn")  # a fork would carry a CUDA context of the main process along
HEARD = {*SIGNALS, signal.SIGINT}  # by the main process alone, even if they are sent to all


def in_processes(
    task: Callable[[Item, StopRequest], Result], items: Sequence[Item], count: int, stop: StopRequest
) -> Iterator[Result]:
    """What `task` makes of each item, `count` at a time, as it comes. Once `stop` is asked no other item is given out.

    Raises OSError that a task raised, or where a process is gone, after the others have stopped as if they were asked.
    """
    told, asks = SPAWN.Pipe(duplex=False)
    stop.then = asks.close
    waiting, workers = deque(items), list[tuple[BaseProcess, Connection]]()
    busy: dict[Connection, BaseProcess] = {}
    error: OSError | None = None

    def give(process: BaseProcess, pipe: Connection) -> None:
        if waiting and not stop.asked:
            pipe.send(waiting.popleft())
            busy[pipe] = process

    try:
        while len(workers) < min(count, len(items)) and not stop.asked:
            workers.append(_start(task, told))
            give(*workers[-1])
        while busy:
            ready = wait(list(busy))
            for pipe in [pipe for pipe in busy if pipe in ready]:
                process = busy.pop(pipe)
                outcome = _outcome(process, pipe)
                if isinstance(outcome, OSError):
                    error = error or outcome
                    stop.ask(repr(outcome))
                else:
                    yield outcome
                give(process, pipe)
    finally:
        _end(workers, at_once=bool(busy))
    if error is not None:
        raise error


def _start(task: Callable[..., Any], told: Connection) -> tuple[BaseProcess, Connection]:
    here, there = SPAWN.Pipe()
    process = SPAWN.Process(target=_work, args=(task, told, there))
    before = signal.pthread_sigmask(signal.SIG_BLOCK, HEARD)  # a process that just begins would die of them
    try:
        resource_tracker.ensure_running()  # Python's own helper would, too; it unblocks some as it starts
        signal.pthread_sigmask(signal.SIG_BLOCK, HEARD)
        process.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    there.close()
    return process, here


def _outcome(process: BaseProcess, pipe: Connection) -> Any:
    try:
        return pipe.recv()
    except (EOFError, ConnectionError):
        process.join()
        return ChildProcessError(f"a process ended with status {process.exitcode}")


def _end(workers: Sequence[tuple[BaseProcess, Connection]], at_once: bool) -> None:
    """Waits for workers that have nothing to do, or kills them `at_once`: where this process is interrupted."""
    try:
        if not at_once:
            for process, pipe in workers:
                if process.is_alive():
                    pipe.send(None)
                process.join()
    finally:
        for process, _ in workers:
            process.kill()
            process.join()


# ---- a worker


def _work(task: Callable[[Any, StopRequest], Any], told: Connection, pipe: Connection) -> None:
    for number in HEARD:
        signal.signal(number, lambda *_: None)  # SIG_IGN would be handed down to programs that it starts
    signal.pthread_sigmask(signal.SIG_UNBLOCK, HEARD)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    stop = StopRequest(told=told)
    while (item := _next(pipe)) is not None:
        try:
            outcome = task(item, stop)
        except OSError as error:
            outcome = error
        with contextlib.suppress(ConnectionError):  # the main process is gone
            pipe.send(outcome)


def _next(pipe: Connection) -> Any:
    try:
        return pipe.recv()
    except (EOFError, ConnectionError):  # the main process is gone
        return None


def _end_with_parent() -> None:
    """Ends this process when the main one is gone: whoever starts it again is alone with its folders."""
    parent = parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)
