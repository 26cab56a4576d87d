"""What the tools share on a terminal."""

import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterable
from typing import Any

from tqdm import tqdm


def progress(iterable: Iterable[Any] | None = None, **options: Any) -> tqdm:
    """A progress bar; in a log file, where each refresh is a line, it refreshes twice a minute only."""
    return tqdm(iterable, mininterval=0.1 if sys.stderr.isatty() else 30.0, **options)


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
