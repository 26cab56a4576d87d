"""Gemma sharded over processes trains as it does in one."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file
from test_processes import metrics

from theworld.config import Config, save_config
from theworld.extract import extract
from theworld.train import Trainer


def launch(config: Config, cache: Path, settings: Path, count: int = 2) -> subprocess.CompletedProcess[str]:
    """tools/train.py in `count` processes, as `accelerate launch --use_fsdp` starts them."""
    save_config(config, settings)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}"]
    arguments = ["tools/train.py", "--config", str(settings), "--cache", str(cache)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "ACCELERATE_USE_FSDP": "true"}
    return subprocess.run(
        [*launcher, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
    )


@pytest.mark.parametrize("lora_rank", [None, 2])
def test_two_sharded_processes_train_and_evaluate_as_one(
    lora_rank: int | None, config: Config, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    extract(config, cache, with_vision=True, allow_missing=False)
    # Three images and six statements: in some steps one of four passes has no statement.
    config = replace(
        config, freeze_gemma_language=False, lora_rank=lora_rank, statement_loss_weight=0.3, max_grad_norm=0.5
    )
    one = Trainer(config, cache).run()
    shared = replace(config, batch_size=1, output_dir=str(tmp_path / "two"))
    done = launch(shared, cache, tmp_path / "two.json")
    assert done.returncode == 0, done.stderr
    assert "4 optimizer steps of 1 x 2 x 2 (processes) statements" in done.stdout
    for a, b in zip(metrics(tmp_path / "two"), metrics(one.parent), strict=True):
        assert a.pop("phase") == b.pop("phase")
        assert a == pytest.approx(b, abs=1e-4, rel=1e-4)
    part = "lora" if lora_rank else "language"
    for file in ("projection.safetensors", f"{part}.safetensors"):
        found, wanted = load_file(tmp_path / "two" / one.name / file), load_file(one / file)
        assert found.keys() == wanted.keys()
        for name, weight in wanted.items():
            torch.testing.assert_close(found[name], weight, atol=1e-5, rtol=1e-3)

    # A checkpoint of shards is like any other: one process goes on from it, and two from one of one.
    halfway = str(tmp_path / "two" / "checkpoint-2")
    alone = Trainer(replace(config, resume_from=halfway, output_dir=str(tmp_path / "alone")), cache).run()
    resumed = replace(
        shared, resume_from=str(one.parent / "checkpoint-2"), output_dir=str(tmp_path / "again")
    )
    done = launch(resumed, cache, tmp_path / "again.json")
    assert done.returncode == 0, done.stderr
    for again in (alone, tmp_path / "again" / one.name):
        found = load_file(again / f"{part}.safetensors")
        for name, weight in load_file(one / f"{part}.safetensors").items():
            torch.testing.assert_close(found[name], weight, atol=1e-5, rtol=1e-3)


def test_a_frozen_language_model_is_not_sharded(config: Config, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    extract(config, cache, with_vision=True, allow_missing=False)
    done = launch(config, cache, tmp_path / "run.json", 1)
    assert done.returncode != 0
    assert "started with --use_fsdp, but its language model is frozen" in done.stderr
