"""Latents to world tokens: nothing lost, right places, right scale."""

import pytest
import torch

from theworld.models.projection import ProjectionShape, WorldProjection


def make(mode: str = "patch", **settings: object) -> WorldProjection:
    torch.manual_seed(0)
    shape = ProjectionShape((3, 4, 6), width=8, mode=mode, **{"patch": 2, **settings})
    return WorldProjection(shape, [0.0, 1.0, 2.0], [1.0, 2.0, 4.0], scale=5.0)


def test_a_patch_holds_all_channels_of_its_place_row_by_row() -> None:
    latents = torch.arange(72.0).view(1, 3, 4, 6)
    patches = make().patches(latents)
    assert patches.shape == (1, 6, 12)
    # Token 4 is the patch of rows 2-3 and columns 2-3.
    assert patches[0, 4].tolist() == latents[0, :, 2:4, 2:4].flatten().tolist()
    assert sorted(patches.flatten().tolist()) == list(range(72))


def test_channel_mode_gives_one_token_a_channel() -> None:
    latents = torch.arange(72.0).view(1, 3, 4, 6)
    assert torch.equal(make("channel").patches(latents), latents.flatten(2))


@pytest.mark.parametrize(("patch", "tokens", "values"), [(4, 256, 256), (2, 1024, 64), (1, 4096, 16)])
def test_token_counts_of_a_512_pixel_photograph(patch: int, tokens: int, values: int) -> None:
    shape = ProjectionShape((16, 64, 64), width=2560, patch=patch)
    assert (shape.num_tokens, shape.values_per_token) == (tokens, values)
    assert ProjectionShape.from_dict(shape.to_dict()) == shape


def test_inputs_are_normalised_by_channel() -> None:
    projection = make(architecture="linear")
    projection.layers = torch.nn.Identity()
    projection.norm = torch.nn.Identity()  # type: ignore[assignment]
    latents = (
        torch.tensor([0.0, 1.0, 2.0])[None, :, None, None]
        + torch.tensor([1.0, 2.0, 4.0])[None, :, None, None]
    )
    assert torch.equal(projection(latents.expand(1, 3, 4, 6)), torch.ones(1, 6, 12))


def test_tokens_start_at_the_given_scale() -> None:
    tokens = make()(torch.randn(2, 3, 4, 6))
    assert tokens.shape == (2, 6, 8)
    torch.testing.assert_close(tokens.pow(2).mean(-1).sqrt(), torch.full((2, 6), 5.0), atol=1e-2, rtol=0)


def test_parameter_counts() -> None:
    def count(projection: WorldProjection) -> int:
        return sum(p.numel() for p in projection.parameters())

    assert count(make(architecture="linear")) == 12 * 8 + 8 + 8 + 2 * 8
    assert count(make()) == 12 * 8 + 8 + 8 * 8 + 8 + 8 + 2 * 8
    assert count(make(hidden=5, positions=True)) == 12 * 5 + 5 + 5 * 8 + 8 + 8 + 2 * 8 + 6 * 8
    around = 8 + 2 * 8  # the norm and the brackets
    conv = 12 * 4 + 4 + 3 * (9 * 4 * 4 + 4) + 4 * 8 + 8
    assert count(make(architecture="conv", hidden=4, depth=3)) == conv + around
    layer = 2 * 8 + (8 * 24 + 24) + (8 * 8 + 8) + (8 * 32 + 32) + (32 * 8 + 8)
    transformer = 12 * 8 + 8 + 6 * 8 + 2 * layer + 8 + 8 * 8 + 8
    assert count(make(architecture="transformer")) == transformer + around


@pytest.mark.parametrize(
    ("architecture", "width", "inner"),
    [("mlp", 2560, 2560), ("conv", 2560, 512), ("transformer", 2560, 512), ("transformer", 64, 64)],
)
def test_the_width_inside_is_gemmas_or_where_it_sees_further_at_most_512(
    architecture: str, width: int, inner: int
) -> None:
    shape = ProjectionShape((16, 64, 64), width=width, architecture=architecture)
    assert shape.inner == inner
    assert ProjectionShape.from_dict(shape.to_dict()) == shape
    assert ("depth" in shape.to_dict()) is (architecture in ("conv", "transformer"))


def moved(projection: WorldProjection, row: int, column: int) -> list[int]:
    """The tokens that change with one latent value."""
    latents = torch.randn(1, 3, 4, 6)
    other = latents.clone()
    other[0, 1, row, column] += 1
    with torch.no_grad():
        return (projection(latents) != projection(other)).any(2)[0].nonzero()[:, 0].tolist()


def test_what_a_token_knows_of_other_patches() -> None:
    # Tokens 0 1 2 over 3 4 5; the value at (0, 5) is in patch 2.
    assert moved(make(), 0, 5) == moved(make(architecture="linear"), 0, 5) == [2]
    assert moved(make(architecture="conv", depth=1), 0, 5) == [1, 2, 4, 5]
    assert moved(make(architecture="conv", depth=2), 0, 5) == [0, 1, 2, 3, 4, 5]
    assert moved(make(architecture="transformer", depth=1), 0, 5) == [0, 1, 2, 3, 4, 5]


def test_a_transformer_tells_places_apart_and_takes_channels_as_tokens() -> None:
    same = torch.ones(1, 3, 4, 6) * torch.tensor([0.0, 1.0, 2.0])[:, None, None]
    tokens = make(architecture="transformer")(same)[0]
    assert all(not torch.allclose(tokens[0], tokens[k]) for k in range(1, 6))
    assert make("channel", architecture="transformer")(torch.randn(2, 3, 4, 6)).shape == (2, 3, 8)


@pytest.mark.parametrize("architecture", ["linear", "conv", "transformer"])
def test_every_kind_starts_at_the_given_scale_and_takes_each_moment_alone(architecture: str) -> None:
    alone = make(architecture=architecture, positions=True)
    moments = make(architecture=architecture, positions=True, steps=2)
    moments.load_state_dict(alone.state_dict(), strict=False)
    latents = torch.randn(2, 3, 3, 4, 6)
    tokens = moments(latents)
    scale = tokens.pow(2).mean(-1).sqrt()
    torch.testing.assert_close(scale, torch.full((2, 18), 5.0), atol=1e-2, rtol=0)
    for moment in range(3):
        wanted = alone(latents[:, moment])
        torch.testing.assert_close(tokens[:, 6 * moment : 6 * (moment + 1)], wanted, atol=1e-5, rtol=1e-5)


def test_the_parameters_of_the_guides_kind_are_named_as_ever() -> None:
    assert list(dict(make(positions=True).named_parameters())) == [
        *("positions", "brackets", "layers.0.weight", "layers.0.bias", "layers.2.weight", "layers.2.bias"),
        "norm.weight",
    ]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"patch": 3}, "world_patch 3 does not divide the latent's 4 x 6 places"),
        ({"mode": "pixel"}, "world_mode 'pixel'"),
        ({"architecture": "pyramid"}, "projection 'pyramid': wanted mlp, linear, conv, transformer"),
        ({"architecture": "conv", "mode": "channel"}, "world_mode 'channel' has none; wanted projection"),
        (
            {"architecture": "transformer", "hidden": 40},
            "projection_hidden 40: a transformer wants a multiple of 32",
        ),
    ],
)
def test_impossible_shapes_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ProjectionShape((3, 4, 6), width=8, **settings)


def test_latents_of_another_shape_are_refused() -> None:
    with pytest.raises(ValueError, match=r"latents \(3, 4, 4\); this projection takes \(3, 4, 6\)"):
        make()(torch.zeros(1, 3, 4, 4))


def test_statistics_of_another_number_of_channels_are_refused() -> None:
    with pytest.raises(ValueError, match="2 and 3 numbers"):
        WorldProjection(ProjectionShape((3, 4, 4), 8, patch=2), [0.0, 0.0], [1.0, 1.0, 1.0])


def test_moments_follow_each_other_through_the_same_layers() -> None:
    alone, moments = make(positions=True), make(positions=True, steps=2)
    torch.nn.init.normal_(alone.positions)
    assert dict(alone.named_parameters()).keys() | {"time"} == dict(moments.named_parameters()).keys()
    moments.load_state_dict(alone.state_dict(), strict=False)
    latents = torch.randn(2, 3, 3, 4, 6)
    tokens = moments(latents)
    assert tokens.shape == (2, 18, 8)
    assert (moments.shape.num_tokens, moments.shape.tokens_per_frame) == (18, 6)
    for moment in range(3):  # time starts at zero: each is what the photograph's projection makes of it
        wanted = alone(latents[:, moment])
        torch.testing.assert_close(tokens[:, 6 * moment : 6 * (moment + 1)], wanted, atol=1e-6, rtol=1e-6)


def test_time_is_added_to_every_token_of_its_moment_before_the_norm() -> None:
    projection = make(steps=2, max_steps=4)
    assert projection.time is not None
    assert projection.time.shape == (5, 8)
    assert projection.time.count_nonzero() == 0
    latents = torch.randn(1, 3, 3, 4, 6)
    torch.nn.init.normal_(projection.time)
    with torch.no_grad():
        plain = make(steps=2, max_steps=4)
        plain.norm = torch.nn.Identity()  # type: ignore[assignment]
        shifted = plain(latents).unflatten(1, (3, 6)) + projection.time[:3, None]
        torch.testing.assert_close(projection(latents), projection.norm(shifted.flatten(1, 2)))
    projection(latents).sum().backward()
    assert projection.time.grad is not None
    assert projection.time.grad.abs().sum(1).gt(0).tolist() == [True, True, True, False, False]


def test_without_moments_nothing_speaks_of_them() -> None:
    shape = ProjectionShape((3, 4, 6), width=8, patch=2)
    assert list(shape.to_dict()) == [
        *("latent_shape", "width", "mode", "patch", "architecture", "hidden", "positions"),
    ]
    assert shape.row_shape == (3, 4, 6)
    moments = ProjectionShape((3, 4, 6), width=8, patch=2, steps=2, max_steps=16)
    assert moments.row_shape == (3, 3, 4, 6)
    assert ProjectionShape.from_dict(moments.to_dict()) == moments


def test_rows_of_another_number_of_moments_are_refused() -> None:
    message = r"latents \(3, 4, 6\); this projection takes \(3, 3, 4, 6\)"
    with pytest.raises(ValueError, match=message):
        make(steps=2)(torch.zeros(1, 3, 4, 6))
    with pytest.raises(ValueError, match=r"latents \(2, 3, 4, 6\); this projection takes \(3, 4, 6\)"):
        make()(torch.zeros(1, 2, 3, 4, 6))
    with pytest.raises(ValueError, match="num_world_steps 3: wanted 0 to max_world_steps, 2"):
        make(steps=3, max_steps=2)
