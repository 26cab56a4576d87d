"""Uploads of a run's checkpoints to the model hub, in the background of training.

One commit holds one checkpoint as it was published by rename, checked against its hashes:

projection.safetensors ... world.json  config.json  README.md    the model and its card
last-checkpoint/...                                              with hub_strategy "checkpoint": all that a resume needs

The files of an upload are links to those of the checkpoint, so that nothing is copied or read in the training thread;
hard links, where the file system has them, so that the checkpoint itself may be deleted meanwhile. No local path in the
settings is uploaded, and no token is written or shown anywhere.
"""

import json
import logging
import os
import shlex
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import Future, wait
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi, get_token

from theworld.config.config import Config
from theworld.hub.card import Facts, model_card, public_settings, read_metrics, read_results
from theworld.models.serialization import (
    CONFIG_FILE,
    INDEX,
    CheckpointError,
    SavedModel,
    fingerprint_of,
    model_files,
)
from theworld.utils.console import progress
from theworld.utils.hub import check_token

logger = logging.getLogger(__name__)

CARD, LAST_CHECKPOINT, LOG = "README.md", "last-checkpoint", "hub.jsonl"
STAGING_PREFIX = ".hub_upload-"  # folders of uploads under way, in the run's folder
FAILED_UPLOAD = "hub_upload"  # the folder that the user can upload by hand
UPLOAD_SECONDS = 1800  # limit for the last upload: the hub's client itself waits without limit
CONNECT_SECONDS = 120  # limit for all requests before the start, for the same reason
NO_ANSWER = "there was no answer in time"
RESUME_HINT = "Repeat the upload by resuming this run"


# ---- the files of an upload


def stage(saved: SavedModel, card: str, resumable: bool, folder: Path) -> dict[Path, dict[str, Any]]:
    """Fill a new folder with the files of one upload: hard links to the checkpoint's, public settings and the card.

    `saved` is as `SavedModel.read` returns it: only its JSON files were read. Returns size and SHA-256 that the linked
    files must have, for `check_staged`. Raises CheckpointError for an incomplete checkpoint, OSError if a file is
    missing.
    """
    assert saved.index is not None
    checkpoint, index = saved.folder, saved.index
    model = model_files(saved.world)
    missing = [name for name in model if name not in index["files"]]
    if missing:
        raise CheckpointError(f"{checkpoint / INDEX} is damaged: it does not list {', '.join(missing)}")
    settings = public_settings(saved.config())
    base = folder / LAST_CHECKPOINT if resumable else folder
    base.mkdir(parents=True)
    names = [name for name in (index["files"] if resumable else model) if name != CONFIG_FILE]
    for name in names:
        _link(checkpoint / name, base / name)
    _write_json(base / CONFIG_FILE, settings, ensure_ascii=False)
    if resumable:
        files = index["files"] | {CONFIG_FILE: fingerprint_of(base / CONFIG_FILE)}
        _write_json(base / INDEX, index | {"files": files})
        for name in model:
            _link(base / name, folder / name)
    (folder / CARD).write_text(card, encoding="utf-8")
    return {base / name: index["files"][name] for name in names}


def check_staged(fingerprints: dict[Path, dict[str, Any]]) -> None:
    """Raise CheckpointError unless every file has the bytes that were saved. Reads all of them, in small pieces."""
    for path, expected in fingerprints.items():
        if fingerprint_of(path) != expected:
            raise CheckpointError(f"{path.name} is damaged, so the checkpoint is not uploaded")


def _link(source: Path, target: Path) -> None:
    """Make a hard link or, on a file system without, a symbolic one: a copy would hold up the training step.

    The upload through a symbolic link fails if the checkpoint is deleted meanwhile, and the next one makes it good.
    """
    target.parent.mkdir(exist_ok=True)  # of the shares of a sharded run
    try:
        os.link(source, target)
    except FileNotFoundError:
        raise
    except OSError:
        target.symlink_to(source.absolute())


def _write_json(path: Path, values: dict[str, Any], ensure_ascii: bool = True) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=ensure_ascii) + "\n", encoding="utf-8")


# ---- the hub


class BackgroundApi(HfApi):
    """HfApi whose background calls, one at a time and in order, never delay the end of the program.

    HfApi's own thread pool is joined when the interpreter exits: a hub that does not answer would hold up a run that
    was asked to stop.
    """

    def __init__(self) -> None:
        super().__init__()
        self._calls: SimpleQueue[tuple[Future[Any], partial[Any]]] = SimpleQueue()
        Thread(target=self._run_calls, name="hub", daemon=True).start()

    def run_as_future(self, fn: Any, *args: Any, **kwargs: Any) -> Future[Any]:
        """Return the future of a call that is made after all earlier ones."""
        future: Future[Any] = Future()
        self._calls.put((future, partial(fn, *args, **kwargs)))
        return future

    def _run_calls(self) -> None:
        while True:
            future, call = self._calls.get()
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(call())
            except Exception as error:  # noqa: BLE001 - raised by future.result()
                future.set_exception(error)


def check_hub(config: Config) -> None:
    """Raise ValueError if the settings ask for uploads and this machine has no token. Makes no request."""
    if not config.push_to_hub:
        return
    check_token()
    if get_token() is None:
        raise ValueError(
            f"push_to_hub to {config.hub_model_id}: there is no token; export HF_TOKEN=..., or log in with "
            "`hf auth login`"
        )


def plan_uploads(config: Config) -> Iterator[str]:
    """Yield a line on what would be uploaded. Raises as `connect`, which asks the same of the hub."""
    if config.push_to_hub:
        connect(config, create=False)
        yield f"uploads: checkpoints to {config.hub_model_id}, as hub_strategy {config.hub_strategy} says"


def connect(config: Config, create: bool = True) -> BackgroundApi:
    """Return the hub's client after checking that this run may write to hub_model_id, which is created if needed.

    With `create` false nothing is created: for a model that is not there, it is checked that the token's account may
    make one. Raises ValueError with what is wrong and a hint, never with the token.
    """
    check_hub(config)
    name = str(config.hub_model_id)
    api = BackgroundApi()

    def ask() -> bool:
        if create:
            api.create_repo(name, private=config.hub_private_repo, exist_ok=True)
        elif not api.repo_exists(name):
            _check_owner(api, name)
            return bool(config.hub_private_repo)
        private = bool(api.model_info(name).private)
        # Writes nothing: the hub answers how it would store the file, to those who may write.
        api.preupload_lfs_files(name, [CommitOperationAdd(CARD, b"# TheWorld\n")])
        return private

    future = api.run_as_future(ask)
    wait([future], CONNECT_SECONDS)
    try:
        if not future.done():
            raise TimeoutError(f"{NO_ANSWER} ({CONNECT_SECONDS:g} s)")
        private = future.result()
    except Exception as error:  # noqa: BLE001 - from the hub's client and the HTTP library below it
        raise ValueError(
            f"push_to_hub: {name} cannot be written to: {_one_line(error)}. Check hub_model_id, and that the token "
            "may write there; or train without push_to_hub and upload afterwards"
        ) from None
    if config.hub_private_repo and not private:
        raise ValueError(
            f"hub_private_repo is true, but {name} is there already and public; make it private on its page, or "
            "choose another hub_model_id"
        )
    return api


def _check_owner(api: HfApi, name: str) -> None:
    """Raise ValueError unless the account of the token, or one of its organisations, is that of a model's name."""
    account = api.whoami()
    owners = [account["name"], *(organisation["name"] for organisation in account.get("orgs", ()))]
    if name.partition("/")[0] not in owners:
        raise ValueError(f"the token is of the account {owners[0]}, which cannot make it")


# ---- uploads of a run


class Publisher:
    """Uploads checkpoints of one run in the background, one at a time.

    A newer checkpoint replaces one that still waits. A failure is logged, written to hub.jsonl, and made good by the
    upload of the next checkpoint; it never ends a run.
    """

    def __init__(self, config: Config, output_dir: Path) -> None:
        """Raises ValueError as `connect` does. Deletes what killed uploads of this run left behind."""
        self.config = config
        self.output_dir = output_dir
        self.api = connect(config)
        self.newest: Path | None = None  # the last checkpoint given to `saved` or `finish`
        self.not_staged: str | None = None  # why that checkpoint could not be staged
        self.staged: Path | None = None  # the checkpoint of `upload`
        self.upload: Future[str | None] | None = None  # the last upload: why it failed, or None
        self.given_up = False
        for folder in output_dir.glob(f"{STAGING_PREFIX}*"):
            shutil.rmtree(folder, ignore_errors=True)

    def saved(self, checkpoint: Path, facts: Facts) -> None:
        """Start the upload of a checkpoint, before older ones are deleted, and return at once."""
        if self.config.hub_strategy != "end":
            self._start(checkpoint, facts)

    def finish(self, checkpoint: Path, facts: Facts) -> bool:
        """Wait until the run's last checkpoint is uploaded and return whether it is; log that, or how to repeat it."""
        if self.newest != checkpoint:
            self._start(checkpoint, facts)
        in_time = self._wait(UPLOAD_SECONDS)
        shutil.rmtree(self.output_dir / FAILED_UPLOAD, ignore_errors=True)  # of an earlier failure
        reason = self.not_staged or NO_ANSWER
        if self.not_staged is None and in_time and self.upload is not None:
            failed = self.upload.result()
            if failed is None:
                logger.info(
                    "hub: %s is at %s/%s", checkpoint.name, self.api.endpoint, self.config.hub_model_id
                )
                return True
            reason = failed
        if not in_time:
            self._give_up()
        logger.warning(
            "hub: %s is NOT on the hub: %s. Training itself is complete, in %s. %s",
            *(checkpoint.name, reason, checkpoint, self._keep(checkpoint, facts)),
        )
        return False

    def _start(self, checkpoint: Path, facts: Facts) -> None:
        """Stage a checkpoint and queue its upload in place of one that still waits."""
        self.newest, self.not_staged = checkpoint, None
        folder = self._staging(checkpoint)
        try:
            fingerprints = self._stage(checkpoint, facts, folder)
        except (OSError, ValueError) as error:
            shutil.rmtree(folder, ignore_errors=True)
            self.not_staged = _one_line(error)
            return self._record(checkpoint.name, "failed", error=self.not_staged)
        if self._cancel():
            self._record(str(self.staged and self.staged.name), "replaced by a newer one")
        self.staged = checkpoint
        self.upload = self.api.run_as_future(self._upload, checkpoint.name, folder, fingerprints)

    def _staging(self, checkpoint: Path) -> Path:
        return self.output_dir / f"{STAGING_PREFIX}{checkpoint.name}"

    def _stage(self, checkpoint: Path, facts: Facts, folder: Path) -> dict[Path, dict[str, Any]]:
        saved = SavedModel.read(checkpoint)
        card = model_card(saved, facts, read_metrics(self.output_dir), read_results(checkpoint))
        return stage(saved, card, self.config.hub_strategy == "checkpoint", folder)

    def _cancel(self) -> bool:
        """Cancel the last upload if it has not begun, and return whether that was so."""
        if self.upload is None or self.staged is None or not self.upload.cancel():
            return False
        shutil.rmtree(self._staging(self.staged), ignore_errors=True)
        return True

    def _wait(self, seconds: float) -> bool:
        """Wait until the last upload has ended; return False if that takes longer than `seconds`."""
        if self.upload is None:
            return True
        end = time.monotonic() + seconds
        with progress(desc=f"upload to {self.config.hub_model_id}", unit=" s", leave=False) as bar:
            while not self.upload.done() and time.monotonic() < end:
                wait([self.upload], 1.0)
                bar.update()
        return self.upload.done()

    def _give_up(self) -> None:
        """Leave no staged files behind, whose upload ends with the program."""
        self.given_up = True
        self._cancel()
        for folder in self.output_dir.glob(f"{STAGING_PREFIX}*"):
            shutil.rmtree(folder, ignore_errors=True)

    def _upload(self, name: str, folder: Path, fingerprints: dict[Path, dict[str, Any]]) -> str | None:
        """Upload a staged folder in one commit and delete the folder. Returns why that failed, or None."""
        start = time.perf_counter()
        try:
            check_staged(fingerprints)
            paths = sorted(path for path in folder.rglob("*") if path.is_file())
            size = sum(path.stat().st_size for path in paths)
            # Not upload_folder, which may divide a folder into several commits.
            operations = [CommitOperationAdd(path.relative_to(folder).as_posix(), path) for path in paths]
            commit = self.api.create_commit(str(self.config.hub_model_id), operations, commit_message=name)
        except Exception as error:  # noqa: BLE001 - an upload never ends a training run
            reason = _one_line(error)
            if not self.given_up:
                self._record(name, "failed", error=reason)
            return reason
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        seconds = round(time.perf_counter() - start, 3)
        self._record(name, "uploaded", commit=commit.oid, files=len(paths), bytes=size, seconds=seconds)
        return None

    def _record(self, name: str, status: str, **details: Any) -> None:
        """Append a line to hub.jsonl, and log a failure."""
        if status == "failed":
            logger.warning("hub: the upload of %s failed: %s", name, details["error"])
        try:
            with open(self.output_dir / LOG, "a", encoding="utf-8") as file:
                file.write(json.dumps({"checkpoint": name, "status": status, **details}) + "\n")
        except OSError as error:
            logger.warning("hub: %s cannot be written: %s", self.output_dir / LOG, error)

    def _keep(self, checkpoint: Path, facts: Facts) -> str:
        """Stage a checkpoint for an upload by hand, and return the command for that."""
        folder = self.output_dir / FAILED_UPLOAD
        try:
            check_staged(self._stage(checkpoint, facts, folder))
        except OSError as error:
            shutil.rmtree(folder, ignore_errors=True)
            return f"{RESUME_HINT} ({folder} cannot be written: {error})"
        except ValueError:  # why is in the message already
            shutil.rmtree(folder, ignore_errors=True)
            return RESUME_HINT
        words = ["hf", "upload", str(self.config.hub_model_id), str(folder), "."]
        return f"Repeat the upload with: {shlex.join(words)}"


def _one_line(error: Exception) -> str:
    """Return an error as one line of at most 300 characters, without the token should an answer repeat it."""
    text = " ".join(str(error).split()).rstrip(".") or type(error).__name__
    text = text.replace(get_token() or "\0", "***")
    return text if len(text) <= 300 else text[:297] + "..."
