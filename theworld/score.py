"""A checkpoint scored on a split: from a cache, or from photographs alone."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from theworld.cache import LATENTS, LiveVision, Rows, check_meaning, in_cache, latent_pixels
from theworld.config import Config
from theworld.data import cached_vision, vision_for
from theworld.evaluate import predict
from theworld.feed import Fetch
from theworld.images import read_image
from theworld.metrics import records
from theworld.model import TheWorld
from theworld.saved import WORLD_FILE, read_world
from theworld.store import StoreReader
from theworld.vae import CosmosEncoder
from theworld.vsr import Statement, load_statements, seen_images


class LiveLatents:
    """Latents straight from the photographs, for evaluation without a cache."""

    def __init__(
        self, encoder: CosmosEncoder, image_folder: str | Path, size: int, max_image_pixels: int
    ) -> None:
        self.encoder = encoder
        self.image_folder = Path(image_folder)
        self.size = size
        self.max_image_pixels = max_image_pixels

    def __call__(self, images: Sequence[str]) -> Tensor:
        """dtype[len(images), C, H, W], each encoded by itself. Raises ImageError for an unreadable one."""
        rows = []
        for image in images:
            pixels = read_image(self.image_folder, image, max_pixels=self.max_image_pixels)
            rows.append(self.encoder.encode(latent_pixels(pixels, self.size)[None]))
        return torch.cat(rows)


def score(
    checkpoint: Path,
    cache: Path | None,
    image_folder: Path | None,
    split: str,
    systems: Sequence[str],
    overrides: dict[str, Any],
) -> list[dict[str, Any]]:
    """One record a statement of the split, with the answers of every system (see `theworld.evaluate`).

    Exactly one of `cache` and `image_folder` is given. Prints what is left out, if anything is.
    """
    if cache is not None and (Path(checkpoint) / WORLD_FILE).is_file():  # else it is a name on the hub
        reader = StoreReader(cache / LATENTS)
        check_meaning(reader.root, reader.fingerprint, read_world(Path(checkpoint))["fingerprint"])
    model = TheWorld.from_pretrained(checkpoint, **overrides)
    config = model.config
    statements = load_statements(config.annotations, split, config.dataset_name)
    train = load_statements(config.annotations, "train", config.dataset_name)
    if cache is not None:
        latents, vision, statements = _from_cache(model, cache, statements)
    else:
        assert image_folder is not None
        latents, vision = _from_photographs(model, config, image_folder)
    size = config.eval_statements
    logits = predict(model, statements, latents, vision, systems, size, quiet=False)
    return records(statements, logits, seen_images(statements, train) if split != "train" else set())


def _from_cache(
    model: TheWorld, cache: Path, statements: list[Statement]
) -> tuple[Fetch, Fetch | None, list[Statement]]:
    latents = Rows(cache / LATENTS, LATENTS)
    check_meaning(latents.reader.root, latents.reader.fingerprint, model.fingerprint)
    statements, note = in_cache(statements, latents, cache)
    print(f"scoring {note}")
    notes: list[str] = []
    cached = cached_vision(model.config, cache)
    vision = vision_for(model.gemma, model.config, cached, notes, latents.reader.images)
    print("".join(f"{note}\n" for note in notes), end="")
    return latents, vision, statements


def _from_photographs(model: TheWorld, config: Config, folder: Path) -> tuple[Fetch, Fetch | None]:
    model.check_no_steps("photographs alone, --image-dir, are not enough")
    encoder = CosmosEncoder(config.cosmos_model_name, model.gemma.dtype, model.gemma.device)
    model.check_encoder(encoder.identity())
    latents = LiveLatents(encoder, folder, config.latent_size, config.max_image_pixels)
    if not model.gemma.is_multimodal:
        return latents, None
    return latents, LiveVision(model.gemma, folder, config.max_image_pixels)
