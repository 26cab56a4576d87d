"""One frame through 2-D convolutions is exactly what diffusers' 3-D encoder gives."""

import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from constants import EMBEDDED_VAE
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanResidualBlock, WanRMS_norm

from theworld.config.config import Config
from theworld.data.square import to_unit_range
from theworld.models.cosmos import (
    CosmosEncoder,
    CosmosLatents,
    FrameBlock,
    FrameConv,
    FrameNorm,
    attend,
    by_products,
    load_vae,
    to_frame_modules,
    unit_range,
)


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


def close_to_diffusers(encoder: CosmosEncoder, size: int) -> None:
    """Latents of random bytes within 1e-5, relative, of diffusers' own 3-D encoding."""
    pixels = torch.randint(0, 256, (2, 3, size, size), dtype=torch.uint8, generator=torch.manual_seed(0))
    with torch.no_grad():
        wanted = (
            load_vae(str(EMBEDDED_VAE)).encode(unit_range(pixels)[:, :, None]).latent_dist.mode()[:, :, 0]
        )
    assert float((encoder.encode(pixels) - wanted).norm() / wanted.norm()) < 1e-5


def test_weights_and_pixels_in_channels_last_equal_diffusers() -> None:
    encoder = CosmosEncoder(str(EMBEDDED_VAE))
    kernels = [p for p in encoder.encoder.parameters() if p.ndim == 4 and min(p.shape[1:]) > 1]
    assert len(kernels) == 17
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in kernels)
    seen: list[bool] = []

    def look(module: torch.nn.Module, inputs: tuple[torch.Tensor]) -> None:
        frames = inputs[0].squeeze(2) if inputs[0].ndim == 5 else inputs[0]
        seen.append(frames.is_contiguous(memory_format=torch.channels_last))

    for module in encoder.encoder.modules():
        if isinstance(module, FrameConv | torch.nn.Conv2d):
            module.register_forward_pre_hook(look)
    close_to_diffusers(encoder, 64)
    assert seen
    assert all(seen)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
def test_a_norm_has_the_bits_of_diffusers_and_leaves_its_input(dtype: torch.dtype, bias: bool) -> None:
    norm = WanRMS_norm(6, images=False, bias=bias).to(dtype).requires_grad_(False)
    for parameter in norm.parameters():
        parameter.uniform_(-2, 2)
    x = torch.randn(2, 6, 1, 5, 7).to(dtype)
    x[:, :, :, 0] = 0  # of length 0
    before = x.clone()
    assert torch.equal(FrameNorm(norm)(x), norm(x))
    assert torch.equal(x, before)


@pytest.mark.parametrize("channels", [6, 8])
def test_a_block_has_the_bits_of_diffusers_and_leaves_its_input(channels: int) -> None:
    holder = torch.nn.ModuleList([WanResidualBlock(6, channels)]).requires_grad_(False).eval()
    x = torch.randn(2, 6, 1, 8, 8)
    before, wanted = x.clone(), holder[0](x)
    to_frame_modules(holder)
    assert isinstance(holder[0], FrameBlock)
    torch.testing.assert_close(holder[0](x), wanted, atol=1e-6, rtol=1e-6)  # 2-D products for 3-D ones
    assert torch.equal(x, before)


def test_the_encoder_is_one_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    # traces, generates nothing
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    close_to_diffusers(CosmosEncoder(str(EMBEDDED_VAE), compile=True), 32)


def test_attention_as_two_products_is_the_same() -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (3 * torch.randn(2, 30, 24, generator=generator) for _ in range(3))
    torch.testing.assert_close(
        by_products(query, key, value), attend(query, key, value), atol=1e-5, rtol=1e-5
    )


@pytest.mark.heavy
def test_the_compiled_encoder_equals_diffusers() -> None:
    close_to_diffusers(CosmosEncoder(str(EMBEDDED_VAE), compile=True), 64)


def test_every_byte_becomes_the_same_number_on_the_device() -> None:
    pixels = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, axis=2)
    found = unit_range(torch.from_numpy(pixels).permute(2, 0, 1))
    assert found.dtype == torch.float32
    assert found.numpy().tobytes() == to_unit_range(pixels).tobytes()
    encoder, levels = CosmosEncoder(str(EMBEDDED_VAE)), torch.from_numpy(pixels).permute(2, 0, 1)[None]
    assert torch.equal(encoder.encode(levels), encoder.encode(found[None]))


def test_the_fingerprint_depends_on_the_weights_and_on_no_path(tmp_path: Path) -> None:
    config = Config(cosmos_model_name=str(EMBEDDED_VAE), latent_size=64, device="cpu")
    fingerprint = CosmosLatents(config).spec.fingerprint()
    shutil.copytree(EMBEDDED_VAE, tmp_path / "vae")
    elsewhere = replace(config, cosmos_model_name=str(tmp_path / "vae"))
    assert CosmosLatents(elsewhere).spec.fingerprint() == fingerprint
    assert fingerprint["cosmos_model_name"] == "vae"
    rounded = CosmosLatents(replace(config, dtype="bfloat16")).spec.fingerprint()
    differing = {key for key in fingerprint if rounded[key] != fingerprint[key]}
    assert differing == {"compute_dtype", "storage_dtype"}


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
