"""FLOPs against counts by hand and against torch's counter."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from benchmark.chip import (
    copy_bytes_per_second,
    count_flops,
    decoder_parameters,
    language_flops,
    matmul_flops_per_second,
    projection_flops,
    vae_encode_flops,
    vision_flops,
    work_of,
)
from constants import EMBEDDED_VAE, QUESTION
from tiny_model import latents_of, make_model, vision_of
from torch import nn

from theworld.data.vsr import Statement
from theworld.models.attention import attention_masks
from theworld.models.gemma import Gemma
from theworld.models.packing import Packer
from theworld.models.projection import ProjectionShape, WorldProjection

CPU = torch.device("cpu")


def test_vae_flops_by_hand() -> None:
    # Embedded VAE at 64 pixels: a convolution is 2 x values out x values in each kernel (of a frame, of its last
    # temporal tap alone); attention of one block over 8 x 8 places of 32 channels is 4 x 64^2 x 32.
    attention = 4 * 64**2 * 32
    assert vae_encode_flops(str(EMBEDDED_VAE), 64) == {
        "frame": 38_338_560 + attention,
        "as_it_is": 105_578_496 + attention,
    }


def test_vision_flops_by_hand(gemma: Gemma) -> None:
    config = gemma.model.config.vision_config
    tokens = (config.image_size // config.patch_size) ** 2
    width, inner = config.hidden_size, config.intermediate_size
    embedding = 2 * tokens * width * 3 * config.patch_size**2
    layer = 2 * tokens * (4 * width**2 + 2 * width * inner) + 4 * tokens**2 * width
    assert vision_flops(config) == embedding + config.num_hidden_layers * layer


def test_decoder_parameters_count_the_linear_layers(gemma: Gemma) -> None:
    layer = gemma.text_model.layers[0]
    linear = [m for m in layer.modules() if isinstance(m, nn.Linear)]
    assert decoder_parameters(gemma.text_config) == sum(m.weight.numel() for m in linear)


@pytest.mark.parametrize("position", ["before", "after"])
def test_the_pairs_are_those_that_the_masks_allow(
    position: str, gemma: Gemma, statements: list[Statement]
) -> None:
    packer = Packer(gemma, QUESTION, num_world_tokens=4, world_position=position)
    batch = packer.pack(statements)
    work = work_of(batch, sliding_window=20)
    real = (batch.preorder >= 0)[:, None, :, None]
    masks = attention_masks(batch, 20, "sdpa")
    assert work.pairs == {name: int((mask & real).sum()) for name, mask in masks.items()}
    assert work.tokens == int((batch.preorder >= 0).sum())
    assert (work.label_rows, work.worlds) == (6, 3)


def test_tokens_before_the_world_tokens_need_no_gradient(gemma: Gemma, statements: list[Statement]) -> None:
    batch = Packer(gemma, QUESTION, num_world_tokens=4).pack(statements)
    work = work_of(batch, sliding_window=20)
    # <bos><start_of_turn>user\n: four tokens an image stand before its world tokens
    before = int(batch.position_ids.flatten()[batch.world_slots[0, 0]])
    assert before == 4
    assert work.tokens_after == work.tokens - 3 * before
    # Four causal tokens see 1 + 2 + 3 + 4; all others see those four.
    own = before * (before + 1) // 2
    assert work.pairs_after["full_attention"] == work.pairs["full_attention"] - 3 * own
    seen = work.pairs_after["full_attention"] - work.pairs_within["full_attention"]
    assert seen == work.tokens_after * before
    behind = Packer(gemma, QUESTION, num_world_tokens=4, world_position="after").pack(statements)
    own_part = work_of(behind, sliding_window=20)
    # The image's 16 tokens, what stands before and around them: none of it depends on the world behind it.
    image = int(behind.position_ids.flatten()[behind.world_slots[0, 0]])
    assert image == 22
    assert own_part.tokens_after == own_part.tokens - 3 * image


def test_without_world_tokens_there_is_no_backward_work(gemma: Gemma, statements: list[Statement]) -> None:
    work = work_of(Packer(gemma, QUESTION, num_world_tokens=0).pack(statements), 1024)
    assert work.tokens_after == 0
    assert sum(work.pairs_after.values()) == 0


def test_language_flops_by_hand() -> None:
    config = SimpleNamespace(
        hidden_size=4, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=3,
        intermediate_size=5, vocab_size=7, layer_types=["full_attention", "sliding_attention"],
    )  # fmt: skip
    assert decoder_parameters(config) == 4 * 6 * 2 + 4 * 3 * 2 + 3 * 4 * 5 == 132
    # One image, three tokens, the last two of them trained, causal: 1 + 2 + 3 pairs. A window of two.
    batch: Any = SimpleNamespace(
        worlds=("a",),
        token_ids=torch.zeros(1, 3),
        preorder=torch.arange(3)[None],
        subtree_end=torch.full((1, 3), 3),
        bidirectional_group=torch.full((1, 3), -1),
        position_ids=torch.arange(3)[None],
        world_slots=torch.tensor([[1]]),
        label_rows=torch.tensor([2]),
    )
    work = work_of(batch, 2)
    full = [p["full_attention"] for p in (work.pairs, work.pairs_after, work.pairs_within)]
    assert full == [6, 5, 3]
    assert (work.label_pairs["sliding_attention"], work.label_pairs_within["sliding_attention"]) == (2, 2)
    assert (work.label_pairs["full_attention"], work.label_pairs_within["full_attention"]) == (3, 2)
    flops = language_flops(config, [work], projection=100)
    # The last layer: keys and values (24 weights) of all tokens, the rest (108) at the label.
    assert flops["forward"] == 2 * (132 + 24) * 3 + 2 * 108 + 4 * 6 * (6 + 2) + 2 * 4 * 7 + 100
    assert flops["backward"] == 2 * (132 + 24) * 2 + 2 * 108 + 4 * 6 * (5 + 3 + 2 + 2) + 2 * 4 * 7 + 200


def test_the_flops_of_a_step_equal_those_that_torch_counts(
    gemma: Gemma, photographs: Path, statements: list[Statement]
) -> None:
    model = make_model(gemma)
    batch = model.packer().pack(statements)
    latents, vision = latents_of(batch.images), vision_of(gemma, photographs, batch.images)
    found = count_flops(lambda: model.losses(batch, latents, vision)["total"].backward())
    work = work_of(batch, gemma.sliding_window)
    without_pairs = {name: dict.fromkeys(work.pairs, 0) for name in vars(work) if "pairs" in name}
    projection = projection_flops(model.projection.shape)
    # torch counts no attention on a CPU,
    counted = language_flops(gemma.text_config, [replace(work, **without_pairs)], projection)
    ours = counted["forward"] + counted["backward"]
    # but padding and tokens before the world tokens, backwards too, in all linears; and the last layer's queries;
    config, size = gemma.text_config, batch.token_ids.numel()
    queries = config.hidden_size * config.num_attention_heads * config.head_dim
    keys = 2 * config.hidden_size * config.num_key_value_heads * config.head_dim
    everywhere = (config.num_hidden_layers - 1) * decoder_parameters(config) + keys
    ours += 2 * everywhere * (size - work.tokens + size - work.tokens_after)
    ours += 2 * queries * 2 * (size - work.label_rows)
    # and Gemma's own projector.
    ours += 2 * vision.numel() * gemma.width
    # The projection's first layer has no gradient of its input, which `language_flops` counts.
    first = 2 * model.projection.shape.num_tokens * model.projection.shape.values_per_token * gemma.width
    assert found == pytest.approx(ours - work.worlds * first, rel=1e-6)


def test_projection_flops_by_hand() -> None:
    shape = ProjectionShape((16, 8, 8), width=10, patch=2, hidden=3)
    assert projection_flops(shape) == 2 * 16 * (64 * 3 + 3 * 10)
    linear = ProjectionShape((16, 8, 8), width=10, patch=2, architecture="linear")
    assert projection_flops(linear) == 2 * 16 * 64 * 10
    transformer = ProjectionShape(
        (16, 8, 8), width=10, patch=2, architecture="transformer", hidden=6, depth=1
    )
    attention = 4 * 16 * 16 * 6  # scores and sums of values
    assert projection_flops(transformer) == 2 * 16 * (64 * 6 + 12 * 6 * 6 + 6 * 10) + attention


def test_projection_flops_equal_those_that_torch_counts() -> None:
    for architecture in ("mlp", "linear", "conv"):
        shape = ProjectionShape((16, 8, 8), width=10, patch=2, architecture=architecture, hidden=6)
        projection = WorldProjection(shape, [0.0] * 16, [1.0] * 16)
        found = count_flops(lambda p=projection: p(torch.zeros(1, 16, 8, 8)))  # type: ignore[misc]
        assert found == projection_flops(shape)


def test_measured_rates_are_plausible() -> None:
    assert 1e6 < matmul_flops_per_second(CPU, torch.float32, 64, repeats=1) < 1e16
    assert 1e6 < copy_bytes_per_second(CPU, 2**16, repeats=1) < 1e16
