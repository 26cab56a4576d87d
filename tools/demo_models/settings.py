"""The settings of `pretrain` and `control_vae`, apart from the training code, so that --help need not load torch."""

from argparse import ArgumentParser
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any


@dataclass(frozen=True)
class PretrainSettings:
    """The settings of a training; the defaults made the embedded models (the VAE from 20,000 scenes)."""

    seed: int = 0
    device: str = "cpu"
    num_scenes: int = 40_000  # drawn scenes to train on
    gemma_steps: int = 3_500
    vae_steps: int = 2_000
    batch_size: int = 512  # statements a step of the Gemma
    vae_batch_size: int = 64  # pictures a step of the VAE
    learning_rate: float = 1e-3
    vae_learning_rate: float = 1e-3
    workers: int = 2


@dataclass(frozen=True)
class ControlSettings:
    """The settings of `demo_models.control_vae`; the defaults made the positive control in RESULTS.md."""

    seed: int = 0
    num_scenes: int = 12_000  # drawn scenes, one in 32 of which is held out
    steps: int = 1_500
    batch_size: int = 32  # scenes a step
    learning_rate: float = 1e-3
    workers: int = 2


def add_settings(parser: ArgumentParser, settings: type[Any], help_of: Mapping[str, str]) -> None:
    """Add a flag for each of the settings, with its default. `help_of`: a sentence about each."""
    metavars = {int: "INTEGER", float: "NUMBER", str: "TEXT"}
    for field in fields(settings):
        kind, text = type(field.default), f"{help_of[field.name]} (default: {field.default})"
        parser.add_argument(
            f"--{field.name}", type=kind, default=field.default, metavar=metavars[kind], help=text
        )
