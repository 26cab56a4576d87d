"""What a run trains and evaluates on, checked against its settings before any model loads."""

import contextlib
import hashlib
import json
import os
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from theworld.cache import (
    LATENTS,
    VISION,
    LivePixels,
    LiveVision,
    Rows,
    check_meaning,
    expected_latents,
    expected_vision,
    in_cache,
)
from theworld.captions import Captions, captions_note, load_captions
from theworld.compare import check_photographs
from theworld.config import Config
from theworld.feed import Fetch
from theworld.gemma import Gemma, is_multimodal
from theworld.model import TheWorld
from theworld.saved import VISION as VISION_PART
from theworld.saved import read_world
from theworld.store import StoreError
from theworld.unfrozen import prepare_parts
from theworld.vsr import Statement, images_of, load_statements, relation_note

COMPARE_SECONDS = 60.0  # for comparing photographs before training; tools/doctor.py takes the time it needs


@dataclass
class Data:
    """What a run trains and evaluates on."""

    train: list[Statement]
    dev: list[Statement]
    latents: Rows
    vision: Fetch | None  # None for a text-only Gemma
    notes: list[str] = field(default_factory=list)
    captions: Captions | None = None  # of the photographs to train on; None: not asked for

    def sha256(self) -> str:
        """Of all that is said of the photographs to train on."""
        said = [[vars(statement) for statement in self.train], self.captions]
        return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()

    @contextlib.contextmanager
    def reading_ahead(self) -> Iterator[None]:
        """Reads what training is going to ask for, in file order, beside it, until the block is left: a program that
        ends in the middle of a row may wait for HDF5 for ever. Stops without a word at what cannot be read: the step
        that needs it says so."""
        images, stop = images_of([*self.train, *self.dev]), threading.Event()

        def read() -> None:
            for rows in (self.latents, self.vision):
                if isinstance(rows, Rows):
                    with contextlib.suppress(StoreError, OSError):
                        rows.preload(images, stop=stop)

        thread = threading.Thread(target=read, daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()


def load_data(config: Config, cache: Path) -> Data:
    """Statements and cache, checked against the settings before any model loads. Vision is there if it is cached; see
    `load_model`."""
    latents = Rows(cache / LATENTS, LATENTS, expected_latents(config))
    train = load_statements(config.annotations, "train", config.dataset_name)
    dev = load_statements(config.annotations, "dev", config.dataset_name) if config.do_eval else []
    train = train[: config.num_samples]
    train, train_note = in_cache(train, latents, cache)
    dev, dev_note = in_cache(dev, latents, cache)
    if not train:
        raise ValueError(f"{config.annotations}: no training statement has its image in {cache}")
    notes = [f"train: {train_note}", f"dev: {dev_note}"]
    if config.relation_loss_weight > 0:
        notes.append(relation_note(train))
    captions = load_captions(config.captions, images_of(train)) if config.captions else None
    if captions is not None:
        notes.append(captions_note(captions, images_of(train)))
    notes += compared(config, latents, images_of([*train, *dev]))
    return Data(train, dev, latents, cached_vision(config, cache), notes, captions)


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


def cached_vision(config: Config, cache: Path) -> Rows | None:
    """The cache's vision features, of a Gemma as it was published; None if it does not see or they are not there."""
    if not (cache / VISION).exists() or not is_multimodal(config.model_name):
        return None
    return Rows(cache / VISION, VISION, expected_vision(config))


def prepare_gemma(gemma: Gemma, config: Config, data: Data, start: Path | None) -> None:
    """Makes of a Gemma as it was published the one that a run trains. `start`: the checkpoint of this run or of an
    earlier stage, whose latents have to be those of the cache. Sets where `data` has Gemma's sight from."""
    world = None
    if start is not None:
        world = read_world(start)
        check_meaning(data.latents.reader.root, data.latents.reader.fingerprint, world["fingerprint"])
    prepare_parts(gemma, config, world)
    data.vision = vision_for(gemma, config, data.vision, data.notes, data.latents.reader.images)
    if isinstance(data.vision, Rows):
        gemma.drop_vision()


def load_model(gemma: Gemma, config: Config, data: Data, start: Path | None) -> TheWorld:
    """The weights of a Gemma made without them, and a new projection or the weights of `start`: see `prepare_gemma`."""
    gemma.load_weights()
    prepare_gemma(gemma, config, data, start)
    model = TheWorld.from_config(config, gemma, data.latents.reader.fingerprint)
    if start is not None:
        model.load_weights(start)
    return model


def vision_for(
    gemma: Gemma,
    config: Config,
    cached: Fetch | None,
    notes: list[str],
    hashes: Mapping[str, str] | None = None,
) -> Fetch | None:
    """Where a Gemma's sight comes from: cached features, photographs through its tower or, if that trains, photographs
    alone; None for one that does not see. Adds a note where cached features are of no use. `hashes`: path -> SHA-256 of
    the photographs whose latents go with them.

    Raises ValueError if photographs are needed and `image_folder` is not set, StoreMismatch if cached features are
    another tower's.
    """
    if not gemma.is_multimodal:
        return None
    if isinstance(cached, Rows) and VISION_PART not in gemma.changed:
        if gemma.has_weights:
            check_same_eyes(gemma, cached)
        return cached
    if VISION_PART in gemma.changed:
        reason = "Gemma's vision tower is not as it was published, so cached features of it are of no use"
        note = f"photographs are read: {reason}"
        if isinstance(cached, Rows) and note not in notes:
            notes.append(note)
    else:
        reason = "the cache has no features of them"
    if config.image_folder is None:
        other = "" if gemma.changed else ", or extract them once with tools/extract_latents.py --gemma_vision"
        raise ValueError(f"this Gemma looks at the photographs: {reason}; give --image_folder{other}")
    kind = LivePixels if VISION_PART in gemma.trained else LiveVision
    return kind(gemma, config.image_folder, config.max_image_pixels, hashes)


def check_same_eyes(gemma: Gemma, vision: Rows) -> None:
    """StoreMismatch if cached features come from another tower. Cast weights have other bits, so towers are
    compared where they were loaded in the same dtype."""
    cached, own = vision.reader.fingerprint, gemma.vision_identity()
    if cached["compute_dtype"] == own["compute_dtype"]:
        check_meaning(vision.reader.root, {key: cached.get(key) for key in own}, own)
