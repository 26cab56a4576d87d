"""A run that is resumed stays the run that it was, unless it is told otherwise, and then its checkpoints say so."""

import copy
import hashlib
import json
import re
import runpy
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from constants import ROOT
from jobs import held
from runs import metrics

from theworld.config.config import FIELDS, Config, save_config
from theworld.data.vsr import Statement
from theworld.models.serialization import CheckpointError, SavedModel, list_checkpoints
from theworld.training.checkpoint import check_same_run, compare_settings, latest_valid_checkpoint
from theworld.training.data import Data
from theworld.training.memory import Plan
from theworld.training.trainer import Trainer
from theworld.utils.locks import InUse, OutputLock


@pytest.fixture
def cache(session_cache: Path) -> Path:
    return session_cache


@pytest.fixture
def halfway(config: Config, cache: Path) -> Path:
    """The checkpoint after the second of a run's four steps."""
    last = Trainer(config, cache).run()
    shutil.rmtree(last)
    return last.with_name("checkpoint-2")


# Another value of each setting that changes what a run learns.
OTHER = {
    "model_name": "google/gemma-3-12b-it",
    "world_encoder": "pixels",
    "control_seed": 1,
    "standardization": "training_images",
    "init_from": "checkpoints/first",
    "freeze_gemma_vision": False,
    "freeze_gemma_language": False,
    "lora_rank": 4,
    "freeze_cosmos_vae": False,
    "dataset_name": "vsr_zeroshot",
    "question_template": "{caption}?",
    "num_samples": 5,
    "train_share": 0.5,
    "latent_size": 128,
    "latent_dtype": "float16",
    "num_world_steps": 2,
    "world_mode": "channel",
    "world_patch": 4,
    "max_world_steps": 3,
    "projection": "conv",
    "projection_hidden": 7,
    "projection_layers": 3,
    "projection_scale": 2.0,
    "world_positions": True,
    "world_attention": "causal",
    "world_position": "after",
    "statement_loss_weight": 0.5,
    "relation_loss_weight": 0.5,
    "statement_steps": 3,
    "align_steps": 3,
    "align_learning_rate": 0.5,
    "num_epochs": 9,
    "max_steps": 9,
    "learning_rate": 0.5,
    "gemma_learning_rate": 0.5,
    "lr_schedule": "linear",
    "warmup_steps": 3,
    "warmup_ratio": 0.5,
    "weight_decay": 0.5,
    "adam_beta2": 0.5,
    "max_grad_norm": 0.5,
    "seed": 1,
    "dtype": "bfloat16",
    "fp8": True,
}
# Those of a rollout make a difference only where there is one.
OF_ROLLOUTS = {
    "rollout_prompt": "It rains.",
    "rollout_frames": 9,
    "rollout_steps": 3,
    "rollout_guidance": 2.0,
    "rollout_seed": 1,
}
CPU = torch.device("cpu")


def changed(config: Config, **values: Any) -> Config:
    """Other settings, whether they go together or not."""
    other = copy.copy(config)
    for key, value in values.items():
        object.__setattr__(other, key, value)
    return other


def test_each_setting_that_changes_what_is_learnt_is_compared(config: Config, halfway: Path) -> None:
    assert OTHER.keys() | OF_ROLLOUTS.keys() == {key for key, own in FIELDS.items() if own.defines_run}
    point = latest_valid_checkpoint(halfway)
    assert compare_settings(point, config, CPU) == ({}, {})
    for key, value in OTHER.items():
        before = "float32" if key == "dtype" else getattr(config, key)  # what auto was on this machine
        assert compare_settings(point, changed(config, **{key: value}), CPU)[0] == {key: [before, value]}
    for key, value in OF_ROLLOUTS.items():
        assert compare_settings(point, changed(config, **{key: value}), CPU) == ({}, {})
        both = compare_settings(point, changed(config, num_world_steps=2, **{key: value}), CPU)[0]
        assert both == {"num_world_steps": [0, 2], key: [getattr(config, key), value]}


def test_another_name_of_the_same_thing_is_no_change(config: Config, halfway: Path, tmp_path: Path) -> None:
    names = {"dataset_name": "vsr_random", "dtype": "float32", "model_name": str(tmp_path / "gemma")}
    names["output_dir"] = f"{config.output_dir}/../{Path(config.output_dir).name}"
    assert Path(config.model_name).name == "gemma"
    assert compare_settings(latest_valid_checkpoint(halfway), changed(config, **names), CPU) == ({}, {})


def test_what_auto_was_on_the_device_of_the_run_counts(config: Config, halfway: Path) -> None:
    point = latest_valid_checkpoint(halfway)
    assert (SavedModel.read(halfway).config().dtype, point.progress["dtype"]) == ("auto", "float32")
    point.progress["dtype"] = "bfloat16"  # as on CUDA
    assert compare_settings(point, config, CPU)[0] == {"dtype": ["bfloat16", "auto"]}
    del point.progress["dtype"]  # as in older checkpoints
    assert compare_settings(point, config, CPU)[0] == {}


def test_a_resume_with_other_settings_is_refused_field_by_field(
    config: Config, cache: Path, halfway: Path
) -> None:
    other = replace(config, seed=1, learning_rate=0.01, eval_steps=3, resume_from=str(halfway))
    message = (
        f"{halfway} was trained with learning_rate 0.001, now 0.01; seed 0, now 1; a run that is resumed keeps what "
        "changes its training: leave learning_rate and seed as before, or take the new values on purpose with "
        "--allow_changed"
    )
    for start in (Plan, Trainer):
        with pytest.raises(CheckpointError, match=f"^{re.escape(message)}$"):
            start(other, cache)


def test_allowed_changes_are_taken_and_recorded_and_the_others_are_named(
    config: Config, cache: Path, halfway: Path
) -> None:
    other = replace(config, seed=1, logging_steps=2, resume_from=str(halfway))
    trainer = Trainer(other, cache, allow_changed=True)
    assert "changed, but not what is learnt: logging_steps 1, now 2" in trainer.plan.lines
    assert "changed on purpose (--allow_changed): seed 0, now 1" in trainer.plan.lines
    last = trainer.run()
    once = [{"after_step": 2, "settings": {"seed": [0, 1]}}]
    assert json.loads((last / "trainer.json").read_text())["changed"] == once
    assert SavedModel.read(last).config().seed == 1
    longer = replace(other, max_steps=5, num_epochs=9, resume_from=str(last))
    second = {"after_step": 4, "settings": {"num_epochs": [3, 9], "max_steps": [4, 5]}}
    record = Trainer(longer, cache, allow_changed=True).run() / "trainer.json"
    assert json.loads(record.read_text())["changed"] == [*once, second]


def test_other_statements_and_steps_of_another_size_are_taken_if_allowed(
    config: Config, cache: Path, halfway: Path
) -> None:
    larger = replace(config, batch_size=3, resume_from=str(halfway))
    with pytest.raises(
        CheckpointError, match=r"with 4 statements a step, now there are 6: .* --allow_changed"
    ):
        Trainer(larger, cache)
    fewer = replace(config, num_samples=5, resume_from=str(halfway))
    changes = Trainer(fewer, cache, allow_changed=True).plan.changed
    assert changes.keys() == {"num_samples", "num_statements", "data_sha256"}
    assert (changes["num_samples"], changes["num_statements"]) == ([None, 5], [6, 5])
    assert Trainer(larger, cache, allow_changed=True).plan.changed == {"statements_per_step": [4, 6]}


def test_another_revision_of_gemma_is_refused(config: Config, cache: Path, halfway: Path) -> None:
    plan = Plan(replace(config, resume_from=str(halfway)), cache)
    point, facts = plan.resumed, plan.identity()
    assert point is not None
    assert check_same_run(point, facts, "b", False) == {}  # a local folder, as here, had none
    point.saved.world["model_revision"] = "a"
    assert check_same_run(point, facts, None, False) == check_same_run(point, facts, "a", False) == {}
    with pytest.raises(
        CheckpointError, match="was trained with Gemma's revision a, now it is b; use the same"
    ):
        check_same_run(point, facts, "b", False)
    assert check_same_run(point, facts, "b", True) == {"model_revision": ["a", "b"]}


# ---- the tool


def train(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: object
) -> tuple[Any, str, str]:
    """tools/train.py in this process: its exit status, output and errors."""
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "tools/train.py"), run_name="__main__")
    return ended.value.code, *capsys.readouterr()


def test_resume_from_alone_goes_on_with_the_run_where_it_lies(
    config: Config,
    cache: Path,
    halfway: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    moved = tmp_path / "moved"
    shutil.move(config.output_dir, moved)
    monkeypatch.chdir(tmp_path)
    status, out, errors = train(monkeypatch, capsys, "--cache", cache, "--resume_from", moved)
    assert (status, [path.name for path in list_checkpoints(moved)]) == (
        0,
        ["checkpoint-2", "checkpoint-4"],
    ), errors
    assert f"done: {moved}/checkpoint-4" in out
    assert f"changed, but not what is learnt: output_dir {json.dumps(config.output_dir)}, now" in out
    assert not (tmp_path / "checkpoints").exists()
    saved = SavedModel.read(moved / "checkpoint-4").config()
    assert saved == replace(config, output_dir=str(moved), resume_from=str(moved))


def test_a_settings_file_that_names_the_folder_or_another_value_counts(
    config: Config,
    cache: Path,
    halfway: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    save_config(replace(config, output_dir=str(tmp_path / "other"), max_grad_norm=2.0), tmp_path / "own.json")
    given = ("--cache", cache, "--config", tmp_path / "own.json", "--resume_from", halfway)
    status, _, errors = train(monkeypatch, capsys, *given)
    assert (status, errors.split(";")[0]) == (
        1,
        f"train: {halfway} was trained with max_grad_norm 1.0, now 2.0",
    )
    status, out, _ = train(monkeypatch, capsys, *given, "--allow_changed")
    assert status == 0
    assert f"done: {tmp_path}/other/checkpoint-4" in out


def test_a_finished_run_says_so_and_how_to_go_on(
    config: Config,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    last = Trainer(config, cache).run()
    before = metrics(last.parent)
    given = ("--cache", cache, "--resume_from", last.parent)
    capsys.readouterr()
    status, out, err = train(monkeypatch, capsys, *given)
    assert (status, err) == (0, "")  # no bar without a step
    longer = "--num_epochs 6 --max_steps 8 --allow_changed"
    assert f"finished: all 4 optimizer steps are taken; to go on, give more with {longer}, or start" in out
    assert f"finished before: {last}. Next:" in out
    assert (list_checkpoints(last.parent)[-1], metrics(last.parent)) == (last, before)
    status, out, err = train(monkeypatch, capsys, *given, *longer.split())
    assert f"done: {last.parent}/checkpoint-8" in out
    assert "train: 100%" in err


# ---- one run in a folder


def test_a_folder_in_which_another_run_trains_is_refused(config: Config, cache: Path) -> None:
    folder = Path(config.output_dir)
    for start in (Plan, Trainer):
        with held(folder), pytest.raises(InUse, match=f"^--output_dir {folder} is in use: process "):
            start(config, cache)
    assert [path.name for path in folder.iterdir()] == [".lock"]
    Trainer(config, cache).run()
    with held(folder):  # the run has ended, and its process has not
        pass


def test_a_run_that_ended_between_the_plan_and_the_lock_is_not_gone_over(
    config: Config, cache: Path, halfway: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Late(OutputLock):
        def __init__(self, output: Path, flag: str) -> None:
            shutil.copytree(halfway, output / "checkpoint-4")
            super().__init__(output, flag)

    monkeypatch.setattr("theworld.training.trainer.OutputLock", Late)
    with pytest.raises(CheckpointError, match="already holds checkpoint-4"):
        Trainer(replace(config, resume_from=str(halfway)), cache)


def test_the_hash_of_statements_is_as_older_checkpoints_have_it_and_tells_a_question_and_a_group() -> None:
    plain = Statement("a.jpg", "It is so.", 1, "on", 0, "http://x/a.jpg")
    hashed = {"image": "a.jpg", "caption": "It is so.", "label": 1, "relation": "on", "index": 0}
    text = json.dumps([[{**hashed, "image_link": "http://x/a.jpg"}], None], sort_keys=True)

    def found(statement: Statement) -> str:
        return Data([statement], [], cast(Any, None), None).sha256()

    assert found(plain) == hashlib.sha256(text.encode()).hexdigest()
    others = (replace(plain, is_question=True), replace(plain, group="1"), replace(plain, group="2"))
    assert len({found(statement) for statement in (plain, *others)}) == 4
