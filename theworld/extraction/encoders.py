"""The encoders as phase 1 runs them: what a row of their store is, and the way from pixels to it.

What a store of these settings would say of itself, as far as that is known before any model loads.

So another setting, library or rule than that of a store that is there is refused in a second and not after minutes.
Only the hashes of the weights have to wait: they are compared once these are read, before anything is encoded.
"""

import json
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from huggingface_hub import try_to_load_from_cache
from torch import Tensor
from transformers import AutoConfig, AutoImageProcessor

from theworld.config.config import Config
from theworld.data.images import PREPROCESSING, square
from theworld.models.cosmos import ARITHMETIC, SPATIAL_FACTOR, CosmosEncoder
from theworld.models.gemma import Gemma
from theworld.models.rollout import Rollout, image_seed
from theworld.store.format import ABSENT, LATENTS, STORE_KEYS, VISION, StoreMismatch, fingerprint_differences
from theworld.store.shard import ArraySpec, ImageEntry
from theworld.store.writer import Store, check_existing
from theworld.utils import files
from theworld.utils.device import resolve_device, resolve_dtype, torch_dtype, wants_compile
from theworld.utils.hub import GEMMA_FILE, VAE_FILE, hub_revision, locate, model_id


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


def check_settings(config: Config, cache: Path, device_name: str, with_vision: bool) -> None:
    """StoreMismatch, field by field, where a store that is there holds something else. Loads no model.

    A store.json that is damaged is left to those who open the store.
    """
    for name in (LATENTS, VISION) if with_vision else (LATENTS,):
        path = cache / name / "store.json"
        if name == LATENTS and config.num_world_steps:  # the rest is known once the video model is there
            check_existing(path.parent, expected_latents(config))
            continue
        try:
            cached = files.read_sealed(path, STORE_KEYS)[0]["fingerprint"]
        except files.StoreError:
            continue
        wanted, later = foreseen(name, config, device_name)
        known = {key: value for key, value in cached.items() if key not in later}
        differences = fingerprint_differences(known, wanted)
        if differences:
            raise StoreMismatch(path.parent, differences)


def foreseen(name: str, config: Config, device_name: str) -> tuple[dict[str, Any], set[str]]:
    """The fields of a store's fingerprint with their values, and the names of those that are not known yet."""
    device = resolve_device(device_name)
    dtype = str(resolve_dtype(config.dtype, device)).removeprefix("torch.")
    fields: dict[str, Any] = {
        "compute_dtype": dtype,
        "storage_dtype": dtype,
        "encode_batch_size": config.encode_batch_size,
        "torch": version("torch"),
        "pillow": version("pillow"),
    }
    if wants_compile(config.compile, device):
        fields["compiled"] = True
    own, later = (_latents if name == LATENTS else _vision)(config)
    return fields | own, later


def _latents(config: Config) -> tuple[dict[str, Any], set[str]]:
    own = expected_latents(config) | {"diffusers": version("diffusers"), "arithmetic": ARITHMETIC}
    path = _vae_config(config.cosmos_model_name)
    if path is None:  # not downloaded yet
        later = {"cosmos_revision", "latents_mean", "latents_std", "latent_shape"}
        return own, later | {"cosmos_weights_sha256"}
    vae, side = json.loads(path.read_text()), config.latent_size // SPATIAL_FACTOR
    own["cosmos_revision"] = hub_revision(config.cosmos_model_name, "vae/config.json")
    own["latent_shape"] = [vae["z_dim"], side, side]
    own |= {key: [float(x) for x in vae[key]] for key in ("latents_mean", "latents_std")}
    return own, {"cosmos_weights_sha256"}


def _vae_config(name_or_path: str) -> Path | None:
    for path in (Path(name_or_path) / "config.json", Path(name_or_path) / "vae" / "config.json"):
        if path.is_file():
            return path
    cached = None if Path(name_or_path).is_dir() else try_to_load_from_cache(name_or_path, "vae/config.json")
    return Path(cached) if isinstance(cached, str) else None


def _vision(config: Config) -> tuple[dict[str, Any], set[str]]:
    name = config.model_name
    own = expected_vision(config) | {"transformers": version("transformers")}
    own["image_processor"] = type(AutoImageProcessor.from_pretrained(name)).__name__
    vision = getattr(AutoConfig.from_pretrained(name), "vision_config", None)
    if vision is None:
        raise ValueError(f"{name} is text-only: it has no vision features to cache")
    own["image_size"] = int(vision.image_size)
    own["model_revision"] = hub_revision(name, "config.json")
    return own, {"vision_weights_sha256"}


_PREPROCESSING = {f"preprocessing_{key}": value for key, value in PREPROCESSING.items()}


def expected_latents(config: Config) -> dict[str, Any]:
    """The fields of a latents fingerprint that follow from a run's settings."""
    expected: dict[str, Any] = {
        "cosmos_model_name": model_id(config.cosmos_model_name),
        "latent_size": config.latent_size,
        "num_world_steps": config.num_world_steps,
        "posterior": "mean",
        **_PREPROCESSING,
        **config.rollout_settings,
    }
    return expected | ({"storage_dtype": config.latent_dtype} if config.latent_dtype else {})


def expected_vision(config: Config) -> dict[str, Any]:
    """The fields of a vision fingerprint that follow from a run's settings."""
    return {"model_name": model_id(config.model_name), **_PREPROCESSING}


@dataclass(frozen=True)
class Planned:
    """A store as extraction would make it, as far as that is known before a model is loaded."""

    root: Path
    model: str  # the encoder and where it is, in words
    spec: ArraySpec  # a row
    fields: dict[str, Any]  # of the fingerprint; ABSENT: not in it


def plan_latents(config: Config, cache: Path) -> Planned:
    """The latents' store. Raises Fault where the VAE cannot be loaded."""
    place = locate(config.cosmos_model_name, VAE_FILE)
    values = json.loads(place.config.read_text()) if place.config is not None else {}
    side = config.latent_size // SPATIAL_FACTOR
    moments = (1 + config.num_world_steps,) if config.num_world_steps else ()
    dtype, fields = _computed(config)
    shape = (*moments, values.get("z_dim", 16), side, side)  # 16: of every Wan 2.1 VAE
    spec = ArraySpec(LATENTS, shape, config.latent_dtype or dtype)
    # How latents are normalised tells VAEs of the same name apart.
    own = {key: [float(x) for x in values[key]] for key in ("latents_mean", "latents_std") if key in values}
    fields |= expected_latents(config) | libraries("diffusers") | own
    return Planned(cache / LATENTS, f"{config.cosmos_model_name}, its VAE: {place.words}", spec, fields)


def plan_vision(config: Config, cache: Path) -> Planned:
    """The store of Gemma's vision features. Raises Fault where Gemma cannot be loaded."""
    place = locate(config.model_name, GEMMA_FILE)
    tokens, width = 256, 1152  # of every Gemma 3 that sees
    if place.config is not None:
        model = AutoConfig.from_pretrained(place.config.parent)
        tokens, width = int(model.mm_tokens_per_image), int(model.vision_config.hidden_size)
    dtype, fields = _computed(config)
    fields |= expected_vision(config) | libraries("transformers")
    spec = ArraySpec(VISION, (tokens, width), dtype)
    return Planned(cache / VISION, f"{config.model_name}, its vision tower: {place.words}", spec, fields)


def _computed(config: Config) -> tuple[str, dict[str, Any]]:
    device = resolve_device(config.device)
    dtype = str(resolve_dtype(config.dtype, device)).removeprefix("torch.")
    return dtype, {"compute_dtype": dtype, "compiled": wants_compile(config.compile, device) or ABSENT}
