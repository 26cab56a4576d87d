"""What a store of these settings would say of itself, as far as that is known before any model loads.

So another setting, library or rule than that of a store that is there is refused in a second and not after minutes.
Only the hashes of the weights have to wait: they are compared once these are read, before anything is encoded.
"""

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from transformers import AutoConfig, AutoImageProcessor

from theworld import files
from theworld.cache import LATENTS, VISION, expected_latents, expected_vision
from theworld.config import Config
from theworld.plan import STORE_KEYS, StoreMismatch, fingerprint_differences
from theworld.store import check_existing
from theworld.vae import ARITHMETIC, SPATIAL_FACTOR
from theworld.weights import hub_revision, resolve_device, resolve_dtype, wants_compile


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
