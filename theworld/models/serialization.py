"""The files of a saved model: a checkpoint or a model on the hub.

projection.safetensors                                     the projection
vision.safetensors language.safetensors lora.safetensors   the parts of Gemma that are not as they were published
world.json                                                 shapes, Gemma's name and revision, the latents' fingerprint
config.json                                                the settings of the run
checkpoint.json                                            in a checkpoint: size and SHA-256 of each of its files

`SavedModel.open` finds and verifies them once. Code that reads a saved model takes the `SavedModel` and not a path.
"""

import hashlib
import json
import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from theworld.config.config import Config, config_from
from theworld.utils.errors import reason_of
from theworld.utils.hub import Fault, Place, locate
from theworld.utils.jsonc import parse_json_with_comments

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
VISION, LANGUAGE, LORA = "vision", "language", "lora"
PARTS = (VISION, LANGUAGE, LORA)  # of Gemma: see `theworld.models.gemma`
PROJECTION_FILE, WORLD_FILE, CONFIG_FILE = "projection.safetensors", "world.json", "config.json"
# Version 1 has the whole optimizer state and the state of the random number generator in trainer.pt. Version 2 has no
# random state, and the optimizer state of a sharded run in a folder of shards.
INDEX, INDEX_VERSION, INDEX_VERSIONS = "checkpoint.json", 2, (1, 2)
SHARDS = "optimizer"  # the only folder in a checkpoint
MOVED = {"model_name": "--gemma", "cosmos_model_name": "--cosmos_model_name"}  # flags for models that moved
_CHECKPOINT_NAME = re.compile(r"checkpoint-(\d+)")
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


class CheckpointError(ValueError):
    """A checkpoint that is damaged, incomplete or in the way; the message names it and a hint."""


# ---- an opened model


@dataclass(frozen=True)
class SavedModel:
    """A saved model whose files were found and verified, and what its JSON files say."""

    folder: Path  # of the model itself, such as checkpoints/vsr/checkpoint-500
    settings: dict[str, Any]  # the content of config.json
    world: dict[str, Any]  # the content of world.json
    index: dict[str, Any] | None = None  # the content of checkpoint.json; None without one, as in a download

    @classmethod
    def open(cls, model: "str | Path | SavedModel", revision: str | None = None) -> "SavedModel":
        """Open and verify a model on the hub ("user/name"), or one in a folder as `open_folder` does.

        A `SavedModel` is returned as it is. Raises ValueError if there is no such model, or a file of it is missing or
        damaged.
        """
        if isinstance(model, SavedModel):
            return model
        if Path(model).is_dir():
            return cls.open_folder(model)
        if not _HUB_NAME.fullmatch(str(model)):
            raise ValueError(f"{model}: neither a folder nor a name on the hub, such as user/name")
        files = [PROJECTION_FILE, *map(part_file, PARTS), WORLD_FILE, CONFIG_FILE]
        offline = locate(str(model), WORLD_FILE, revision).offline
        folder = snapshot_download(
            str(model), revision=revision, allow_patterns=files, local_files_only=offline
        )
        return cls.open_folder(folder)

    @classmethod
    def open_folder(cls, model: "str | Path | SavedModel") -> "SavedModel":
        """Open a saved model, or the newest valid checkpoint of a run, and compare each file with its recorded SHA-256.

        Newer checkpoints that are damaged are logged. Raises ValueError if there is none, or if a file of the saved
        model itself is missing or damaged.
        """
        if isinstance(model, SavedModel):
            return model
        folder = Path(model)
        if _is_model(folder) or len(list_checkpoints(folder)) < 2:
            return cls._verified(find_model(folder))
        for checkpoint in reversed(list_checkpoints(folder)):
            try:
                return cls._verified(checkpoint)
            except CheckpointError as error:
                logger.warning("skipped: %s", error)
        raise CheckpointError(f"{folder}: no valid checkpoint in it; use another run")

    @classmethod
    def _verified(cls, folder: Path) -> "SavedModel":
        saved = cls.read(folder)
        saved.verify(name for name in model_files(saved.world) if name not in (WORLD_FILE, CONFIG_FILE))
        return saved

    @classmethod
    def read(cls, folder: Path) -> "SavedModel":
        """Read and verify the JSON files of the saved model in `folder`, and no weights: see `open_folder`."""
        index = read_index(folder) if (folder / INDEX).is_file() else None
        world = _parse_world(_read_file(folder, WORLD_FILE, index), folder / WORLD_FILE)
        settings = parse_json_with_comments(_read_file(folder, CONFIG_FILE, index), folder / CONFIG_FILE)
        return cls(folder, settings, world, index)

    def config(self, overrides: Mapping[str, object] | None = None) -> Config:
        """Return the settings of the run with `overrides` on top. Raises ValueError as `load_config` does."""
        return config_from(self.settings, self.folder / CONFIG_FILE, overrides)

    def locate(self, config: Config, name: str, file: str) -> Place:
        """Return the place of a model that the settings name.

        Raises Fault as `theworld.utils.hub.locate` does, with the file that names it and the flag for one that moved.
        """
        try:
            return locate(name, file)
        except Fault as fault:
            # Not for a model that a flag named.
            key = next((k for k in MOVED if getattr(config, k) == self.settings.get(k) == name), None)
            if key is None:
                raise
            where = f"{self.folder / CONFIG_FILE}: {key} is {fault.message}"
            raise Fault(where, f"{fault.hint}; if it has moved, name it with {MOVED[key]}") from None

    def verify(self, names: Iterable[str]) -> None:
        """Raise ValueError unless these files are there and, if the model has an index, have the recorded bytes."""
        for name in names:
            _check_there(self.folder, name, self.index)
            if self.index is not None:
                _compare(self.folder, name, self.index, fingerprint_of(self.folder / name))

    def read_file(self, name: str) -> bytes:
        """Return the content of a small file. Raises as `verify` does."""
        return _read_file(self.folder, name, self.index)

    @property
    def step(self) -> int | None:
        """The number of optimizer steps of a checkpoint; None for a model without an index."""
        return None if self.index is None else int(self.index["step"])

    @property
    def run(self) -> Path:
        """The folder of a checkpoint's run; of a model without an index its own folder."""
        return self.folder if self.index is None else self.folder.parent


def model_files(world: dict[str, Any]) -> list[str]:
    """Return the names of all files of a saved model with this world.json."""
    return [PROJECTION_FILE, *(part_file(part) for part in world["parts"]), WORLD_FILE, CONFIG_FILE]


def part_file(part: str) -> str:
    """Return the name of the file with a part of Gemma."""
    return f"{part}.safetensors"


# ---- the files


def fingerprint_of(path: Path) -> dict[str, Any]:
    """Return size and SHA-256 of a file, as in checkpoint.json. Reads it in small pieces."""
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return {"bytes": file.tell(), "sha256": digest}


def read_index(folder: Path) -> dict[str, Any]:
    """Return the content of a checkpoint.json. Raises CheckpointError if it is damaged or of another version."""
    path = folder / INDEX
    try:
        data = path.read_bytes()
        if not data.endswith(b"}\n"):
            raise ValueError("its end is missing")
        index = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged: {error}; use another checkpoint") from None
    version = index.get("format") if isinstance(index, dict) else None
    if version not in INDEX_VERSIONS:
        raise CheckpointError(f"{path}: format {version!r}; wanted {' or '.join(map(str, INDEX_VERSIONS))}")
    files = index.get("files")
    if type(index.get("step")) is not int or not isinstance(files, dict) or not all(map(_is_name, files)):
        raise CheckpointError(f"{path} is damaged: it has no step or no files; use another checkpoint")
    return index


def _is_name(name: str) -> bool:
    """Return whether a name in an index stays in the folder of its checkpoint."""
    name = name.removeprefix(f"{SHARDS}/")
    return Path(name).name == name


def _read_file(folder: Path, name: str, index: dict[str, Any] | None) -> bytes:
    """Return the content of a small file of a saved model, compared with its index."""
    _check_there(folder, name, index)
    data = (folder / name).read_bytes()
    if index is not None:
        found = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        _compare(folder, name, index, found)
    return data


def _check_there(folder: Path, name: str, index: dict[str, Any] | None) -> None:
    if index is not None and name not in index["files"]:
        raise CheckpointError(f"{folder / INDEX} is damaged: it does not list {name}; use another checkpoint")
    if (folder / name).is_file():
        return
    if index is not None:
        raise CheckpointError(f"{folder}: {name} is missing; use another checkpoint")
    raise ValueError(f"{folder}: no {name} in it; name a folder such as checkpoints/vsr/checkpoint-500")


def _compare(folder: Path, name: str, index: dict[str, Any], found: dict[str, Any]) -> None:
    """Raise CheckpointError unless a file has the recorded size and SHA-256."""
    recorded = index["files"][name]
    if found != recorded:
        size, digest = (recorded.get(k) if isinstance(recorded, dict) else None for k in ("bytes", "sha256"))
        raise CheckpointError(
            f"{folder / name} is damaged: {size} bytes with SHA-256 {digest} were saved, "
            f"{found['bytes']} with {found['sha256']} are there; use another checkpoint"
        )


def _parse_world(data: bytes, path: Path) -> dict[str, Any]:
    try:
        world = {"parts": [], "lora_rank": None} | json.loads(data)
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(
            f"{path} is damaged: {error}; use another checkpoint, or download it again"
        ) from None
    if world.get("format") != FORMAT_VERSION:
        raise ValueError(f"{path}: format {world.get('format', 'not stated')}; wanted {FORMAT_VERSION}")
    return world


def write_world(folder: Path, world: dict[str, Any]) -> None:
    """Write world.json, with sorted keys."""
    content = {"format": FORMAT_VERSION, **world}
    (folder / WORLD_FILE).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


# ---- weights


def weights_sha256(tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of the names, dtypes, shapes and bytes of the tensors, in order of name."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def files_sha256(folder: Path) -> str:
    """Return the SHA-256 of the config and the weights in a model's folder, whatever dtype they are loaded in.

    Raises ValueError if there are none.
    """
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
    """Copy the tensors of a file into parameters of the same names and shapes, in the parameters' dtype.

    Raises ValueError naming what is missing, unknown or of another shape, before anything was changed.
    """
    if not path.is_file():
        raise ValueError(f"{path} is missing; download or copy the whole folder again")
    try:
        state = load_file(path)
    except SafetensorError as error:
        raise ValueError(
            f"{path} is damaged: {reason_of(error)}; download or copy the whole folder again"
        ) from None
    for name in sorted(wanted.keys() | state.keys()):
        if name not in state:
            shape = tuple(wanted[name].shape)
            raise ValueError(f"{path}: {name} is missing; this model wants it in the shape {shape}")
        if name not in wanted:
            shape = tuple(state[name].shape)
            raise ValueError(f"{path}: {name} of shape {shape} is not one of this model's tensors")
        have, want = tuple(state[name].shape), tuple(wanted[name].shape)
        if have != want:
            raise ValueError(f"{path}: {name} has shape {have}; this model wants {want}")
    with torch.no_grad():
        for name, parameter in wanted.items():
            parameter.copy_(state[name])


# ---- the checkpoints of a run


def numbered(output_dir: Path) -> list[Path]:
    """Return everything with the name of a checkpoint, by step, whatever is in it."""
    found = [path for path in output_dir.glob("checkpoint-*") if _CHECKPOINT_NAME.fullmatch(path.name)]
    return sorted(found, key=number_of)


def number_of(path: Path) -> int:
    """Return the step in a checkpoint's name."""
    return int(path.name.removeprefix("checkpoint-"))


def list_checkpoints(output_dir: Path) -> list[Path]:
    """Return the published checkpoints of a run, by step."""
    return [path for path in numbered(output_dir) if (path / INDEX).is_file()]


def _is_model(path: Path) -> bool:
    return (path / PROJECTION_FILE).is_file() or (path / INDEX).is_file()


def find_model(path: str | Path) -> Path:
    """Return the folder of a saved model: `path` itself, or the newest checkpoint in it. Raises CheckpointError."""
    path = Path(path)
    if _is_model(path):
        return path
    found = list_checkpoints(path)
    if not found:
        lack = "" if path.is_dir() else ": it is a file" if path.exists() else ": there is no such folder"
        raise CheckpointError(
            f"{path}: neither a checkpoint (no {INDEX}) nor a folder with checkpoint-N in it{lack}"
        )
    return found[-1]


def checkpoint_step(path: Path) -> int:
    """Return the optimizer steps of a checkpoint, whatever its folder is called."""
    return int(read_index(path)["step"])
