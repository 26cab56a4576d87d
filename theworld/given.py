"""Photographs as a caller hands them over, and what the two frozen models see of each."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from theworld.cache import latent_pixels
from theworld.images import photograph

Photograph = str | Path | np.ndarray | Image.Image


@dataclass(frozen=True)
class Seen:
    """One photograph as the models see it, on the CPU."""

    latent: Tensor | None  # dtype[1, C, H, W]; None where no world tokens are wanted
    vision: Tensor | None  # dtype[1, N, V]; None for a text-only Gemma


def paired(
    images: Photograph | Sequence[Photograph], texts: str | Sequence[str], what: str
) -> tuple[list[Photograph], list[str]]:
    """Both as lists, which pair up one to one, or one image with all texts. ValueError else; `what` the texts are."""
    texts = [texts] if isinstance(texts, str) else list(texts)
    pictures = [images] if isinstance(images, str | Path | np.ndarray | Image.Image) else list(images)
    if not texts or len(pictures) not in (1, len(texts)):
        raise ValueError(
            f"{len(pictures)} images and {len(texts)} {what}: give as many, or one image for all"
        )
    return pictures, texts


def look(model: Any, pictures: Sequence[Photograph], with_world: bool) -> tuple[list[Seen], list[int]]:
    """What a `TheWorld` sees of each different photograph, and for each picture the index of its own.

    Photographs of the same pixels are encoded once, and a file that is named again is not read again. Each is encoded
    by itself, since in 16 bits latents depend on their batch. Raises ImageError and ValueError as `photograph` does.
    """
    seen: list[Seen] = []
    files: dict[str, int] = {}
    pixels_of: dict[Any, int] = {}
    numbers = []
    for picture in pictures:
        file = str(picture) if isinstance(picture, str | Path) else None
        number = files.get(file) if file is not None else None
        if number is None:
            pixels = photograph(picture, model.config.max_image_pixels)
            key = (pixels.shape, hashlib.sha256(pixels.tobytes()).digest())
            if key not in pixels_of:
                pixels_of[key] = len(seen)
                seen.append(_see(model, pixels, with_world))
            number = pixels_of[key]
            if file is not None:
                files[file] = number
        numbers.append(number)
    return seen, numbers


def _see(model: Any, pixels: np.ndarray, with_world: bool) -> Seen:
    gemma = model.gemma
    latent = vision = None
    if with_world:
        latent = model.encoder.encode(latent_pixels(pixels, model.config.latent_size)[None]).cpu()
    if gemma.is_multimodal:
        vision = gemma.vision_features(gemma.pixel_values([pixels])).cpu()
    return Seen(latent, vision)


def load_encoder(model: Any) -> Any:
    """The `CosmosEncoder` whose latents a `TheWorld` was trained for, in the same revision.

    Raises ValueError where world tokens take more than a photograph, StoreMismatch if it is another encoder.
    """
    from theworld.vae import CosmosEncoder  # diffusers takes seconds to load, and training never needs it

    model.check_no_steps("generate needs no cache with enable_world=False, nor does score")
    name, revision = model.config.cosmos_model_name, model.fingerprint.get("cosmos_revision")
    encoder = CosmosEncoder(name, model.gemma.dtype, model.gemma.device, revision=revision)
    model.check_encoder(encoder.identity())
    return encoder
