"""What a run trains and evaluates on, checked against its settings before any model loads."""

import contextlib
import hashlib
import json
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from theworld.config.config import Config
from theworld.data.captions import Captions, captions_note, load_captions
from theworld.data.images import check_photographs
from theworld.data.vsr import Statement, images_of, load_statements, relation_note
from theworld.extraction.batches import Fetch
from theworld.extraction.encoders import expected_latents
from theworld.extraction.features import Rows, cached_vision, in_cache, vision_for
from theworld.models.gemma import Gemma, prepare_parts
from theworld.models.serialization import SavedModel
from theworld.models.theworld import TheWorld
from theworld.store.format import LATENTS, check_meaning
from theworld.utils.files import StoreError

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


def prepare_gemma(gemma: Gemma, config: Config, data: Data, start: SavedModel | None) -> None:
    """Makes of a Gemma as it was published the one that a run trains. `start`: the checkpoint of this run or of an
    earlier stage, whose latents have to be those of the cache. Sets where `data` has Gemma's sight from."""
    world = None
    if start is not None:
        world = start.world
        check_meaning(data.latents.reader.root, data.latents.reader.fingerprint, world["fingerprint"])
    prepare_parts(gemma, config, world)
    data.vision = vision_for(gemma, config, data.vision, data.notes, data.latents.reader.images)
    if isinstance(data.vision, Rows):
        gemma.drop_vision()


def load_model(gemma: Gemma, config: Config, data: Data, start: SavedModel | None) -> TheWorld:
    """The weights of a Gemma made without them, and a new projection or the weights of `start`: see `prepare_gemma`."""
    gemma.load_weights()
    prepare_gemma(gemma, config, data, start)
    model = TheWorld.from_config(config, gemma, data.latents.reader.fingerprint)
    if start is not None:
        model.load_weights(start)
    return model
