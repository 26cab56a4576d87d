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
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors.torch import load_file
from torch import Tensor, nn

FORMAT_VERSION = 1
VISION, LANGUAGE, LORA = "vision", "language", "lora"
PARTS = (VISION, LANGUAGE, LORA)  # of Gemma: see `theworld.models.gemma`
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


def weights_sha256(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over the names, dtypes, shapes and bytes of the tensors, in order of name."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def files_sha256(folder: Path) -> str:
    """SHA-256 over the config and the weights as they lie in a model's folder, so of no dtype they are loaded in.
    ValueError if there are none."""
    weights = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
    config = folder / "config.json"
    if not weights or not config.is_file():
        raise ValueError(f"{folder}: no config.json with weights (*.safetensors) in it")
    digest = hashlib.sha256()
    for path in [config, *weights]:
        with path.open("rb") as file:
            digest.update(f"{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()


def copy_strictly(path: Path, wanted: dict[str, nn.Parameter]) -> None:
    """Copies the tensors of a file into parameters of the same names and shapes, in the parameters' dtype.

    Raises ValueError naming what is missing, unknown or of another shape, before anything was changed.
    """
    if not path.is_file():
        raise ValueError(f"{path} is missing; download or copy the whole folder again")
    state = load_file(path)
    for name in sorted(wanted.keys() | state.keys()):
        have = tuple(state[name].shape) if name in state else "nothing"
        want = tuple(wanted[name].shape) if name in wanted else "nothing"
        if have != want:
            raise ValueError(f"{path}: {name} has shape {have}; this model wants {want}")
    with torch.no_grad():
        for name, parameter in wanted.items():
            parameter.copy_(state[name])


_NAME = re.compile(r"checkpoint-(\d+)")


# ---- finding


def numbered(output_dir: Path) -> list[Path]:
    """Everything of a checkpoint's name, by step, whatever is in it."""
    found = [p for p in output_dir.glob("checkpoint-*") if _NAME.fullmatch(p.name)]
    return sorted(found, key=number_of)


def number_of(path: Path) -> int:
    """The step that a checkpoint's name tells."""
    return int(path.name.removeprefix("checkpoint-"))


def list_checkpoints(output_dir: Path) -> list[Path]:
    """The published checkpoints of a run, by step."""
    return [path for path in numbered(output_dir) if (path / INDEX).is_file()]


def find_checkpoint(path: str | Path) -> Path:
    """A checkpoint folder: `path` itself, or the newest one in it. CheckpointError if there is none."""
    path = Path(path)
    if (path / INDEX).is_file():
        return path
    found = list_checkpoints(path)
    if not found:
        raise CheckpointError(
            f"{path}: neither a checkpoint (no {INDEX}) nor a folder with checkpoint-N in it"
        )
    return found[-1]


def find_model(path: str | Path) -> Path:
    """A folder with a trained model: `path` itself, such as a download, or as `find_checkpoint` does."""
    return Path(path) if (Path(path) / PROJECTION_FILE).is_file() else find_checkpoint(path)


def find_start(path: str | Path) -> Path:
    """As `find_model`, for a run that starts from its weights. CheckpointError if they are not as they were saved."""
    found = find_model(path)
    check_model(found)
    return found


def checkpoint_step(path: Path) -> int:
    """The optimizer steps that a checkpoint has behind it, whatever its folder is called."""
    return int(read_index(path)["step"])
