"""How much memory a training takes, by hand."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import EMBEDDED_GEMMA

from theworld import machine
from theworld.config import Config
from theworld.gemma import Gemma
from theworld.machine import PUBLISHED, Sizes, memory_of, sizes_of, training_bytes


def test_the_guides_run_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """bfloat16; RESULTS.md: a layer keeps 3 x 2,560 + 2 x 10,240 + 24 x 256 values of a token."""
    monkeypatch.setattr(machine, "resolve_device", lambda name: torch.device("cuda"))
    weights, kept = training_bytes(Config(), PUBLISHED["4b"])
    assert weights == 2 * 3.88e9
    tokens = 8 * (256 + 256 + 60)
    assert kept == 2 * tokens * 34 * 34_304
    again = replace(Config(), use_gradient_checkpointing=True)
    assert training_bytes(again, PUBLISHED["4b"])[1] == 2 * tokens * (34 * 2_560 + 3 * 34_304)
    channels = replace(Config(), world_mode="channel")
    assert training_bytes(channels, PUBLISHED["4b"])[1] == 2 * 8 * (16 + 256 + 60) * 34 * 34_304


def test_sizes_are_those_of_the_model(gemma: Gemma, text_gemma_folder: Path) -> None:
    sizes = sizes_of(str(EMBEDDED_GEMMA))
    assert sizes is not None
    assert replace(sizes, parameters=0) == Sizes(64, 4, 192, 12, 16, 0, 16)
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
