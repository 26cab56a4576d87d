"""Which weights a model has: names, revisions and hashes for fingerprints."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from huggingface_hub import try_to_load_from_cache
from torch import Tensor, nn


def model_id(name_or_path: str) -> str:
    """The hub name as it is; of a local folder its last part, since a fingerprint holds no paths."""
    return Path(name_or_path).resolve().name if Path(name_or_path).is_dir() else name_or_path


def hub_revision(name_or_path: str, filename: str) -> str | None:
    """The commit that a downloaded hub model has on this machine; None for a local folder."""
    if Path(name_or_path).is_dir():
        return None
    cached = try_to_load_from_cache(name_or_path, filename)
    if not isinstance(cached, str):
        return None
    parts = Path(cached).parts  # .../snapshots/<commit>/<filename>
    return parts[parts.index("snapshots") + 1] if "snapshots" in parts else None


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


def count_parameters(module: nn.Module) -> tuple[int, int]:
    """(trainable, frozen) numbers of parameters; tied ones count once."""
    trainable = sum(p.numel() for p in module.parameters() if p.requires_grad)
    return trainable, sum(p.numel() for p in module.parameters()) - trainable


def torch_dtype(name: str) -> torch.dtype:
    """`"float32"`, `"float16"` or `"bfloat16"` as torch's dtype."""
    dtypes = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
    if name not in dtypes:
        raise ValueError(f"dtype {name!r}: wanted one of {', '.join(dtypes)}")
    return dtypes[name]


def device_setting(device_map: object) -> str:
    """What transformers calls a `device_map`, as the setting `device`: a word, a torch.device, the number of a GPU, or
    {"": one of these}. ValueError for a map of parts: the models lie on one device."""
    if isinstance(device_map, dict):
        if list(device_map) != [""]:
            raise ValueError(
                f"device_map {device_map!r}: all models lie on one device; wanted it, or a map of ''"
            )
        device_map = device_map[""]
    return f"cuda:{device_map}" if isinstance(device_map, int) else str(device_map)


def resolve_device(device: str) -> torch.device:
    """`"auto"` is CUDA where there is one, else the CPU. Raises ValueError for a CUDA that is not there."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device {device!r}: this machine has no usable CUDA GPU; use --device cpu or auto")
    return torch.device(device)


def resolve_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """`"auto"` is bfloat16 on CUDA and float32 on the CPU."""
    if dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return torch_dtype(dtype)


def wants_compile(setting: bool | None, device: torch.device) -> bool:
    """Whether models are compiled: as the setting says, by default on CUDA, where it pays."""
    return device.type == "cuda" if setting is None else setting
