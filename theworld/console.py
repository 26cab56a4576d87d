"""What the tools share on a terminal."""

import logging
import os
import sys
import warnings
from collections.abc import Iterable
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


def duration(seconds: float) -> str:
    """A time span in words, to the second or, from an hour on, to the minute."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return (
        f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s" if minutes else f"{seconds} s"
    )
