"""What a run says before it starts is what it then does, and nothing is written for it.

How much memory a training takes, by hand.
"""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from constants import EMBEDDED_GEMMA, GIB

from theworld.config.config import Config
from theworld.models.gemma import Gemma
from theworld.models.projection import ProjectionShape
from theworld.training import memory as machine
from theworld.training.memory import (
    PUBLISHED,
    ROOM,
    Layers,
    Memory,
    Plan,
    Sizes,
    check_memory,
    layer_values,
    projection_bytes,
    sizes_of,
    training_bytes,
)
from theworld.training.trainer import Trainer
from theworld.utils.device import memory_of


def test_the_guides_run_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """bfloat16; RESULTS.md: a layer keeps 3 x 2,560 + 2 x 10,240 + 24 x 256 values of a token."""
    monkeypatch.setattr(machine, "resolve_device", lambda name: torch.device("cuda"))
    weights, kept = training_bytes(Config(), PUBLISHED["4b"])
    assert weights == 2 * 3.88e9
    tokens = 8 * (256 + 256 + 60)
    assert kept == 2 * tokens * (33 * 34_304 + 2 * 10_240)
    in_8_bits, kept_in_8_bits = training_bytes(replace(Config(), fp8=True), PUBLISHED["4b"])
    linear = 34 * 2_560 * (24 * 256 + 3 * 10_240)
    assert in_8_bits == weights - linear
    # Gate and up of a layer in a byte each, and at work the products of both gradients.
    assert kept_in_8_bits == 2 * tokens * (33 * 24_064 + 4 * 10_240)
    again = replace(Config(), use_gradient_checkpointing=True)
    assert training_bytes(again, PUBLISHED["4b"])[1] == 2 * tokens * (34 * 2_560 + 2 * 34_304)
    channels = replace(Config(), world_mode="channel")
    assert training_bytes(channels, PUBLISHED["4b"])[1] == 2 * 8 * (16 + 256 + 60) * (33 * 34_304 + 20_480)


@pytest.mark.parametrize(
    ("kind", "compiled", "values"),
    [
        ("frozen", True, 34_304),
        ("frozen", False, 65_536),
        ("language", True, 54_784),
        ("language", False, 107_520),
        ("lora", True, 56_832),
        ("lora", False, 90_624),
    ],
)
def test_a_layer_of_the_4b_keeps_what_was_counted(kind: str, compiled: bool, values: int) -> None:
    """RESULTS.md: counted from the tensors that are saved of one layer in bfloat16."""
    assert layer_values(Layers(compiled, kind), PUBLISHED["4b"]) == values
    # In float32 what norms keep is not wider than the rest.
    exact = layer_values(Layers(compiled, kind, width=4), PUBLISHED["4b"])
    assert exact < values if not compiled else exact == values


def test_sizes_are_those_of_the_model(gemma: Gemma, text_gemma_folder: Path) -> None:
    sizes = sizes_of(str(EMBEDDED_GEMMA))
    assert sizes is not None
    assert replace(sizes, parameters=0) == Sizes(64, 4, 192, 12, 16, 0, 16, 4)
    counted = sum(p.numel() for p in gemma.text_model.parameters())
    assert sizes.parameters == pytest.approx(counted, rel=0.01)  # norms are left out
    text = sizes_of(str(text_gemma_folder))
    assert text is not None
    assert (text.hidden, text.layers, text.image_tokens) == (32, 3, 0)


@pytest.mark.parametrize(("name", "size"), [("google/gemma-3-4b-it", "4b"), ("google/gemma-3-270m", "270m")])
def test_without_its_config_a_published_name_is_enough(
    monkeypatch: pytest.MonkeyPatch, name: str, size: str
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", "/nowhere")
    assert sizes_of(name) == PUBLISHED[size]
    assert sizes_of("someone/else") is None


def test_this_machine_has_some() -> None:
    have = memory_of(torch.device("cpu"))
    assert 0 < have.free <= have.total
    assert have.capability is None


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


def test_the_estimate_is_of_the_step_with_the_most_images(config: Config, cache: Path) -> None:
    config = replace(config, gradient_accumulation_steps=1, max_steps=6)
    plan = Plan(config, cache)
    images = [len({s.image for s in plan.order.take(start, 2)}) for start in range(0, 12, 2)]
    assert set(images) == {1, 2}
    assert plan.heaviest_start == 2 * images.index(2)
    assert plan.memory == plan.estimate(config, plan.heaviest_start)
    assert plan.memory.activations > plan.estimate(config, 2 * images.index(1)).activations


def test_a_share_of_the_statements_takes_as_many_steps_as_all_of_them(config: Config, cache: Path) -> None:
    config = replace(config, max_steps=None, num_epochs=4)
    whole, half = (Plan(replace(config, train_share=share), cache) for share in (None, 0.5))
    assert (len(whole.data.train), len(half.data.train)) == (6, 3)
    assert (whole.num_steps, half.num_steps) == (6, 6)  # 4 epochs of 6 statements in steps of 4, or 8 of 3
    assert half.data.notes[0] == (
        "train: 3 statements, drawn by the seed (train_share 0.5), of 6 of 6 statements, 3 of 3 images; as many steps "
        "as with all of them"
    )


def test_what_the_projection_keeps_is_counted_by_hand() -> None:
    shape = ProjectionShape((16, 8, 8), 64, patch=2)
    assert projection_bytes(shape) == 4 * 16 * (2 * 64 + 3 * 64)
    assert projection_bytes(replace(shape, architecture="linear")) == 4 * 16 * 3 * 64


def test_what_is_held_in_every_step_has_to_fit(config: Config, cache: Path) -> None:
    plan = Plan(config, cache)
    plan.memory = Memory(frozen=8 * GIB, trained=64 * GIB, activations=3 * GIB, available=70 * GIB)
    assert str(plan.memory).startswith("memory: about 75.0 GiB of 70.0 GiB: frozen weights 8.0 GiB, ")
    with pytest.raises(
        ValueError,
        match=r"on cpu\. memory: about 75\.0 GiB of 70\.0 GiB: .*--lora_rank 16.*--use_fsdp`; to try",
    ):
        check_memory(plan)
    plan.memory = replace(plan.memory, available=75 * GIB)
    check_memory(plan)
    plan.memory = replace(plan.memory, loading=76 * GIB)
    with pytest.raises(
        ValueError, match=r"Loading the weights takes 76\.0 GiB for a moment: use a smaller Gemma"
    ):
        check_memory(plan)


def test_a_run_that_cannot_fit_is_refused_before_weights_load_and_what_is_proposed_fits(
    config: Config, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(config, batch_size=6, gradient_accumulation_steps=1)
    plan = Plan(config, cache)
    smaller = replace(config, batch_size=3, gradient_accumulation_steps=2)
    room = plan.estimate(smaller).total / ROOM + 1
    assert plan.estimate(smaller).total < room < plan.memory.total
    monkeypatch.setattr(machine, "room_on", lambda device: room)
    monkeypatch.setattr(Gemma, "with_weights", lambda gemma: pytest.fail("weights load"))
    with pytest.raises(
        ValueError, match=r"this run does not fit on cpu\. memory: about [\d.]+ MiB of [\d.]+ MiB: "
    ) as refused:
        Trainer(config, cache)
    found = re.search(
        r"would fit, by the estimate: --batch_size 3 --gradient_accumulation_steps 2, or .*"
        r"--use_gradient_checkpointing; to try it as it is, add --no-check_memory",
        str(refused.value),
    )
    assert found is not None, refused.value
    assert Plan(smaller, cache).memory.total <= room
    assert Plan(replace(config, check_memory=False), cache).memory.total > room


def test_available_is_what_this_machine_has(config: Config, cache: Path) -> None:
    memory = Plan(config, cache).memory
    with open("/proc/meminfo") as file:
        total = int(file.readline().split()[1]) * 1024
    assert abs(memory.available - total) < 0.01 * total
    assert torch.device(config.device).type == "cpu"
