"""The encoders of phase 1: that of world tokens, predicted frames, and Gemma's vision features.

What a store of these settings holds follows from their `EncoderSpec`. A store that is there and holds something else is
refused by it in a second, before any model loads; only what is known once weights are read is compared later.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from theworld.config.config import Config
from theworld.models import world_encoder
from theworld.models.cosmos import CosmosLatents
from theworld.models.encoder import Encoder, EncoderSpec
from theworld.models.gemma_vision import VisionEncoder
from theworld.store.format import LATENTS, VISION, StoreMismatch
from theworld.store.shard import ImageEntry
from theworld.store.writer import Store
from theworld.utils.device import torch_dtype
from theworld.utils.files import StoreError, UnknownVersion


class RolloutEncoder:
    """Photographs to their Cosmos latents and the frames predicted from them, one photograph at a time."""

    name = LATENTS

    def __init__(self, config: Config, guardrail: Any = None) -> None:
        """`guardrail`: see `Rollout`, which raises ValueError."""
        from theworld.models.rollout import Rollout  # which loads diffusers

        self.latents = CosmosLatents(config)
        encoder = self.latents.encoder
        self.rollout = Rollout(config, encoder.dtype, self.latents.device, encoder.revision, guardrail)
        self.batch_size = config.encode_batch_size
        self.spec = CosmosLatents.describe(config).having(
            cosmos_weights_sha256=encoder.weights_sha256, **self.rollout.identity()
        )

    def encode(self, pixels: np.ndarray, image_sha256: str) -> Tensor:
        """uint8[H, W, 3] -> storage dtype[1 + n, C, H, W] on the CPU, not normalised. Raises FramesRefused.

        The photograph is encoded in a batch of `encode_batch_size`, so that its latent has the bits of an extraction
        without predicted frames.
        """
        from theworld.models.rollout import image_seed

        prepared = self.latents.prepare(pixels)
        batch = prepared.new_zeros((self.batch_size, *prepared.shape))
        batch[0] = prepared
        photograph = self.latents.encode(batch)[:1].cpu()
        seed = image_seed(self.rollout.config.rollout_seed, image_sha256)
        predicted = self.rollout.predicted_frames(prepared.numpy(), seed)
        return torch.cat([photograph, predicted.to(torch_dtype(self.spec.dtype)).cpu()])


def specs_of(config: Config, with_vision: bool) -> list[EncoderSpec]:
    """Return what phase 1 stores with these settings, one spec a store."""
    world = world_encoder.describe(config)
    specs = [world] if world.stored else []
    if with_vision and world.name != VISION:
        specs.append(VisionEncoder.describe(config))
    return specs


def specs_to_extract(config: Config, with_vision: bool) -> list[EncoderSpec]:
    """Return the same for a run of phase 1. Raises ValueError if that is nothing."""
    specs = specs_of(config, with_vision)
    if not specs:
        raise ValueError(
            f"world_encoder {config.world_encoder}: it reads no store, so there is nothing to extract; train with it "
            "as it is, or give --gemma_vision for a Gemma that sees"
        )
    return specs


def check_stores(config: Config, cache: Path, with_vision: bool) -> None:
    """Raise StoreMismatch, field by field, where a store that is there holds something else. Loads no model.

    A damaged store is left to `Store.create`, which mends it.
    """
    for spec in specs_to_extract(config, with_vision):
        try:
            spec.check_store(cache / spec.name, config.shard_size)
        except (StoreMismatch, UnknownVersion):
            raise
        except StoreError:
            continue


def encoder_of(name: str, config: Config) -> type[Encoder]:
    """Return the class of the encoder that makes the store of this name. Raises ValueError if no setting names it."""
    known = {one.name: one for one in (world_encoder.encoder_class(config), VisionEncoder)}
    if name not in known:
        raise ValueError(
            f"{name}: not the store of world_encoder {config.world_encoder!r}, which is {next(iter(known))}; give "
            "--world_encoder"
        )
    return known[name]


def open_store(cache: Path, spec: EncoderSpec, images: list[ImageEntry], shard_size: int) -> Store:
    """Return the store of an encoder in the cache, new or to be resumed. Raises StoreMismatch if it is another one."""
    return Store.create(cache / spec.name, spec.fingerprint(), images, [spec.array], shard_size)
