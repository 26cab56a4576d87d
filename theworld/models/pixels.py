"""The encoder without a model: the RGB values of a photograph on the grid of its latents.

A control for the Cosmos encoder: the same places and as many tokens, of what the photograph itself says there. Each
cell of 8 x 8 pixels is one place with 192 channels, channel c * 64 + 8 y + x holding colour c of its pixel (y, x).
Values are levels, 0 to 255, which every dtype of a store holds exactly; the projection standardises them.
At 512 pixels a row is 1.5 MiB, twelve times that of a latent.
"""

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from theworld.config.config import Config
from theworld.data.square import Square
from theworld.models.encoder import CELL, EncoderSpec, common_fields
from theworld.utils.device import resolve_device, torch_dtype

# Of ImageNet's photographs by colour, in levels: the mean and standard deviation that torchvision's models take.
MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)


class PixelEncoder:
    """Photographs to their pixels, cell by cell: see `theworld.models.encoder.Encoder`."""

    name = "pixels"

    def __init__(self, config: Config, like: Mapping[str, Any] | None = None) -> None:
        self.device, self.prepare = resolve_device(config.device), Square(config.latent_size)
        self.spec = self.describe(config, like)

    @staticmethod
    def describe(config: Config, like: Mapping[str, Any] | None = None) -> EncoderSpec:
        """Return what is stored of a photograph: float16[192, H, W], unless the settings name another dtype."""
        side, dtype = config.latent_size // CELL, config.latent_dtype or "float16"
        shape = (3 * CELL**2, side, side)
        fields = {
            "world_encoder": "pixels",
            "latent_size": config.latent_size,
            "latent_shape": list(shape),
            "latents_mean": [value for value in MEAN for _ in range(CELL**2)],
            "latents_std": [value for value in STD for _ in range(CELL**2)],
            "num_world_steps": 0,
            **common_fields(config, dtype),
            "preprocessing_range": "levels, 0 to 255",
            "compute_dtype": dtype,
        }
        demanded = frozenset({"storage_dtype"} if config.latent_dtype else ())
        return EncoderSpec("pixels", shape, dtype, None, fields, demanded)

    def encode(self, prepared: Tensor) -> Tensor:
        """uint8[B, S, S, 3] -> storage dtype[B, 192, S / 8, S / 8]."""
        levels = prepared.to(self.device, non_blocking=True).permute(0, 3, 1, 2)
        return F.pixel_unshuffle(levels, CELL).to(torch_dtype(self.spec.dtype))
