"""A photograph as the square of pixels that world encoders take.

Dimensions: H and W, height and width in pixels; S, side of the square.
"""

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from theworld.data.images import check_pixels


def square(pixels: np.ndarray, size: int) -> np.ndarray:
    """Return the whole picture, uint8[H, W, 3], stretched to uint8[size, size, 3].

    Gemma's processor stretches too, so that the grid of its image tokens and that of the latent coincide.
    """
    check_pixels(pixels)
    return np.array(Image.fromarray(pixels).resize((size, size), Image.Resampling.BICUBIC))


def to_unit_range(pixels: np.ndarray) -> np.ndarray:
    """Return uint8[H, W, 3] as the VAE's input, float32[3, H, W]: 0 becomes -1 and 255 becomes 1."""
    check_pixels(pixels)
    channels_first = np.ascontiguousarray(pixels.transpose(2, 0, 1))
    return channels_first.astype(np.float32) / np.float32(127.5) - np.float32(1)


@dataclass(frozen=True)
class Square:
    """A photograph as the input of a world encoder: the whole picture, stretched to a square."""

    size: int  # side in pixels

    def __call__(self, pixels: np.ndarray) -> Tensor:
        """Return uint8[S, S, 3] for uint8[H, W, 3]: a quarter of the bytes of float32 pixels."""
        return torch.from_numpy(square(pixels, self.size))


def latent_pixels(pixels: np.ndarray, size: int) -> Tensor:
    """Return a photograph, uint8[H, W, 3], as the VAE's input, float32[3, size, size] in [-1, 1]."""
    return torch.from_numpy(to_unit_range(square(pixels, size)))
