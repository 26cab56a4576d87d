"""The files of a saved model: a checkpoint's, or those of a model on the hub.

projection.safetensors                                     what trains in every stage
vision.safetensors language.safetensors lora.safetensors   parts of Gemma, if they are not as they were published
world.json                                                 what these are for: shapes, Gemma, the latents' fingerprint
config.json                                                the settings of the run
checkpoint.json                                            of a checkpoint: size and SHA-256 of each of its files
"""

import hashlib
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download

FORMAT_VERSION = 1
VISION, LANGUAGE, LORA = "vision", "language", "lora"
PARTS = (VISION, LANGUAGE, LORA)  # of Gemma: see `theworld.unfrozen`
PROJECTION_FILE, WORLD_FILE, CONFIG_FILE = "projection.safetensors", "world.json", "config.json"
INDEX, INDEX_VERSION = "checkpoint.json", 1


class CheckpointError(ValueError):
    """A checkpoint that is damaged, incomplete or in the way; the message names it and the cure."""


def fingerprint_of(path: Path) -> dict[str, Any]:
    """Size and SHA-256 of a file, as checkpoint.json has them."""
    with open(path, "rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def read_index(folder: Path) -> dict[str, Any]:
    """The checkpoint.json of a checkpoint. CheckpointError if it is not as one is written."""
    path = folder / INDEX
    try:
        data = path.read_bytes()
        if not data.endswith(b"}\n"):
            raise ValueError("its end is missing")
        index = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged: {error}; use another checkpoint") from None
    version = index.get("format") if isinstance(index, dict) else None
    if version != INDEX_VERSION:
        raise CheckpointError(f"{path}: format {version!r}; wanted {INDEX_VERSION}")
    files = index.get("files")
    if type(index.get("step")) is not int or not isinstance(files, dict) or not all(map(_is_name, files)):
        raise CheckpointError(f"{path} is damaged: it has no step or no files; use another checkpoint")
    return index


def _is_name(name: str) -> bool:
    return Path(name).name == name


def check_hashes(folder: Path, index: dict[str, Any], names: Iterable[str]) -> None:
    """CheckpointError unless each of these files has the bytes that were saved."""
    for name in names:
        wanted = index["files"].get(name)
        if wanted is None:
            raise CheckpointError(
                f"{folder / INDEX} is damaged: it does not list {name}; use another checkpoint"
            )
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder}: {name} is missing; use another checkpoint")
        have = fingerprint_of(folder / name)
        if have != wanted:
            size, digest = (
                (wanted.get(key) for key in ("bytes", "sha256")) if isinstance(wanted, dict) else (0, 0)
            )
            raise CheckpointError(
                f"{folder / name} is damaged: {size} bytes with SHA-256 {digest} were saved, "
                f"{have['bytes']} with {have['sha256']} are there; use another checkpoint"
            )


def check_model(folder: Path) -> None:
    """CheckpointError unless the model's files are as they were saved; nothing is known of a folder without INDEX."""
    if not (folder / INDEX).is_file():
        return
    index = read_index(folder)
    check_hashes(folder, index, [WORLD_FILE])
    check_hashes(folder, index, model_files(read_world(folder)))


def model_files(world: dict[str, Any]) -> list[str]:
    """The names of all files of a saved model with this world.json."""
    return [PROJECTION_FILE, *(part_file(part) for part in world["parts"]), WORLD_FILE, CONFIG_FILE]


def part_file(part: str) -> str:
    """The file that holds a part of Gemma."""
    return f"{part}.safetensors"


def saved_folder(name_or_path: str | Path, revision: str | None = None) -> Path:
    """The folder itself, or the files of a hub model in a local one. ValueError for neither, and for a file missing
    or damaged."""
    folder = Path(name_or_path)
    if not folder.is_dir():
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(name_or_path)):
            raise ValueError(f"{name_or_path}: neither a folder nor a name on the hub, such as user/name")
        files = [PROJECTION_FILE, *map(part_file, PARTS), WORLD_FILE, CONFIG_FILE]
        folder = Path(snapshot_download(str(name_or_path), revision=revision, allow_patterns=files))
    for name in (WORLD_FILE, PROJECTION_FILE, CONFIG_FILE):
        if not (folder / name).is_file():
            raise ValueError(
                f"{folder}: no {name} in it; name a folder such as checkpoints/vsr/checkpoint-500"
            )
    check_model(folder)
    return folder


def read_world(folder: Path) -> dict[str, Any]:
    """The world.json of a saved model. ValueError for one of another format."""
    world = {"parts": [], "lora_rank": None} | json.loads((folder / WORLD_FILE).read_text())
    if world.get("format") != FORMAT_VERSION:
        raise ValueError(f"{folder / WORLD_FILE}: format {world.get('format')!r}; wanted {FORMAT_VERSION}")
    return world


def write_world(folder: Path, world: dict[str, Any]) -> None:
    """Writes world.json, in the order of its keys."""
    content = {"format": FORMAT_VERSION, **world}
    (folder / WORLD_FILE).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
