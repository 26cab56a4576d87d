"""The settings of `demo_models.pretrain`, apart from what learns, so that a command line need not load torch."""

from dataclasses import dataclass


@dataclass(frozen=True)
class PretrainSettings:
    """What the tool may change; with the defaults it made the embedded models (the VAE from 20,000 scenes)."""

    seed: int = 0
    device: str = "cpu"
    num_scenes: int = 40_000  # scenes drawn to learn from
    gemma_steps: int = 3_500
    vae_steps: int = 2_000
    batch_size: int = 512  # statements a step of the Gemma
    vae_batch_size: int = 64  # pictures a step of the VAE
    learning_rate: float = 1e-3
    vae_learning_rate: float = 1e-3
    workers: int = 2
