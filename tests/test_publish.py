"""Uploads of a run to a stand-in hub: what arrives, what a failing hub changes, and what never leaves this machine."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT
from hub import COMMIT, Uploads, serve

from theworld.card import Facts, model_card, public_settings, read_metrics, read_results
from theworld.checkpoint import CheckpointError, find_model, list_checkpoints, save_checkpoint
from theworld.config import Config, save_config
from theworld.extract import extract
from theworld.metrics import records, summarise
from theworld.model import TheWorld
from theworld.publish import Publisher, connect, snapshot
from theworld.train import Trainer
from theworld.vsr import Statement

CANARY = "hf_canary0123456789canary"
NAME = "someone/world"
MODEL_FILES = ["README.md", "config.json", "projection.safetensors", "world.json"]
FACTS = Facts(10, 20, 4, 4, ["train: 6 of 6 statements, 3 of 3 images"])


@pytest.fixture
def cache(config: Config, tmp_path: Path) -> Path:
    extract(config, tmp_path / "cache", with_vision=True, allow_missing=False)
    return tmp_path / "cache"


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


def checkpoint_of(folder: Path, step: int, config: Config, fill: float) -> Path:
    """A checkpoint whose every tensor and number is of its step, without a model."""

    class Model:
        def save_pretrained(self, target: Path, weights: object = None) -> None:
            target.mkdir(parents=True)
            (target / "projection.safetensors").write_bytes(f"weights of {step}".encode() * 1000)
            shape = {"architecture": "mlp", "mode": "patch"}
            world = {"format": 1, "parts": [], "projection": shape, "fingerprint": {"latent_size": step}}
            (target / "world.json").write_text(json.dumps(world))
            save_config(config, target / "config.json")

    folder.mkdir(parents=True, exist_ok=True)
    return save_checkpoint(folder, step, Model(), {"tensor": torch.full((4,), fill)}, {"step": step})  # type: ignore[arg-type]


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
    assert weights(Trainer(resumed, cache).run()) == weights(Trainer(whole, cache).run())


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
    assert [settings[key] for key in places] == [None, None, None, None, "checkpoints/vsr"]
    assert find_model(folder) == folder
    model = TheWorld.from_pretrained(folder, model_name=pushing.model_name)
    assert model.config.batch_size == pushing.batch_size


def test_only_the_main_process_uploads(
    cache: Path, pushing: Config, hub: Callable[..., Uploads], monkeypatch: pytest.MonkeyPatch
) -> None:
    uploads = hub()
    monkeypatch.setattr("theworld.processes.Processes.is_main", False)
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
    assert "hub: the upload of checkpoint-4 failed: " in shown.out
    assert f"hub: checkpoint-4 is NOT on the hub: {log(last.parent)[-1]['error']}" in shown.out
    assert f"Repeat the upload with: hf upload {NAME} {folder} ." in shown.out
    assert sorted(p.name for p in folder.iterdir()) == MODEL_FILES
    assert weights(folder) == weights(last)
    for path in last.parent.rglob("*"):
        assert path.is_dir() or CANARY.encode() not in path.read_bytes()
    assert CANARY not in shown.out + shown.err


def test_a_failed_upload_is_made_good_by_the_next_save(
    pushing: Config, hub: Callable[..., Uploads], tmp_path: Path
) -> None:
    uploads = hub(behaviour=["500"])
    publisher = Publisher(pushing, tmp_path)
    first, second = (checkpoint_of(tmp_path, step, pushing, step) for step in (2, 4))
    publisher.saved(first, FACTS)
    assert publisher.thread is None or not publisher.thread.join(30)
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
    capsys: pytest.CaptureFixture[str],
) -> None:
    uploads = hub(behaviour=["wait"])
    monkeypatch.setattr("theworld.publish.PATIENCE", 1)
    publisher = Publisher(pushing, tmp_path)
    path = checkpoint_of(tmp_path, 2, pushing, 0.0)
    assert not publisher.finish(path, FACTS)
    assert "NOT on the hub: there was no answer in time" in capsys.readouterr().out
    assert weights(tmp_path / "hub_upload") == weights(path)
    uploads.go_on.set()
    assert publisher.thread is None or not publisher.thread.join(30)


def test_a_damaged_checkpoint_is_not_uploaded(
    pushing: Config, hub: Callable[..., Uploads], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    uploads = hub()
    path = checkpoint_of(tmp_path, 2, pushing, 0.0)
    (path / "projection.safetensors").write_bytes(b"other")
    with pytest.raises(CheckpointError, match=r"projection\.safetensors is damaged"):
        snapshot(path, "card", resumable=False)
    assert not Publisher(pushing, tmp_path).finish(path, FACTS)
    assert "checkpoint-2 is NOT on the hub" in capsys.readouterr().out
    assert uploads.commits == []


# ---- checked before any model loads


def test_a_hub_that_accepts_and_is_silent_stops_the_run_before_it_starts(
    pushing: Config, hub: Callable[..., Uploads], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub()
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"http://127.0.0.1:{server.getsockname()[1]}"
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
        monkeypatch.setattr("theworld.publish.CONNECT_SECONDS", 0.3)
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
        monkeypatch.setattr("theworld.publish.get_token", lambda: None)
    else:
        monkeypatch.setenv("HF_TOKEN", token)
    monkeypatch.setattr("theworld.train.load_model", None)
    with pytest.raises(ValueError, match=message) as error:
        Trainer(pushing, cache)
    assert "hf_wrong" not in str(error.value)


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


# ---- the card


def header(card: str) -> dict[str, object]:
    return yaml.safe_load(card.split("---\n")[1])


def test_a_card_tells_the_run_and_nothing_else(tmp_path: Path) -> None:
    config = Config(hub_model_id=NAME, learning_rate=0.5, image_folder="/secret/place", wandb_project="mine")
    path = checkpoint_of(tmp_path, 2, config, 0.0)
    metrics = [
        {"step": 1, "loss": 0.75, "accuracy": 0.25},
        {"step": 2, "loss": 0.5},
        {"step": 2, "dev_loss": 0.625, "dev_accuracy": 0.875, "dev_relation_loss": 0.4375},
        {"step": 3, "loss": 0.0625},
    ]
    card = model_card(path, FACTS, metrics)
    assert header(card)["base_model"] == ["google/gemma-3-4b-it"]
    assert header(card)["datasets"] == ["cambridgeltl/vsr_random"]
    assert header(card)["library_name"] == "theworld"
    assert "10 parameters" in card
    assert "Gemma, 20 parameters" in card
    assert "After 2 of 4 optimizer steps of 4 statements" in card
    assert "- train: 6 of 6 statements, 3 of 3 images" in card
    assert '```json\n{\n  "learning_rate": 0.5\n}\n```' in card
    assert "| training loss, mean since the line before | 0.5000 | 2 |" in card
    assert "| training accuracy, likewise | 0.2500 | 1 |" in card
    assert "| dev accuracy, with world tokens | 0.8750 | 2 |" in card
    assert "| dev, next-word loss on relations, nats a statement | 0.4375 | 2 |" in card
    assert "0.0625" not in card  # of a later step
    assert "no evaluation with controls was at hand" in card
    assert f'snapshot_download("{NAME}"' in card
    assert "secret" not in card


def test_a_card_without_figures_or_public_sources_says_so(tmp_path: Path) -> None:
    config = Config(model_name="/models/my-gemma", annotations="/data/vsr")
    card = model_card(checkpoint_of(tmp_path, 2, config, 0.0), FACTS, read_metrics(tmp_path))
    assert not {"base_model", "datasets"} & header(card).keys()
    assert "None were logged up to this checkpoint." in card
    assert "`my-gemma`" in card
    assert "/models" not in card
    assert "/data" not in card


def test_a_card_shows_controls_where_they_were_measured(tmp_path: Path) -> None:
    score = {"n": 8, "accuracy": 0.75, "low": 0.5, "high": 0.9}
    results = {
        "statements": 8,
        "images": 3,
        "systems": {"world": score, "baseline": score | {"accuracy": 0.5}},
        "world_against": {"baseline": {"only_first": 3, "only_second": 1, "p_value": 0.625}},
    }
    card = model_card(checkpoint_of(tmp_path, 2, Config(), 0.0), FACTS, [], results)
    assert "| world | 8 | 75.0% | 50.0% to 90.0% |  |" in card
    assert "| baseline | 8 | 50.0% | 50.0% to 90.0% | 0.62 |" in card
    assert "8 statements about 3 images" in card


def test_an_evaluation_beside_a_checkpoint_comes_with_its_upload(
    pushing: Config, hub: Callable[..., Uploads], tmp_path: Path, capsys: pytest.CaptureFixture[str]
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
    assert "2 statements about 2 images; p: exact McNemar." in card
    assert "| world | 2 | 100.0% |" in card
    assert "| baseline | 2 | 50.0% |" in card
    beside.with_suffix(".summary.json").write_text("[]")
    with pytest.raises(ValueError, match=r"checkpoint-2\.summary\.json is no summary of tools/eval\.py"):
        read_results(path)
    assert not Publisher(pushing, tmp_path).finish(path, FACTS)  # and training goes on


def test_an_evaluation_in_its_run_comes_with_it_too(tmp_path: Path) -> None:
    path = checkpoint_of(tmp_path, 2, Config(), 0.0)
    folder = tmp_path / "evaluation"
    folder.mkdir()
    score = {"n": 8, "accuracy": 0.75, "low": 0.5, "high": 0.9}
    results = {"statements": 8, "images": 3, "data": [["vsr_random", "test"]], "systems": {"world": score}}
    (folder / "checkpoint-2-vsr_random-test.summary.json").write_text(json.dumps(results))
    (folder / "checkpoint-20-vsr_random-test.summary.json").write_text("[]")  # of another
    assert read_results(path) == results
    assert "8 statements about 3 images of vsr_random test; p: exact McNemar." in model_card(
        path, FACTS, [], results
    )
    beside = results | {"statements": 9}
    (tmp_path / "checkpoint-2.summary.json").write_text(json.dumps(beside))
    assert read_results(path) == beside


def test_public_settings_make_a_config_again() -> None:
    assert Config(**public_settings(Config())) == Config()
