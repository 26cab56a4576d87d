"""What a run says before it starts is what it then does, and nothing is written for it."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from theworld.config import Config
from theworld.extract import extract
from theworld.preflight import GIB, Memory, Plan, check_memory
from theworld.train import Trainer


@pytest.fixture
def cache(config: Config, tmp_path: Path) -> Path:
    """A finished cache with latents and vision features of the three photographs."""
    extract(config, tmp_path / "cache", with_vision=True, allow_missing=False)
    return tmp_path / "cache"


@pytest.mark.parametrize(
    "settings", [{}, {"freeze_gemma_vision": False}, {"freeze_gemma_language": False, "lora_rank": 2}]
)
def test_what_is_counted_from_shapes_is_what_loads(
    settings: dict[str, object], config: Config, cache: Path, tmp_path: Path
) -> None:
    config = replace(config, **settings)
    files = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    plan = Plan(config, cache)
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")} == files
    assert not plan.gemma.has_weights
    lines = list(plan.lines)
    trainer = Trainer(config, cache)
    assert trainer.plan.lines == lines
    assert trainer.model.gemma.has_weights
    trains = sum(p.numel() for p in trainer.model.trainable().values())
    gemma = sum(p.numel() for p in trainer.model.gemma.model.parameters())
    projection = sum(p.numel() for p in trainer.model.projection.parameters())
    assert plan.facts.trainable == trains
    assert plan.facts.frozen == gemma + projection - trains
    trained = sum(p.numel() for p in trainer.model.gemma.model.parameters() if p.requires_grad)
    assert plan.memory.trained == 16 * (trained + projection)
    assert plan.memory.frozen == 4 * (gemma - trained)


def test_what_a_pass_keeps_is_estimated_from_its_tokens(config: Config, cache: Path) -> None:
    short = Plan(config, cache).memory
    longer = Plan(replace(config, world_patch=1), cache).memory
    less = Plan(replace(config, use_gradient_checkpointing=True), cache).memory
    vision = Plan(replace(config, freeze_gemma_vision=False), cache).memory
    assert short.activations < longer.activations
    assert less.activations < short.activations < vision.activations


def test_a_run_that_cannot_fit_is_refused_before_it_loads() -> None:
    memory = Memory(frozen=8 * GIB, trained=64 * GIB, activations=3 * GIB, available=70 * GIB)
    with pytest.raises(
        ValueError, match=r"take 72\.0 GiB, and there are 70\.0: .*--lora_rank 16.*--use_fsdp"
    ):
        check_memory(memory, sharded=False)
    check_memory(replace(memory, available=73 * GIB), sharded=False)  # a pass can be made smaller
    assert str(memory).startswith("memory: about 75.0 of 70.0 GiB: frozen weights 8.0, ")


def test_available_is_what_this_machine_has(config: Config, cache: Path) -> None:
    memory = Plan(config, cache).memory
    with open("/proc/meminfo") as file:
        total = int(file.readline().split()[1]) * 1024
    assert abs(memory.available - total) < 0.01 * total
    assert torch.device(config.device).type == "cpu"
