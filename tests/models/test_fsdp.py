"""Gemma sharded over processes trains as it does in one."""

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from commands import launch
from runs import Run, metrics
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor

from theworld.config.config import Config
from theworld.models import fsdp, theworld
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


@pytest.mark.parametrize("lora_rank", [None, 2])
def test_two_sharded_processes_train_and_evaluate_as_one(
    lora_rank: int | None, config: Config, cache: Path, tmp_path: Path
) -> None:
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

    # Each process wrote its shares of the moments, and put together no sharded tensor but the main one the weights.
    weights = sum(weight.numel() for weight in load_file(one / f"{part}.safetensors").values())
    shards = [load_file(path) for path in sorted((tmp_path / "two" / one.name / "optimizer").iterdir())]
    assert [sum(share.numel() for share in shard.values()) for shard in shards] == [weights] * 2
    assert {name.split(".")[1] for name in shards[0]} == {"exp_avg", "exp_avg_sq"}

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


def note_whole_tensors() -> None:
    """Write down how many values of sharded tensors this process puts together, outside of a layer at work."""
    real, full_tensor = fsdp.gather_to_main, DTensor.full_tensor

    def gathered(tensor: torch.Tensor) -> torch.Tensor | None:
        found = real(tensor)
        if isinstance(tensor, DTensor):
            with open(f"{os.environ['NOTES']}-{os.environ['RANK']}", "a") as file:
                file.write(f"{0 if found is None else found.numel()}\n")
        return found

    def full(tensor: DTensor, **options: object) -> torch.Tensor:
        assert tensor.ndim == 0, "only a norm is summed on every process"
        return full_tensor(tensor, **options)  # type: ignore[arg-type]

    theworld.gather_to_main, DTensor.full_tensor = gathered, full  # type: ignore[attr-defined, method-assign]


def test_a_save_puts_weights_together_in_the_main_process_alone_and_a_resume_is_bitwise(
    config: Config, session_cache: Path, tmp_path: Path
) -> None:
    config = replace(
        config, batch_size=1, freeze_gemma_language=False, output_dir=str(tmp_path / "run"), do_eval=False
    )
    notes = {"NOTES": str(tmp_path / "notes")}
    run = Run(config, session_cache, ranks=2, prepare=note_whole_tensors, **FSDP, **notes)
    assert run.wait(400) == {0}, run.log.read_text()
    weights = [w.numel() for w in load_file(run.folder / "checkpoint-4" / "language.safetensors").values()]
    main, other = (
        [int(line) for line in Path(f"{notes['NOTES']}-{rank}").read_text().splitlines()] for rank in (0, 1)
    )
    assert sorted(main) == sorted(2 * weights)  # of two checkpoints
    assert other == [0] * len(main)

    halfway = str(run.folder / "checkpoint-2")
    again = Run(
        replace(config, resume_from=halfway, output_dir=str(tmp_path / "again")),
        session_cache,
        ranks=2,
        **FSDP,
    )
    assert again.wait(400) == {0}, again.log.read_text()
    for path in sorted((run.folder / "checkpoint-4").rglob("*.safetensors")):
        name = path.relative_to(run.folder)
        # the header's order is not always the same
        have, want = (
            load_file(again.folder / name),
            load_file(path),
        )
        assert have.keys() == want.keys()
        assert all(torch.equal(have[key], want[key]) for key in want), name


def test_a_frozen_language_model_is_not_sharded(config: Config, cache: Path, tmp_path: Path) -> None:
    done = launch(config, cache, tmp_path / "run.json", 1, **FSDP)
    assert done.returncode != 0
    assert "started with --use_fsdp, but its language model is frozen" in done.stderr


def test_a_dry_run_of_two_processes_speaks_once(config: Config, cache: Path, tmp_path: Path) -> None:
    config = replace(config, freeze_gemma_language=False)
    done = launch(config, cache, tmp_path / "run.json", flags=["--dry_run"], **FSDP)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("2 x 2 x 2 (processes) statements") == 1
    assert done.stdout.splitlines()[-1] == "dry run: nothing was written"
    assert not Path(config.output_dir).exists()


@pytest.mark.parametrize("fused", [False, True])
def test_an_optimizers_state_is_loaded_and_its_kernels_are_not(fused: bool) -> None:
    weight = torch.nn.Parameter(torch.ones(3))
    saved, own = (torch.optim.AdamW([weight], lr=0.1, fused=f) for f in (not fused, fused))
    weight.grad = torch.full((3,), 2.0)
    saved.step()
    fsdp.load_state(own, saved.state_dict())
    assert own.param_groups[0]["fused"] is fused
    assert torch.equal(own.state[weight]["exp_avg"], saved.state[weight]["exp_avg"])
    own.step()
    assert float(own.state[weight]["step"]) == 2
