"""What a run trains and evaluates on, checked against its settings before any model loads."""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from theworld.config.config import Config
from theworld.data.captions import Captions, captions_note, load_captions, pick_captions
from theworld.data.images import check_photographs
from theworld.data.vsr import Statement, images_of, load_statements, relation_note, training_statements
from theworld.extraction.batches import FeatureSource
from theworld.extraction.features import (
    CachedFeatures,
    NoRows,
    WorldRows,
    cached_latents,
    cached_vision,
    in_cache,
    vision_note,
    vision_source,
)
from theworld.extraction.statistics import measured_on
from theworld.models.encoder import MEASURED, check_compatible
from theworld.models.fsdp import asked
from theworld.models.gemma import Gemma, KeptGemma, decide_parts, load_gemma
from theworld.models.serialization import SavedModel
from theworld.models.theworld import TheWorld
from theworld.training.schedule import Phase

COMPARE_SECONDS = 60.0  # for comparing photographs before training; tools/doctor.py takes the time it needs


@dataclass
class Data:
    """What a run trains and evaluates on."""

    train: list[Statement]
    dev: list[Statement]
    latents: WorldRows | NoRows
    vision: FeatureSource | None  # None: of a text-only Gemma, or not cached
    notes: list[str] = field(default_factory=list)  # lines about all this, to show before the start
    captions: Captions | None = None  # of the training photographs; None: not asked for
    num_epoch: int = 0  # statements of an epoch by which steps are counted: `train`, or what it is a share of

    def sha256(self) -> str:
        """Return the hash of the training statements and captions."""
        # Fields that older checkpoints did not hash are hashed where they say something.
        newer = ("is_question", "group", "sets", "source_image")
        statements = [{k: v for k, v in vars(s).items() if v or k not in newer} for s in self.train]
        said = [statements, self.captions]
        return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()

    def captions_of(
        self, statements: Sequence[Statement], phase: Phase, seed: int, step: int
    ) -> dict[str, str] | None:
        """Return a caption for each of the statements' images, or None in a phase that predicts no captions."""
        if self.captions is None or "statement" not in phase.word_losses:
            return None
        return pick_captions(self.captions, statements, seed, step)


def load_data(config: Config, cache: Path) -> Data:
    """Return statements and cache, checked against the settings before any model loads. `vision` is what is cached: see
    `with_vision`."""
    vision, latents = cached_vision(config, cache), cached_latents(config, cache)
    train = load_statements(config.annotations, "train", config.dataset_name)
    dev = load_statements(config.annotations, "dev", config.dataset_name) if config.do_eval else []
    pool, train_note = in_cache(train[: config.num_samples], latents, cache)
    train, _ = in_cache(training_statements(train, config), latents, cache)
    if config.train_share is not None:
        drawn = f"{len(train):,} statements, drawn by the seed (train_share {config.train_share:g})"
        train_note = f"{drawn}, of {train_note}; as many steps as with all of them"
    dev, dev_note = in_cache(dev, latents, cache)
    if not train:
        raise ValueError(
            f"{config.annotations or config.dataset_name}: no training statement has its image in {cache}"
        )
    notes = [f"train: {train_note}", f"dev: {dev_note}"]
    if config.relation_loss_weight > 0:
        notes.append(relation_note(train))
    captions = load_captions(config.captions, images_of(train)) if config.captions else None
    if captions is not None:
        notes.append(captions_note(captions, images_of(train)))
    notes += compared(config, latents, images_of([*train, *dev]))
    return Data(train, dev, latents, vision, notes, captions, len(pool))


def with_statistics(data: Data, start: SavedModel | None) -> Data:
    """Return the data with the statistics by which the projection standardises rows, where the settings want those of
    the training images: measured, or those of the checkpoint that the run starts from, whose weights go with them."""
    latents = data.latents
    if "standardization" not in latents.fingerprint:
        return data
    assert isinstance(latents, WorldRows), "only rows are standardised"
    trained = {} if start is None else start.world["fingerprint"]
    images, source = (
        images_of(data.train),
        "" if start is None else f", measured by the run of {start.folder}",
    )
    if "standardized_on" not in trained:
        trained, source = measured_on(latents, images), f" of the {len(images):,} training images"
    note = f"rows are standardised by the mean and deviation of each channel{source}"
    measured = {key: trained[key] for key in MEASURED}
    return replace(data, latents=latents.having(**measured), notes=[*data.notes, note])


def compared(config: Config, latents: WorldRows | NoRows, images: list[str]) -> list[str]:
    """Return a line that says how many of a run's photographs were compared with those that were extracted, where they
    are on this machine.

    Raises PhotographsChanged if one was edited, replaced or deleted. Only the first process looks.
    """
    if config.image_folder is None or os.environ.get("RANK", "0") != "0" or latents.images is None:
        return []
    folder = Path(config.image_folder)
    if not any((folder / image).exists() for image in images):
        return [f"photographs: not in {folder}, so they were not compared with the cache"]
    hashes = {image: latents.images[image] for image in images}
    extracted = (latents.root / "manifest.json").stat().st_mtime
    links = config.follow_links
    return [check_photographs(hashes, folder, extracted, COMPARE_SECONDS, follow_links=links)]


def plan_gemma(config: Config, device: torch.device, data: Data, start: SavedModel | None) -> Gemma:
    """Return the Gemma of a run as shapes without weights.

    `start` is the checkpoint of this run or of an earlier stage. Raises StoreMismatch if its latents are others than
    those in the cache, ValueError for settings that cannot go on from it.
    """
    world = None if start is None else start.world
    if world is not None:
        check_compatible(data.latents.root, data.latents.fingerprint, world["fingerprint"])
    parts = decide_parts(config, world)
    return load_gemma(config, device, parts=parts, weights=False, sharded=asked())


def with_vision(data: Data, gemma: Gemma, config: Config) -> Data:
    """Return the data with the source of this Gemma's vision features, and free its vision tower if they are cached."""
    cached = data.vision if isinstance(data.vision, CachedFeatures) else None
    vision = vision_source(gemma, config, cached, data.latents.images, data.latents.cache)
    if isinstance(vision, CachedFeatures):
        gemma.drop_vision()
    return replace(data, vision=vision, notes=[*data.notes, *vision_note(gemma, cached)])


def load_model(
    planned: Gemma, config: Config, data: Data, start: SavedModel | None, kept: KeptGemma | None = None
) -> tuple[TheWorld, Data]:
    """Return the model of a run, with a new projection or the weights of `start`, and the data with its vision source.

    `planned` and `data` are as `plan_gemma` and `with_vision` gave them; `kept` has the Gemma of the run before.
    """
    gemma = planned.with_weights() if kept is None else kept.of(planned)
    data = with_vision(data, gemma, config)
    model = TheWorld.from_config(config, gemma, data.latents.fingerprint)
    if start is not None:
        model.load_weights(start)
    return model, data
