"""Checkpoints for an exact resume: folders `checkpoint-N` that are there whole or not at all.

projection.safetensors ... world.json  config.json    the model (see `theworld.models.serialization`)
trainer.pt                                            optimizer state (read with weights_only=True)
optimizer/shard-*.safetensors                         of a sharded run: what each process holds of the optimizer state
trainer.json                                          step and running sums
checkpoint.json                                       size and SHA-256 of each of the others

No random state is saved: the order of the statements is a function of seed and epoch, and nothing else in training is
random. Checkpoints of version 1, which have one, are resumed as well.

A run is resumed from its newest valid checkpoint. Checks that it is this run's, and files that earlier starts left in
the way, are here too.
"""

import errno
import json
import logging
import os
import pickle
import re
import shutil
import socket
import time
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.tensor import DTensor

from theworld.config.config import FIELDS, Config
from theworld.config.fields import shown
from theworld.data.vsr import RELEASES
from theworld.models.fsdp import (
    State,
    load_state,
    read_shares,
    split_state,
    write_shares,
    written_shapes,
)
from theworld.models.serialization import (
    CONFIG_FILE,
    INDEX,
    INDEX_VERSION,
    SHARDS,
    WORLD_FILE,
    CheckpointError,
    SavedModel,
    find_model,
    fingerprint_of,
    list_checkpoints,
    model_files,
    number_of,
    numbered,
)
from theworld.models.theworld import TheWorld
from theworld.training.logging import ASIDE, METRICS, set_aside
from theworld.utils.commands import flags
from theworld.utils.device import resolve_dtype
from theworld.utils.errors import reason_of
from theworld.utils.files import STALE_SECONDS, sync_folder

logger = logging.getLogger(__name__)

STATE, PROGRESS = "trainer.pt", "trainer.json"
DAMAGED = "damaged-"  # before the name of a checkpoint that was set aside
SETTLED = 60.0  # seconds: the age of the last write of a process that is gone
_TEMPORARY = re.compile(r"\.checkpoint-\d+\.(?:(.+)\.)?(\d+)\.tmp")
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
    optimizer: State,
    progress: dict[str, Any],
    is_main: bool = True,
) -> Path:
    """Publish `output_dir/checkpoint-<step>` by rename, and return it.

    `optimizer` is the optimizer's state_dict(), `progress` is JSON. In a sharded run all processes call this: each
    writes its shares of the optimizer state, and the main one everything else. Raises CheckpointError if there is a
    checkpoint of that name, since nothing published is overwritten; OSError with the bytes needed and free if the
    checkpoint cannot be written, and then nothing of it stays.
    """
    target = output_dir / f"checkpoint-{step}"
    if is_main and target.exists():
        raise CheckpointError(f"{target} is there already; resume from it, or choose another --output_dir")
    state, shares = split_state(optimizer)
    weights = model.weights()
    temporary = _temporary(target)
    try:
        if is_main:
            shutil.rmtree(temporary, ignore_errors=True)  # our own, of a save that failed
            model.save_pretrained(temporary, weights)
            torch.save({"optimizer": state}, temporary / STATE)
            (temporary / PROGRESS).write_text(json.dumps(progress, indent=2) + "\n")
        if shares:
            _write_shares(shares, temporary)
        if is_main:
            _publish(temporary, target, step)
    except (OSError, SafetensorError, RuntimeError) as error:
        # torch.save turns an OSError into a RuntimeError.
        raise _not_written(error, target, _num_bytes([weights, optimizer])) from error
    finally:
        if is_main:
            shutil.rmtree(temporary, ignore_errors=True)  # gone after the rename
    return target


def _write_shares(shares: dict[str, Any], temporary: Path) -> None:
    """Write the shares of all processes into the folder of the main process."""
    folder = [temporary / SHARDS]
    torch.distributed.broadcast_object_list(folder)
    write_shares(shares, folder[0])
    if torch.distributed.get_rank() > 0:
        return
    try:
        written = written_shapes(folder[0])
    except ValueError as error:
        raise OSError(
            errno.EIO, f"{error}; --output_dir has to be a folder that all machines share"
        ) from None
    assert written == {name: tuple(value.shape) for name, value in shares.items()}


def _publish(temporary: Path, target: Path, step: int) -> None:
    """Write the index of a complete temporary folder, make all of it durable, and rename it."""
    paths = sorted(path for path in temporary.rglob("*") if path.is_file())
    files = {path.relative_to(temporary).as_posix(): fingerprint_of(path) for path in paths}
    index = {"format": INDEX_VERSION, "step": step, "files": files}
    (temporary / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    for path in (*temporary.rglob("*"), temporary):
        _fsync(path)
    os.rename(temporary, target)
    sync_folder(target.parent)


def rotate(output_dir: Path, limit: int | None) -> list[Path]:
    """Delete the oldest checkpoints beyond `limit`, after the newest one is complete, and return them. A stop in
    between leaves a temporary folder, never half of a checkpoint."""
    old = list_checkpoints(output_dir)[:-limit] if limit else []
    for path in old:
        os.rename(path, _temporary(path))
        shutil.rmtree(_temporary(path))
    return old


def _temporary(target: Path) -> Path:
    """Return a temporary name that tells which process of which machine writes there."""
    return target.with_name(f".{target.name}.{socket.gethostname()}.{os.getpid()}.tmp")


def _not_written(error: Exception, target: Path, needed: int) -> OSError:
    free = shutil.disk_usage(target.parent).free
    code = getattr(error, "errno", None) or (errno.ENOSPC if free < needed else errno.EIO)
    older = list_checkpoints(target.parent)
    last = f"{older[-1].name} is as it was" if older else "there is none before it"
    reason = reason_of(error).partition(";")[0]
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


# ---- reading


@dataclass
class ResumePoint:
    """A valid checkpoint that a run goes on from, and newer ones that are damaged, with what is wrong with them."""

    saved: SavedModel
    progress: dict[str, Any]  # the content of trainer.json
    optimizer: State | None  # mapped from trainer.pt; None once `load_optimizer` has loaded it
    skipped: dict[Path, str] = field(default_factory=dict)

    @property
    def path(self) -> Path:
        """The folder of the checkpoint."""
        return self.saved.folder

    @property
    def shards(self) -> Path | None:
        """The folder with shares of the optimizer state; None if all of it is in trainer.pt."""
        names = [] if self.saved.index is None else self.saved.index["files"]
        return self.path / SHARDS if any(name.startswith(f"{SHARDS}/") for name in names) else None


def latest_valid_checkpoint(path: str | Path) -> ResumePoint:
    """Return the checkpoint `path`, which has to be valid, or the newest valid one in the folder `path`.

    Raises CheckpointError if there is none.
    """
    path, skipped = Path(path), dict[Path, str]()
    if (path / INDEX).is_file() or not numbered(path):
        return read_checkpoint(find_model(path))
    for one in reversed(numbered(path)):
        try:
            return read_checkpoint(one, skipped)
        except CheckpointError as error:
            skipped[one] = str(error)
    reasons = "".join(f"\n  {reason}" for reason in skipped.values())
    raise CheckpointError(f"{path}: no valid checkpoint in it:{reasons}")


def read_checkpoint(path: Path, skipped: dict[Path, str] | None = None) -> ResumePoint:
    """Return a checkpoint, each file of which was compared with its recorded SHA-256. Raises CheckpointError."""
    if not (path / INDEX).is_file():
        raise CheckpointError(f"{path}: {INDEX} is missing; use another checkpoint")
    saved = SavedModel.read(path)
    assert saved.index is not None
    progress_data = saved.read_file(PROGRESS)
    names = {*saved.index["files"], *model_files(saved.world), STATE}
    saved.verify(sorted(names - {WORLD_FILE, CONFIG_FILE, PROGRESS}))
    try:
        # Mapped and not read: each process of a run maps the same pages.
        optimizer = torch.load(path / STATE, map_location="cpu", weights_only=True, mmap=True)["optimizer"]
        progress = json.loads(progress_data)
        optimizer["state"], optimizer["param_groups"], progress["window"]
    except _UNREADABLE as error:
        reason = str(error).partition("\n")[0]
        raise CheckpointError(
            f"{path}: {STATE} or {PROGRESS} cannot be read: {reason}; use another checkpoint"
        ) from None
    if progress["step"] != saved.step:
        raise CheckpointError(
            f"{path}: {INDEX} says step {saved.step}, {PROGRESS} {progress['step']}; use another checkpoint"
        )
    return ResumePoint(saved, progress, optimizer, {} if skipped is None else skipped)


def load_optimizer(optimizer: torch.optim.Optimizer, point: ResumePoint) -> None:
    """Load the saved state into the optimizer of a resumed run and drop it from `point`.

    Raises CheckpointError, before anything is changed, unless the state fits: torch itself compares no shapes.
    """
    state, point.optimizer = point.optimizer, None
    assert state is not None, "a resume point is applied once"
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    groups = [len(group["params"]) for group in optimizer.param_groups]
    theirs = [len(group["params"]) for group in state["param_groups"]]
    if groups != theirs:
        raise CheckpointError(
            f"{point.path / STATE}: parameters in groups of {theirs}; this run has {groups}"
        )
    whole = {number: dict(own) for number, own in state["state"].items()}
    if point.shards is not None:
        try:
            shapes = written_shapes(point.shards)
        except ValueError as error:
            raise CheckpointError(f"{error}; use another checkpoint") from None
        for name, shape in shapes.items():
            number, _, moment = name.partition(".")
            whole.setdefault(int(number), {})[moment] = torch.empty(shape, device="meta")
        _check_moments(whole, parameters, point.path)
        like = {name: parameters[int(name.partition(".")[0])] for name in shapes}
        for name, value in read_shares(point.shards, like).items():
            number, _, moment = name.partition(".")
            whole[int(number)][moment] = value
    _check_moments(whole, parameters, point.path)
    load_state(optimizer, state | {"state": whole})


def _check_moments(
    state: dict[int, dict[str, Any]], parameters: list[torch.nn.Parameter], path: Path
) -> None:
    """Raise CheckpointError unless the moments of an optimizer have its parameters' shapes and are finite."""
    for number, own in state.items():
        if not 0 <= number < len(parameters):
            raise CheckpointError(f"{path / STATE}: there is no parameter {number} in this run")
        for name in ("exp_avg", "exp_avg_sq"):
            have = tuple(own[name].shape) if name in own else "missing"
            wanted = tuple(parameters[number].shape)
            if have != wanted:
                raise CheckpointError(
                    f"{path / STATE}: {name} of parameter {number} is {have}; wanted {wanted}"
                )
            value = own[name].to_local() if isinstance(own[name], DTensor) else own[name]
            if not value.is_meta and not value.isfinite().all():
                raise CheckpointError(f"{path / STATE}: {name} of parameter {number} is not finite")


def settings_to_resume(path: str | Path) -> Config:
    """Return the settings of a run that is resumed, with the folder where its checkpoint lies as `output_dir`.

    Weights are not verified yet. Raises CheckpointError if `path` is neither a checkpoint nor a folder with one.
    """
    path = Path(path)
    for one in reversed([] if (path / INDEX).is_file() else list_checkpoints(path)):
        try:
            return _settings_of(SavedModel.read(one))
        except CheckpointError as error:
            logger.debug("skipped, as it is for the run itself: %s", error)
    return _settings_of(SavedModel.read(find_model(path)))


def _settings_of(saved: SavedModel) -> Config:
    return replace(saved.config(), output_dir=str(saved.run))


Changed = dict[str, list[Any]]  # a setting or fact about a run -> [what it was, what it is now]


def compare_settings(point: ResumePoint, config: Config, device: torch.device) -> tuple[Changed, Changed]:
    """Return the settings that `config` changes: those that change what is learnt, and the others.

    `device` is the one of this start. What only has another name is no change.
    """
    before, recorded = point.saved.config(), point.progress.get("dtype")  # older checkpoints do not record it
    before = before if recorded is None else replace(before, dtype=recorded)
    learnt, others = Changed(), Changed()
    for key, declared in FIELDS.items():
        values = [getattr(before, key), getattr(config, key)]
        unused = key.startswith("rollout_") and not (before.num_world_steps or config.num_world_steps)
        if len({_meant(key, value, device) for value in values}) == 2 and not unused and key != "resume_from":
            (learnt if declared.defines_run else others)[key] = values
    return learnt, others


def _meant(key: str, value: Any, device: torch.device) -> Any:
    """Return what the value of a setting stands for: the same dtype, release of VSR, Gemma or folder has several
    names."""
    if key == "dtype":
        return resolve_dtype(value, device)
    if key == "dataset_name":
        return RELEASES[value]
    if key == "model_name":  # on the hub or in a folder; its revision is compared as well
        return Path(value).name
    return Path(value).resolve() if key in ("init_from", "output_dir") and value is not None else value


def in_words(changed: Changed) -> str:
    """Return changes in one line: "seed 0, now 1; dtype ..."."""
    return "; ".join(f"{key} {shown(before)}, now {shown(now)}" for key, (before, now) in changed.items())


def check_same_settings(point: ResumePoint, learnt: Changed, allow_changed: bool) -> None:
    """Raise CheckpointError for changed settings of a run (see `compare_settings`) unless they are allowed."""
    if learnt and not allow_changed:
        raise CheckpointError(
            f"{point.path} was trained with {in_words(learnt)}; a run that is resumed keeps what changes its training: "
            f"leave {' and '.join(learnt)} as before, or take the new values on purpose with --allow_changed"
        )


def check_same_run(
    point: ResumePoint, run: dict[str, Any], revision: str | None, allow_changed: bool
) -> Changed:
    """Compare `run`, the facts about it in the trainer.json of each checkpoint, and Gemma's revision with `point`'s.

    Returns the changed facts, which `allow_changed` takes. Raises CheckpointError for the first one if they are not
    allowed, and for another part of Gemma that trains: its weights and optimizer state do not fit.
    """
    path, record = point.path, point.progress
    saved, now = record["trained"], run["trained"]
    if saved != now:
        raise CheckpointError(
            f"{path} trained {saved or 'nothing'} of Gemma, now {now or 'nothing'} would train; start a new stage with "
            "--init_from in place of --resume_from"
        )
    record = record | {"model_revision": point.saved.world.get("model_revision")}
    run, changed = run | {"model_revision": revision}, Changed()
    for key, hint in FACTS.items():
        saved, now = record.get(key), run[key]
        if saved is None or now is None or saved == now:  # older checkpoints lack some of them
            continue
        if not allow_changed:
            raise CheckpointError(f"{path} {hint.format(saved=saved, now=now)}, or give --allow_changed")
        changed[key] = [saved, now]
    return changed


# The facts that are compared besides the settings, and the message of each. A Gemma in a folder has no revision.
FACTS = {
    "num_statements": "was trained on {saved} statements, now there are {now}; use the same --annotations and cache",
    "data_sha256": "was trained on other statements or captions: their SHA-256 is {saved}, now {now}; use the same "
    "files of --annotations and --captions",
    "statements_per_step": "was trained with {saved} statements a step, now there are {now}: batch_size x "
    "gradient_accumulation_steps x processes has to stay the same",
    "model_revision": "was trained with Gemma's revision {saved}, now it is {now}; use the same one",
}


# ---- what earlier starts left


def refuse_to_overwrite(output_dir: Path, point: ResumePoint | None) -> None:
    """Raise CheckpointError if a run would write checkpoints that are there when it starts. Damaged ones that were
    skipped are set aside before."""
    done = -1 if point is None else point.progress["step"]
    skipped = point.skipped if point is not None else {}
    ahead = [p for p in numbered(output_dir) if number_of(p) > done and p not in skipped]
    if ahead:
        hint = "use another --output_dir, or move them away"
        if point is None:
            hint = f"go on with {flags('--resume_from', output_dir)}, " + hint
        raise CheckpointError(f"{output_dir} already holds {', '.join(p.name for p in ahead)}; {hint}")


def clean_up(output_dir: Path, skipped: Iterable[Path] = ()) -> None:
    """Rename damaged checkpoints that are in the way, delete what killed saves left, and log each.

    A temporary folder is deleted if the process in its name ran on this machine, is gone, and wrote nothing for a
    minute; or if nobody wrote to it for a day.
    """
    for path in skipped:
        if path.parent.resolve() == output_dir.resolve():
            aside, number = path.with_name(DAMAGED + path.name), 2
            while aside.exists():
                aside, number = path.with_name(f"{DAMAGED}{path.name}-{number}"), number + 1
            os.rename(path, aside)
            logger.warning("%s is now %s", path.name, aside)
    for path in sorted(output_dir.glob(".checkpoint-*.tmp")):
        match = _TEMPORARY.fullmatch(path.name)
        if match is None:
            continue
        age = time.time() - max(p.stat().st_mtime for p in (path, *path.rglob("*")))
        gone = match[1] == socket.gethostname() and not _lives(int(match[2])) and age > SETTLED
        if gone or age > STALE_SECONDS:
            shutil.rmtree(path)
            logger.info("deleted %s, which a killed save left", path)
        else:
            logger.warning("%s was left by a save that did not end, %.0f s ago; it is not used", path, age)


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def clean_up_run(output_dir: Path, point: ResumePoint | None, last: int, pending_dev_eval: bool) -> None:
    """Move what earlier starts left out of the way of a run that goes on after step `last`, and log each thing.

    With `pending_dev_eval` the evaluation of that step is made again.
    """
    clean_up(output_dir, point.skipped if point is not None else ())

    def keep(line: dict[str, Any]) -> bool:
        return line["step"] < last or (line["step"] == last and not (pending_dev_eval and "dev_loss" in line))

    moved = set_aside(output_dir, keep)
    if moved:
        logger.warning("%d lines of %s about steps that are taken again are now in %s", moved, METRICS, ASIDE)
