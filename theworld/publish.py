"""A run on the model hub: what is uploaded, its model card, and uploads that training neither waits for nor dies of.

One commit holds one checkpoint as it was published by rename, read whole and checked against its hashes:

projection.safetensors ... world.json  config.json  README.md    the model (see `theworld.saved`) and its card
last-checkpoint/...                                              with hub_strategy "checkpoint": all that a resume takes

No setting that names a place on this machine is uploaded, and no token is written or shown anywhere.
"""

import hashlib
import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import CommitOperationAdd, HfApi, get_token
from huggingface_hub.utils import (
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
)
from tqdm import tqdm

from theworld.card import Facts, model_card, public_settings, read_metrics, read_results
from theworld.checkpoint import INDEX, CheckpointError
from theworld.config import Config, load_config
from theworld.console import progress
from theworld.saved import CONFIG_FILE, WORLD_FILE, model_files

T = TypeVar("T")

CARD, LAST, LOG, REPEAT = "README.md", "last-checkpoint", "hub.jsonl", "hub_upload"
PATIENCE = 1800  # seconds for the last upload: the hub's client itself waits for an answer for ever
CONNECT_SECONDS = 120  # for all that is asked before the start, for the same reason
LATE = "there was no answer in time"


# ---- what is uploaded


def snapshot(checkpoint: Path, card: str, resumable: bool) -> dict[str, bytes]:
    """The files of one upload, by their names on the hub. CheckpointError unless every byte is as it was saved."""
    index = json.loads((checkpoint / INDEX).read_text())
    saved = {name: _checked(checkpoint / name, wanted["sha256"]) for name, wanted in index["files"].items()}
    config = load_config(checkpoint / CONFIG_FILE)
    saved[CONFIG_FILE] = (json.dumps(public_settings(config), indent=2, ensure_ascii=False) + "\n").encode()
    files = {name: saved[name] for name in model_files(json.loads(saved[WORLD_FILE]))}
    files[CARD] = card.encode()
    if resumable:
        index["files"][CONFIG_FILE] = {
            "bytes": len(saved[CONFIG_FILE]),
            "sha256": hashlib.sha256(saved[CONFIG_FILE]).hexdigest(),
        }
        saved[INDEX] = (json.dumps(index, indent=2) + "\n").encode()
        files |= {f"{LAST}/{name}": data for name, data in saved.items()}
    return files


def _checked(path: Path, sha256: str) -> bytes:
    data = path.read_bytes()
    if hashlib.sha256(data).hexdigest() != sha256:
        raise CheckpointError(f"{path} is damaged, so it is not uploaded")
    return data


# ---- uploading


def connect(config: Config) -> HfApi:
    """The hub, once it is sure that this run may write to hub_model_id, which is made if there is none.

    Raises ValueError that names what is wrong and the cure, and never the token.
    """
    name = str(config.hub_model_id)
    if get_token() is None:
        raise ValueError(
            f"push_to_hub to {name}: there is no token; export HF_TOKEN=..., or log in with `hf auth login`"
        )
    api = HfApi()

    def ask() -> bool:
        api.create_repo(name, private=config.hub_private_repo, exist_ok=True)
        private = bool(api.model_info(name).private)
        # Writes nothing: the hub answers how it would take the file, to those who may write.
        api.preupload_lfs_files(name, [CommitOperationAdd(CARD, b"# TheWorld\n")])
        return private

    try:
        private = _within(CONNECT_SECONDS, ask)
    except Exception as error:  # noqa: BLE001 - of the hub's client and of the HTTP library beneath it
        raise ValueError(
            f"push_to_hub: {name} cannot be written to: {_in_words(error)}. Check hub_model_id, and that the token "
            "may write there; or train without push_to_hub and upload afterwards"
        ) from None
    if config.hub_private_repo and not private:
        raise ValueError(
            f"hub_private_repo is true, but {name} is there already and public; make it private on its page, or "
            "choose another hub_model_id"
        )
    return api


class Publisher:
    """Uploads checkpoints of one run in a thread of its own, one at a time; a newer one takes the place of one that
    waits. A failure is printed, written to hub.jsonl, and tried again with the next checkpoint."""

    def __init__(self, config: Config, output_dir: Path) -> None:
        """Raises ValueError as `connect` does."""
        self.config = config
        self.output_dir = output_dir
        self.api = connect(config)
        self.lock = threading.Lock()
        self.thread: threading.Thread | None = None
        self.waiting: tuple[str, dict[str, bytes]] | None = None
        self.offered: Path | None = None  # the last checkpoint handed in
        self.unread: str | None = None  # why the last checkpoint handed in could not be read
        self.files: dict[str, bytes] = {}  # of that checkpoint, if it could be read
        self.failed: str | None = None  # why the newest upload failed

    def saved(self, checkpoint: Path, facts: Facts) -> None:
        """To be called for each checkpoint, before older ones are deleted: reads it and returns at once."""
        if self.config.hub_strategy != "end":
            self._offer(checkpoint, facts)

    def finish(self, checkpoint: Path, facts: Facts) -> bool:
        """Waits until the run's last checkpoint is up; prints whether it is, and if not how to repeat it."""
        if self.offered != checkpoint:
            self._offer(checkpoint, facts)
        arrived = self._wait(PATIENCE)
        folder = self.output_dir / REPEAT
        shutil.rmtree(folder, ignore_errors=True)  # of an upload that failed before
        if arrived and self.failed is None and self.unread is None:
            tqdm.write(f"hub: {checkpoint.name} is at {self.api.endpoint}/{self.config.hub_model_id}")
            return True
        reason = self.unread or (self.failed if arrived and self.failed else LATE)
        tqdm.write(
            f"hub: {checkpoint.name} is NOT on the hub: {reason}. Training itself is complete, in {checkpoint}. "
            f"{_keep(self.files, folder, str(self.config.hub_model_id))}"
        )
        return False

    def _wait(self, seconds: int) -> bool:
        """Until no upload is under way or waiting; False if that takes longer."""
        thread, end = self.thread, time.monotonic() + seconds
        if thread is None:
            return True
        with progress(desc=f"upload to {self.config.hub_model_id}", unit=" s", leave=False) as bar:
            while thread.is_alive() and time.monotonic() < end:
                thread.join(1.0)
                bar.update()
        return not thread.is_alive()

    def _offer(self, checkpoint: Path, facts: Facts) -> None:
        self.offered = checkpoint
        resumable = self.config.hub_strategy == "checkpoint"
        try:
            card = model_card(checkpoint, facts, read_metrics(self.output_dir), read_results(checkpoint))
            files = snapshot(checkpoint, card, resumable)
        except (OSError, ValueError) as error:
            self.unread, self.files = _in_words(error), {}
            return self._record(checkpoint.name, "failed", error=self.unread)
        self.unread, self.files = None, files
        with self.lock:
            if self.waiting is not None:
                self._record(self.waiting[0], "replaced by a newer one")
            self.waiting = checkpoint.name, files
            if self.thread is None:
                # A daemon, so that a user who stops the run does not wait for the network.
                self.thread = threading.Thread(target=self._work, daemon=True)
                self.thread.start()

    def _work(self) -> None:
        while True:
            with self.lock:
                chosen, self.waiting = self.waiting, None
                if chosen is None:
                    self.thread = None
                    return
            self._upload(*chosen)

    def _upload(self, name: str, files: dict[str, bytes]) -> None:
        start = time.perf_counter()
        operations = [CommitOperationAdd(name, data) for name, data in files.items()]
        try:
            with _without_bars():
                commit = self.api.create_commit(
                    str(self.config.hub_model_id), operations, commit_message=name
                )
        except Exception as error:  # noqa: BLE001 - nothing that an upload does may end a training
            self.failed = _in_words(error)
            return self._record(name, "failed", error=self.failed)
        self.failed = None
        size, seconds = sum(map(len, files.values())), time.perf_counter() - start
        self._record(
            name, "uploaded", commit=commit.oid, files=len(files), bytes=size, seconds=round(seconds, 3)
        )

    def _record(self, name: str, status: str, **details: Any) -> None:
        """One line of hub.jsonl, and one on the terminal for a failure."""
        if status == "failed":
            tqdm.write(f"hub: the upload of {name} failed: {details['error']}")
        try:
            with open(self.output_dir / LOG, "a", encoding="utf-8") as file:
                file.write(json.dumps({"checkpoint": name, "status": status, **details}) + "\n")
        except OSError as error:
            tqdm.write(f"hub: {self.output_dir / LOG} cannot be written: {error}")


def _within(seconds: float, work: Callable[[], T]) -> T:
    """What `work` returns, or raises; TimeoutError if it is not done in time, when it goes on in a thread that ends
    with the program."""
    done: list[Callable[[], T]] = []

    def attempt() -> None:
        try:
            result = work()
        except Exception as error:  # noqa: BLE001 - raised again where it is waited for
            done.append(partial(_raise, error))
        else:
            done.append(lambda: result)

    thread = threading.Thread(target=attempt, daemon=True)
    thread.start()
    thread.join(seconds)
    if not done:
        raise TimeoutError(f"{LATE} ({seconds:g} s)")
    return done[0]()


def _raise(error: Exception) -> Any:
    raise error


@contextmanager
def _without_bars() -> Iterator[None]:
    """The hub's own progress bars, which would draw over that of training, are off meanwhile."""
    shown = not are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            enable_progress_bars()


def _in_words(error: Exception) -> str:
    """An error as one line of at most 300 characters, without the token should an answer repeat it."""
    text = " ".join(str(error).split()).rstrip(".") or type(error).__name__
    text = text.replace(get_token() or "\0", "***")
    return text if len(text) <= 300 else text[:297] + "..."


def _keep(files: dict[str, bytes], folder: Path, name: str) -> str:
    """Writes what was to be uploaded, without what it takes to resume, and gives the command that does it."""
    if not files:
        return "Repeat the upload by resuming this run"
    try:
        for path, data in files.items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_bytes(data)
    except OSError as error:
        return f"Repeat the upload by resuming this run ({folder} cannot be written: {error})"
    return f"Repeat the upload with: hf upload {name} {folder} ."
