"""What tools/ask.py does: a trained model is loaded, asked about a photograph, and what it says is shown."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from theworld.asking import SYSTEMS, ask
from theworld.checkpoint import find_model
from theworld.config import load_config
from theworld.dry_run import line
from theworld.given import Photograph
from theworld.images import photograph
from theworld.model import TheWorld
from theworld.places import GEMMA_FILE, VAE_FILE, locate
from theworld.projection import ProjectionShape
from theworld.saved import CONFIG_FILE, WORLD_FILE, read_world, saved_folder
from theworld.weights import resolve_device, resolve_dtype

# "without": of a Gemma that a later stage trained, where "baseline" would be the published one, as in an evaluation.
NAMES = {
    "world": "with world tokens",
    "baseline": "without them",
    "without": "without them",
    "zero": "zero latents",
}
# Compiling pays for thousands of statements, not for one.
DEFAULTS = {"compile": False}
Answers = list[dict[str, Any]]


def load_for_asking(name: str, systems: Sequence[str], overrides: dict[str, Any]) -> TheWorld:
    """A checkpoint, the newest one in a folder, or a model on the hub, with its VAE if `systems` need it: ready.

    Raises ValueError and OSError as `TheWorld.from_pretrained` does, and before weights load where the model was
    trained on predicted moments.
    """
    folder = saved_folder(find_model(name) if Path(name).is_dir() else name)
    _check_steps(folder, systems)
    model = TheWorld.from_pretrained(folder, **DEFAULTS | overrides)
    if "world" in systems:
        _ = model.encoder  # now and not at the first photograph
    return model


def _check_steps(folder: Path, systems: Sequence[str]) -> None:
    if "world" in systems:
        shape = ProjectionShape.from_dict(read_world(folder)["projection"])
        shape.check_no_steps("--systems baseline zero needs none")


def called(model: TheWorld, systems: Sequence[str]) -> list[str]:
    """What `answers` calls those systems, in the words of an evaluation's records."""
    return ["without" if s == "baseline" and model.gemma.changed else s for s in systems]


def answers(
    model: TheWorld, image: Photograph, statements: Sequence[str], systems: Sequence[str] = SYSTEMS
) -> Answers:
    """For each statement {"statement": ..., "p_true": {system: P(true)}}, the systems as `called`. Raises as
    `TheWorld.score` does."""
    found = ask(model, image, statements, systems)
    names = dict(zip(called(model, systems), systems, strict=True))
    return [
        {"statement": statement, "p_true": {name: found[system][i] for name, system in names.items()}}
        for i, statement in enumerate(statements)
    ]


def table(rows: Answers) -> str:
    """The answers as text for a terminal: a line for each statement."""
    systems = list(rows[0]["p_true"])
    heads = [NAMES[system] for system in systems]
    lines = ["P(true) " + "  ".join(heads)]
    for row in rows:
        shares = [f"{row['p_true'][s]:.1%}".rjust(len(h)) for s, h in zip(systems, heads, strict=True)]
        lines.append(" " * 8 + "  ".join(shares) + "  " + row["statement"])
    return "\n".join(lines)


def plan(
    name: str,
    image: Path | None,
    statements: Sequence[str],
    systems: Sequence[str],
    overrides: dict[str, Any],
) -> Iterator[str]:
    """What would be loaded and asked, in lines; loads and downloads nothing. `image` None: whatever a page is given.

    Raises ValueError and OSError where a run would stop.
    """
    folder = find_model(name) if Path(name).is_dir() else None
    place = locate(name, WORLD_FILE) if folder is None else None
    if place is not None:
        folder = None if place.config is None else place.config.parent
    if folder is None or not (folder / CONFIG_FILE).is_file():
        yield line("projection", f"{name}: on the hub; what it needs is known once it is downloaded")
        config = load_config(None, DEFAULTS | overrides)
    else:
        _check_steps(saved_folder(folder), systems)
        config = load_config(folder / CONFIG_FILE, DEFAULTS | overrides)
        device = resolve_device(config.device)
        yield line("projection", f"{folder}, for {read_world(folder)['model_name']}")
        says = (
            f"{locate(config.model_name, GEMMA_FILE).words}; {device}, {resolve_dtype(config.dtype, device)}"
        )
        yield line("Gemma", f"{config.model_name}: {says}")
        if "world" in systems:
            vae = locate(config.cosmos_model_name, VAE_FILE)
            yield line("Cosmos VAE", f"{config.cosmos_model_name}: {vae.words}")
    if image is not None:
        height, width, _ = photograph(image, config.max_image_pixels).shape
        yield line("reads", f"{image}, {width} x {height} pixels")
        asked = f"{len(systems)} systems ({', '.join(systems)})"
        yield line("asks", f"{asked} about {len(statements):,} statements")
