"""A small model, as a run saves it, and statements to ask it about."""

from dataclasses import replace
from pathlib import Path

from constants import EMBEDDED_GEMMA, EMBEDDED_VAE

from theworld.config.config import Config
from theworld.models.cosmos import CosmosLatents
from theworld.models.gemma import Gemma
from theworld.models.theworld import TheWorld

STATEMENTS = ["The red ball is left of the blue ball.", "The cat is beneath the old wooden table."]


def save_model(folder: Path, config: Config, num_world_steps: int = 0) -> Path:
    """An untrained model as a run saves it."""
    encoder = CosmosLatents(replace(config, cosmos_model_name=str(EMBEDDED_VAE)))
    fingerprint = encoder.spec.having(num_world_steps=num_world_steps).fingerprint()
    TheWorld.from_config(config, Gemma(str(EMBEDDED_GEMMA)), fingerprint).save_pretrained(folder)
    return folder
