"""The control "an untrained encoder": the Cosmos VAE with random weights.

What is left of a gain with these latents is owed to the architecture, and not to what the video model has learnt.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from theworld.config.config import Config
from theworld.models.cosmos import CosmosLatents
from theworld.models.encoder import EncoderSpec


class RandomLatents(CosmosLatents):
    """Photographs to latents of a VAE that was never trained: see `theworld.models.encoder.Encoder`."""

    name = "cosmos_random"
    has_random_weights = True

    @staticmethod
    def describe(config: Config, like: Mapping[str, Any] | None = None) -> EncoderSpec:
        """Return what is stored of a photograph. The VAE's own mean and deviation are of its trained latents, so these
        have none."""
        spec = CosmosLatents.describe(config, like)
        fields = {k: v for k, v in spec.fields.items() if k not in ("latents_mean", "latents_std")}
        fields |= {"world_encoder": "cosmos_random", "control_seed": config.control_seed}
        return replace(spec, name="cosmos_random", fields=fields)
