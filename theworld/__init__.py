"""World tokens for a frozen Gemma 3: latents of a frozen Cosmos VAE through a small trained projection.

The public names load when they are first used, so that `import theworld` takes no time. transformers' auto classes
know of checkpoints as soon as they load themselves: see `theworld.models.transformers_auto`.
"""

import importlib
import sys
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import TYPE_CHECKING, Any

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


_AUTO = "transformers.models.auto.configuration_auto"


class _WhenTransformersLoads:
    """A finder of modules that registers TheWorld with transformers right after its `AutoConfig` has loaded."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name != _AUTO:
            return None
        sys.meta_path.remove(self)  # type: ignore[arg-type]
        spec = find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            _register(module)

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


def _register(configuration_auto: ModuleType) -> None:
    importlib.import_module("theworld.models.transformers_auto").register(configuration_auto)


if _AUTO in sys.modules:
    _register(sys.modules[_AUTO])
else:
    sys.meta_path.insert(0, _WhenTransformersLoads())  # type: ignore[arg-type]
