"""World tokens for a frozen Gemma 3: latents of a frozen Cosmos VAE through a small trained projection.

The public names load when they are first used, so that `import theworld` takes no time.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from theworld.config.config import Config, load_config
    from theworld.evaluation.score import score_to_file as evaluate
    from theworld.extraction.extract import extract
    from theworld.models.theworld import TheWorld
    from theworld.training.trainer import Trainer

__version__ = "0.1.0"
__all__ = ["Config", "TheWorld", "Trainer", "evaluate", "extract", "load_config"]

_DEFINED_IN = {
    "Config": ("theworld.config.config", "Config"),
    "load_config": ("theworld.config.config", "load_config"),
    "extract": ("theworld.extraction.extract", "extract"),
    "TheWorld": ("theworld.models.theworld", "TheWorld"),
    "Trainer": ("theworld.training.trainer", "Trainer"),
    "evaluate": ("theworld.evaluation.score", "score_to_file"),
}


def __getattr__(name: str) -> object:
    if name not in _DEFINED_IN:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = _DEFINED_IN[name]
    return getattr(importlib.import_module(module), attribute)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
