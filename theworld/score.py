"""Checkpoints scored on a split: from a cache, or from photographs alone."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from theworld.cache import LATENTS, LiveVision, Rows, check_meaning, in_cache, latent_pixels
from theworld.checkpoint import find_model
from theworld.config import Config, load_config
from theworld.data import cached_vision, vision_for
from theworld.evaluate import possible_systems, predict
from theworld.feed import Fetch
from theworld.held_out import HeldOut, held_out
from theworld.images import read_image
from theworld.metrics import Row, model_of, records
from theworld.model import TheWorld
from theworld.places import check_output
from theworld.provenance import default_output, of_checkpoint, of_results, short_names, write_results
from theworld.saved import CONFIG_FILE, read_world
from theworld.store import StoreReader
from theworld.unfrozen import load_gemma
from theworld.vae import CosmosEncoder
from theworld.vsr import Statement

NOT_ALONE = "photographs alone, --image-dir, are not enough"


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
    output = output or default_output(models, found, data.dataset, split)
    check_output(output)
    rows, source = score_all(checkpoints, data, cache, image_folder, systems, overrides)
    return output, write_results(rows, source, output, command)


@dataclass
class _Answers:
    """What each system says of the same statements, put together model by model."""

    data: HeldOut
    cache: Path | None
    image_folder: Path | None
    shared: set[str]  # systems that are the same for all checkpoints, and have no name before them
    statements: Sequence[Statement] = ()  # as they were read
    logits: dict[str, np.ndarray] = field(default_factory=dict)

    def add(self, model: TheWorld, name: str, kinds: dict[str, str]) -> None:
        """Asks a checkpoint's model; `kinds`: what it is asked by what its answers are called."""
        latents, vision, self.statements = _sources(
            model, self.cache, self.image_folder, self.data.statements
        )
        named = {k if k in self.shared or not name else f"{name}:{k}": kind for k, kind in kinds.items()}
        named = {system: kind for system, kind in named.items() if system not in self.logits}
        print(f"answering as {', '.join(named)}", flush=True)
        size = model.config.eval_statements
        found = predict(model, self.statements, latents, vision, list(named.values()), size, quiet=False)
        self.logits.update({system: found[kind] for system, kind in named.items()})


def score_all(
    checkpoints: Mapping[str, Path],
    data: HeldOut,
    cache: Path | None,
    image_folder: Path | None,
    systems: Sequence[str],
    overrides: dict[str, Any],
) -> tuple[list[Row], dict[str, Any]]:
    """The records of several checkpoints on the same statements, and where they come from (`theworld.provenance`).

    `checkpoints`: folders by the names that stand before their systems, "" for a single one. "baseline" is always Gemma
    as it was published: where a checkpoint has a Gemma of its own, what that answers without world tokens is "without".
    What is the same for all checkpoints is answered once, and has no name before it. Gemma stays loaded from one to the
    next that has the same.
    """
    worlds = {name: read_world(path) for name, path in checkpoints.items()}
    if cache is not None:  # before any model loads
        reader = StoreReader(cache / LATENTS)
        for world in worlds.values():
            check_meaning(reader.root, reader.fingerprint, world["fingerprint"])
    keys = {name: _gemma_key(path, worlds[name], overrides) for name, path in checkpoints.items()}
    shared = _shared(worlds, keys)
    answers = _Answers(data, cache, image_folder, shared)
    sources: dict[str, Any] = {}
    gemma, loaded = None, None  # as it was published, and its key
    for name, path in checkpoints.items():
        world = worlds[name]
        if world["parts"] or keys[name] != loaded:
            gemma, loaded = None, None  # before another is loaded
        model = TheWorld.from_pretrained(path, gemma, **overrides)
        sources[name] = of_checkpoint(model, path, data.trained_on[name])
        kinds = possible_systems(systems, model.gemma.is_multimodal, model.gemma.name)
        if len(kinds) < len(systems):
            print("without 'text': this Gemma sees no photograph, so it is 'baseline'")
        called = {"without" if world["parts"] and kind == "baseline" else kind: kind for kind in kinds}
        answers.add(model, name, called)
        if world["parts"] and "baseline" in kinds and not shared & answers.logits.keys():
            config, fingerprint = model.config, model.fingerprint
            del model
            plain = load_gemma(config, revision=world["model_revision"])
            model = TheWorld.from_config(config, plain, fingerprint)
            answers.add(model, name, {"baseline": "baseline"})
        if not model.gemma.changed:
            gemma, loaded = model.gemma, keys[name]
        del model  # before the next: it holds merged copies of Gemma's matrices
    # What all share first.
    logits = dict(sorted(answers.logits.items(), key=lambda item: bool(model_of(item[0]))))
    rows = records(answers.statements, logits, data.seen_images, data.in_train, data.dataset, data.split)
    return rows, of_results(data, cache, image_folder, sources)


def _shared(worlds: dict[str, dict[str, Any]], keys: dict[str, tuple[Any, ...]]) -> set[str]:
    """The systems that answer alike whatever the checkpoint: those of one Gemma, and without its changes."""
    if len(set(keys.values())) > 1:
        return set()
    return {"baseline"} if any(world["parts"] for world in worlds.values()) else {"baseline", "text"}


def _gemma_key(path: Path, world: dict[str, Any], overrides: dict[str, Any]) -> tuple[Any, ...]:
    """What is equal for two checkpoints if and only if the Gemma that they started from answers both alike without
    world tokens."""
    config = load_config(path / CONFIG_FILE, overrides)
    fields = ("model_name", "dtype", "device", "compile", "fp8", "question_template", "max_seq_length")
    return (world["model_revision"], *(getattr(config, field) for field in fields))


def _sources(
    model: TheWorld, cache: Path | None, image_folder: Path | None, statements: list[Statement]
) -> tuple[Fetch, Fetch | None, list[Statement]]:
    if cache is not None:
        return _from_cache(model, cache, statements)
    assert image_folder is not None
    return *_from_photographs(model, model.config, image_folder), statements


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
    model.check_no_steps(NOT_ALONE)
    encoder = CosmosEncoder(config.cosmos_model_name, model.gemma.dtype, model.gemma.device)
    model.check_encoder(encoder.identity())
    latents = LiveLatents(encoder, folder, config.latent_size, config.max_image_pixels)
    if not model.gemma.is_multimodal:
        return latents, None
    return latents, LiveVision(model.gemma, folder, config.max_image_pixels)
