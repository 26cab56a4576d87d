"""One frame through 2-D convolutions is exactly what diffusers' 3-D encoder gives."""

import shutil
from pathlib import Path

import pytest
import torch
from conftest import EMBEDDED_VAE
from diffusers import AutoencoderKLWan

from theworld.vae import CosmosEncoder, load_vae


@pytest.mark.parametrize("downsample", [[False, True, True], [True, True, False]])
def test_encoding_equals_diffusers_for_random_weights(tmp_path: Path, downsample: list[bool]) -> None:
    torch.manual_seed(0)
    vae = AutoencoderKLWan(base_dim=8, dim_mult=[1, 2, 2, 4], temperal_downsample=downsample)
    vae.save_pretrained(tmp_path / "vae")
    encoder = CosmosEncoder(str(tmp_path))  # a pipeline's folder, with the VAE in its subfolder
    pixels = torch.rand(2, 3, 48, 64) * 2 - 1
    with torch.no_grad():
        wanted = vae.encode(pixels[:, :, None]).latent_dist.mode()[:, :, 0]
    assert wanted.std() > 1e-3
    torch.testing.assert_close(encoder.encode(pixels), wanted, atol=1e-5, rtol=1e-5)


def test_identity_names_weights_and_normalisation_and_holds_no_path(tmp_path: Path) -> None:
    identity = CosmosEncoder(str(EMBEDDED_VAE)).identity()
    shutil.copytree(EMBEDDED_VAE, tmp_path / "vae")
    assert CosmosEncoder(str(tmp_path / "vae")).identity() == identity
    assert set(identity) == {
        "cosmos_model_name",
        "cosmos_revision",
        "cosmos_weights_sha256",
        "latents_mean",
        "latents_std",
        "posterior",
        "compute_dtype",
    }
    assert identity["cosmos_model_name"] == "vae"
    assert (
        CosmosEncoder(str(EMBEDDED_VAE), torch.bfloat16).identity()["cosmos_weights_sha256"]
        == (identity["cosmos_weights_sha256"])
    )


def test_pixels_outside_the_range_are_refused() -> None:
    encoder = CosmosEncoder(str(EMBEDDED_VAE))
    with pytest.raises(ValueError, match=r"range over \[0, 255\]; wanted \[-1, 1\]"):
        encoder.encode(torch.tensor([0.0, 255.0]).expand(1, 3, 16, 2))
    with pytest.raises(ValueError, match=r"wanted \[B, 3, H, W\]"):
        encoder.encode(torch.zeros(1, 1, 16, 16))


@pytest.mark.parametrize("size", [0, -16, 40, 100])
def test_sizes_that_do_not_divide_are_refused(size: int) -> None:
    with pytest.raises(ValueError, match="positive multiple of 16"):
        CosmosEncoder(str(EMBEDDED_VAE)).latent_shape(size)


def test_another_kind_of_vae_is_refused(tmp_path: Path) -> None:
    AutoencoderKLWan(
        base_dim=8, dim_mult=[1, 1], temperal_downsample=[False], is_residual=True
    ).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"Wan 2\.2 kind"):
        CosmosEncoder(str(tmp_path))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"neither config\.json nor a folder vae/"):
        load_vae(str(tmp_path / "empty"))
