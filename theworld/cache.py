"""A cache folder as the training and evaluation loops see it: images in, tensors out.

cache/latents/         the Cosmos latents, one float[C, H, W] an image
cache/gemma_vision/    optional: Gemma's own pooled SigLIP features, one float[N, V] an image
cache/failures.jsonl   images that statements name but that could not be read, with the reason
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from theworld.config import Config
from theworld.gemma import Gemma
from theworld.images import read_image, square, to_unit_range
from theworld.store import StoreError, StoreReader
from theworld.vsr import Statement, images_of
from theworld.weights import model_id

LATENTS, VISION, FAILURES = "latents", "gemma_vision", "failures.jsonl"


def to_numpy(tensor: Tensor) -> np.ndarray:
    """A tensor as the store takes it: bfloat16, which NumPy does not have, as the uint16 of the same bits."""
    tensor = tensor.detach().cpu().contiguous()
    return tensor.view(torch.uint16).numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy()


def to_tensor(array: np.ndarray) -> Tensor:
    """The inverse of `to_numpy`."""
    tensor = torch.from_numpy(np.array(array))
    return tensor.view(torch.bfloat16) if tensor.dtype == torch.uint16 else tensor


def latent_pixels(pixels: np.ndarray, size: int) -> Tensor:
    """uint8[H, W, 3] -> float32[3, size, size] in [-1, 1]: a photograph as the VAE takes it."""
    return torch.from_numpy(to_unit_range(square(pixels, size)))


def expected_latents(config: Config) -> dict[str, Any]:
    """The fields of a latents fingerprint that follow from a run's settings."""
    expected = {
        "cosmos_model_name": model_id(config.cosmos_model_name),
        "latent_size": config.latent_size,
        "num_world_steps": config.num_world_steps,
        "posterior": "mean",
    }
    return expected | ({"storage_dtype": config.latent_dtype} if config.latent_dtype else {})


def expected_vision(config: Config) -> dict[str, Any]:
    """The fields of a vision fingerprint that follow from a run's settings."""
    return {"model_name": model_id(config.model_name)}


# Fields of a fingerprint that say how exactly a number was computed, not what it means.
_PRECISION = {
    "compute_dtype",
    "compiled",
    "storage_dtype",
    "encode_batch_size",
    "torch",
    "diffusers",
    "transformers",
    "pillow",
}


def meaning(fingerprint: dict[str, Any]) -> dict[str, Any]:
    """The part of a fingerprint in which two caches must agree to serve one projection."""
    return {key: value for key, value in fingerprint.items() if key not in _PRECISION}


class Rows:
    """One array of one store as tensors by image path. Rows that were read stay in memory where all of them fit
    into a quarter of the machine's."""

    def __init__(self, root: Path, array: str, expected: dict[str, Any] | None = None) -> None:
        self.reader = StoreReader(root, expected)
        self.array = array
        self._memory: dict[str, Tensor] = {}
        physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        self._keep = self.reader.nbytes(array) <= physical // 4

    def __call__(self, images: Sequence[str]) -> Tensor:
        """[len(images), ...] in the stored dtype. Raises StoreError for an image that is not there."""
        return torch.stack([self._row(image) for image in images])

    def _row(self, image: str) -> Tensor:
        if image in self._memory:
            return self._memory[image]
        row = to_tensor(self.reader.read(image, self.array))
        if self._keep:
            self._memory[image] = row
        return row


class LiveVision:
    """Gemma's vision features straight from the photographs: what stands in where they are not cached."""

    def __init__(self, gemma: Gemma, image_folder: str | Path, max_image_pixels: int) -> None:
        self.gemma = gemma
        self.image_folder = Path(image_folder)
        self.max_image_pixels = max_image_pixels

    def __call__(self, images: Sequence[str]) -> Tensor:
        """dtype[len(images), N, V]. Raises ImageError for a photograph that cannot be read."""
        pixels = [read_image(self.image_folder, image, max_pixels=self.max_image_pixels) for image in images]
        return self.gemma.vision_features(self.gemma.pixel_values(pixels))


def read_failures(cache: str | Path) -> dict[str, str]:
    """path -> reason of the images that were left out of this cache, knowingly, with --allow_missing."""
    path = Path(cache) / FAILURES
    if not path.is_file():
        return {}
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return {row["path"]: row["reason"] for row in rows}


def in_cache(statements: list[Statement], rows: Rows, cache: str | Path) -> tuple[list[Statement], str]:
    """The statements whose image is in the cache, and a line that says how many of how many those are.

    Only images that extraction left out knowingly may be missing; StoreError for any other.
    """
    missing = {image for image in images_of(statements) if image not in rows.reader}
    unknown = sorted(missing - read_failures(cache).keys())
    if unknown:
        raise StoreError(
            f"{cache}: {len(unknown)} of {len(images_of(statements))} images that the statements name are not in "
            f"the cache, such as {unknown[0]}; run tools/extract_latents.py with the same --annotations"
        )
    kept = [s for s in statements if s.image not in missing]
    total = len(images_of(statements))
    note = f"{len(kept)} of {len(statements)} statements, {total - len(missing)} of {total} images"
    return kept, note + (f" ({len(missing)} left out by --allow_missing)" if missing else "")
