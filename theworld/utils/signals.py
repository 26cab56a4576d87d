"""A request to stop a run: by SIGTERM or SIGUSR1, as clusters send, by SIGHUP of a terminal that is closed, or because
its launcher is gone.

After the first request the run finishes its optimizer step, saves, and ends with STATUS. A second request, and any
request while no step is under way, ends the process at once: nothing that was published is touched. Ctrl-C raises
KeyboardInterrupt, as in any Python program.
"""

import contextlib
import os
import signal
import sys
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any

from theworld.utils.console import write_at_once
from theworld.utils.distributed import num_launched

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
STATUS = 75  # EX_TEMPFAIL of sysexits.h: the same command goes on, of a training with --resume_from
# seconds: a signal that reaches a process twice, by itself and with its group, is one request
ONE_REQUEST = 2.0


class StopRequest:
    """Whether this process was asked to stop. As a context manager it listens to SIGNALS; else only to `ask`."""

    def __init__(self, tool: str = "train") -> None:
        """`tool`: the name before its messages."""
        self.reason = ""  # of the request; empty: there was none
        self._tool = tool
        self._at = 0.0
        self._working = False
        self._before: dict[int, Any] = {}
        # torchrun dies of SIGUSR1 and leaves its processes behind. A run by itself may outlive its shell.
        self._parent = os.getppid() if num_launched() > 1 else None

    @property
    def asked(self) -> bool:
        """Whether the run should save and end."""
        if not self.reason and self._parent is not None and os.getppid() != self._parent:
            self.ask("its launcher is gone")
        return bool(self.reason)

    def ask(self, reason: str) -> None:
        """Ask the run to stop."""
        self.reason, self._at = reason, time.monotonic()

    def end(self) -> None:
        """Ignore further requests: the run has ended, and none may change the exit status any more."""
        self._before = {}
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)

    @contextlib.contextmanager
    def working(self) -> Iterator[None]:
        """Mark the time in which steps are taken, after which a request can be answered; in a sweep, of all runs."""
        before, self._working = self._working, True
        try:
            yield
        finally:
            self._working = before

    def __enter__(self) -> "StopRequest":
        for number in SIGNALS:
            if number == signal.SIGHUP and signal.getsignal(number) is signal.SIG_IGN:
                continue  # as `nohup` asks
            self._before[number] = signal.signal(number, self._hear)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _hear(self, number: int, _: FrameType | None) -> None:
        name = signal.Signals(number).name
        if not self._working:
            self._leave(f"{name} while no step was under way: there is nothing to save", STATUS)
        if not self.reason:
            self.ask(name)
            self._say(f"{name}: saving after this step (a second signal ends the run at once)")
        elif time.monotonic() - self._at > ONE_REQUEST:
            self._leave(f"{name} again: ended at once; what was saved before stays", 128 + number)

    def _say(self, text: str) -> None:
        write_at_once(f"\n{self._tool}: {text}\n")

    def _leave(self, text: str, status: int) -> None:
        with contextlib.suppress(RuntimeError):
            sys.stdout.flush()
        self._say(text)
        os._exit(status)
