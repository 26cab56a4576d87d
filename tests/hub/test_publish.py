"""Uploads of a run to a stand-in hub: what arrives, what a failing hub changes, and what never leaves this machine."""

import errno
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from constants import ROOT
from fake_hub import COMMIT, Uploads, serve
from small_checkpoint import FACTS, NAME, checkpoint_of

from theworld.config.config import Config, save_config
from theworld.data.vsr import Statement
from theworld.evaluation.metrics import summarise
from theworld.evaluation.records import records
from theworld.hub.card import read_results
from theworld.hub.publish import Publisher, check_hub, check_staged, connect, stage
from theworld.models.serialization import (
    CheckpointError,
    SavedModel,
    find_model,
    fingerprint_of,
    list_checkpoints,
)
from theworld.models.theworld import TheWorld
from theworld.training.memory import Plan
from theworld.training.trainer import Trainer

CANARY = "hf_canary0123456789canary"
MODEL_FILES = ["README.md", "config.json", "projection.safetensors", "world.json"]


@pytest.fixture
def pushing(config: Config) -> Config:
    """Settings of a tiny run that pushes, with a checkpoint at steps 2 and 4."""
    return replace(config, push_to_hub=True, hub_model_id=NAME)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Uploads]]:
    """Starts a hub that takes uploads, and makes it the one that this process knows."""
    monkeypatch.setenv("HF_TOKEN", CANARY)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    for name in [n for n in os.environ if "proxy" in n.lower()]:
        monkeypatch.delenv(name)
    with contextmanager(_hub)(monkeypatch) as start:
        yield start


def _hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Uploads]]:
    servers = []

    def start(**options: object) -> Uploads:
        uploads = Uploads(NAME, CANARY, **options)  # type: ignore[arg-type]
        server = serve({}, uploads)
        address, _ = server.__enter__()
        servers.append(server)
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
        return uploads

    yield start
    for server in servers:
        server.__exit__(None, None, None)


def log(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / "hub.jsonl").read_text().splitlines()]


def weights(checkpoint: Path) -> bytes:
    return (checkpoint / "projection.safetensors").read_bytes()


# ---- strategies: which commits, with which files


def test_end_uploads_the_final_model_alone(cache: Path, pushing: Config, hub: Callable[..., Uploads]) -> None:
    uploads = hub()
    last = Trainer(replace(pushing, hub_strategy="end"), cache).run()
    ((title, files),) = uploads.commits
    assert title == "checkpoint-4"
    assert sorted(files) == MODEL_FILES
    assert files["projection.safetensors"] == weights(last)
    assert files["world.json"] == (last / "world.json").read_bytes()


def test_every_save_ends_with_the_newest_model(
    cache: Path, pushing: Config, hub: Callable[..., Uploads]
) -> None:
    uploads = hub()
    last = Trainer(pushing, cache).run()
    assert all(sorted(files) == MODEL_FILES for _, files in uploads.commits)
    assert uploads.commits[-1][0] == "checkpoint-4"
    assert uploads.files()["projection.safetensors"] == weights(last)
    (first, *_, final) = log(last.parent)
    assert first["checkpoint"] == "checkpoint-2"
    assert (final["checkpoint"], final["status"], final["commit"]) == ("checkpoint-4", "uploaded", COMMIT)
    assert final["bytes"] == sum(map(len, uploads.commits[-1][1].values()))


def test_checkpoint_can_be_resumed_from_the_hub_to_the_same_weights(
    cache: Path, pushing: Config, config: Config, hub: Callable[..., Uploads], tmp_path: Path
) -> None:
    uploads = hub()
    Trainer(replace(pushing, hub_strategy="checkpoint", max_steps=2, lr_schedule="constant"), cache).run()
    files = uploads.files()
    extra = [f"last-checkpoint/{n}" for n in ("checkpoint.json", "trainer.json", "trainer.pt")]
    extra += [f"last-checkpoint/{n}" for n in MODEL_FILES if n != "README.md"]
    assert sorted(files) == sorted(MODEL_FILES + extra)
    for name, data in files.items():
        (tmp_path / "download" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "download" / name).write_bytes(data)
    whole = replace(config, lr_schedule="constant", output_dir=str(tmp_path / "whole"))
    last = tmp_path / "download" / "last-checkpoint"
    resumed = replace(whole, output_dir=str(tmp_path / "resumed"), resume_from=str(last))
    longer = Trainer(resumed, cache, allow_changed=True)  # max_steps is no longer 2
    assert weights(longer.run()) == weights(Trainer(whole, cache).run())


def test_a_resumed_run_that_is_at_its_end_uploads_its_last_checkpoint(
    cache: Path, pushing: Config, config: Config, hub: Callable[..., Uploads]
) -> None:
    last = Trainer(config, cache).run()
    uploads = hub()
    assert Trainer(replace(pushing, resume_from=config.output_dir), cache).run() == last
    assert [title for title, _ in uploads.commits] == ["checkpoint-4"]


def test_a_download_loads_and_holds_no_place_of_this_machine(
    cache: Path, pushing: Config, hub: Callable[..., Uploads], tmp_path: Path
) -> None:
    uploads = hub()
    captions = tmp_path / "captions.jsonl"
    captions.write_text('{"image": "a.png", "caption": "A ball."}\n')
    told = replace(pushing, captions=str(captions), statement_loss_weight=0.5)
    Trainer(replace(told, hub_strategy="checkpoint"), cache).run()
    folder = tmp_path / "download"
    for name, data in uploads.files().items():
        assert str(tmp_path).encode() not in data
        assert str(ROOT).encode() not in data
        if "/" not in name:
            folder.mkdir(exist_ok=True)
            (folder / name).write_bytes(data)
    settings = json.loads((folder / "config.json").read_text())
    assert (settings["model_name"], settings["cosmos_model_name"]) == ("gemma", "vae")
    places = ("annotations", "captions", "image_folder", "resume_from", "output_dir")
    assert [settings[key] for key in places] == [None, None, None, None, "checkpoints/theworld-vsr"]
    assert find_model(folder) == folder
    model = TheWorld.from_pretrained(folder, model_name=pushing.model_name)
    assert model.config.batch_size == pushing.batch_size


def test_only_the_main_process_uploads(
    cache: Path, pushing: Config, hub: Callable[..., Uploads], monkeypatch: pytest.MonkeyPatch
) -> None:
    uploads = hub()
    monkeypatch.setattr("theworld.utils.distributed.Processes.is_main_process", False)
    Trainer(pushing, cache).run()
    assert uploads.commits == []
    assert not uploads.exists


# ---- a hub that fails


@pytest.mark.parametrize("failure", ["500", "cut"])
def test_a_failing_hub_changes_nothing_of_a_training_and_is_reported(
    failure: str,
    cache: Path,
    config: Config,
    pushing: Config,
    hub: Callable[..., Uploads],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    alone = Trainer(replace(config, output_dir=str(tmp_path / "alone")), cache).run()
    uploads = hub(behaviour=[failure] * 9)
    last = Trainer(pushing, cache).run()
    assert weights(last) == weights(alone)
    assert uploads.commits == []
    assert {line["status"] for line in log(last.parent)} <= {"failed", "replaced by a newer one"}
    shown = capsys.readouterr()
    folder = last.parent / "hub_upload"
    assert "hub: the upload of checkpoint-4 failed: " in caplog.text
    assert f"hub: checkpoint-4 is NOT on the hub: {log(last.parent)[-1]['error']}" in caplog.text
    assert f"Repeat the upload with: hf upload {NAME} {folder} ." in caplog.text
    assert sorted(p.name for p in folder.iterdir()) == MODEL_FILES
    assert weights(folder) == weights(last)
    for path in last.parent.rglob("*"):
        assert path.is_dir() or CANARY.encode() not in path.read_bytes()
    assert CANARY not in shown.out + shown.err + caplog.text


def test_a_failed_upload_is_made_good_by_the_next_save(
    pushing: Config, hub: Callable[..., Uploads], tmp_path: Path
) -> None:
    uploads = hub(behaviour=["500"])
    publisher = Publisher(pushing, tmp_path)
    first, second = (checkpoint_of(tmp_path, step, pushing, step) for step in (2, 4))
    publisher.saved(first, FACTS)
    assert publisher.upload is not None
    assert publisher.upload.result(30) is not None
    publisher.saved(second, FACTS)
    assert publisher.finish(second, FACTS)
    assert [line["status"] for line in log(tmp_path)] == ["failed", "uploaded"]
    assert uploads.files()["projection.safetensors"] == weights(second)
    assert not (tmp_path / "hub_upload").exists()


def test_saves_in_quick_succession_give_whole_snapshots_though_older_ones_are_deleted(
    pushing: Config, hub: Callable[..., Uploads], tmp_path: Path
) -> None:
    uploads = hub(behaviour=["wait"])
    config = replace(pushing, hub_strategy="checkpoint", save_total_limit=1)
    publisher = Publisher(config, tmp_path)
    trainer_states = {}
    for step in (1, 2, 3, 4):
        path = checkpoint_of(tmp_path, step, config, step)
        publisher.saved(path, FACTS)  # returns although the first one is still on its way
        trainer_states[path.name] = (path / "trainer.pt").read_bytes()
        if step == 1:
            assert uploads.arrived.wait(30)
        for old in list_checkpoints(tmp_path)[:-1]:
            for file in old.iterdir():
                file.unlink()
            old.rmdir()
    uploads.go_on.set()
    assert publisher.finish(path, FACTS)
    assert [title for title, _ in uploads.commits] == ["checkpoint-1", "checkpoint-4"]
    for title, files in uploads.commits:
        step = title.removeprefix("checkpoint-")
        assert files["projection.safetensors"] == f"weights of {step}".encode() * 1000
        assert files["last-checkpoint/projection.safetensors"] == files["projection.safetensors"]
        assert json.loads(files["world.json"])["fingerprint"] == {"latent_size": int(step)}
        assert files["last-checkpoint/trainer.pt"] == trainer_states[title]
        assert f"After {step} of 4 optimizer steps" in files["README.md"].decode()
    replaced = [line["checkpoint"] for line in log(tmp_path) if line["status"].startswith("replaced")]
    assert replaced == ["checkpoint-2", "checkpoint-3"]


def test_a_hub_that_never_answers_is_not_waited_for_for_ever(
    pushing: Config,
    hub: Callable[..., Uploads],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    uploads = hub(behaviour=["wait"])
    monkeypatch.setattr("theworld.hub.publish.UPLOAD_SECONDS", 1)
    publisher = Publisher(pushing, tmp_path)
    path = checkpoint_of(tmp_path, 2, pushing, 0.0)
    assert not publisher.finish(path, FACTS)
    assert "NOT on the hub: there was no answer in time" in caplog.text
    assert weights(tmp_path / "hub_upload") == weights(path)
    assert list(tmp_path.glob(".hub_upload-*")) == []
    uploads.go_on.set()
    assert publisher.upload is not None
    publisher.upload.result(30)


def test_a_damaged_checkpoint_is_not_uploaded(
    pushing: Config, hub: Callable[..., Uploads], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    uploads = hub()
    path = checkpoint_of(tmp_path, 2, pushing, 0.0)
    (path / "projection.safetensors").write_bytes(b"other")
    with pytest.raises(CheckpointError, match=r"projection\.safetensors is damaged"):
        check_staged(stage(SavedModel.read(path), "card", False, tmp_path / "staged"))
    assert not Publisher(pushing, tmp_path).finish(path, FACTS)
    assert "checkpoint-2 is NOT on the hub: projection.safetensors is damaged" in caplog.text
    assert "Repeat the upload by resuming this run" in caplog.text
    assert not (tmp_path / "hub_upload").exists()
    assert uploads.commits == []


@pytest.mark.parametrize("name", ["config.json", "world.json"])
def test_damaged_json_is_not_uploaded_either(
    name: str, pushing: Config, hub: Callable[..., Uploads], tmp_path: Path
) -> None:
    uploads = hub()
    path = checkpoint_of(tmp_path, 2, pushing, 0.0)
    (path / name).write_text((path / name).read_text() + " ")
    assert not Publisher(pushing, tmp_path).finish(path, FACTS)
    assert f"{name} is damaged" in str(log(tmp_path)[0]["error"])
    assert uploads.commits == []


# ---- no copies, no waiting, nothing left behind


@pytest.mark.parametrize("links", [True, False])
def test_an_upload_is_staged_as_hard_links_or_else_as_symbolic_ones(
    links: bool, pushing: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(source: Path, target: Path) -> None:
        raise PermissionError(1, "Operation not permitted")

    if not links:
        monkeypatch.setattr("theworld.hub.publish.os.link", refuse)
    path = checkpoint_of(tmp_path, 2, pushing, 0.0)
    before = {file.name: file.read_bytes() for file in path.iterdir()}
    staged = tmp_path / "staged"
    check_staged(stage(SavedModel.read(path), "card", True, staged))
    for name in ("projection.safetensors", "world.json"):
        for copy in (staged / name, staged / "last-checkpoint" / name):
            assert copy.samefile(path / name)
            assert copy.is_symlink() is not links
            assert copy.read_bytes() == before[name]
    assert (staged / "last-checkpoint" / "trainer.pt").samefile(path / "trainer.pt")
    assert not (staged / "last-checkpoint" / "config.json").samefile(path / "config.json")
    assert {file.name: file.read_bytes() for file in path.iterdir()} == before


def test_a_save_returns_at_once_while_the_hub_does_not_answer(
    pushing: Config, hub: Callable[..., Uploads], tmp_path: Path
) -> None:
    uploads = hub(behaviour=["wait"])
    publisher = Publisher(pushing, tmp_path)
    paths = [checkpoint_of(tmp_path, step, pushing, step) for step in (1, 2, 3)]
    for path in paths:
        start = time.perf_counter()
        publisher.saved(path, FACTS)
        assert time.perf_counter() - start < 5  # the hub takes up to 60 s; a busy machine gets some of them
        assert uploads.arrived.wait(30)
    uploads.go_on.set()
    assert publisher.finish(paths[-1], FACTS)
    assert list(tmp_path.glob(".hub_upload-*")) == []


PROGRAM = """
import os, signal, sys
from pathlib import Path
from theworld.config.config import load_config
from theworld.hub.card import Facts
from theworld.hub.publish import Publisher

def peak(reset=False):
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) // 1024

mode, path, facts = sys.argv[1], Path(sys.argv[2]), Facts(10, 20, 4, 4, [])
publisher = Publisher(load_config(path / "config.json"), path.parent)
if mode == "memory":
    before = peak(reset=True)
    assert publisher.finish(path, facts)
    print(peak() - before)
else:
    publisher.saved(path, facts)
    sys.stdin.readline()
    if mode == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    sys.exit(75)
"""


@contextmanager
def program(mode: str, checkpoint: Path, uploads: Uploads, home: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that uploads one checkpoint; `exit` and `kill` end it when they are sent a line."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("HF_") and "proxy" not in k.lower()}
    clean |= {"HF_ENDPOINT": uploads.address, "HF_TOKEN": CANARY, "HF_HOME": str(home)}
    clean["HF_HUB_DISABLE_XET"] = "1"  # the stand-in hub takes large files in one request each
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM, mode, str(checkpoint)],
        cwd=ROOT,
        env=clean | {"PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        yield process


@pytest.mark.parametrize(("end", "status"), [("exit", 75), ("kill", -9)])
def test_a_run_that_ends_does_not_wait_for_the_hub_and_the_next_start_tidies_up(
    end: str, status: int, pushing: Config, hub: Callable[..., Uploads], tmp_path: Path
) -> None:
    uploads = hub(behaviour=["wait"])
    run = tmp_path / "run"
    path = checkpoint_of(run, 2, pushing, 0.0)
    with program(end, path, uploads, tmp_path / "home") as process:
        assert uploads.arrived.wait(100)
        start = time.perf_counter()
        process.communicate("end\n", timeout=30)
        assert time.perf_counter() - start < 30  # the hub would hold it for 60 s
    assert process.returncode == status
    assert [folder.name for folder in run.glob(".hub_upload-*")] == [".hub_upload-checkpoint-2"]
    uploads.go_on.set()
    Publisher(pushing, run)
    assert list(run.glob(".hub_upload-*")) == []
    assert sorted(p.name for p in path.iterdir()) == sorted(
        [
            "checkpoint.json",
            "config.json",
            "projection.safetensors",
            "trainer.json",
            "trainer.pt",
            "world.json",
        ]
    )


def test_without_hard_links_nothing_is_copied_either(
    pushing: Config, hub: Callable[..., Uploads], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    uploads = hub()
    path = checkpoint_of(tmp_path, 2, pushing, 0.0)
    monkeypatch.setattr(os, "link", refuse)
    monkeypatch.setattr(shutil, "copyfile", None)
    assert Publisher(replace(pushing, hub_strategy="checkpoint"), tmp_path).finish(path, FACTS)
    for name in ("projection.safetensors", "last-checkpoint/trainer.pt"):
        assert uploads.files()[name] == (path / Path(name).name).read_bytes()
    assert path.is_dir()


def test_a_large_checkpoint_is_uploaded_without_being_read_into_memory(
    pushing: Config, hub: Callable[..., Uploads], tmp_path: Path
) -> None:
    uploads = hub(large=1 << 20)
    run, size = tmp_path / "run", 200 << 20
    path = checkpoint_of(run, 2, pushing, 0.0)
    os.truncate(path / "projection.safetensors", size)  # sparse: takes no room on the disk
    index = json.loads((path / "checkpoint.json").read_text())
    index["files"]["projection.safetensors"] = fingerprint_of(path / "projection.safetensors")
    (path / "checkpoint.json").write_text(json.dumps(index) + "\n")
    with program("memory", path, uploads, tmp_path / "home") as process:
        shown, _ = process.communicate(timeout=200)
    assert process.returncode == 0
    assert uploads.large_files == {index["files"]["projection.safetensors"]["sha256"]: size}
    assert int(shown) < 60  # MiB


# ---- checked before any model loads


def test_a_hub_that_accepts_and_is_silent_stops_the_run_before_it_starts(
    pushing: Config, hub: Callable[..., Uploads], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub()
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"http://127.0.0.1:{server.getsockname()[1]}"
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
        monkeypatch.setattr("theworld.hub.publish.CONNECT_SECONDS", 0.3)
        with pytest.raises(ValueError, match=r"cannot be written to: there was no answer in time \(0\.3 s\)"):
            connect(pushing)


@pytest.mark.parametrize(
    ("options", "token", "message"),
    [
        ({}, None, "there is no token; export HF_TOKEN"),
        ({}, "hf_wrong", "someone/world cannot be written to: .*401"),
        ({"exists": True, "writable": False}, CANARY, "someone/world cannot be written to: .*403"),
    ],
)
def test_a_hub_that_refuses_is_known_before_any_model_loads(
    options: dict[str, bool],
    token: str | None,
    message: str,
    cache: Path,
    pushing: Config,
    hub: Callable[..., Uploads],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hub(**options)
    if token is None:
        monkeypatch.setattr("theworld.hub.publish.get_token", lambda: None)
    else:
        monkeypatch.setenv("HF_TOKEN", token)
    monkeypatch.setattr("theworld.training.trainer.load_model", None)
    with pytest.raises(ValueError, match=message) as error:
        Trainer(pushing, cache)
    assert "hf_wrong" not in str(error.value)


def test_a_dry_run_refuses_a_missing_token_as_the_run_does(
    cache: Path, pushing: Config, hub: Callable[..., Uploads], monkeypatch: pytest.MonkeyPatch
) -> None:
    uploads = hub()
    monkeypatch.setattr("theworld.hub.publish.get_token", lambda: None)
    messages = []
    for start in (Plan, Trainer, lambda config, _: check_hub(config)):
        with pytest.raises(ValueError, match="there is no token; export HF_TOKEN") as error:
            start(pushing, cache)
        messages.append(str(error.value))
    assert len(set(messages)) == 1
    check_hub(replace(pushing, push_to_hub=False))
    assert not uploads.exists


def test_a_public_model_is_not_taken_for_a_private_one(
    pushing: Config, hub: Callable[..., Uploads], tmp_path: Path
) -> None:
    hub(exists=True, private=False)
    with pytest.raises(ValueError, match="hub_private_repo is true, but someone/world is there already"):
        Publisher(replace(pushing, hub_private_repo=True), tmp_path)


def test_a_new_model_is_private_if_asked(
    pushing: Config, hub: Callable[..., Uploads], tmp_path: Path
) -> None:
    uploads = hub()
    Publisher(replace(pushing, hub_private_repo=True), tmp_path)
    assert uploads.private


def test_the_tool_pushes_shows_no_token_and_succeeds_though_the_hub_does_not(
    cache: Path, pushing: Config, tmp_path: Path
) -> None:
    save_config(replace(pushing, log_to_tensorboard=True), tmp_path / "run.json")
    uploads = Uploads(NAME, CANARY, behaviour=["500"] * 9)
    clean = {k: v for k, v in os.environ.items() if not k.startswith("HF_") and "proxy" not in k.lower()}
    with serve({}, uploads) as (address, _):
        done = subprocess.run(
            [sys.executable, "tools/train.py", "--config", str(tmp_path / "run.json"), "--cache", str(cache)],
            cwd=ROOT,
            env=clean | {"HF_ENDPOINT": address, "HF_TOKEN": CANARY, "HF_HOME": str(tmp_path / "home")},
            capture_output=True,
            text=True,
            timeout=240,
        )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "checkpoint-4 is NOT on the hub" in done.stdout
    assert "Traceback" not in done.stderr
    assert CANARY not in done.stdout + done.stderr
    for path in Path(pushing.output_dir).rglob("*"):
        assert path.is_dir() or CANARY.encode() not in path.read_bytes()


def test_an_evaluation_beside_a_checkpoint_comes_with_its_upload(
    pushing: Config, hub: Callable[..., Uploads], tmp_path: Path
) -> None:
    uploads = hub()
    path = checkpoint_of(tmp_path, 2, pushing, 0.0)
    assert read_results(path) is None
    statements = [Statement("a.jpg", "On.", 1, "on", 0), Statement("b.jpg", "On.", 0, "on", 1)]
    answers = {
        "world": np.array([[0.0, 1.0, 1.5], [1.0, 0.0, 1.5]]),
        "baseline": np.array([[0.0, 1.0, 1.5], [0.0, 1.0, 1.5]]),
    }
    summary = summarise(records(statements, answers, set()))
    beside = tmp_path / "checkpoint-2.jsonl"  # as tools/eval.py is told by --output
    beside.with_suffix(".summary.json").write_text(json.dumps(summary))
    assert Publisher(pushing, tmp_path).finish(path, FACTS)
    card = uploads.files()["README.md"].decode()
    assert "2 statements about 2 images; p-values: exact McNemar test." in card
    assert "| world | 2 | 100.0% |" in card
    assert "| baseline | 2 | 50.0% |" in card
    beside.with_suffix(".summary.json").write_text("[]")
    with pytest.raises(ValueError, match=r"checkpoint-2\.summary\.json is no summary of tools/eval\.py"):
        read_results(path)
    assert not Publisher(pushing, tmp_path).finish(path, FACTS)  # and training goes on
