"""The files of a saved model: a checkpoint's, or those of a model on the hub.

projection.safetensors                                     what trains in every stage
vision.safetensors language.safetensors lora.safetensors   parts of Gemma, if they are not as they were published
world.json                                                 what these are for: shapes, Gemma, the latents' fingerprint
config.json                                                the settings of the run
"""

import json
import re
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download

FORMAT_VERSION = 1
VISION, LANGUAGE, LORA = "vision", "language", "lora"
PARTS = (VISION, LANGUAGE, LORA)  # of Gemma: see `theworld.unfrozen`
PROJECTION_FILE, WORLD_FILE, CONFIG_FILE = "projection.safetensors", "world.json", "config.json"


def model_files(world: dict[str, Any]) -> list[str]:
    """The names of all files of a saved model with this world.json."""
    return [PROJECTION_FILE, *(part_file(part) for part in world["parts"]), WORLD_FILE, CONFIG_FILE]


def part_file(part: str) -> str:
    """The file that holds a part of Gemma."""
    return f"{part}.safetensors"


def saved_folder(name_or_path: str | Path, revision: str | None = None) -> Path:
    """The folder itself, or the files of a hub model in a local one. ValueError for neither, and for a file missing."""
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
