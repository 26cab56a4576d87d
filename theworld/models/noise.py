"""The control "noise": fixed random latents of each image, which say nothing but which image it is.

What is left of a gain with them is owed to telling images apart, or to memorising them. The seed of an image is the
SHA-256 of its pixels as an encoder takes them: where a JPEG decoder gives a single other value, noise is another one,
so an evaluation on another machine better reads the cache.
"""

from collections.abc import Mapping
from hashlib import sha256
from typing import Any

import numpy as np
import torch
from torch import Tensor

from theworld.config.config import Config
from theworld.data.square import Square
from theworld.models.encoder import EncoderSpec, common_fields, compute_dtype, latent_shape
from theworld.utils.device import resolve_device, torch_dtype


class NoiseEncoder:
    """Photographs to noise of the shape of a latent: see `theworld.models.encoder.Encoder`."""

    name = "noise"

    def __init__(self, config: Config, like: Mapping[str, Any] | None = None) -> None:
        self.device, self.prepare = resolve_device(config.device), Square(config.latent_size)
        self.seed, self.spec = config.control_seed, self.describe(config, like)
        self.shape = latent_shape(config)

    @staticmethod
    def describe(config: Config, like: Mapping[str, Any] | None = None) -> EncoderSpec:
        """Return what is stored of a photograph: independent values of mean 0 and standard deviation 1."""
        shape, dtype = latent_shape(config), config.latent_dtype or compute_dtype(config)
        fields = {
            "world_encoder": "noise",
            "control_seed": config.control_seed,
            "latent_size": config.latent_size,
            "latent_shape": list(shape),
            "latents_mean": [0.0] * shape[0],
            "latents_std": [1.0] * shape[0],
            "num_world_steps": 0,
            **common_fields(config, dtype),
            "compute_dtype": dtype,
        }
        demanded = frozenset({"storage_dtype"} if config.latent_dtype else ())
        return EncoderSpec("noise", shape, dtype, None, fields, demanded)

    def encode(self, prepared: Tensor) -> Tensor:
        """uint8[B, S, S, 3] -> storage dtype[B, C, H, W]."""
        rows = torch.stack([self._noise(pixels) for pixels in prepared])
        return rows.to(self.device, torch_dtype(self.spec.dtype))

    def _noise(self, pixels: Tensor) -> Tensor:
        """uint8[S, S, 3] -> float64[C, H, W]. Of NumPy's generators this one has a stream that never changes (NEP
        19)."""
        digest = sha256(f"{self.seed} ".encode() + pixels.contiguous().numpy().tobytes()).digest()
        generator = np.random.RandomState(np.frombuffer(digest, ">u4").astype(np.uint32))
        return torch.from_numpy(generator.standard_normal(self.shape))
