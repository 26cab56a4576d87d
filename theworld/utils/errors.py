"""Errors of libraries and of the system as one line: what failed, in which field, and what to do.

torch, safetensors, HDF5 and the HTTP libraries each say in their own way that a disk is full, memory ran out or the
network failed. `explain` and `reason_of` are the only places that know their words.
"""

import errno
import os
import re
import shutil
from pathlib import Path

from theworld.utils import commands

# Of an OSError without a message of our own: what is wrong, and what to do.
_REASONS = {
    errno.ENOSPC: ("no space is left on the disk", "make room, or choose another"),
    errno.EDQUOT: ("the quota of disk space is used up", "make room, or choose another"),
    errno.EFBIG: ("larger than the file system, or `ulimit -f` of the shell, allows", "choose another"),
    errno.EROFS: ("on a file system that cannot be written to", "choose another"),
    errno.EACCES: ("not yours to read or write", "change its permissions, or choose another"),
    errno.EPERM: ("not yours to change", "change its permissions, or choose another"),
    errno.ENOENT: ("no such file or folder", "check the path in"),
    errno.ENOTDIR: ("a file is where a folder is wanted", "check the path in"),
    errno.EISDIR: ("a folder, and a file is wanted", "check the path in"),
    errno.ENAMETOOLONG: ("longer than the file system takes", "choose a shorter"),
    errno.EMFILE: ("too many files are open", "raise the limit with `ulimit -n 4096` before"),
    errno.EIO: ("the disk failed", "choose another"),
}
# The setting of each tool that says how much is in memory at a time.
_SIZES = {
    "extract_latents": "--encode_batch_size",
    "train": "--batch_size",
    "sweep": "--batch_size",
    "eval": "--eval_batch_size",
    "visualize_alignment": "--num_samples",
}
_NO_MEMORY = re.compile(
    r"DefaultCPUAllocator|not enough memory|out of memory|can't allocate memory|CUBLAS_STATUS_ALLOC_FAILED",
    re.I,
)
_TORCH_WRITE = re.compile(r"enforce fail at .*inline_container|PytorchStreamWriter")
_OS_CODE = re.compile(r"\(os error (\d+)\)|errno = (\d+)")  # safetensors; HDF5
_PATH = re.compile(r"filename = '([^']+)'")  # HDF5
OVERRIDE = "override: "  # before a setting that `load_config` refuses
_NETWORK = {"httpx", "httpx2", "httpcore", "requests", "urllib3", "aiohttp"}


def is_no_memory(error: BaseException) -> bool:
    """Return whether an error means that there is no memory left, on a GPU or here."""
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and _NO_MEMORY.search(str(error)) is not None
    )


def reason_of(error: BaseException) -> str:
    """Return why something failed, as a few words without codes of the system or places in a library's source."""
    text = str(error)
    code = error.errno if isinstance(error, OSError) else None
    found = _OS_CODE.search(text)
    if found is not None:
        code = int(found[1] or found[2])
    if _TORCH_WRITE.search(text):
        return "the file could not be written to its end"
    words = str(error.strerror or text) if isinstance(error, OSError) else text
    if code is not None and (found is not None or words == os.strerror(code)):
        return _REASONS[code][0] if code in _REASONS else os.strerror(code).lower()
    return words.strip().partition("\n")[0] or type(error).__name__


def explain(error: BaseException, tool: str) -> str | None:
    """Return the message of an error that a user of a tool can cause, or None for any other error."""
    if is_no_memory(error):
        return _no_memory(error, tool)
    if isinstance(error, OSError) and error.errno is not None:
        if error.filename is not None:
            return _of_file(error)
        path = _PATH.search(str(error))
        return f"{path[1]}: {reason_of(error)}" if path else reason_of(error)
    if isinstance(error, (ValueError, OSError)):
        text = str(error)  # settings that no file gave were flags
        return f"--{text.removeprefix(OVERRIDE)}" if text.startswith(OVERRIDE) else text
    if type(error).__name__ == "SafetensorError" or _TORCH_WRITE.search(str(error)):
        return f"a file cannot be read or written: {reason_of(error)}"
    if type(error).__module__.partition(".")[0] in _NETWORK:
        return f"the network failed: {reason_of(error)}; try again, or give local folders"
    return None


def _no_memory(error: BaseException, tool: str) -> str:
    asked = re.search(r"(?:allocate|tried to allocate) ([\d.,]+ ?\w+)", str(error))
    size = f" ({asked[1]} were asked for)" if asked else ""
    return f"out of memory{size}; {_smaller(tool)}"


def _smaller(tool: str) -> str:
    if tool not in _SIZES:
        return "end other programs, or use a machine with more memory"
    flag = _SIZES[tool]
    given = commands.value_of(flag.removeprefix("--"))
    return f"lower {flag}{f', which is {given}' if given else ''}"


def _of_file(error: OSError) -> str:
    """Return `PATH: reason; hint`, with the flag that names the path or a folder above it."""
    path = Path(os.fsdecode(error.filename))
    if error.strerror != os.strerror(int(error.errno or 0)):  # a message of our own
        return f"{path}: {error.strerror}"
    reason, hint = _REASONS.get(int(error.errno or 0), (str(error.strerror).lower(), "check"))
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        reason += f" ({_free(path):,} bytes free)"
    flag = commands.flag_of(path)
    return f"{path}: {reason}; {hint} {flag or 'path'}"


def _free(path: Path) -> int:
    there = next(folder for folder in path.absolute().parents if folder.is_dir())
    return shutil.disk_usage(there).free
