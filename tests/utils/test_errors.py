"""Errors of libraries as one line, each as the library itself raises it."""

import errno
import os
import resource
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import h5py
import httpx
import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from theworld.config.config import load_config
from theworld.training.logging import append
from theworld.utils.console import run_tool
from theworld.utils.errors import explain, is_no_memory, reason_of


def raised(call: object, *arguments: object, **options: object) -> Exception:
    with pytest.raises(Exception) as caught:  # noqa: PT011 - whatever the library raises
        call(*arguments, **options)  # type: ignore[operator]
    return caught.value


def test_an_error_of_the_system_has_path_flag_and_hint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "run" / "metrics.jsonl"
    monkeypatch.setattr(
        sys, "argv", ["tools/train.py", "--output_dir", str(tmp_path / "run"), "--cache", "c"]
    )

    def message(code: int) -> str | None:
        return explain(OSError(code, os.strerror(code), str(path)), "train")

    assert message(errno.EROFS) == (
        f"{path}: on a file system that cannot be written to; choose another --output_dir"
    )
    assert message(errno.EACCES) == (
        f"{path}: not yours to read or write; change its permissions, or choose another --output_dir"
    )
    (tmp_path / "run").mkdir()
    full = str(message(errno.ENOSPC))
    assert full.startswith(f"{path}: no space is left on the disk (")
    assert full.endswith(" bytes free); make room, or choose another --output_dir")
    own = OSError(errno.ENOSPC, "no room; 12 bytes needed, 0 free", str(path))
    assert explain(own, "train") == f"{path}: no room; 12 bytes needed, 0 free"
    monkeypatch.setattr(sys, "argv", ["notebook"])
    assert str(message(errno.EROFS)).endswith("; choose another path")


@contextmanager
def no_room() -> Iterator[None]:
    """Within the block no file can be longer than a page, as on a disk that is full from there on."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def write_hdf5(path: Path) -> None:
    with h5py.File(path, "w") as file:
        file["rows"] = np.zeros(1 << 18)


TOO_LARGE = "larger than the file system, or `ulimit -f` of the shell, allows"


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (
            lambda path: torch.save({"weight": torch.zeros(1 << 18)}, path),
            "a file cannot be read or written: the file could not be written to its end",
        ),
        (
            lambda path: save_file({"weight": torch.zeros(1 << 18)}, path),
            f"a file cannot be read or written: {TOO_LARGE}",
        ),
        (write_hdf5, f"{{}}: {TOO_LARGE}"),
        (lambda path: append(path, {"step": 1, "loss": "0" * 9000}), f"{{}}/metrics.jsonl: {TOO_LARGE}; "),
        (lambda path: path.write_bytes(bytes(1 << 18)), TOO_LARGE),
    ],
)
def test_every_library_that_writes_gives_one_line_without_codes(
    write: Callable[[Path], object], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "file"
    if "metrics" in message:
        path.mkdir()
    with no_room():
        error = raised(write, path)
    assert str(explain(error, "train")).startswith(message.format(path))


def test_codes_in_messages_of_libraries_are_read() -> None:
    assert reason_of(SafetensorError("I/O error: No space left on device (os error 28)")) == (
        "no space is left on the disk"
    )


def test_no_memory_names_the_setting_to_lower(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["tools/extract_latents.py", "--encode_batch_size", "1000000"])
    for error in (
        raised(torch.empty, 1 << 60, dtype=torch.uint8),
        raised(np.zeros, 1 << 60, np.uint8),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has ..."),
        MemoryError(),
    ):
        assert is_no_memory(error)
        message = str(explain(error, "extract_latents"))
        assert message.startswith("out of memory")
        assert message.endswith("; lower --encode_batch_size, which is 1000000")
        assert "\n" not in message
    assert str(explain(MemoryError(), "ask")) == (
        "out of memory; end other programs, or use a machine with more memory"
    )


def test_a_library_for_the_network_gives_one_line() -> None:
    message = explain(httpx.ConnectError("[Errno -2] Name or service not known\nmore"), "ask")
    assert (
        message
        == "the network failed: [Errno -2] Name or service not known; try again, or give local folders"
    )


def test_a_fault_of_the_program_keeps_its_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> int:
        raise KeyError("shape")

    with pytest.raises(KeyError):
        run_tool("train", fail)

    def refuse() -> int:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    assert run_tool("eval", refuse) == 1
    assert (
        capsys.readouterr().err == "eval: out of memory (2.00 GiB were asked for); lower --eval_batch_size\n"
    )


def test_a_damaged_file_of_hdf5_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "a.h5").write_bytes(b"no HDF5")
    message = explain(raised(h5py.File, tmp_path / "a.h5"), "train")
    assert message is not None
    assert "\n" not in message


def test_a_refused_setting_of_a_flag_is_named_as_the_flag() -> None:
    error = raised(load_config, None, {"batch_size": 0})
    assert explain(error, "train") == "--batch_size is 0; allowed: an integer of at least 1"
