"""The encoders as phase 1 runs them: what a row of their store is, and the way from pixels to it."""

from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from theworld.cache import LATENTS, VISION
from theworld.gemma import Gemma
from theworld.images import PREPROCESSING, square
from theworld.rollout import Rollout, image_seed
from theworld.store import ArraySpec, ImageEntry, Store
from theworld.vae import CosmosEncoder
from theworld.weights import torch_dtype


class Meaning(Protocol):
    """What a store is opened with: its name, what a row is, and what the numbers in it mean."""

    name: str
    arrays: list[ArraySpec]

    def fingerprint(self) -> dict[str, Any]: ...


def full_fingerprint(meaning: Meaning, batch_size: int) -> dict[str, Any]:
    """What a store says of its numbers: what the encoder does, and what is done before and after it."""
    return meaning.fingerprint() | common_fields(meaning.arrays[0].dtype, batch_size)


def common_fields(storage_dtype: str, batch_size: int) -> dict[str, Any]:
    """The fields of a fingerprint that every encoding has, and that are known without an encoder."""
    pixels = {f"preprocessing_{key}": value for key, value in PREPROCESSING.items()}
    return pixels | {"storage_dtype": storage_dtype, "encode_batch_size": batch_size}


def open_store(
    cache: Path, meaning: Meaning, images: list[ImageEntry], shard_size: int, batch_size: int
) -> Store:
    """The store of one encoding in the cache, new or to be resumed; StoreMismatch where it is another one."""
    fingerprint = full_fingerprint(meaning, batch_size)
    return Store.create(cache / meaning.name, fingerprint, images, meaning.arrays, shard_size)


class Encoding(Meaning, Protocol):
    """What `extract` needs of an encoder: its meaning, and the way from pixels to a row.

    `prepare` runs in other processes: it may not touch a GPU. `encode` may return before a GPU is done.
    """

    device: torch.device
    compiled: bool

    def prepare(self, pixels: np.ndarray) -> Tensor: ...

    def encode(self, prepared: Tensor) -> Tensor: ...


class LatentEncoding:
    """Photographs to Cosmos latents."""

    name = LATENTS

    def __init__(self, encoder: CosmosEncoder, size: int, storage_dtype: str | None) -> None:
        """`size`: side of the square the VAE sees, pixels. `storage_dtype` None stores what is computed."""
        self.encoder = encoder
        self.device, self.compiled = encoder.device, encoder.compiled
        self.size = size
        self.storage = storage_dtype or str(encoder.dtype).removeprefix("torch.")
        self.arrays = [ArraySpec(LATENTS, encoder.latent_shape(size), self.storage)]

    def fingerprint(self) -> dict[str, Any]:
        """What these numbers mean: encoder, pixels, dtypes, libraries."""
        own: dict[str, Any] = {
            "latent_size": self.size,
            "latent_shape": list(self.arrays[0].shape),
            "num_world_steps": 0,
        }
        if self.compiled:  # rounds elsewhere than the same model uncompiled
            own["compiled"] = True
        return {**self.encoder.identity(), **own, **libraries("diffusers")}

    def prepare(self, pixels: np.ndarray) -> Tensor:
        """uint8[H, W, 3] -> uint8[S, S, 3]: a quarter of the bytes that it is in [-1, 1]."""
        return torch.from_numpy(square(pixels, self.size))

    def encode(self, prepared: Tensor) -> Tensor:
        """uint8[B, S, S, 3] -> storage dtype[B, C, H, W]."""
        return self.encoder.encode(prepared.permute(0, 3, 1, 2)).to(torch_dtype(self.storage))


class RolloutEncoding:
    """Photographs to their Cosmos latents and those of the moments predicted from them, one photograph at a time."""

    name = LATENTS

    def __init__(self, latents: LatentEncoding, rollout: Rollout, batch_size: int) -> None:
        """`batch_size`: that of an encoding of photographs alone, so that the first moment is to the bit what that
        would store."""
        self.latents, self.rollout, self.batch_size = latents, rollout, batch_size
        own = latents.arrays[0]
        moments = 1 + rollout.config.num_world_steps
        self.arrays = [ArraySpec(LATENTS, (moments, *own.shape), own.dtype)]

    def fingerprint(self) -> dict[str, Any]:
        """What these numbers mean: those of the photographs, and how the rest was predicted."""
        steps = {"num_world_steps": self.rollout.config.num_world_steps}
        return {
            **self.latents.fingerprint(),
            **steps,
            **self.rollout.identity(),
            **libraries("transformers"),
        }

    def encode(self, pixels: np.ndarray, image_sha256: str) -> Tensor:
        """uint8[H, W, 3] -> storage dtype[1 + n, C, H, W] on the CPU, not normalised. Raises FramesRefused."""
        prepared = self.latents.prepare(pixels)
        batch = prepared.new_zeros((self.batch_size, *prepared.shape))
        batch[0] = prepared
        photograph = self.latents.encode(batch)[:1].cpu()
        seed = image_seed(self.rollout.config.rollout_seed, image_sha256)
        moments = self.rollout.moments(prepared.numpy(), seed)
        return torch.cat([photograph, moments.to(torch_dtype(self.latents.storage)).cpu()])


class VisionEncoding:
    """Photographs to Gemma's own pooled vision features, so that training never loads the vision tower."""

    name = VISION

    def __init__(self, gemma: Gemma, compile: bool = False) -> None:
        if not gemma.is_multimodal:
            raise ValueError(f"{gemma.name} is text-only: it has no vision features to cache")
        self.gemma = gemma
        self.device, self.compiled = gemma.device, compile
        if compile:
            gemma.compile_vision()
        self.storage = str(gemma.dtype).removeprefix("torch.")
        width = int(gemma.model.config.vision_config.hidden_size)
        self.arrays = [ArraySpec(VISION, (gemma.num_image_tokens, width), self.storage)]

    def fingerprint(self) -> dict[str, Any]:
        """What these numbers mean: tower, image processor, dtypes, libraries."""
        own = {"compiled": True} if self.compiled else {}
        return {**self.gemma.vision_identity(), **own, **libraries("transformers")}

    def prepare(self, pixels: np.ndarray) -> Tensor:
        """uint8[H, W, 3] -> float32[3, S, S], by Gemma's own image processor."""
        return self.gemma.pixel_values([pixels])[0]

    def encode(self, prepared: Tensor) -> Tensor:
        """float32[B, 3, S, S] -> storage dtype[B, N, V]."""
        return self.gemma.vision_features(prepared.to(self.device, non_blocking=True))


def libraries(*names: str) -> dict[str, str]:
    """The versions of what an encoding computes with, as a fingerprint has them."""
    return {name: version(name) for name in ("torch", "pillow", *names)}
