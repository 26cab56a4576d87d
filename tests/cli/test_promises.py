"""What a dry run lets pass, the run does not refuse at its start: both say the same of whatever stops a run."""

import json
import os
import sys
import types
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from commands import run_command, trace
from conftest import tiny_run
from constants import EMBEDDED_GEMMA, ROOT
from fake_hub import Uploads, serve

from theworld.cli import demo
from theworld.config.config import save_config
from theworld.models.serialization import SavedModel
from theworld.models.theworld import TheWorld
from theworld.training.trainer import Trainer
from theworld.utils import files
from theworld.utils.commands import command
from theworld.utils.console import NOTHING_WRITTEN
from theworld.utils.hub import Fault

Change = Callable[[pytest.MonkeyPatch, Path], None]


@pytest.fixture(scope="module")
def trained(
    tmp_path_factory: pytest.TempPathFactory, photographs: Path, annotations: Path, session_cache: Path
) -> Path:
    """A run of one step, with the settings of a further one beside it."""
    folder = tmp_path_factory.mktemp("promises")
    config = replace(tiny_run(folder / "run", photographs, annotations), max_steps=1)
    Trainer(config, session_cache).run()
    save_config(replace(config, output_dir=str(folder / "next")), folder / "next.json")
    return folder


def without_permission() -> Change:
    """Permission is refused below `theirs`; nothing is forbidden to root, as whom tests may run."""

    def change(patch: pytest.MonkeyPatch, folder: Path) -> None:
        real = os.access
        patch.setattr(files.os, "access", lambda path, mode: "theirs" not in str(path) and real(path, mode))

    return change


def room(free: int) -> Change:
    return lambda patch, folder: patch.setattr(files, "free_bytes", lambda path: free)


def no_token(patch: pytest.MonkeyPatch, folder: Path) -> None:
    patch.setattr("theworld.hub.publish.get_token", lambda: None)


def hidden_token(patch: pytest.MonkeyPatch, folder: Path) -> None:
    patch.setattr("theworld.utils.hub.get_token", lambda: "hf_\u200bcanary")


def no_key(patch: pytest.MonkeyPatch, folder: Path) -> None:
    wandb: Any = types.ModuleType("wandb")
    wandb.errors = types.SimpleNamespace(Error=type("Error", (Exception,), {}))

    def login() -> None:
        raise wandb.errors.Error("No API key configured.")

    wandb.login = login
    patch.setitem(sys.modules, "wandb", wandb)
    patch.delenv("WANDB_MODE", raising=False)


def offline(patch: pytest.MonkeyPatch, folder: Path) -> None:
    patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def nothing(patch: pytest.MonkeyPatch, folder: Path) -> None:
    pass


PUSH = ("--push_to_hub", "--hub_model_id", "you/world")
OBSTACLES: dict[str, tuple[str, tuple[str, ...], Change, str]] = {
    "no hub token": ("train", PUSH, no_token, "push_to_hub to you/world: there is no token; export HF_TOKEN"),
    "a hidden character": ("train", PUSH, hidden_token, "character 4 of 10 is U+200B (ZERO WIDTH SPACE)"),
    "no key": (
        "train",
        ("--log_to_wandb",),
        no_key,
        "log_to_wandb: No API key configured. Set WANDB_API_KEY",
    ),
    "a run of others": (
        "train",
        ("--output_dir", "{0}/theirs/a"),
        without_permission(),
        "is not yours to write to",
    ),
    "a full disk": (
        "train",
        (),
        room(0),
        "65,536 bytes are needed and 0 are free; make room or move --output_dir",
    ),
    "no room for a checkpoint": ("train", (), room(70_000), "102,144 bytes are needed and 70,000 are free"),
    "a file in the way": (
        "train",
        ("--output_dir", "setup.cfg/a"),
        nothing,
        "setup.cfg is a file, and a folder",
    ),
    "no 8-bit products": ("train", ("--fp8",), nothing, "fp8 is true, but cpu has no 8-bit products"),
    "checkpoints there": (
        "train",
        ("--output_dir", "{0}/run"),
        nothing,
        "already holds checkpoint-1; go on with",
    ),
    "a model nowhere": (
        "train",
        ("--model_name", "some/where/else"),
        nothing,
        "no such folder, and not a name on",
    ),
    "a model offline": ("train", ("--model_name", "some/model"), offline, "some/model: the hub is not asked"),
    "a cache of others": (
        "extract_latents",
        ("--cache", "{0}/theirs/c"),
        without_permission(),
        "is not yours to write to",
    ),
    "no video model": (
        "extract_latents",
        ("--num_world_steps", "2"),
        nothing,
        "vae: no model_index.json in it",
    ),
    "no such GPU": ("extract_latents", ("--device", "cuda:7"), nothing, "no usable CUDA GPU"),
    "no photographs": ("extract_latents", ("--image_folder", "{0}/none"), nothing, "none: not a folder"),
    "records of others": (
        "eval",
        ("--output", "{0}/theirs/r.jsonl"),
        without_permission(),
        "is not yours to write to",
    ),
    "a folder as records": ("eval", ("--output", "{0}"), nothing, "is a folder, and a file is wanted"),
    "a folder beside records": ("eval", ("--output", "{0}/x.jsonl"), nothing, "x.meta.json is a folder"),
    "no room for records": ("eval", (), room(9), "65,536 bytes are needed and 9 are free"),
    "figures of others": ("visualize_alignment", ("--output", "{0}/x.png"), nothing, "x.json is a folder"),
    "a page of others": (
        "report",
        ("--output", "{0}/theirs/p.html"),
        without_permission(),
        "is not yours to write to",
    ),
    "no room for a page": ("report", (), room(9), "65,536 bytes are needed and 9 are free"),
    "no room for a demo": (
        "demo",
        ("--output", "{0}/demo"),
        room(9),
        "262,144,000 bytes are needed and 9 are free",
    ),
    "a demo of others": (
        "demo",
        ("--output", "{0}/theirs/d"),
        without_permission(),
        "is not yours to write to",
    ),
    "photographs of others": (
        "get_images",
        ("--output", "{0}/theirs/i"),
        without_permission(),
        "is not yours to write to",
    ),
    "a sweep of others": (
        "sweep",
        ("--output", "{0}/theirs/s"),
        without_permission(),
        "is not yours to write to",
    ),
    "no photograph": ("ask", ("--image", "{0}/none.jpg"), nothing, "none.jpg"),
}


@pytest.mark.parametrize("obstacle", OBSTACLES)
def test_a_dry_run_refuses_what_the_run_refuses_in_the_same_words(
    obstacle: str,
    trained: Path,
    session_cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    tool, flags, change, message = OBSTACLES[obstacle]
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["pytest"])
    monkeypatch.setattr(demo, "write_scenes", None)  # a demo that is not refused ends here
    settings = json.loads((trained / "next.json").read_text())
    model = ("--model", trained / "run")
    start: dict[str, tuple[object, ...]] = {
        "train": ("--config", trained / "next.json", "--cache", session_cache),
        "sweep": ("--config", trained / "next.json", "--cache", session_cache, "--seeds", "0"),
        "extract_latents": ("--config", trained / "next.json", "--cache", tmp_path / "cache"),
        "eval": (*model, "--cache", session_cache),
        "visualize_alignment": (*model, "--cache", session_cache),
        "report": (trained / "run",),
        "ask": (*model, "--statement", "The cat is on the mat."),
        "get_images": ("--annotations", settings["annotations"], "--coco", settings["image_folder"]),
        "demo": (),
    }
    for name in ("x.meta.json", "x.json", "theirs"):
        (trained / name).mkdir(exist_ok=True)
    line = command(tool, *start[tool], *(flag.format(trained) for flag in flags))
    change(monkeypatch, trained)
    before = trace(trained), trace(tmp_path)
    planned = run_command(f"{line} --dry_run", monkeypatch, capsys)
    assert (trace(trained), trace(tmp_path)) == before
    done = run_command(line, monkeypatch, capsys)
    assert planned[0] == done[0] == 1
    assert message in planned[2]
    assert planned[2] == done[2]
    assert NOTHING_WRITTEN not in planned[1]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Starts a hub that takes uploads for you/world, and makes it the one that this process knows."""
    monkeypatch.setenv("HF_TOKEN", "hf_canary")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    for name in [n for n in os.environ if "proxy" in n.lower()]:
        monkeypatch.delenv(name)

    def start(uploads: Uploads) -> Any:
        server = serve({}, uploads)
        address, requests = server.__enter__()
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
        return server, requests

    return start


@pytest.mark.parametrize(
    ("options", "name", "message"),
    [
        ({"exists": True, "writable": False}, "you/world", "push_to_hub: you/world cannot be written to: "),
        ({}, "others/world", "push_to_hub: others/world cannot be written to: "),
        (
            {"exists": True},
            "you/world",
            "hub_private_repo is true, but you/world is there already and public",
        ),
        ({}, "you/world", ""),
    ],
)
def test_a_dry_run_asks_the_hub_whether_it_would_take_an_upload_and_creates_nothing(
    options: dict[str, bool],
    name: str,
    message: str,
    trained: Path,
    session_cache: Path,
    hub: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(ROOT)
    uploads = Uploads("you/world", "hf_canary", **options)  # type: ignore[arg-type]
    server, requests = hub(uploads)
    flags = (
        "--push_to_hub",
        "--hub_model_id",
        name,
        *(["--hub_private_repo"] if "public" in message else []),
    )
    line = command("train", "--config", trained / "next.json", "--cache", session_cache, *flags, "--dry_run")
    status, out, err = run_command(line, monkeypatch, capsys)
    server.__exit__(None, None, None)
    assert (status, message in err) == (int(bool(message)), True)
    assert "canary" not in out + err
    assert uploads.commits == []
    assert uploads.exists == options.get("exists", False)
    assert not any("repos/create" in request for request in requests)
    if not message:
        assert "uploads: checkpoints to you/world, as hub_strategy every_save says" in out


def test_the_settings_of_the_obstacles_start_where_nothing_is_in_the_way(
    trained: Path,
    session_cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(ROOT)
    line = command("train", "--config", trained / "next.json", "--cache", session_cache, "--dry_run")
    assert run_command(line, monkeypatch, capsys)[0] == 0


def test_a_model_that_has_moved_is_named_with_its_file_and_the_flag_for_it(trained: Path) -> None:
    saved = SavedModel.open_folder(trained / "run")
    moved = replace(saved, settings=saved.settings | {"model_name": "/gone/gemma"})
    with pytest.raises(Fault) as caught:
        TheWorld.from_pretrained(moved)
    assert caught.value.message == (
        f"{saved.folder / 'config.json'}: model_name is /gone/gemma: no such folder, and not a name on the hub"
    )
    assert caught.value.hint == "check the path, or the name; if it has moved, name it with --gemma"
    with pytest.raises(Fault) as caught:
        TheWorld.from_pretrained(moved, model_name="/also/gone")
    assert str(caught.value) == (
        "/also/gone: no such folder, and not a name on the hub; check the path, or the name"
    )
    assert TheWorld.from_pretrained(moved, model_name=str(EMBEDDED_GEMMA)).gemma.name == str(EMBEDDED_GEMMA)
