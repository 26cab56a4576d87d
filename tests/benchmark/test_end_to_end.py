"""The end-to-end baseline computes what TheWorld computes: only so is its time worth a comparison."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from benchmark.end_to_end import EndToEnd, VaePixels, extract_plainly
from constants import EMBEDDED_GEMMA, EMBEDDED_VAE, QUESTION

from theworld.config.config import Config
from theworld.data.vsr import Statement
from theworld.extraction.extract import extract
from theworld.extraction.features import CachedFeatures
from theworld.models.cosmos import CosmosEncoder, CosmosLatents
from theworld.models.gemma import Gemma
from theworld.models.theworld import TheWorld
from theworld.store.format import LATENTS

CPU = torch.device("cpu")


@pytest.mark.parametrize("patch", [2, 4])
def test_loss_and_gradient_equal_those_of_theworld(
    patch: int, config: Config, gemma: Gemma, statements: list[Statement], photographs: Path
) -> None:
    encoder = CosmosEncoder(str(EMBEDDED_VAE))
    fingerprint = CosmosLatents(config).spec.fingerprint()
    ours = TheWorld.from_config(replace(config, world_patch=patch), gemma, fingerprint)
    copied = TheWorld.from_config(replace(config, world_patch=patch), gemma, fingerprint)
    baseline = EndToEnd(
        str(EMBEDDED_GEMMA), str(EMBEDDED_VAE), copied.projection, QUESTION, torch.float32, CPU
    )
    batches = baseline.batches(statements, photographs, latent_size=64, size=len(statements), workers=0)
    chosen, sample = next(batches)
    loss = baseline.loss(chosen, sample["vae_pixels"], sample["pixel_values"])
    loss.backward()

    batch = ours.packer().pack(statements)
    first = [next(i for i, s in enumerate(chosen) if s.image == image) for image in batch.images]
    latents = encoder.encode(sample["vae_pixels"][first])
    vision = gemma.vision_features(sample["pixel_values"][first])
    losses = ours.losses(batch, latents, vision)
    (losses["total"] / len(statements)).backward()

    # float32 on both sides: 3-D and 2-D convolutions, padded and packed rows add in other orders
    torch.testing.assert_close(loss, losses["total"] / len(statements), rtol=1e-5, atol=1e-5)
    wanted = ours.trainable()
    for name, parameter in baseline.projection.named_parameters():
        scale = wanted[name].grad.abs().max()
        torch.testing.assert_close(parameter.grad / scale, wanted[name].grad / scale, rtol=0, atol=1e-3)


def test_a_step_changes_the_projection_and_nothing_else(
    config: Config, gemma: Gemma, statements: list[Statement], photographs: Path
) -> None:
    fingerprint = CosmosLatents(config).spec.fingerprint()
    model = TheWorld.from_config(config, gemma, fingerprint)
    baseline = EndToEnd(
        str(EMBEDDED_GEMMA), str(EMBEDDED_VAE), model.projection, QUESTION, torch.float32, CPU
    )
    frozen = {k: v.clone() for k, v in baseline.gemma.state_dict().items()}
    before = {k: v.clone() for k, v in baseline.projection.named_parameters()}
    batches = baseline.batches(statements, photographs, 64, size=2, workers=0)
    assert baseline.train_step(*next(batches)) > 0
    assert all((frozen[k] == v).all() for k, v in baseline.gemma.state_dict().items())
    assert all((before[k] != v).any() for k, v in baseline.projection.named_parameters())


def test_a_plain_extraction_stores_the_same_latents(config: Config, tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.mkdir()
    images = ["a.png", "b.png", "c.png"]
    photographs = VaePixels(images, str(config.image_folder), 64)
    extract_plainly(str(EMBEDDED_VAE), photographs, plain, 2, 0, torch.float32, CPU)
    extract(config, tmp_path / "cache", with_vision=False, allow_missing=False)
    ours = CachedFeatures(tmp_path / "cache" / LATENTS)(images)
    stored = torch.stack([torch.load(plain / f"{name[0]}.pt") for name in images])
    # 3-D and 2-D convolutions add in other orders
    torch.testing.assert_close(stored, ours, rtol=1e-4, atol=1e-4)
