"""Checkpoints for an exact resume: folders `checkpoint-N` that are there whole or not at all.

projection.safetensors ... world.json  config.json    the model (see `theworld.saved`)
trainer.pt                                            optimizer and RNG state (read with weights_only=True)
trainer.json                                          step and running figures
checkpoint.json                                       size and SHA-256 of each of the others
"""

import errno
import json
import os
import pickle
import re
import shutil
import socket
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from theworld.files import sync_folder
from theworld.model import TheWorld
from theworld.saved import (
    INDEX,
    INDEX_VERSION,
    PROJECTION_FILE,
    WORLD_FILE,
    CheckpointError,
    check_hashes,
    check_model,
    fingerprint_of,
    model_files,
    read_index,
    read_world,
)

STATE, PROGRESS = "trainer.pt", "trainer.json"
_NAME = re.compile(r"checkpoint-(\d+)")
_UNREADABLE = (
    pickle.UnpicklingError,
    RuntimeError,
    EOFError,
    KeyError,
    ValueError,
    TypeError,
    AttributeError,
)


# ---- writing


def save_checkpoint(
    output_dir: Path,
    step: int,
    model: TheWorld,
    state: dict[str, Any],
    progress: dict[str, Any],
    weights: dict[str, dict[str, Tensor]] | None = None,
) -> Path:
    """Publishes `output_dir/checkpoint-<step>` by rename, and returns it.

    `state` holds tensors, numbers and containers of them; `progress` is JSON; `weights` as `model.weights()` gives
    them, where they had to be put together before. Raises CheckpointError if a checkpoint of that name is there
    already: nothing that was published is overwritten; OSError with the bytes needed and free where it cannot be
    written, and then nothing of it stays.
    """
    target = output_dir / f"checkpoint-{step}"
    if target.exists():
        raise CheckpointError(f"{target} is there already; resume from it, or choose another --output_dir")
    temporary = _temporary(target)
    shutil.rmtree(temporary, ignore_errors=True)  # our own, of a save that failed
    try:
        model.save_pretrained(temporary, weights)
        torch.save(state, temporary / STATE)
        (temporary / PROGRESS).write_text(json.dumps(progress, indent=2) + "\n")
        files = {path.name: fingerprint_of(path) for path in sorted(temporary.iterdir())}
        index = {"format": INDEX_VERSION, "step": step, "files": files}
        (temporary / INDEX).write_text(json.dumps(index, indent=2) + "\n")
        for path in (*temporary.iterdir(), temporary):
            _fsync(path)
        os.rename(temporary, target)
    except (
        OSError,
        SafetensorError,
        RuntimeError,
    ) as error:  # the last is what torch.save makes of an OSError
        raise _not_written(error, target, _num_bytes([weights or model.weights(), state])) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # gone after the rename
    sync_folder(output_dir)
    return target


def rotate(output_dir: Path, limit: int | None) -> list[Path]:
    """Deletes the oldest checkpoints beyond `limit`, after the newest one is complete; returns what went. A stop in
    between leaves a temporary folder, never half of a checkpoint."""
    old = list_checkpoints(output_dir)[:-limit] if limit else []
    for path in old:
        os.rename(path, _temporary(path))
        shutil.rmtree(_temporary(path))
    return old


def _temporary(target: Path) -> Path:
    """Says who writes it: machine and process."""
    return target.with_name(f".{target.name}.{socket.gethostname()}.{os.getpid()}.tmp")


def _not_written(error: Exception, target: Path, needed: int) -> OSError:
    free = shutil.disk_usage(target.parent).free
    code = getattr(error, "errno", None) or (errno.ENOSPC if free < needed else errno.EIO)
    older = list_checkpoints(target.parent)
    last = f"{older[-1].name} is as it was" if older else "there is none before it"
    # An OSError of the store's own has a line of its own after its first reason.
    reason = str(getattr(error, "strerror", None) or error).partition(";")[0].partition("\n")[0]
    text = f"{reason}; {needed:,} bytes needed, {free:,} free; this checkpoint was not written, {last}"
    return OSError(code, text, str(target))


def _num_bytes(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    values: Iterable[Any] = (
        value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    )
    return sum(map(_num_bytes, values))


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# ---- finding


def numbered(output_dir: Path) -> list[Path]:
    """Everything of a checkpoint's name, by step, whatever is in it."""
    found = [p for p in output_dir.glob("checkpoint-*") if _NAME.fullmatch(p.name)]
    return sorted(found, key=number_of)


def number_of(path: Path) -> int:
    """The step that a checkpoint's name tells."""
    return int(path.name.removeprefix("checkpoint-"))


def list_checkpoints(output_dir: Path) -> list[Path]:
    """The published checkpoints of a run, by step."""
    return [path for path in numbered(output_dir) if (path / INDEX).is_file()]


def find_checkpoint(path: str | Path) -> Path:
    """A checkpoint folder: `path` itself, or the newest one in it. CheckpointError if there is none."""
    path = Path(path)
    if (path / INDEX).is_file():
        return path
    found = list_checkpoints(path)
    if not found:
        raise CheckpointError(
            f"{path}: neither a checkpoint (no {INDEX}) nor a folder with checkpoint-N in it"
        )
    return found[-1]


def find_model(path: str | Path) -> Path:
    """A folder with a trained model: `path` itself, such as a download, or as `find_checkpoint` does."""
    return Path(path) if (Path(path) / PROJECTION_FILE).is_file() else find_checkpoint(path)


def find_start(path: str | Path) -> Path:
    """As `find_model`, for a run that starts from its weights. CheckpointError if they are not as they were saved."""
    found = find_model(path)
    check_model(found)
    return found


def checkpoint_step(path: Path) -> int:
    """The optimizer steps that a checkpoint has behind it, whatever its folder is called."""
    return int(read_index(path)["step"])


def load_checkpoint(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """(state on the CPU, progress) of a checkpoint, after the hash of every file was checked. CheckpointError."""
    check_files(path)
    try:
        state = torch.load(path / STATE, map_location="cpu", weights_only=True)
        progress = json.loads((path / PROGRESS).read_text())
        state["optimizer"]["state"], state["rng"], progress["window"]
    except _UNREADABLE as error:
        reason = str(error).partition("\n")[0]
        raise CheckpointError(
            f"{path}: {STATE} or {PROGRESS} cannot be read: {reason}; use another"
        ) from None
    if progress["step"] != checkpoint_step(path):
        raise CheckpointError(
            f"{path}: {INDEX} says step {checkpoint_step(path)}, {PROGRESS} {progress['step']}; use another checkpoint"
        )
    return state, progress


def check_files(path: Path) -> None:
    """CheckpointError unless every file of a checkpoint is there, and has the bytes that were saved."""
    if not (path / INDEX).is_file():
        raise CheckpointError(f"{path}: {INDEX} is missing; use another checkpoint")
    index = read_index(path)
    check_hashes(path, index, {*index["files"], STATE, PROGRESS, WORLD_FILE})
    check_hashes(path, index, [name for name in model_files(read_world(path)) if name not in index["files"]])
