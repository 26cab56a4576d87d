"""Gemma's own vision features: what Gemma sees in any case, and the control "again".

The world encoder gemma_vision sends the features that are cached for Gemma's own use through the projection once more.
What is left of a gain with them is owed to more trained parameters on the same features.

Dimensions: B images, S side in pixels, N image tokens of an image (256), which lie on a grid of s x s, V their width.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import Tensor
from transformers import AutoConfig, AutoImageProcessor

from theworld.config.config import Config
from theworld.models.encoder import (
    CELL,
    UNTIL_DOWNLOADED,
    UNTIL_LOADED,
    EncoderSpec,
    NotYetKnown,
    Use,
    Weights,
    common_fields,
    compiled_field,
    compute_dtype,
)
from theworld.models.gemma import Gemma
from theworld.store.format import VISION
from theworld.utils.device import resolve_device, resolve_dtype, wants_compile
from theworld.utils.hub import GEMMA_FILE, file_at_hand, hub_revision, model_id


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


class GemmaVision(VisionEncoder):
    """The same features as rows of a world encoder, from the same store."""

    def __init__(self, config: Config, like: Mapping[str, Any] | None = None) -> None:
        super().__init__(config, like)
        spec = replace(self.spec, use=self.describe(config, like).use)
        if like is not None and like.get("compute_dtype") != spec.fields["compute_dtype"]:
            spec = spec.having(vision_weights_sha256=UNTIL_LOADED)  # weights that were cast have other bits
        self.spec = spec

    @staticmethod
    def describe(config: Config, like: Mapping[str, Any] | None = None) -> EncoderSpec:
        """Return what is stored of a photograph, and that the projection takes it as a grid, in patches of as many
        image tokens as there are for a world token. Raises ValueError where there is less than one."""
        spec = VisionEncoder.describe(config, like)
        fields: dict[str, Any] = {"world_encoder": "gemma_vision", "num_world_steps": 0}
        if isinstance(spec.row_shape, NotYetKnown):
            fields |= {"latent_shape": UNTIL_DOWNLOADED, "world_patch": UNTIL_DOWNLOADED}
        else:
            tokens, width = spec.row_shape
            side = math.isqrt(tokens)
            fields |= {"latent_shape": [width, side, side], "world_patch": _patch(config, side)}
        return replace(spec, use=Use(fields, tokens_as_grid))


def _patch(config: Config, side: int) -> int:
    """Return the side of a world token's patch, in image tokens, for as many world tokens as the latents give."""
    wanted, rest = divmod(config.latent_size // CELL, config.world_patch)
    if rest or side % wanted:
        raise ValueError(
            f"world_encoder gemma_vision: {config.model_name} has {side} x {side} image tokens, and latent_size "
            f"{config.latent_size} with world_patch {config.world_patch} wants {config.latent_size // CELL} / "
            f"{config.world_patch} world tokens a side; wanted a world_patch that gives a divisor of {side}"
        )
    return side // wanted


def tokens_as_grid(rows: Tensor) -> Tensor:
    """dtype[B, N, V] -> dtype[B, V, s, s]: image tokens stand row by row over the picture."""
    side = math.isqrt(rows.shape[1])
    return rows.transpose(1, 2).unflatten(2, (side, side))
