"""What the tools share on a terminal: progress bars, dry runs, errors and interruptions."""

import contextlib
import errno
import io
import logging
import os
import select
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from theworld.utils.errors import explain
from theworld.utils.starting import starting

QUIET_SECONDS = 30.0  # between two lines of a bar in a log file


class Bar(tqdm):
    """A progress bar that keeps each figure until it is replaced."""

    def set_postfix(self, ordered_dict: Any = None, refresh: bool | None = True, **figures: Any) -> None:
        """Add figures to those that the bar shows."""
        self._figures = getattr(self, "_figures", {}) | dict(ordered_dict or {}) | figures
        super().set_postfix(self._figures, refresh)


class LogBar(Bar):
    """A progress bar for log files: a line every QUIET_SECONDS and one at the end."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self._written = time.monotonic()
        super().__init__(*arguments, **options)

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        """Write a line if the last one is QUIET_SECONDS old."""
        if msg is None and time.monotonic() - self._written >= QUIET_SECONDS:
            self._write()

    def clear(self, nolock: bool = False) -> None:
        """Do nothing: a written line stays."""

    def close(self) -> None:
        """Write the last line, unless the bar is one that vanishes at its end."""
        if not self.disable:
            if self.leave:
                self._write()
            self.leave, self.sp = False, None
        super().close()

    def _write(self) -> None:
        self._written = time.monotonic()
        self.fp.write(f"{self}\n")
        self.fp.flush()


def progress(iterable: Iterable[Any] | None = None, **options: Any) -> tqdm:
    """Return a progress bar that moves on a terminal and writes lines elsewhere; it is not shown if nothing is left."""
    total = options.get("total")
    if total is not None and options.get("initial", 0) >= total:
        options["disable"] = True
    return Bar(iterable, **options) if sys.stderr.isatty() else LogBar(iterable, **options)


def quiet_libraries() -> None:
    """Turn off the libraries' own progress bars and notices, so that a tool's lines stay readable.

    For tools only: the settings of the whole process change. Warnings stay on.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # silences its warning after a fork
    from transformers.utils import logging as transformers_logging

    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # retries; a failure is reported by the tool
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    if "diffusers" in sys.modules:  # not imported only for this: training does not need it
        from diffusers.utils import logging as diffusers_logging

        diffusers_logging.disable_progress_bar()
        diffusers_logging.set_verbosity_error()
    logging.getLogger("datasets").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|diffusers|huggingface_hub")


class _TerminalHandler(logging.Handler):
    """Writes messages above the progress bars, on the standard output of the moment."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            tqdm.write(self.format(record))
        except Exception:  # noqa: BLE001 - as every handler: a message that cannot be written ends nothing
            self.handleError(record)


def configure_logging() -> None:
    """Show what the package logs from INFO on, message only, above the progress bars on standard output.

    For tools, not for library code: it changes the `theworld` logger of the whole process. A second call changes
    nothing.
    """
    logger = logging.getLogger("theworld")
    if not any(isinstance(handler, _TerminalHandler) for handler in logger.handlers):
        logger.addHandler(_TerminalHandler())
    logger.setLevel(logging.INFO)
    logger.propagate = False  # a library that configures the root logger would show each message again


def duration(seconds: float) -> str:
    """Return a time span in words, to the second, or to the minute from an hour on."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return (
        f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s" if minutes else f"{seconds} s"
    )


class _Output(io.FileIO):
    """A standard stream that ends no run: what cannot be written to it is dropped, and the first error kept."""

    error: OSError | None = None

    def write(self, data: Any, /) -> int:
        """Return how many bytes are done with: all of them where they cannot be written."""
        try:
            while (written := super().write(data)) is None:  # another process made the pipe non-blocking
                select.select([], [self], [])
            return written
        except OSError as error:
            self.error = self.error or error
            return memoryview(data).nbytes


def guard_outputs() -> None:
    """Let no message end this process: not a closed pipe or terminal, a full disk, nor a character that it cannot show.

    For tools only: the standard streams of the process are replaced. A stream that was closed before the start gets
    /dev/null, as its descriptor would otherwise be that of the next file to be opened, and messages would go into it.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest free number
    sys.stdout = _guarded(sys.stdout, 1, "replace")
    sys.stderr = _guarded(sys.stderr, 2, "backslashreplace")


def _guarded(stream: Any, number: int, errors: str) -> Any:
    """Return a text stream on a descriptor in place of `stream`; one that is not plain, as in a notebook, stays."""
    encoding, by_line = "utf-8", True
    if stream is not None:
        buffer = getattr(stream, "buffer", None)
        if type(getattr(buffer, "raw", buffer)) is not io.FileIO or stream.fileno() != number:
            return stream
        stream.flush()
        encoding, by_line = stream.encoding, stream.line_buffering or stream.write_through
    raw = _Output(number, "w", closefd=False)
    return io.TextIOWrapper(io.BufferedWriter(raw), encoding, errors, line_buffering=by_line)


def _output_error() -> OSError | None:
    """Flush the standard output, and return why some of it could not be written; None where its reader had enough."""
    with contextlib.suppress(OSError, ValueError):  # of a stream that is not guarded
        sys.stdout.flush()
    error = getattr(getattr(getattr(sys.stdout, "buffer", None), "raw", None), "error", None)
    return None if error is None or error.errno == errno.EPIPE else error


def write_at_once(text: str) -> None:
    """Write to standard error without `print`, which a signal may have interrupted and cannot be entered twice."""
    with contextlib.suppress(OSError):
        os.write(2, text.encode(errors="backslashreplace"))


class ExplainedError(Exception):
    """An error whose message is all that a user needs: a tool prints the message and no traceback."""


def keep_compiled_code() -> None:
    """Have torch keep compiled code in the user's cache folder, which survives a reboot: its own place does not.

    An environment that names a folder has its way. Without a home folder to write to, torch's own place serves.
    """
    folder = _cache_folder("compiled")
    if folder is not None and "TORCHINDUCTOR_CACHE_DIR" not in os.environ:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder  # torch makes it


def keep_bytecode() -> None:
    """Have Python keep bytecode in the user's cache folder where it keeps none beside the libraries, as in most
    containers: without any, imports take three times as long. An environment that names a folder has its way."""
    # Imported a moment ago, so that Python would have kept it.
    library = sys.modules[tqdm.__module__].__spec__
    beside = None if library is None else library.cached
    folder = _cache_folder("bytecode")
    if folder is None or beside is None or Path(beside).exists() or sys.pycache_prefix is not None:
        return
    sys.pycache_prefix, sys.dont_write_bytecode = folder, False  # Python makes it
    os.environ["PYTHONPYCACHEPREFIX"] = folder  # for processes that this one starts


def _cache_folder(name: str) -> str | None:
    """Return the place of a folder in the user's cache folder; None if it cannot be written to."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path(os.path.expanduser("~")) / ".cache")
    folder = home / "theworld" / name
    there = next(parent for parent in (folder, *folder.parents) if parent.exists())
    return str(folder) if folder.is_absolute() and there.is_dir() and os.access(there, os.W_OK) else None


def run_tool(
    tool: str, main: Callable[[], int], interrupted: str = "interrupted", prints: bool = False
) -> int:
    """Return the exit status of a tool: what `main` returns, 1 for an error that a user can cause, 130 for Ctrl-C.

    Errors and Ctrl-C cost one line on stderr, `interrupted` for the latter. Output that cannot be written ends nothing
    (`guard_outputs`); one line says so at the end, unless its reader has gone, as `head` does. Where the output is what
    the tool is for, `prints`, the status is then 1. `main` imports what loads torch by itself: libgomp reads
    OMP_WAIT_POLICY once, when it is loaded. With passive waiting small models run many times faster on a machine whose
    cores are shared.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    keep_compiled_code()
    keep_bytecode()
    os.environ["MPLBACKEND"] = "agg"  # pictures are files; a notebook's backend, inherited, is not here
    guard_outputs()
    try:
        status = main()
    except KeyboardInterrupt:
        print(f"\n{tool}: {interrupted}", file=sys.stderr)
        return 130
    except Exception as error:
        message = str(error) if isinstance(error, ExplainedError) else explain(error, tool)
        if message is None:
            raise
        print(f"{tool}: {message}", file=sys.stderr, flush=True)
        return 1
    lost = _output_error()
    if lost is None:
        return status
    print(f"{tool}: output could not be written: {lost.strerror}", file=sys.stderr)
    return status or int(prints)


@contextlib.contextmanager
def loading(tool: str) -> Iterator[None]:
    """For the imports of a tool that take seconds: Ctrl-C ends the process at once, as in `starting`.

    Afterwards the libraries are quiet (`quiet_libraries`) and the package's log is shown (`configure_logging`).
    """
    with starting(tool):
        yield
        quiet_libraries()
        configure_logging()


NOTHING_WRITTEN = "dry run: nothing was written"


def rehearse(plan: Callable[[], Iterable[str]]) -> int:
    """Print the lines of a dry run as they come and at its end that nothing was written; return the exit status 0.

    Raises what `plan` raises, which is what the run itself would raise. Of processes that were launched together only
    the first one prints.
    """
    if os.environ.get("RANK", "0") != "0":
        return 0
    for line in plan():
        print(line, flush=True)
    print(NOTHING_WRITTEN, flush=True)
    return 0


def line(topic: str, message: str) -> str:
    """Return one line of a dry run."""
    return f"{topic:<12} {message}"
