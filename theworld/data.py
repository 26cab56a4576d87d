"""What a run trains and evaluates on, checked against its settings before any model loads."""

import contextlib
import json
import os
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from theworld.cache import (
    LATENTS,
    VISION,
    LiveVision,
    Rows,
    check_meaning,
    expected_latents,
    expected_vision,
    in_cache,
)
from theworld.compare import check_photographs
from theworld.config import Config
from theworld.feed import Fetch
from theworld.gemma import Gemma, is_multimodal
from theworld.model import TheWorld, load_gemma
from theworld.store import StoreError
from theworld.vsr import Statement, images_of, load_statements

COMPARE_SECONDS = 60.0  # for comparing photographs before training; tools/doctor.py takes the time it needs


@dataclass
class Data:
    """What a run trains and evaluates on."""

    train: list[Statement]
    dev: list[Statement]
    latents: Rows
    vision: Fetch | None  # None for a text-only Gemma
    notes: list[str] = field(default_factory=list)

    def read_ahead(self) -> None:
        """Starts to read what training is going to ask for, in file order, beside it. Stops without a word at what
        cannot be read: the step that needs it says so."""
        images = images_of([*self.train, *self.dev])

        def read() -> None:
            for rows in (self.latents, self.vision):
                if isinstance(rows, Rows):
                    with contextlib.suppress(StoreError, OSError):
                        rows.preload(images)

        threading.Thread(target=read, daemon=True).start()


def load_data(config: Config, cache: Path) -> tuple[Data, bool]:
    """Statements and cache, checked against the settings before any model loads; and whether vision is cached."""
    latents = Rows(cache / LATENTS, LATENTS, expected_latents(config))
    train = load_statements(config.annotations, "train", config.dataset_name)
    dev = load_statements(config.annotations, "dev", config.dataset_name) if config.do_eval else []
    train = train[: config.num_samples]
    train, train_note = in_cache(train, latents, cache)
    dev, dev_note = in_cache(dev, latents, cache)
    if not train:
        raise ValueError(f"{config.annotations}: no training statement has its image in {cache}")
    cached = is_multimodal(config.model_name) and (cache / VISION).exists()
    vision = Rows(cache / VISION, VISION, expected_vision(config)) if cached else None
    notes = [
        f"train: {train_note}",
        f"dev: {dev_note}",
        *compared(config, latents, images_of([*train, *dev])),
    ]
    return Data(train, dev, latents, vision, notes), cached


def compared(config: Config, latents: Rows, images: list[str]) -> list[str]:
    """A line that says how many of a run's photographs were compared with what was extracted, where they are at hand.

    Raises PhotographsChanged if one was edited, replaced or deleted. Only the first process looks.
    """
    if config.image_folder is None or os.environ.get("RANK", "0") != "0":
        return []
    folder = Path(config.image_folder)
    if not any((folder / image).exists() for image in images):
        return [f"photographs: not in {folder}, so they were not compared with the cache"]
    hashes = {image: latents.reader.images[image] for image in images}
    extracted = (latents.reader.root / "manifest.json").stat().st_mtime
    return [check_photographs(hashes, folder, extracted, COMPARE_SECONDS)]


def check_trained_for(model: Path, root: Path, fingerprint: dict[str, Any]) -> None:
    """StoreMismatch, field by field, unless a saved projection was trained for such latents. Loads no model; a damaged
    world.json is left to those who load it."""
    try:
        trained = dict(json.loads((model / "world.json").read_text())["fingerprint"])
    except (ValueError, KeyError, TypeError, FileNotFoundError):
        return
    check_meaning(root, fingerprint, trained)


def load_model(config: Config, data: Data, vision_cached: bool, device: torch.device) -> TheWorld:
    """Gemma and a new projection. Without cached vision features a Gemma that sees reads the photographs."""
    gemma = load_gemma(config, device)
    if gemma.is_multimodal and vision_cached:
        assert isinstance(data.vision, Rows)
        check_same_eyes(gemma, data.vision)
        gemma.drop_vision()
    elif gemma.is_multimodal:
        if config.image_folder is None:
            raise ValueError(
                "this Gemma looks at the photographs, and the cache has no features of them: give --image_folder, or "
                "extract them once with tools/extract_latents.py --gemma_vision"
            )
        hashes = data.latents.reader.images
        data.vision = LiveVision(gemma, config.image_folder, config.max_image_pixels, hashes)
    return TheWorld.from_config(config, gemma, data.latents.reader.fingerprint)


def check_same_eyes(gemma: Gemma, vision: Rows) -> None:
    """StoreMismatch if cached features come from another tower. Cast weights have other bits, so towers are
    compared where they were loaded in the same dtype."""
    cached, own = vision.reader.fingerprint, gemma.vision_identity()
    if cached["compute_dtype"] == own["compute_dtype"]:
        check_meaning(vision.reader.root, {key: cached.get(key) for key in own}, own)
