"""The encoders of phase 1 beside those of photographs alone: predicted frames, and Gemma's vision features.

What a store of these settings holds follows from their `EncoderSpec`. A store that is there and holds something else is
refused by it in a second, before any model loads; only what is known once weights are read is compared later.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig, AutoImageProcessor

from theworld.config.config import Config
from theworld.models import world_encoder
from theworld.models.cosmos import CosmosLatents
from theworld.models.encoder import (
    UNTIL_DOWNLOADED,
    UNTIL_LOADED,
    Encoder,
    EncoderSpec,
    NotYetKnown,
    Weights,
    common_fields,
    compiled_field,
    compute_dtype,
)
from theworld.models.gemma import Gemma
from theworld.store.format import LATENTS, VISION, StoreMismatch
from theworld.store.shard import ImageEntry
from theworld.store.writer import Store
from theworld.utils.device import resolve_device, resolve_dtype, torch_dtype, wants_compile
from theworld.utils.files import StoreError, UnknownVersion
from theworld.utils.hub import GEMMA_FILE, file_at_hand, hub_revision, model_id


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


@dataclass(frozen=True)
class GemmaPixels:
    """Photographs as Gemma's vision tower takes them."""

    image_processor: Any  # of transformers

    def __call__(self, pixels: np.ndarray) -> Tensor:
        """uint8[H, W, 3] -> float32[3, S, S], by Gemma's own image processor."""
        return self.image_processor(images=[pixels], return_tensors="pt")["pixel_values"][0]


class VisionEncoder:
    """Photographs to Gemma's own pooled vision features, so that training never loads the vision tower."""

    name = VISION

    def __init__(self, config: Config, like: Mapping[str, Any] | None = None) -> None:
        """Raises ValueError for a text-only Gemma."""
        self.device = resolve_device(config.device)
        dtype, revision = resolve_dtype(config.dtype, self.device), (like or {}).get("model_revision")
        self.gemma = Gemma(config.model_name, dtype, self.device, revision=revision)
        self.spec = vision_spec(config, self.gemma)
        assert self.gemma.processor is not None
        self.prepare = GemmaPixels(self.gemma.processor.image_processor)
        if wants_compile(config.compile, self.device):
            self.gemma.compile_vision()

    @staticmethod
    def describe(config: Config, like: Mapping[str, Any] | None = None) -> EncoderSpec:
        """Return what is stored of a photograph. Raises ValueError for a text-only Gemma."""
        dtype = compute_dtype(config)
        shape, from_files = _from_config_files(config.model_name, (like or {}).get("model_revision"))
        fields = {
            "model_name": model_id(config.model_name),
            "vision_weights_sha256": UNTIL_LOADED,
            **from_files,
            **compiled_field(config),
            **common_fields(config, dtype, "transformers"),
        }
        weights = Weights("Gemma's vision tower", config.model_name, GEMMA_FILE)
        return EncoderSpec(VISION, shape, dtype, weights, fields)

    def encode(self, prepared: Tensor) -> Tensor:
        """float32[B, 3, S, S] -> storage dtype[B, N, V]."""
        return self.gemma.vision_features(prepared.to(self.device, non_blocking=True))


def _from_config_files(
    model: str, revision: str | None
) -> tuple[tuple[int, ...] | NotYetKnown, dict[str, Any]]:
    """Return the shape of the vision features and the fields of the fingerprint that Gemma's config files give."""
    path = file_at_hand(model, GEMMA_FILE, revision=revision)
    if path is None:
        names = ("image_size", "image_processor", "model_revision")
        return UNTIL_DOWNLOADED, dict.fromkeys(names, UNTIL_DOWNLOADED)
    config = AutoConfig.from_pretrained(path.parent)
    vision = getattr(config, "vision_config", None)
    if vision is None:
        raise ValueError(f"{model} is text-only: it has no vision features to cache")
    processor: str | NotYetKnown = UNTIL_DOWNLOADED
    if file_at_hand(model, "processor_config.json", "preprocessor_config.json", revision=revision):
        processor = type(AutoImageProcessor.from_pretrained(path.parent)).__name__
    fields = {
        "image_size": int(vision.image_size),
        "image_processor": processor,
        "model_revision": revision or hub_revision(model, GEMMA_FILE),
    }
    return (int(config.mm_tokens_per_image), int(vision.hidden_size)), fields


def vision_spec(config: Config, gemma: Gemma) -> EncoderSpec:
    """Return what the vision tower of a Gemma with its weights gives."""
    own, like = replace(config, model_name=gemma.name), {"model_revision": gemma.revision}
    return VisionEncoder.describe(own, like).having(vision_weights_sha256=gemma.vision_weights_sha256())


def specs_of(config: Config, with_vision: bool) -> list[EncoderSpec]:
    """Return what phase 1 stores with these settings, one spec a store."""
    world = world_encoder.encoder_class(config).describe(config)
    return [world, VisionEncoder.describe(config)] if with_vision else [world]


def check_stores(config: Config, cache: Path, with_vision: bool) -> None:
    """Raise StoreMismatch, field by field, where a store that is there holds something else. Loads no model.

    A damaged store is left to `Store.create`, which mends it.
    """
    for spec in specs_of(config, with_vision):
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
