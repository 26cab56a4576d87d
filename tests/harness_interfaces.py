"""What tests of other harnesses share: a scored checkpoint, and stand-ins for harnesses that are not installed.

The stand-ins have what the adapters import of a harness, as its releases have it: lmms-eval 0.7, VLMEvalKit of 2026.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from theworld.data.vsr import Statement


@dataclass(frozen=True)
class Scored:
    """A checkpoint and what `tools/eval.py` says about it, statement by statement."""

    checkpoint: Path
    scenes: Path
    statements: list[Statement]
    said: list[int]  # 1: true

    @property
    def images(self) -> Path:
        return self.scenes / "images"

    @property
    def accuracy(self) -> float:
        right = [said == s.label for said, s in zip(self.said, self.statements, strict=True)]
        return sum(right) / len(right)


class Lmms:
    """The base class `lmms_eval.api.model.lmms` of release 0.7, as far as models use it."""

    is_simple = True

    def __init__(self) -> None:
        self._rank, self._world_size, self.task_dict = 0, 1, {}
        self.cache_hook = SimpleNamespace(add_partial=lambda *arguments: None)

    rank = property(lambda self: self._rank)
    world_size = property(lambda self: self._world_size)


@dataclass
class GenerationResult:
    """`lmms_eval.api.instance.GenerationResult`."""

    text: Any
    token_counts: Any = None


@dataclass(frozen=True)
class ModelManifest:
    """`lmms_eval.models.registry_v2.ModelManifest`."""

    model_id: str
    simple_class_path: str | None = None
    chat_class_path: str | None = None
    aliases: tuple[str, ...] = ()


def stand_in(monkeypatch: pytest.MonkeyPatch, modules: dict[str, dict[str, Any]]) -> None:
    """Put modules with these names in the place of a package that is not installed, and forget adapters over others."""
    for module, names in modules.items():
        parts = module.split(".")
        for end in range(1, len(parts) + 1):
            path = ".".join(parts[:end])
            if path not in sys.modules:
                monkeypatch.setitem(sys.modules, path, ModuleType(path))
        vars(sys.modules[module]).update(names)


LMMS_EVAL = {
    "lmms_eval.api.model": {"lmms": Lmms},
    "lmms_eval.api.instance": {"GenerationResult": GenerationResult},
    "lmms_eval.models.registry_v2": {"ModelManifest": ModelManifest},
}


class BaseModel:
    """`vlmeval.vlm.base.BaseModel`, as far as `generate` prepares what a model gets."""

    allowed_types = ("text", "image", "video")

    def __init__(self) -> None:
        self.dump_image_func = None

    def generate(self, message: list[dict[str, str]], dataset: str | None = None) -> str:
        for item in message:
            assert item["type"] in self.allowed_types, f"Invalid input type: {item['type']}"
        return self.generate_inner(message, dataset)  # type: ignore[attr-defined]


def vlmevalkit() -> dict[str, dict[str, Any]]:
    return {"vlmeval.vlm.base": {"BaseModel": BaseModel}, "vlmeval.config": {"supported_VLM": {}}}
