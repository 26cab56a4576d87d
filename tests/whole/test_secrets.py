"""A token is nowhere: a canary in every place that a token may stand, and then in no file and no line of output."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from commands import tool
from constants import ROOT
from fake_hub import Uploads, serve
from torture import Tally

from theworld.config.config import Config, save_config
from theworld.models.theworld import TheWorld

CANARY = "hf_canaryCanaryCanary0123456789abcd"
OTHER = "0123456789canary0123456789canary01234567"  # W&B's are 40 hex digits
WANDB = '''
"""As much of wandb as a training calls; what it is given is written down."""
import json, os, pathlib, types
Error = type("Error", (Exception,), {})
errors = types.SimpleNamespace(Error=Error)
def login():
    assert os.environ["WANDB_API_KEY"]
    return True
class Run:
    id = "abc"
    def log(self, figures, step): pass
    def finish(self): pass
def init(**settings):
    pathlib.Path(settings["dir"], "wandb.json").write_text(json.dumps(settings, default=str))
    return Run()
'''
ROW = ("security", "a token in no log, setting, checkpoint, TensorBoard file, upload or traceback")


def leaks(folder: Path, *texts: str) -> list[str]:
    """Where a canary stands: in a file, its name, or a text."""
    words = [CANARY, OTHER, CANARY[3:], OTHER[:30]]
    found = [text[:200] for text in texts if any(word in text for word in words)]
    for path in folder.rglob("*"):
        if path.is_file() and any(w.encode() in path.read_bytes() or w in str(path) for w in words):
            found.append(str(path))
    return found


def broken() -> None:
    """The third step raises what nobody foresaw, so that there is a traceback through everything."""
    train_step = TheWorld.losses
    count = iter(range(1000))

    def losses(self: TheWorld, *arguments: Any, **options: Any) -> Any:
        if next(count) == 5:
            raise RuntimeError("unforeseen")
        return train_step(self, *arguments, **options)

    TheWorld.losses = losses  # type: ignore[method-assign]


@pytest.mark.torture(*ROW)
@pytest.mark.parametrize("end", ["well", "traceback", "refused upload"])
def test_a_run_leaks_no_token(
    end: str, config: Config, session_cache: Path, tmp_path: Path, tally: Tally
) -> None:
    (tmp_path / "stub").mkdir()
    (tmp_path / "stub/wandb.py").write_text(WANDB)
    uploads = Uploads("me/model", CANARY, behaviour=["500"], writable=end != "refused upload")
    config = replace(
        config,
        push_to_hub=True,
        hub_model_id="me/model",
        hub_strategy="checkpoint",
        log_to_wandb=True,
        log_to_tensorboard=True,
        output_dir=str(tmp_path / "run"),
    )
    with serve({}, uploads) as (address, _):
        save_config(config, tmp_path / "settings.json")
        # Not forked: the hub's client reads its settings when it is imported.
        program = "import sys; sys.path[:0] = ['tests', 'tests/whole']; import test_secrets, runpy\n"
        program += "test_secrets.broken()\n" if end == "traceback" else ""
        program += f"sys.argv = ['train', '--config', {str(tmp_path / 'settings.json')!r}, "
        program += (
            f"'--cache', {str(session_cache)!r}]\nrunpy.run_path('tools/train.py', run_name='__main__')"
        )
        done = subprocess.run(
            [sys.executable, "-c", program],
            cwd=ROOT,
            env=os.environ
            | {
                "HF_TOKEN": CANARY,
                "WANDB_API_KEY": OTHER,
                "HF_ENDPOINT": address,
                "HF_HOME": str(tmp_path / "hf"),
            }
            | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{tmp_path / 'stub'}:{ROOT}", "HF_HUB_OFFLINE": "0"},
            capture_output=True,
            text=True,
            timeout=200,
        )
    assert done.returncode == (0 if end == "well" else 1), done.stderr
    if end == "traceback":
        assert "Traceback" in done.stderr
        assert "unforeseen" in done.stderr
    elif end == "refused upload":
        assert "cannot be written to" in done.stderr
    else:
        assert '"config": {"model_name": ' in (tmp_path / "run/wandb.json").read_text()
        assert list((tmp_path / "run/logs").glob("events.out.tfevents.*"))
        assert (tmp_path / "run/hub.jsonl").exists()
        uploaded = uploads.files()
        assert uploaded
        assert not any(CANARY.encode() in data for data in uploaded.values())
    (tmp_path / "stub/wandb.py").unlink()
    found = leaks(tmp_path, done.stdout, done.stderr)
    assert found == []
    tally(places_searched=sum(path.is_file() for path in tmp_path.rglob("*")) + 2, leaks=len(found))


@pytest.mark.torture(*ROW)
@pytest.mark.parametrize(
    "where", ["settings", "torn settings", "twice", "near key", "flag", "flag=", "hub_model_id"]
)
def test_a_token_in_a_wrong_place_is_refused_and_not_repeated(
    where: str, config: Config, tmp_path: Path, tally: Tally
) -> None:
    settings = json.dumps(config.to_dict())
    texts = {
        "settings": settings[:-1] + f', "hf_token": "{CANARY}"}}',
        "torn settings": settings[:-1] + f', "hf_token": "{CANARY}" "a"}}',
        "twice": settings[:-1] + f', "hf_token": "{CANARY}", "hf_token": "{CANARY}"}}',
        "near key": settings[:-1] + f', "hf_tokn": "{CANARY}"}}',
    }
    (tmp_path / "settings.json").write_text(texts.get(where, settings))
    flags = {"flag": ["--hf_token", CANARY], "flag=": [f"--hf_token={CANARY}"]}
    flags["hub_model_id"] = ["--push_to_hub", "--hub_model_id", CANARY]
    words = ["--config", tmp_path / "settings.json", *flags.get(where, [])]
    done = tool("train", *words, check=False)
    assert done.returncode in (1, 2)
    (tmp_path / "settings.json").unlink()
    found = leaks(tmp_path, done.stdout, done.stderr)
    assert found == []
    assert "Traceback" not in done.stderr
    tally(places_searched=2, leaks=len(found))


def test_the_search_finds_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(b"\0" + CANARY.encode())
    assert leaks(tmp_path, f"error {OTHER}") == [f"error {OTHER}", str(tmp_path / "a.bin")]
