"""What `tools/ask.py` does: load a trained model, ask it about a photograph, and show its answers."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from theworld.config.config import Config, load_config
from theworld.data.images import photograph, refuse_address
from theworld.evaluation.predict import possible_conditions
from theworld.models import world_encoder
from theworld.models.inference import CONDITIONS, Photograph, check_alone
from theworld.models.projection import ProjectionShape
from theworld.models.serialization import CONFIG_FILE, WORLD_FILE, SavedModel
from theworld.models.theworld import TheWorld
from theworld.utils.device import resolve_device, resolve_dtype, set_up_torch
from theworld.utils.hub import GEMMA_FILE, locate
from theworld.utils.text import check_texts, counted

# "without" is a Gemma that a later stage trained, where "baseline" would be the published Gemma, as in an evaluation.
LABELS = {
    "world": "with world tokens",
    "baseline": "without world tokens",
    "without": "without world tokens",
    "zero": "zero latents",
}
# Compiling pays for thousands of statements, not for a few.
DEFAULTS = {"compile": False}
Answers = list[dict[str, Any]]


def load_for_asking(name: str, conditions: Sequence[str], overrides: dict[str, Any]) -> TheWorld:
    """Return a model that is ready to be asked, with its VAE if `conditions` need it.

    `name` is a checkpoint, a folder whose newest checkpoint is taken, or a model on the hub. Raises ValueError and
    OSError as `TheWorld.from_pretrained` does; for a model trained on predicted frames before any weights load.
    """
    saved = SavedModel.open(name)
    _check_alone(saved, conditions)
    if "world" in conditions:  # before Gemma loads, which takes minutes
        list(_encoder_place(saved, saved.config(DEFAULTS | overrides)))
    model = TheWorld.from_pretrained(saved, **DEFAULTS | overrides)
    set_up_torch(model.gemma.dtype)
    if "world" in conditions:
        _ = model.encoder  # load the VAE now and not at the first photograph
    return model


def _encoder_place(saved: SavedModel, config: Config) -> Iterator[tuple[str, str]]:
    """Yield the world encoder and its place, if it has weights. Raises Fault if they are nowhere."""
    weights = world_encoder.describe(config).weights
    if weights is not None:
        place = saved.locate(config, weights.model, weights.file)
        yield weights.topic, f"{weights.model}: {place.words}"


def _check_alone(saved: SavedModel, conditions: Sequence[str]) -> None:
    if "world" in conditions:
        shape = ProjectionShape.from_dict(saved.world["projection"])
        check_alone(shape, saved.config(), "--conditions baseline zero needs none")


def recorded_names(model: TheWorld, conditions: Sequence[str]) -> list[str]:
    """Return the names of these conditions in `answers`, which are those in the records of an evaluation.

    As there, "zero" is left out where world tokens look at no picture.
    """
    conditions = possible_conditions(conditions, model.gemma.is_multimodal, model.config)
    return ["without" if c == "baseline" and model.gemma.modified_parts else c for c in conditions]


def check_question(image: str, statements: Sequence[str]) -> None:
    """Raise ImageError for an address in place of a file, ValueError for a statement that is empty or no text."""
    refuse_address(image)
    check_texts(statements, "statement")


def answers(
    model: TheWorld, image: Photograph, statements: Sequence[str], conditions: Sequence[str] = CONDITIONS
) -> Answers:
    """Return {"statement": ..., "p_true": {name of the condition: P(true)}} for each statement.

    Raises ValueError and ImageError as `TheWorld.score` does.
    """
    conditions = possible_conditions(conditions, model.gemma.is_multimodal, model.config)
    p_true = model.ask(image, statements, conditions)
    names = dict(zip(recorded_names(model, conditions), conditions, strict=True))
    return [
        {"statement": statement, "p_true": {name: p_true[condition][i] for name, condition in names.items()}}
        for i, statement in enumerate(statements)
    ]


def table(rows: Answers) -> str:
    """Return the answers as text for a terminal, one line for each statement."""
    names = list(rows[0]["p_true"])
    heads = [LABELS[name] for name in names]
    lines = ["P(true) " + "  ".join(heads)]
    for row in rows:
        cells = [f"{row['p_true'][n]:.1%}".rjust(len(h)) for n, h in zip(names, heads, strict=True)]
        lines.append(" " * 8 + "  ".join(cells) + "  " + row["statement"])
    return "\n".join(lines)


def plan(
    name: str,
    image: str | None,
    statements: Sequence[str],
    conditions: Sequence[str],
    overrides: dict[str, Any],
) -> Iterator[tuple[str, str]]:
    """Yield (part, what would be done) for everything that would be loaded and asked; loads and downloads nothing.

    `image` is None for a page, whose photographs are not known yet. Raises ValueError and OSError where a run would
    stop.
    """
    folder = SavedModel.open_folder(name).folder if Path(name).is_dir() else None
    place = locate(name, WORLD_FILE) if folder is None else None
    if place is not None:
        folder = None if place.config is None else place.config.parent
    if folder is None or not (folder / CONFIG_FILE).is_file():
        yield "projection", f"{name}: on the hub; what it needs is known once it is downloaded"
        config = load_config(None, DEFAULTS | overrides)
    else:
        saved = SavedModel.open_folder(folder)
        _check_alone(saved, conditions)
        config = saved.config(DEFAULTS | overrides)
        conditions = possible_conditions(conditions, True, config)
        device = resolve_device(config.device)
        arithmetic = f"{device}, {resolve_dtype(config.dtype, device)}"
        yield "projection", f"{folder}, for {saved.world['model_name']}"
        place = saved.locate(config, config.model_name, GEMMA_FILE)
        yield "Gemma", f"{config.model_name}: {place.words}; {arithmetic}"
        if "world" in conditions:
            yield from _encoder_place(saved, config)
    if image is not None:
        check_question(image, statements)
        height, width, _ = photograph(image, config.max_image_pixels).shape
        yield "reads", f"{image}, {width} x {height} pixels"
        asked = f"{counted(len(conditions), 'condition')} ({', '.join(conditions)})"
        yield "asks", f"{asked} about {counted(len(statements), 'statement')}"
