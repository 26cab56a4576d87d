"""Gemma sharded over processes trains as it does in one."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from commands import launch
from runs import metrics
from safetensors.torch import load_file

from theworld.config.config import Config
from theworld.extraction.extract import extract
from theworld.models.fsdp import load_state, whole_state
from theworld.training.trainer import Trainer

# As `accelerate launch --use_fsdp` sets them by itself.
FSDP = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "1",
    "FSDP_SHARDING_STRATEGY": "FULL_SHARD",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_OFFLOAD_PARAMS": "false",
    "FSDP_MIN_NUM_PARAMS": "100000000",
    "FSDP_FORWARD_PREFETCH": "false",
    "FSDP_USE_ORIG_PARAMS": "true",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
    "FSDP_SYNC_MODULE_STATES": "true",
    "FSDP_ACTIVATION_CHECKPOINTING": "false",
    "FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD": "false",
}


@pytest.mark.parametrize("fused", [False, True])
def test_an_optimizers_state_is_taken_and_its_kernels_are_not(fused: bool) -> None:
    weight = torch.nn.Parameter(torch.ones(3))
    theirs, own = (torch.optim.AdamW([weight], lr=0.1, fused=f) for f in (not fused, fused))
    weight.grad = torch.full((3,), 2.0)
    theirs.step()
    load_state(own, whole_state(theirs.state_dict()))
    assert own.param_groups[0]["fused"] is fused
    assert torch.equal(own.state[weight]["exp_avg"], theirs.state[weight]["exp_avg"])
    assert float(own.state[weight]["step"]) == 1
    own.step()
    assert float(own.state[weight]["step"]) == 2


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
    done = launch(shared, cache, tmp_path / "two.json", **FSDP)
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
    done = launch(resumed, cache, tmp_path / "again.json", **FSDP)
    assert done.returncode == 0, done.stderr
    for again in (alone, tmp_path / "again" / one.name):
        found = load_file(again / f"{part}.safetensors")
        for name, weight in load_file(one / f"{part}.safetensors").items():
            torch.testing.assert_close(found[name], weight, atol=1e-5, rtol=1e-3)


def test_a_frozen_language_model_is_not_sharded(config: Config, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    extract(config, cache, with_vision=True, allow_missing=False)
    done = launch(config, cache, tmp_path / "run.json", 1, **FSDP)
    assert done.returncode != 0
    assert "started with --use_fsdp, but its language model is frozen" in done.stderr


def test_a_dry_run_of_two_processes_speaks_once(config: Config, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    extract(config, cache, with_vision=True, allow_missing=False)
    config = replace(config, freeze_gemma_language=False)
    done = launch(config, cache, tmp_path / "run.json", flags=["--dry_run"], **FSDP)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("2 x 2 x 2 (processes) statements") == 1
    assert done.stdout.splitlines()[-1] == "dry run: nothing was written"
    assert not Path(config.output_dir).exists()
