"""What the tools share on a terminal."""

import logging
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterable
from typing import Any

from tqdm import tqdm

QUIET_SECONDS = 30.0  # between two lines of a bar in a log file


class Bar(tqdm):
    """A progress bar whose figures stay until they are replaced."""

    def set_postfix(self, ordered_dict: Any = None, refresh: bool | None = True, **figures: Any) -> None:
        """As tqdm's, but adds to the figures that are shown already."""
        self._figures = getattr(self, "_figures", {}) | dict(ordered_dict or {}) | figures
        super().set_postfix(self._figures, refresh)


class LogBar(Bar):
    """The same where nobody sees it move, such as in a log file: a line twice a minute and one at the end."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self._said = time.monotonic()
        super().__init__(*arguments, **options)

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        """Writes a line if the last one is long enough ago."""
        if msg is None and time.monotonic() - self._said >= QUIET_SECONDS:
            self._say()

    def clear(self, nolock: bool = False) -> None:
        """Nothing: a line that is written stays."""

    def close(self) -> None:
        """Writes the last line, unless the bar was to vanish at its end."""
        if not self.disable:
            if self.leave:
                self._say()
            self.leave, self.sp = False, None
        super().close()

    def _say(self) -> None:
        self._said = time.monotonic()
        self.fp.write(f"{self}\n")
        self.fp.flush()


def progress(iterable: Iterable[Any] | None = None, **options: Any) -> tqdm:
    """A progress bar on a terminal, a line now and then elsewhere."""
    return Bar(iterable, **options) if sys.stderr.isatty() else LogBar(iterable, **options)


def quiet_libraries() -> None:
    """Turns off the libraries' own progress bars and notices, so that a tool's lines stay readable.

    For tools, not for library code: it changes settings of the whole process. Warnings stay on.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # its notice after a fork
    from transformers.utils import logging as transformers_logging

    logging.getLogger("huggingface_hub").setLevel(
        logging.ERROR
    )  # its retries; what comes of them is said by us
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    if "diffusers" in sys.modules:  # training has no need of it, so it is not imported for this
        from diffusers.utils import logging as diffusers_logging

        diffusers_logging.disable_progress_bar()
        diffusers_logging.set_verbosity_error()
    logging.getLogger("datasets").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|diffusers|huggingface_hub")


def duration(seconds: float) -> str:
    """A time span in words, to the second or, from an hour on, to the minute."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return (
        f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s" if minutes else f"{seconds} s"
    )


NOTHING_WRITTEN = "dry run: nothing was written"


def rehearse(tool: str, plan: Callable[[], Iterable[str]]) -> int:
    """Prints the lines of a dry run as they come; returns the exit status that the run's start would have.

    What stands in the way is raised by `plan` as ValueError or OSError, as the run itself would raise it. Of processes
    that were launched together the first alone speaks.
    """
    if os.environ.get("RANK", "0") != "0":
        return 0
    status = 0
    try:
        for line in plan():
            print(line, flush=True)
    except (ValueError, OSError) as error:
        print(f"{tool}: {error}", file=sys.stderr, flush=True)
        status = 1
    print(NOTHING_WRITTEN)
    return status


def status_of(tool: str, main: Callable[[], int]) -> int:
    """The exit status of a tool: what `main` returns, or 130 and a line where it was interrupted."""
    try:
        return main()
    except KeyboardInterrupt:
        print(f"\n{tool}: interrupted", file=sys.stderr)
        return 130
