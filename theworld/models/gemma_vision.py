"""Gemma's own vision features: what Gemma sees in any case, and the control "again".

The world encoder gemma_vision sends the features that are cached for Gemma's own use through the projection once more.
What is left of a gain with them is owed to more trained parameters on the same features.

Dimensions: B images, S side in pixels, N image tokens of an image (256), which lie on a grid of s x s, V their width.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig, AutoImageProcessor, SiglipVisionModel
from transformers.models.siglip.modeling_siglip import SiglipEncoderLayer

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
from theworld.models.gemma import Gemma, keep_patches_together, pooled_patches
from theworld.models.pretrained import load_pretrained, to_device
from theworld.models.serialization import weights_sha256
from theworld.store.format import VISION
from theworld.utils.device import resolve_device, resolve_dtype, wants_compile
from theworld.utils.hub import GEMMA_FILE, file_at_hand, hub_revision, model_id, source_of_model

# Raise it whenever the compiled tower computes the same by other steps: see `theworld.models.cosmos`.
ARITHMETIC = 2


@dataclass(frozen=True)
class GemmaPixels:
    """Photographs at the size that Gemma's vision tower takes."""

    image_processor: Any  # of transformers

    def __call__(self, pixels: np.ndarray) -> Tensor:
        """uint8[H, W, 3] -> uint8[3, S, S], resized by Gemma's own image processor: a quarter of the bytes of the
        numbers that the tower takes, which `values_of_pixels` gives."""
        return self._processed([pixels], do_rescale=False, do_normalize=False)[0]

    def values_of_pixels(self) -> Tensor:
        """float32[3, 256]: what Gemma's own image processor makes of each value of a pixel in each channel."""
        ramp = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, axis=2)
        return self._processed([ramp], do_resize=False)[0].flatten(1).float()

    def _processed(self, pictures: list[np.ndarray], **options: Any) -> Tensor:
        return self.image_processor(images=pictures, return_tensors="pt", **options)["pixel_values"]


class VisionTower(SiglipVisionModel):
    """The vision tower of a Gemma, of whose files nothing else is read."""

    _keys_to_ignore_on_load_unexpected: ClassVar = [
        r"^(model\.)?(language_model|multi_modal_projector)\.",
        r"^lm_head\.",
    ]


def load_tower(model: str, dtype: torch.dtype, device: torch.device, revision: str | None) -> VisionTower:
    """Return the vision tower of a Gemma. Raises ValueError for a text-only one, and as `load_pretrained`."""
    hub = {"revision": revision} if revision else {}
    config = AutoConfig.from_pretrained(source_of_model(model, GEMMA_FILE, revision), **hub)
    tower = load_pretrained(
        VisionTower,
        model,
        config=_vision_config(config, model),
        key_mapping={r"^(model\.)?vision_tower\.(vision_model\.)?": ""},
        dtype=dtype,
        attn_implementation="sdpa",
        **hub,
    )
    keep_patches_together(tower)
    to_device(tower, device)
    return tower.eval().requires_grad_(False)


class VisionEncoder:
    """Photographs to Gemma's own pooled vision features, so that training never loads the vision tower."""

    name = VISION

    def __init__(self, config: Config, like: Mapping[str, Any] | None = None) -> None:
        """Raises ValueError for a text-only Gemma."""
        model, revision = config.model_name, (like or {}).get("model_revision")
        self.device = resolve_device(config.device)
        self.dtype = resolve_dtype(config.dtype, self.device)
        self.tower = load_tower(model, self.dtype, self.device, revision)
        source, hub = source_of_model(model, GEMMA_FILE, revision), {"revision": revision} if revision else {}
        self.prepare = GemmaPixels(AutoImageProcessor.from_pretrained(source, **hub))
        self.values = self.prepare.values_of_pixels().to(self.device, self.dtype)
        spec = self.describe(config, {"model_revision": revision or hub_revision(model, GEMMA_FILE)})
        self.spec = spec.having(vision_weights_sha256=weights_sha256(self.tower.state_dict()))
        if wants_compile(config.compile, self.device):
            for module in self.tower.modules():
                if isinstance(module, SiglipEncoderLayer):
                    module.compile()  # pays for thousands of photographs in batches of one size

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
        if "compiled" in fields:
            fields["arithmetic"] = ARITHMETIC
        weights = Weights("Gemma's vision tower", config.model_name, GEMMA_FILE)
        return EncoderSpec(VISION, shape, dtype, weights, fields)

    @torch.no_grad()
    def encode(self, prepared: Tensor) -> Tensor:
        """uint8[B, 3, S, S] or, as Gemma's own image processor gives them, float32 -> storage dtype[B, N, V]."""
        pixels = prepared.to(self.device, non_blocking=True)
        if pixels.dtype == torch.uint8:
            channels = zip(self.values, pixels.unbind(1), strict=True)
            pixels = torch.stack([values[channel.int()] for values, channel in channels], 1)
        num_tokens, _ = self.spec.array.shape
        return pooled_patches(self.tower, pixels.to(self.dtype), num_tokens)


def _vision_config(config: Any, model: str) -> Any:
    """Return the config of a Gemma's vision tower. Raises ValueError for a text-only Gemma."""
    vision = getattr(config, "vision_config", None)
    if vision is None:
        raise ValueError(f"{model} is text-only: it has no vision features to cache")
    return vision


def _from_config_files(
    model: str, revision: str | None
) -> tuple[tuple[int, ...] | NotYetKnown, dict[str, Any]]:
    """Return the shape of the vision features and the fields of the fingerprint that Gemma's config files give."""
    path = file_at_hand(model, GEMMA_FILE, revision=revision)
    if path is None:
        names = ("image_size", "image_processor", "model_revision")
        return UNTIL_DOWNLOADED, dict.fromkeys(names, UNTIL_DOWNLOADED)
    config = AutoConfig.from_pretrained(path.parent)
    vision = _vision_config(config, model)
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
