"""The control "a prompt": world tokens that are trained and look at no picture.

Each image's row is zeros, so none is stored and no photograph is read; the projection adds input rows of the shape of a
latent that it trains. What is left of a gain with them is owed to training, to the answers' format or to their bias.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from theworld.config.config import Config
from theworld.models.encoder import EncoderSpec, latent_shape
from theworld.utils.device import resolve_device


class NoPicture:
    """Photographs to zeros: see `theworld.models.encoder.Encoder`."""

    name = "none"

    def __init__(self, config: Config, like: Mapping[str, Any] | None = None) -> None:
        self.device, self.spec = resolve_device(config.device), self.describe(config, like)

    @staticmethod
    def describe(config: Config, like: Mapping[str, Any] | None = None) -> EncoderSpec:
        """Return what the projection takes in place of a photograph; there is no store of it."""
        shape = latent_shape(config)
        fields = {
            "world_encoder": "none",
            "latent_size": config.latent_size,
            "latent_shape": list(shape),
            "latents_mean": [0.0] * shape[0],
            "latents_std": [1.0] * shape[0],
            "num_world_steps": 0,
            "trained_inputs": True,
        }
        return EncoderSpec("none", shape, "float32", None, fields, stored=False)

    def prepare(self, pixels: np.ndarray) -> Tensor:
        """uint8[H, W, 3] -> uint8[0], as nothing of a photograph is taken."""
        return torch.empty(0, dtype=torch.uint8)

    def encode(self, prepared: Tensor) -> Tensor:
        """uint8[B, 0] -> float32[B, C, H, W] of zeros."""
        return torch.zeros(len(prepared), *self.spec.array.shape, device=self.device)
