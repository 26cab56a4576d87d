"""The settings of `pretrain` and `control_vae`, apart from the training code, so that --help need not load torch."""

from dataclasses import dataclass


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
