"""Published weights, loaded whole or not at all.

transformers and diffusers leave a parameter that no file holds at random values, with a warning at most. Here every
parameter comes from the files, and an error of a loader is one line that names the model.
"""

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from theworld.utils.commands import command
from theworld.utils.device import current_device
from theworld.utils.errors import is_no_memory, reason_of
from theworld.utils.hub import GEMMA_FILE, source_of_model

SHOWN = 5
_ERRORS = (SafetensorError, RuntimeError, ImportError, KeyError, TypeError, AttributeError, OSError)


def load_pretrained(kind: Any, name_or_path: str, subfolder: str = "", **options: Any) -> Any:
    """Return `kind.from_pretrained(name_or_path)`, every parameter of which comes from the model's files.

    On a CPU, in the dtype of the files, a parameter is a view of them, whose bytes are read when they are used.

    `kind` is a model class of transformers or diffusers; `subfolder` holds the model's files, "" for the top folder.
    Raises ValueError, which names tensors that are missing, unknown or of another shape, and for files that cannot be
    loaded; OSError as the hub's client does.
    """
    file = str(Path(subfolder) / GEMMA_FILE)
    source = source_of_model(name_or_path, file, options.get("revision"))
    options |= {"subfolder": subfolder} if subfolder else {}
    # Tensors of another shape are named and refused below.
    options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
    try:
        model, info = kind.from_pretrained(source, **options)
    except _ERRORS as error:
        if is_no_memory(error):
            raise
        raise ValueError(
            f"{name_or_path}: {kind.__name__} cannot be loaded: {reason_of(error)}; {_hint(name_or_path)}"
        ) from error
    faults = [
        *_named("missing", info["missing_keys"]),
        *_named("unknown", info["unexpected_keys"]),
        *_named("of another shape", [key for key, *_ in info["mismatched_keys"]]),
        *map(str, info.get("error_msgs") or ()),
    ]
    if faults:
        raise ValueError(
            f"{name_or_path}: the weights are not those of its config.json: {'; '.join(faults)}; {_hint(name_or_path)}"
        )
    return model


def _hint(name_or_path: str) -> str:
    return f"download or copy the model again; check its files with: {command('doctor', '--model_name', name_or_path)}"


def _named(what: str, keys: Any) -> list[str]:
    names = sorted(map(str, keys))
    more = f" and {len(names) - SHOWN:,} more" if len(names) > SHOWN else ""
    return [f"{len(names):,} tensors {what}: {', '.join(names[:SHOWN])}{more}"] if names else []


# ---- from the files to a GPU

THREADS = 8  # together they read pages, and fill page-locked memory, faster than a GPU's bus empties it
STAGED = 16 * 2**20  # bytes of page-locked memory that a thread fills before it is copied


def to_device(model: nn.Module, device: torch.device) -> None:
    """Move the weights of a model to a device, where they take no more memory at any moment than they do in the end.

    transformers and torch copy them to a GPU straight from the pages of their files, which is several times slower than
    by way of page-locked memory that several threads fill.
    """
    if device.type != "cuda":
        model.to(device)
        return
    if device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())  # of this thread; others have their own
    tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    with ThreadPoolExecutor(THREADS) as threads:
        for _ in threads.map(partial(_move, device=device), tensors.values()):
            pass  # an error is raised here


def _move(tensor: Tensor, device: torch.device) -> None:
    with current_device(device):
        moved = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
        copy_in_parts(tensor, moved, torch.empty(STAGED, dtype=torch.uint8, pin_memory=True))
    tensor.data = moved


def copy_in_parts(source: Tensor, target: Tensor, staged: Tensor) -> None:
    """Copy a tensor into a contiguous one of the same shape and dtype by way of `staged`, uint8[n] on the CPU."""
    given, wanted = (tensor.detach().contiguous().view(-1).view(torch.uint8) for tensor in (source, target))
    for start in range(0, len(given), len(staged)):
        part = given[start : start + len(staged)]
        filled = staged[: len(part)]
        np.copyto(filled.numpy(), part.numpy())  # on this thread alone, and outside of Python's lock
        wanted[start : start + len(part)].copy_(filled)
