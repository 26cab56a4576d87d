"""The encoders that are controls: the exact rows of each, and what their fingerprints say."""

from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import torch
from constants import EMBEDDED_GEMMA, EMBEDDED_VAE
from diffusers import AutoencoderKLWan

from theworld.config.config import Config
from theworld.data.images import read_image
from theworld.data.square import square
from theworld.models import world_encoder
from theworld.models.cosmos import CosmosLatents, unit_range
from theworld.models.cosmos_random import RandomLatents
from theworld.models.encoder import UNTIL_DOWNLOADED, UNTIL_LOADED, encode_alone
from theworld.models.gemma import Gemma
from theworld.models.gemma_vision import GemmaVision, VisionEncoder, tokens_as_grid
from theworld.models.mismatched import MismatchedLatents, another_image
from theworld.models.no_picture import NoPicture
from theworld.models.noise import NoiseEncoder
from theworld.models.projection import ProjectionShape, WorldProjection
from theworld.utils.device import seeded

SETTINGS = Config(
    model_name=str(EMBEDDED_GEMMA),
    cosmos_model_name=str(EMBEDDED_VAE),
    latent_size=64,
    world_patch=2,
    device="cpu",
)


def digests(*names: str) -> dict[str, str]:
    return {name: sha256(name.encode()).hexdigest() for name in names}


# ---- noise


def test_noise_is_a_function_of_pixels_and_seed(photographs: Path) -> None:
    encoder = NoiseEncoder(SETTINGS)
    a, b = (read_image(photographs, name) for name in ("a.png", "b.png"))
    row = encode_alone(encoder, a)
    assert (row.shape, row.dtype) == ((1, 16, 8, 8), torch.float32)
    seed = np.frombuffer(sha256(b"0 " + square(a, 64).tobytes()).digest(), ">u4")
    wanted = np.random.RandomState(seed.astype(np.uint32)).standard_normal((16, 8, 8)).astype(np.float32)
    assert np.array_equal(row[0].numpy(), wanted)
    batch = torch.stack([encoder.prepare(b), encoder.prepare(a)])
    assert torch.equal(encoder.encode(batch)[1:], row)
    assert not torch.equal(encode_alone(encoder, b), row)
    assert not torch.equal(encode_alone(NoiseEncoder(replace(SETTINGS, control_seed=1)), a), row)
    changed = a.copy()
    changed[0, 0, 0] ^= 255
    assert not torch.equal(encode_alone(encoder, changed), row)


def test_noise_is_the_same_on_every_machine_and_in_every_release() -> None:
    row = encode_alone(NoiseEncoder(SETTINGS), np.zeros((64, 64, 3), np.uint8))
    # Literal values: a generator whose stream changed would make every cache of noise another one.
    assert row.flatten()[:3].tolist() == pytest.approx([-0.10374191, -0.10465661, 0.45076728], abs=1e-7)
    assert row[0, 15, 7, 7].item() == pytest.approx(-1.28516150, abs=1e-7)
    # 1,024 values: 0.1 is 3 standard errors of the mean and 4 of the deviation.
    assert (row.mean().item(), row.std().item()) == pytest.approx((0.0, 1.0), abs=0.1)


def test_the_fingerprint_of_noise_names_its_seed_and_no_model() -> None:
    spec = NoiseEncoder.describe(replace(SETTINGS, latent_dtype="bfloat16", control_seed=3))
    assert (spec.name, spec.row_shape, spec.dtype, spec.weights) == ("noise", (16, 8, 8), "bfloat16", None)
    assert spec.demanded == {"storage_dtype"}
    own = {key: spec.fields[key] for key in ("world_encoder", "control_seed", "latent_size", "latents_mean")}
    assert own == {"world_encoder": "noise", "control_seed": 3, "latent_size": 64, "latents_mean": [0.0] * 16}
    assert spec.fields["latents_std"] == [1.0] * 16
    assert (
        spec.fields["preprocessing_resize"] == CosmosLatents.describe(SETTINGS).fields["preprocessing_resize"]
    )


# ---- mismatched


@pytest.mark.parametrize("count", [2, 3, 50])
def test_each_image_stands_for_one_other_and_none_for_itself(count: int) -> None:
    hashes = digests(*(f"{number}.jpg" for number in range(count)))
    pairs = another_image(hashes, 0)
    assert sorted(pairs) == sorted(pairs.values()) == sorted(hashes)
    assert not any(pairs[image] == image for image in hashes)
    seen, image = [], "0.jpg"  # one cycle through all of them
    while image not in seen:
        seen.append(image)
        image = pairs[image]
    assert len(seen) == count
    assert another_image(dict(reversed(hashes.items())), 0) == pairs
    if count == 50:
        assert another_image(hashes, 1) != pairs


def test_images_of_equal_bytes_never_stand_for_each_other_and_have_one_pair() -> None:
    hashes = digests("a", "b", "c")
    hashes |= {"copy of a": hashes["a"], "another copy of a": hashes["a"]}
    pairs = another_image(hashes, 0)
    for image, other in pairs.items():
        assert hashes[image] != hashes[other]
    assert pairs["copy of a"] == pairs["another copy of a"] == pairs["a"]
    assert set(pairs.values()) == {"b", "c", "a" if "a" in pairs.values() else "another copy of a"}
    with pytest.raises(ValueError, match="world_encoder mismatched: 1 different image in the store"):
        another_image({"a": hashes["a"], "copy of a": hashes["a"]}, 0)


def test_pairs_follow_from_hashes_whatever_the_images_are_called() -> None:
    hashes = digests("a", "b", "c", "d")
    pairs = another_image(hashes, 0)
    renamed = another_image({f"folder/{name}": digest for name, digest in hashes.items()}, 0)
    assert renamed == {f"folder/{name}": f"folder/{other}" for name, other in pairs.items()}


def test_mismatched_latents_are_stored_as_cosmos_own() -> None:
    spec = MismatchedLatents.describe(replace(SETTINGS, control_seed=5))
    plain = CosmosLatents.describe(SETTINGS)
    assert (spec.name, spec.fields, spec.row_shape) == ("latents", plain.fields, plain.row_shape)
    assert spec.use.fields == {"world_encoder": "mismatched", "control_seed": 5}
    hashes = digests("a", "b", "c", "d")
    assert spec.use.pairs is not None
    assert spec.use.pairs(hashes) == another_image(hashes, 5)


# ---- cosmos_random


def test_an_untrained_encoder_is_diffusers_vae_with_the_weights_that_a_seed_draws(photographs: Path) -> None:
    config = replace(SETTINGS, control_seed=7)
    encoder, pixels = RandomLatents(config), read_image(photographs, "a.png")
    with seeded(7):
        vae = AutoencoderKLWan.from_config(AutoencoderKLWan.load_config(str(EMBEDDED_VAE)))
    frame = unit_range(torch.from_numpy(square(pixels, 64))).permute(2, 0, 1)[None, :, None]
    with torch.no_grad():
        wanted = vae.encode(frame).latent_dist.mode()[:, :, 0]
    # The same sums in another order, as for the trained weights.
    torch.testing.assert_close(encode_alone(encoder, pixels), wanted, atol=1e-5, rtol=1e-4)
    same, other = RandomLatents(config), RandomLatents(SETTINGS)
    assert same.spec == encoder.spec
    assert other.spec.fields["cosmos_weights_sha256"] != encoder.spec.fields["cosmos_weights_sha256"]
    assert wanted.std() > 0.01  # it does not fade out


def test_an_untrained_encoder_has_no_statistics_and_needs_no_weights(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((EMBEDDED_VAE / "config.json").read_bytes())
    config = replace(SETTINGS, cosmos_model_name=str(tmp_path))
    spec, plain = RandomLatents(config).spec, CosmosLatents.describe(config)
    assert plain.fields.keys() - spec.fields.keys() == {"latents_mean", "latents_std"}
    assert spec.fields.keys() - plain.fields.keys() == {"world_encoder", "control_seed"}
    assert (spec.name, spec.row_shape, spec.unknown) == ("cosmos_random", (16, 8, 8), set())
    with pytest.raises(ValueError, match=r"neither config.json nor a folder vae/ in it"):
        RandomLatents(replace(SETTINGS, cosmos_model_name=str(tmp_path.parent)))


# ---- none


def test_without_a_picture_all_images_have_the_same_trained_rows() -> None:
    encoder = NoPicture(SETTINGS)
    assert not encoder.spec.stored
    row = encode_alone(encoder, np.full((5, 6, 3), 9, np.uint8))
    assert torch.equal(row, torch.zeros(1, 16, 8, 8))
    shape = ProjectionShape.from_settings(SETTINGS, encoder.spec.fingerprint(), 32)
    assert shape == ProjectionShape((16, 8, 8), 32, patch=2, trained_inputs=True)
    with seeded(0):
        projection = WorldProjection(shape, [0.0] * 16, [1.0] * 16)
    assert projection.inputs is not None
    # Standard normal, as rows that are standardised.
    assert (projection.inputs.mean().item(), projection.inputs.std().item()) == pytest.approx((0, 1), abs=0.1)
    tokens = projection(row.expand(2, -1, -1, -1))
    assert torch.equal(tokens[0], tokens[1])
    plain = WorldProjection(replace(shape, trained_inputs=False), [0.0] * 16, [1.0] * 16)
    own = {name: p for name, p in projection.named_parameters() if name != "inputs"}
    plain.load_state_dict(own, strict=False)
    assert torch.equal(plain(projection.inputs.detach()[None])[0], tokens[0])
    tokens.sum().backward()
    assert projection.inputs.grad is not None
    assert projection.inputs.grad.abs().sum() > 0


def test_a_projection_without_trained_inputs_starts_and_is_saved_as_ever() -> None:
    shape = ProjectionShape((16, 8, 8), 32, patch=2)
    assert "trained_inputs" not in shape.to_dict()
    trained = replace(shape, trained_inputs=True)
    assert trained.to_dict() == shape.to_dict() | {"trained_inputs": True}
    assert ProjectionShape.from_dict(trained.to_dict()) == trained
    both = []
    for one in (shape, trained):
        with seeded(0):
            both.append(dict(WorldProjection(one, [0.0] * 16, [1.0] * 16).named_parameters()))
    assert both[1].keys() - both[0].keys() == {"inputs"}
    assert all(torch.equal(both[1][name], weight) for name, weight in both[0].items())


# ---- gemma_vision


def test_gemmas_vision_features_are_a_grid_of_their_image_tokens(photographs: Path, gemma: Gemma) -> None:
    encoder, pixels = GemmaVision(SETTINGS), read_image(photographs, "a.png")
    tokens = gemma.vision_features(gemma.pixel_values([pixels]))
    count, width = tokens.shape[1:]
    row = encode_alone(encoder, pixels)
    assert row.shape == (1, width, 4, 4)
    assert count == 16
    for token in (0, 3, 4, 15):
        assert torch.equal(row[0, :, token // 4, token % 4], tokens[0, token])
    projection = WorldProjection(
        ProjectionShape.from_settings(SETTINGS, {**encoder.spec.fields, **encoder.spec.use.fields}, 32),
        [0.0] * width,
        [1.0] * width,
    )
    assert torch.equal(projection.patches(row), tokens)  # each world token is made of one image token


def test_gemmas_vision_features_are_stored_as_for_gemma_itself() -> None:
    spec, plain = GemmaVision.describe(SETTINGS), VisionEncoder.describe(SETTINGS)
    assert (spec.name, spec.fields, spec.row_shape) == ("gemma_vision", plain.fields, plain.row_shape)
    assert spec.row_shape == (16, 64)
    assert spec.use.fields == {
        "world_encoder": "gemma_vision",
        "num_world_steps": 0,
        "latent_shape": [64, 4, 4],
        "world_patch": 1,
    }
    assert spec.use.view is tokens_as_grid


@pytest.mark.parametrize(("world_patch", "patch", "num_tokens"), [(2, 1, 16), (4, 2, 4), (8, 4, 1)])
def test_neighbouring_image_tokens_are_grouped_where_there_are_fewer_world_tokens(
    world_patch: int, patch: int, num_tokens: int
) -> None:
    config = replace(SETTINGS, world_patch=world_patch)
    spec = GemmaVision.describe(config)
    shape = ProjectionShape.from_settings(config, {**spec.fields, **spec.use.fields}, 32)
    assert (shape.patch, shape.num_tokens) == (patch, num_tokens)
    assert shape.num_tokens * shape.values_per_token == 16 * 64  # nothing is lost
    assert num_tokens == ProjectionShape.from_settings(config, {"latent_shape": [16, 8, 8]}, 32).num_tokens


def test_more_world_tokens_than_image_tokens_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"has 4 x 4 image tokens, and latent_size 64 with world_patch 1 wants 8 / 1 world"
    ):
        GemmaVision.describe(replace(SETTINGS, world_patch=1))
    with pytest.raises(ValueError, match=r"world_mode.*channel.*as world_encoder is gemma_vision"):
        replace(SETTINGS, world_encoder="gemma_vision", world_mode="channel")


def test_features_of_a_gemma_that_is_not_here_yet_are_not_guessed_at() -> None:
    spec = GemmaVision.describe(replace(SETTINGS, model_name="somebody/gemma"))
    assert spec.use.fields["latent_shape"] is spec.use.fields["world_patch"] is UNTIL_DOWNLOADED
    trained = GemmaVision.describe(SETTINGS)
    with pytest.raises(ValueError, match='model_name: cached "somebody/gemma", wanted "somebody"') as caught:
        spec.check_serves({**trained.fields, **trained.use.fields, "model_name": "somebody"})
    assert len(caught.value.differences) == 1  # type: ignore[attr-defined]


def test_a_vision_tower_in_another_dtype_is_not_compared_by_its_bits() -> None:
    own = GemmaVision(SETTINGS).spec
    trained = {**own.fields, **own.use.fields}
    for dtype, known in (("float32", True), ("bfloat16", False)):
        spec = GemmaVision(replace(SETTINGS, dtype=dtype), trained).spec  # type: ignore[arg-type]
        assert (spec.fields["vision_weights_sha256"] is not UNTIL_LOADED) == known
        spec.check_serves(trained)


# ---- which statistics


def test_measured_statistics_are_no_part_of_what_rows_mean() -> None:
    config = replace(SETTINGS, standardization="training_images")
    spec = world_encoder.describe(config)
    assert spec.use.fields == {"standardization": "training_images"}
    trained = {**spec.fields, "cosmos_weights_sha256": "x", **spec.use.fields}
    spec.check_serves(
        trained | {"latents_mean": [1.0] * 16, "latents_std": [2.0] * 16, "standardized_on": "y"}
    )
    with pytest.raises(ValueError, match=r'standardization: cached \(absent\), wanted "training_images"'):
        world_encoder.describe(SETTINGS).check_serves(trained)
    with pytest.raises(ValueError, match="latents_mean"):  # those that an encoder states are compared
        world_encoder.describe(SETTINGS).check_serves({**spec.fields, "latents_mean": [1.0] * 16})
