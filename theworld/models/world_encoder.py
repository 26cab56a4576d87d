"""The world encoder that the settings name: the one place that knows which there are."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from theworld.config.config import Config
from theworld.models.cosmos import CosmosLatents
from theworld.models.cosmos_random import RandomLatents
from theworld.models.encoder import Encoder, EncoderSpec, Use
from theworld.models.gemma_vision import GemmaVision
from theworld.models.mismatched import MismatchedLatents
from theworld.models.no_picture import NoPicture
from theworld.models.noise import NoiseEncoder
from theworld.models.pixels import PixelEncoder


def encoder_class(config: Config) -> type[Encoder]:
    """Return the class of the encoder whose rows the world tokens are made of."""
    if config.world_encoder == "none":
        return NoPicture
    if config.world_encoder == "pixels":
        return PixelEncoder
    if config.world_encoder == "cosmos_random":
        return RandomLatents
    if config.world_encoder == "gemma_vision":
        return GemmaVision
    if config.world_encoder == "noise":
        return NoiseEncoder
    if config.world_encoder == "mismatched":
        return MismatchedLatents
    return CosmosLatents


def describe(config: Config, like: Mapping[str, Any] | None = None) -> EncoderSpec:
    """Return what the encoder of these settings stores, and how the projection takes it: see `Encoder.describe`.

    Rows of an encoder without statistics of its own are standardised by those of the training images in any case; the
    zeros of an encoder without rows never.
    """
    spec = encoder_class(config).describe(config, like)
    measured = config.standardization == "training_images" or "latents_mean" not in spec.fields
    if not spec.stored or not measured:
        return spec
    fields = {**spec.use.fields, "standardization": "training_images"}
    return replace(spec, use=Use(fields, spec.use.view, spec.use.pairs))
