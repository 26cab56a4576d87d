"""Checkpoints for an exact resume: folders `checkpoint-N` that are there whole or not at all.

projection.safetensors ... world.json  config.json    the model (see `theworld.saved`)
trainer.pt                                            optimizer and RNG state (read with weights_only=True)
trainer.json                                          step and running figures
checkpoint.json                                       size and SHA-256 of each of the others
"""

import hashlib
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from theworld.model import TheWorld
from theworld.saved import PROJECTION_FILE

FORMAT_VERSION = 1
INDEX, STATE, PROGRESS = "checkpoint.json", "trainer.pt", "trainer.json"
_NAME = re.compile(r"checkpoint-(\d+)")


class CheckpointError(ValueError):
    """A checkpoint that is damaged, incomplete or in the way; the message names it and the cure."""


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
    them, where they had to be put together before. Raises CheckpointError if a
    checkpoint of that name is there already: nothing that was published is overwritten.
    """
    target = output_dir / f"checkpoint-{step}"
    if target.exists():
        raise CheckpointError(f"{target} is there already; resume from it, or choose another --output_dir")
    temporary = output_dir / f".{target.name}.{os.getpid()}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)  # our own, of a save that failed
    model.save_pretrained(temporary, weights)
    torch.save(state, temporary / STATE)
    (temporary / PROGRESS).write_text(json.dumps(progress, indent=2) + "\n")
    files = {path.name: _fingerprint(path) for path in sorted(temporary.iterdir())}
    index = {"format": FORMAT_VERSION, "step": step, "files": files}
    (temporary / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    for path in (*temporary.iterdir(), temporary):
        _fsync(path)
    os.rename(temporary, target)
    _fsync(output_dir)
    return target


def rotate(output_dir: Path, limit: int | None) -> list[Path]:
    """Deletes the oldest checkpoints beyond `limit`, after the newest one is complete; returns what went."""
    old = list_checkpoints(output_dir)[:-limit] if limit else []
    for path in old:
        shutil.rmtree(path)
    return old


def list_checkpoints(output_dir: Path) -> list[Path]:
    """The published checkpoints of a run, by step."""
    found = [p for p in output_dir.glob("checkpoint-*") if _NAME.fullmatch(p.name) and (p / INDEX).is_file()]
    return sorted(found, key=lambda p: int(p.name.removeprefix("checkpoint-")))


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
    if (found / INDEX).is_file():
        check_files(found)
    return found


def checkpoint_step(path: Path) -> int:
    """The optimizer steps that a checkpoint has behind it, whatever its folder is called."""
    return int(json.loads((path / INDEX).read_text())["step"])


def load_checkpoint(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """(state on the CPU, progress) of a checkpoint, after the hash of every file was checked. CheckpointError."""
    check_files(path)
    state = torch.load(path / STATE, map_location="cpu", weights_only=True)
    return state, json.loads((path / PROGRESS).read_text())


def check_files(path: Path) -> None:
    """CheckpointError unless every file of a checkpoint is there, and has the bytes that were saved."""
    index = json.loads((path / INDEX).read_text())
    if index.get("format") != FORMAT_VERSION:
        raise CheckpointError(f"{path / INDEX}: format {index.get('format')!r}; wanted {FORMAT_VERSION}")
    for name, wanted in index["files"].items():
        if not (path / name).is_file():
            raise CheckpointError(f"{path}: {name} is missing; use another checkpoint")
        have = _fingerprint(path / name)
        if have != wanted:
            raise CheckpointError(
                f"{path / name} is damaged: {wanted['bytes']} bytes with SHA-256 {wanted['sha256']} were saved, "
                f"{have['bytes']} with {have['sha256']} are there; use another checkpoint"
            )


def refuse_to_overwrite(output_dir: Path, resumed: Path | None) -> None:
    """CheckpointError if checkpoints that a run would write again are there when it starts."""
    done = -1 if resumed is None else checkpoint_step(resumed)
    ahead = [p for p in list_checkpoints(output_dir) if int(p.name.removeprefix("checkpoint-")) > done]
    if ahead:
        cure = "use another --output_dir, or move them away"
        if resumed is None:
            cure = f"go on with --resume_from {output_dir}, " + cure
        raise CheckpointError(f"{output_dir} already holds {', '.join(p.name for p in ahead)}; {cure}")


def _fingerprint(path: Path) -> dict[str, Any]:
    with open(path, "rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
