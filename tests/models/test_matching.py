"""Projections of equally many trained parameters."""

from dataclasses import replace
from typing import Any

import pytest
from constants import EMBEDDED_GEMMA, EMBEDDED_VAE

from theworld.config.config import Config
from theworld.models.matching import Match, match_hidden, num_parameters, shape_of
from theworld.models.projection import ProjectionShape, WorldProjection
from theworld.utils.device import count_parameters

WORLD = ProjectionShape((16, 64, 64), 2560)  # of the recipe on the 4B
ROWS: dict[str, dict[str, Any]] = {
    "pixels": {"latent_shape": (192, 64, 64)},
    "none": {"trained_inputs": True},
    "gemma_vision": {"latent_shape": (1152, 16, 16), "patch": 1},
}


def test_parameters_are_counted_by_hand() -> None:
    # 256 -> 2,560 -> 2,560 with biases, the norm's scale, two brackets
    assert num_parameters(WORLD) == 257 * 2560 + 2561 * 2560 + 3 * 2560 == 7_221_760
    assert num_parameters(replace(WORLD, trained_inputs=True)) == 7_221_760 + 16 * 64 * 64
    assert num_parameters(replace(WORLD, positions=True)) == 7_221_760 + 256 * 2560


@pytest.mark.parametrize("architecture", ["mlp", "linear", "conv", "transformer"])
def test_the_count_is_that_of_the_projection_itself(architecture: str) -> None:
    shape = ProjectionShape((3, 4, 4), 8, patch=2, architecture=architecture, positions=True, depth=1)
    projection = WorldProjection(shape, [0.0] * 3, [1.0] * 3)
    assert num_parameters(shape) == count_parameters(projection)[0]


@pytest.mark.parametrize(
    ("arm", "hidden", "parameters"),
    [("pixels", 1280, 7_220_480), ("none", 2537, 7_222_505), ("gemma_vision", 1942, 7_220_886)],
)
def test_the_width_inside_is_solved_for(arm: str, hidden: int, parameters: int) -> None:
    shape = replace(WORLD, **ROWS[arm])
    found = match_hidden(shape, 7_221_760)
    assert found == Match(hidden, parameters, 7_221_760)
    assert num_parameters(replace(shape, hidden=hidden)) == parameters
    for other in (hidden - 1, hidden + 1):
        assert abs(num_parameters(replace(shape, hidden=other)) - 7_221_760) > abs(parameters - 7_221_760)


def test_the_same_rows_keep_their_width_and_the_counts_are_shown() -> None:
    assert str(match_hidden(WORLD, num_parameters(WORLD))) == (
        "projection_hidden 2560: 7,221,760 trained parameters, 100.0% of 7,221,760"
    )


@pytest.mark.parametrize("architecture", ["conv", "transformer"])
@pytest.mark.parametrize("arm", ROWS)
def test_deep_projections_are_matched_within_a_tenth(arm: str, architecture: str) -> None:
    world = replace(WORLD, architecture=architecture)
    found = match_hidden(replace(world, **ROWS[arm]), num_parameters(world))
    assert found.hidden is not None
    assert found.hidden % (32 if architecture == "transformer" else 1) == 0
    assert 0.9 < found.parameters / found.target < 1.1


def test_a_projection_without_a_width_is_matched_as_it_is_or_refused() -> None:
    world = replace(WORLD, architecture="linear")
    found = match_hidden(replace(world, trained_inputs=True), num_parameters(world))
    assert found == Match(None, 731_136, 665_600)  # 9.8 % more
    with pytest.raises(
        ValueError, match=r"no projection_hidden gives rows of shape \[192, 64, 64\] 665,600 trained"
    ):
        match_hidden(replace(world, **ROWS["pixels"]), num_parameters(world))


@pytest.mark.parametrize("arm", ["none", "pixels", "cosmos_random", "gemma_vision", "noise", "mismatched"])
def test_every_arm_has_as_many_world_tokens_and_about_as_many_parameters(arm: str) -> None:
    config = Config(
        model_name=str(EMBEDDED_GEMMA),
        cosmos_model_name=str(EMBEDDED_VAE),
        latent_size=64,
        world_patch=2,
        device="cpu",
    )
    world, shape = shape_of(config, 128), shape_of(replace(config, world_encoder=arm), 128)  # type: ignore[arg-type]
    assert (shape.num_tokens, shape.grid) == (world.num_tokens, world.grid)
    found = match_hidden(shape, num_parameters(world))
    matched = replace(config, world_encoder=arm, projection_hidden=found.hidden)  # type: ignore[arg-type]
    assert num_parameters(shape_of(matched, 128)) == found.parameters
    assert abs(found.parameters / found.target - 1) < 0.1
