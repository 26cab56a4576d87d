"""Train the encoder of the positive control: the embedded VAE's, to see through hard scenes.

It learns to give the embedded VAE's latents of the plain scene from the hard one, so that the embedded decoder, which
stays as it is, draws the plain scene from them. Its architecture is that of an untrained encoder, so what it has over
that one and over pixels is what it learnt about such scenes: an effect that a study has to find.

Dimensions: N scenes, P side of the VAE's picture in pixels.
"""

import json
import platform
import time
from collections.abc import Iterator
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from demo_models.hard_scenes import draw_hard_scene
from demo_models.lessons import POOL_SEED, draw_all, to_pixels
from demo_models.pretrain import Steps, encode, one_frame
from demo_models.settings import ControlSettings
from demo_models.small_models import VAE_PIXELS
from diffusers import AutoencoderKLWan
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from theworld.cli.demo import EMBEDDED
from theworld.data.scenes import draw_scene, make_scene
from theworld.utils.files import check_folder
from theworld.utils.text import counted

FILES = ("config.json", "diffusion_pytorch_model.safetensors", "training.json")


def _draw_one(key: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Return the scene (seed, index), plain and hard, each as uint8[P, P, 3], resized as in TheWorld."""
    scene = make_scene(key[0], "train", key[1])
    plain, hard = (
        np.asarray(Image.fromarray(picture).resize((VAE_PIXELS, VAE_PIXELS), Image.Resampling.BICUBIC))
        for picture in (draw_scene(scene), draw_hard_scene(scene))
    )
    return plain, hard


def draw_pairs(seed: int, num_scenes: int, num_workers: int) -> tuple[Tensor, Tensor]:
    """Return scenes that are in no data set with a small seed, plain and hard, uint8[N, 3, P, P] each."""
    keys = [(POOL_SEED + seed, index) for index in range(num_scenes)]
    drawn = draw_all(_draw_one, keys, num_workers)
    plain, hard = (torch.from_numpy(np.stack(own)).permute(0, 3, 1, 2) for own in zip(*drawn, strict=True))
    return plain.contiguous(), hard.contiguous()


def train_encoder(
    vae: AutoencoderKLWan, plain: Tensor, hard: Tensor, settings: ControlSettings
) -> list[dict[str, float]]:
    """Train the encoder to give its present latents of `plain` from `hard`; return the losses over time.

    The loss is the squared error of the standardised latents: 1 is to know nothing of the scene. "held_out" is of the
    last scenes, which are not trained on.
    """
    num_held_out = max(1, len(plain) // 32)
    history: list[dict[str, float]] = []
    std = torch.tensor(vae.config.latents_std)[:, None, None]

    def loss_of(_: None) -> Tensor:
        chosen = torch.randint(len(plain) - num_held_out, (settings.batch_size,))
        found = vae.encode(to_pixels(hard[chosen])[:, :, None]).latent_dist.mode()[:, :, 0]
        return F.mse_loss(found / std, latents[chosen] / std)

    def report(step: int, loss: float) -> None:
        found, wanted = encode(vae, hard[-num_held_out:]), latents[-num_held_out:]
        held_out = float(F.mse_loss(found / std, wanted / std))
        history.append({"step": step, "loss": round(loss, 4), "held_out": round(held_out, 4)})
        print("encoder", history[-1], flush=True)

    with one_frame():
        latents = encode(vae, plain)
        parameters = [
            parameter
            for name, parameter in vae.named_parameters()
            if name.startswith(("encoder.", "quant_conv.")) and "time_conv" not in name
        ]
        Steps(parameters, settings.learning_rate, loss_of).run(settings.steps, lambda _: None, report)
    return history


def check_control_vae(folder: Path, settings: ControlSettings) -> str:
    """Return a line that names what would be replaced, or "".

    Raises ValueError for settings that are not positive, OSError for a folder that cannot be written.
    """
    for key, value in asdict(settings).items():
        if key != "seed" and value <= 0:
            raise ValueError(f"{key} is {value}; give more than 0")
    if settings.num_scenes < 2:
        raise ValueError(f"num_scenes is {settings.num_scenes}; one is held out, so give 2 or more")
    check_folder(folder, "--output")
    there = [name for name in FILES if (folder / name).exists()]
    return f"; replaces {', '.join(there)} there" if there else ""


def plan_control_vae(folder: Path, settings: ControlSettings) -> Iterator[str]:
    """Yield lines that say what `make_control_vae` would do with the same arguments. Raises the same errors."""
    replaces = check_control_vae(folder, settings)
    yield (
        f"draws        {settings.num_scenes:,} scenes, plain and hard, with seed {settings.seed}, in "
        f"{counted(settings.workers, 'process', 'processes')}"
    )
    yield f"trains       an encoder in {settings.steps:,} steps of {settings.batch_size} scenes, on the CPU"
    yield f"writes       {folder}: {', '.join(FILES)}, about 3 MiB{replaces}"


def make_control_vae(folder: Path, settings: ControlSettings, command: str) -> None:
    """Draw the scenes, train the encoder and write the VAE. Raises the errors of `check_control_vae` at the start."""
    check_control_vae(folder, settings)
    torch.manual_seed(settings.seed)
    started = time.perf_counter()
    plain, hard = draw_pairs(settings.seed, settings.num_scenes, settings.workers)
    vae = AutoencoderKLWan.from_pretrained(EMBEDDED / "vae")
    drawn = time.perf_counter()
    history = train_encoder(vae, plain, hard, settings)
    seconds = {"scenes": drawn - started, "encoder": time.perf_counter() - drawn}
    vae.eval().save_pretrained(folder)
    record = {
        "purpose": "the positive control of a study; no video model",
        "command": command,
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "settings": asdict(settings),
        "device": platform.processor() or "cpu",
        "versions": {name: version(name) for name in ("torch", "diffusers", "pillow")},
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
        "history": history,
    }
    (folder / "training.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
