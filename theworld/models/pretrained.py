"""Published weights, loaded whole or not at all.

transformers and diffusers leave a parameter that no file holds at random values, with a warning at most. Here every
parameter comes from the files, and an error of a loader is one line that names the model.
"""

from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from theworld.utils.commands import command
from theworld.utils.errors import is_no_memory, reason_of
from theworld.utils.hub import GEMMA_FILE, source_of_model

SHOWN = 5
_ERRORS = (SafetensorError, RuntimeError, ImportError, KeyError, TypeError, AttributeError, OSError)


def load_pretrained(kind: Any, name_or_path: str, subfolder: str = "", **options: Any) -> Any:
    """Return `kind.from_pretrained(name_or_path)`, every parameter of which comes from the model's files.

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
