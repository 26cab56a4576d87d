"""Checkpoints scored on a split: from a cache, or from photographs alone."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from theworld.cache import (
    LATENTS,
    VISION,
    LiveVision,
    Rows,
    check_meaning,
    expected_vision,
    in_cache,
    latent_pixels,
)
from theworld.checkpoint import find_model
from theworld.config import Config, load_config
from theworld.data import check_same_eyes
from theworld.evaluate import predict
from theworld.feed import Fetch
from theworld.gemma import Gemma
from theworld.held_out import HeldOut, held_out
from theworld.images import read_image
from theworld.metrics import Row, model_of, records
from theworld.model import CONFIG_FILE, WORLD_FILE, TheWorld
from theworld.provenance import default_output, of_checkpoint, of_results, short_names, write_results
from theworld.vae import CosmosEncoder
from theworld.vsr import Statement


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
) -> list[Row]:
    """One record a statement of the split, with the answers of every system (see `theworld.evaluate`).

    Exactly one of `cache` and `image_folder` is given. Prints what is left out, if anything is.
    """
    data = held_out({"": checkpoint}, split, overrides)
    return score_all({"": checkpoint}, data, cache, image_folder, systems, overrides)[0]


def score_to_file(
    models: Sequence[Path],
    split: str,
    cache: Path | None,
    image_folder: Path | None,
    systems: Sequence[str],
    overrides: dict[str, Any],
    command: Sequence[str],
    output: Path | None = None,
    train_annotations: str | None = None,
    allow_trained: bool = False,
) -> tuple[Path, dict[str, Any]]:
    """Scores checkpoints, or the newest ones in folders, writes records, summary and where they come from, and returns
    the path of the records and the summary. `output` None: a place in the run of a single model.

    Raises ValueError as `held_out` and `score_all` do, and for several models without `output`.
    """
    found = [find_model(model) for model in models]
    checkpoints = dict(zip(short_names(models, found), found, strict=True))
    data = held_out(checkpoints, split, overrides, train_annotations, allow_trained)
    if output is None and len(found) > 1:
        raise ValueError("several models belong to no single run; name an --output, such as comparison.jsonl")
    output = output or default_output(models[0], found[0], data)
    rows, source = score_all(checkpoints, data, cache, image_folder, systems, overrides)
    return output, write_results(rows, source, output, command)


def score_all(
    checkpoints: Mapping[str, Path],
    data: HeldOut,
    cache: Path | None,
    image_folder: Path | None,
    systems: Sequence[str],
    overrides: dict[str, Any],
) -> tuple[list[Row], dict[str, Any]]:
    """The records of several checkpoints on the same statements, and where they come from (`theworld.provenance`).

    `checkpoints`: folders by the names that stand before their systems, "" for a single one. What does not depend on
    a checkpoint is answered once where all of them have the same Gemma and ask it the same: then "baseline" and
    "text" have no name before them. Gemma stays loaded from one checkpoint to the next that has the same.
    """
    keys = {name: _gemma_key(path, overrides) for name, path in checkpoints.items()}
    shared = len(set(keys.values())) == 1
    statements = data.statements
    logits: dict[str, np.ndarray] = {}
    sources: dict[str, Any] = {}
    gemma: Gemma | None = None
    loaded: Any = None
    for name, path in checkpoints.items():
        model = TheWorld.from_pretrained(path, gemma if keys[name] == loaded else None, **overrides)
        gemma, loaded = model.gemma, keys[name]
        if cache is not None:
            latents, vision, statements = _from_cache(model, cache, data.statements)
        else:
            assert image_folder is not None
            latents, vision = _from_photographs(model, model.config, image_folder)
        asked = {f"{name}:{kind}" if name else kind: kind for kind in _possible(model, systems)}
        if name and shared:
            asked = {kind if kind in ("baseline", "text") else system: kind for system, kind in asked.items()}
        asked = {system: kind for system, kind in asked.items() if system not in logits}
        print(f"answering as {', '.join(asked)}", flush=True)
        size = model.config.eval_statements
        answers = predict(model, statements, latents, vision, list(asked.values()), size, quiet=False)
        logits |= {system: answers[kind] for system, kind in asked.items()}
        sources[name] = of_checkpoint(model, path, data.trained_on[name])
        del model, latents, vision  # before the next: with them its merged copy of Gemma's matrices
    logits = dict(sorted(logits.items(), key=lambda item: bool(model_of(item[0]))))  # what all share first
    rows = records(statements, logits, data.seen_images, data.in_train, data.dataset, data.split)
    return rows, of_results(data, cache, image_folder, sources)


def _gemma_key(path: Path, overrides: dict[str, Any]) -> tuple[Any, ...]:
    """What is equal for two checkpoints if and only if they answer alike without world tokens, so that one Gemma serves
    both."""
    config = load_config(path / CONFIG_FILE, overrides)
    fields = ("model_name", "dtype", "device", "compile", "fp8", "question_template", "max_seq_length")
    revision = json.loads((path / WORLD_FILE).read_text()).get("model_revision")
    return (revision, *(getattr(config, field) for field in fields))


def _possible(model: TheWorld, systems: Sequence[str]) -> list[str]:
    """The systems that this Gemma has; says which one it leaves out. ValueError if none is left."""
    possible = [s for s in systems if s != "text" or model.gemma.is_multimodal]
    if not possible:
        raise ValueError(
            f"system 'text': {model.gemma.name} sees no photograph, so it is 'baseline'; ask for that"
        )
    if len(possible) < len(systems):
        print("without 'text': this Gemma sees no photograph, so it is 'baseline'")
    return possible


def _from_cache(
    model: TheWorld, cache: Path, statements: list[Statement]
) -> tuple[Fetch, Fetch | None, list[Statement]]:
    latents = Rows(cache / LATENTS, LATENTS)
    check_meaning(latents.reader.root, latents.reader.fingerprint, model.fingerprint)
    statements, note = in_cache(statements, latents, cache)
    print(f"scoring {note}")
    if not model.gemma.is_multimodal:
        return latents, None, statements
    if (cache / VISION).exists():
        vision = Rows(cache / VISION, VISION, expected_vision(model.config))
        check_same_eyes(model.gemma, vision)
        return latents, vision, statements
    if model.config.image_folder is None:
        raise ValueError(
            f"{cache} has no vision features; extract them with tools/extract_latents.py --gemma_vision, or score "
            "from photographs with --image-dir"
        )
    return (
        latents,
        LiveVision(model.gemma, model.config.image_folder, model.config.max_image_pixels),
        statements,
    )


def _from_photographs(model: TheWorld, config: Config, folder: Path) -> tuple[Fetch, Fetch | None]:
    encoder = CosmosEncoder(config.cosmos_model_name, model.gemma.dtype, model.gemma.device)
    model.check_encoder(encoder.identity())
    latents = LiveLatents(encoder, folder, config.latent_size, config.max_image_pixels)
    if not model.gemma.is_multimodal:
        return latents, None
    return latents, LiveVision(model.gemma, folder, config.max_image_pixels)
