"""Checkpoints for an exact resume: folders `checkpoint-N` that are there whole or not at all.

projection.safetensors ... world.json  config.json    the model (see `theworld.models.serialization`)
trainer.pt                                            optimizer and RNG state (read with weights_only=True)
trainer.json                                          step and running figures
checkpoint.json                                       size and SHA-256 of each of the others

What a run goes on from: the newest checkpoint that is as it was saved, whether it is this run's, and what earlier
starts left in the way.
"""

import errno
import json
import os
import pickle
import re
import shutil
import socket
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from theworld.models.serialization import (
    INDEX,
    INDEX_VERSION,
    WORLD_FILE,
    CheckpointError,
    check_hashes,
    checkpoint_step,
    find_checkpoint,
    fingerprint_of,
    list_checkpoints,
    model_files,
    number_of,
    numbered,
    read_index,
    read_world,
)
from theworld.models.theworld import TheWorld
from theworld.training.logging import ASIDE, METRICS, set_aside
from theworld.utils.files import STALE_SECONDS, sync_folder

STATE, PROGRESS = "trainer.pt", "trainer.json"


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


DAMAGED = "damaged-"  # before the name of a checkpoint that was set aside
SETTLED = 60.0  # seconds: what a process that is gone wrote last is older
_TEMPORARY = re.compile(r"\.checkpoint-\d+\.(?:(.+)\.)?(\d+)\.tmp")


@dataclass(frozen=True)
class Found:
    """A checkpoint that is as it was saved, and newer ones that are not, with what is wrong with them."""

    path: Path
    state: dict[str, Any]
    progress: dict[str, Any]
    skipped: dict[Path, str] = field(default_factory=dict)


def find_sound(path: str | Path) -> Found:
    """What a run goes on from: `path` itself, which has to be as it was saved, or the newest one in it that is.

    CheckpointError if there is none.
    """
    path, skipped = Path(path), dict[Path, str]()
    if (path / INDEX).is_file() or not numbered(path):
        path = find_checkpoint(path)
        return Found(path, *load_checkpoint(path))
    for one in reversed(numbered(path)):
        try:
            return Found(one, *load_checkpoint(one), skipped)
        except CheckpointError as error:
            skipped[one] = str(error)
    reasons = "".join(f"\n  {reason}" for reason in skipped.values())
    raise CheckpointError(f"{path}: no checkpoint in it is as it was saved:{reasons}")


def check_optimizer(optimizer: torch.optim.Optimizer, saved: dict[str, Any], path: Path) -> None:
    """CheckpointError unless a whole optimiser's state fits this optimiser: torch itself asks for no shape."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    groups = [len(group["params"]) for group in optimizer.param_groups]
    theirs = [len(group["params"]) for group in saved["param_groups"]]
    if groups != theirs:
        raise CheckpointError(f"{path / STATE}: parameters in groups of {theirs}; this run has {groups}")
    for number, state in saved["state"].items():
        if not 0 <= number < len(parameters):
            raise CheckpointError(f"{path / STATE}: there is no parameter {number} in this run")
        for name in ("exp_avg", "exp_avg_sq"):
            have, wanted = tuple(state[name].shape), tuple(parameters[number].shape)
            if have != wanted:
                raise CheckpointError(
                    f"{path / STATE}: {name} of parameter {number} is {have}; wanted {wanted}"
                )
            if not state[name].isfinite().all():
                raise CheckpointError(f"{path / STATE}: {name} of parameter {number} is not finite")


def check_same_run(found: Found, run: dict[str, Any]) -> None:
    """CheckpointError where `run`, what its checkpoints are going to say of it, is not the run that a checkpoint is
    of."""
    path, record = found.path, found.progress
    saved, now = record["num_statements"], run["num_statements"]
    if saved != now:
        raise CheckpointError(
            f"{path} was trained on {saved} statements, now there are {now}; use the same --annotations and cache"
        )
    saved, now = record.get("data_sha256"), run["data_sha256"]
    if saved not in (None, now):  # checkpoints of before do not say
        raise CheckpointError(
            f"{path} was trained on other statements or captions: their SHA-256 is {saved}, now {now}; use the same "
            "files of --annotations and --captions"
        )
    saved, now = record["statements_per_step"], run["statements_per_step"]
    if saved != now:
        raise CheckpointError(
            f"{path} was trained with {saved} statements a step, now there are {now}: batch_size x "
            "gradient_accumulation_steps x processes has to stay the same"
        )
    saved, now = record["trained"], run["trained"]
    if saved != now:
        raise CheckpointError(
            f"{path} trained {saved or 'nothing'} of Gemma, now {now or 'nothing'} would train; start a new stage with "
            "--init_from in place of --resume_from"
        )


# ---- what lies in the way


def refuse_to_overwrite(output_dir: Path, found: Found | None) -> None:
    """CheckpointError if checkpoints that a run would write again are there when it starts; those that are damaged
    and were skipped are set aside by then."""
    done = -1 if found is None else found.progress["step"]
    skipped = found.skipped if found is not None else {}
    ahead = [p for p in numbered(output_dir) if number_of(p) > done and p not in skipped]
    if ahead:
        cure = "use another --output_dir, or move them away"
        if found is None:
            cure = f"go on with --resume_from {output_dir}, " + cure
        raise CheckpointError(f"{output_dir} already holds {', '.join(p.name for p in ahead)}; {cure}")


def set_random_state(found: Found) -> None:
    """CheckpointError where torch cannot take the state that was saved."""
    try:
        torch.set_rng_state(found.state["rng"])
    except (RuntimeError, TypeError) as error:
        raise CheckpointError(
            f"{found.path}: its random state cannot be used: {error}; use another"
        ) from None


def tidy(output_dir: Path, skipped: Iterable[Path] = ()) -> list[str]:
    """Renames damaged checkpoints that are in the way, and deletes what killed saves left; a line for each.

    A temporary folder goes if the process that its name tells of ran on this machine, is gone, and wrote nothing for a
    minute; or if nobody wrote to it for a day.
    """
    lines = []
    for path in skipped:
        if path.parent.resolve() == output_dir.resolve():
            aside, number = path.with_name(DAMAGED + path.name), 2
            while aside.exists():
                aside, number = path.with_name(f"{DAMAGED}{path.name}-{number}"), number + 1
            os.rename(path, aside)
            lines.append(f"{path.name} is now {aside}")
    for path in sorted(output_dir.glob(".checkpoint-*.tmp")):
        match = _TEMPORARY.fullmatch(path.name)
        if match is None:
            continue
        age = time.time() - max(p.stat().st_mtime for p in (path, *path.iterdir()))
        gone = match[1] == socket.gethostname() and not _lives(int(match[2])) and age > SETTLED
        if gone or age > STALE_SECONDS:
            shutil.rmtree(path)
            lines.append(f"deleted {path}, which a killed save left")
        else:
            lines.append(f"{path} was left by a save that did not end, {age:.0f} s ago; it is not used")
    return lines


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def tidy_run(output_dir: Path, resumed: Found | None, last: int, owes_dev: bool) -> list[str]:
    """Moves what earlier starts left out of the way of a run that goes on after step `last`; a line for each thing.
    `owes_dev`: an evaluation of that step is made again."""
    lines = tidy(output_dir, resumed.skipped if resumed is not None else ())

    def keep(line: dict[str, Any]) -> bool:
        return line["step"] < last or (line["step"] == last and not (owes_dev and "dev_loss" in line))

    moved = set_aside(output_dir, keep)
    if moved:
        lines.append(f"{moved} lines of {METRICS} about steps that are taken again are now in {ASIDE}")
    return lines
