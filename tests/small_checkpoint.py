"""Checkpoints without a model, for tests of what becomes of their files."""

import json
from pathlib import Path

import torch

from theworld.config.config import Config, save_config
from theworld.hub.card import Facts
from theworld.training.checkpoint import save_checkpoint

NAME = "someone/world"
FACTS = Facts(10, 20, 4, 4, ["train: 6 of 6 statements, 3 of 3 images"])


def checkpoint_of(folder: Path, step: int, config: Config, fill: float) -> Path:
    """A checkpoint whose every tensor and number is of its step, without a model."""

    class Model:
        def weights(self) -> dict[str, object]:
            return {}

        def save_pretrained(self, target: Path, weights: object = None) -> None:
            target.mkdir(parents=True)
            (target / "projection.safetensors").write_bytes(f"weights of {step}".encode() * 1000)
            shape = {"architecture": "mlp", "mode": "patch"}
            world = {"format": 1, "parts": [], "projection": shape, "fingerprint": {"latent_size": step}}
            (target / "world.json").write_text(json.dumps(world))
            save_config(config, target / "config.json")

    folder.mkdir(parents=True, exist_ok=True)
    state = {"state": {0: {"exp_avg": torch.full((4,), fill)}}, "param_groups": []}
    return save_checkpoint(folder, step, Model(), state, {"step": step})  # type: ignore[arg-type]
