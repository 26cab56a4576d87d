"""What Cosmos-Predict2 Video2World predicts after a photograph: diffusers' pipeline, run once an image, into latents.

Dimensions: S side of the square picture in pixels, F video frames with the photograph as the first, K latent frames
(F = 1 + 4 (K - 1)), C, H, W the latent's channels, height and width, n predicted latent frames that are kept.
"""

import hashlib
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import Cosmos2VideoToWorldPipeline
from diffusers.pipelines.cosmos.pipeline_cosmos2_video2world import DEFAULT_NEGATIVE_PROMPT
from diffusers.utils import is_cosmos_guardrail_available
from PIL import Image
from torch import Tensor

from theworld.config.config import FRAMES_A_STEP, Config
from theworld.models.encoder import UNTIL_LOADED
from theworld.models.serialization import files_sha256
from theworld.utils.files import canonical_json

FPS, PROMPT_TOKENS = 16, 512  # what the pipeline takes by itself
PACKAGE = "cosmos_guardrail"
REFUSED = "the guardrail refuses the frames that were predicted from it"
# Fields of a fingerprint that the loaded pipeline gives.
_LOADED = (
    "rollout_scheduler rollout_scheduler_config guardrail rollout_transformer_sha256 rollout_text_encoder_sha256"
).split()


class FramesRefused(ValueError):
    """The guardrail refused the frames that were predicted from a photograph."""


def image_seed(rollout_seed: int, image_sha256: str) -> int:
    """Return the seed of a photograph's noise, 0 to 2^63 - 1: a pure function, so the order of photographs and the
    sharing of work do not matter."""
    digest = hashlib.sha256(f"{rollout_seed} {image_sha256}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def check_rollout(config: Config, guardrail: Any = None) -> None:
    """Raise ValueError where the model is no Video2World, or its guardrail is neither installed nor given.

    Loads no model.
    """
    name = config.cosmos_model_name
    if Path(name).is_dir() and not (Path(name) / "model_index.json").is_file():
        raise ValueError(
            f"{name}: no model_index.json in it; num_world_steps {config.num_world_steps} takes the whole pipeline, "
            "not its VAE alone"
        )
    wanted = Cosmos2VideoToWorldPipeline.__name__
    found = Cosmos2VideoToWorldPipeline.load_config(name).get("_class_name")
    if found != wanted:
        raise ValueError(
            f"{name} holds a {found}; num_world_steps {config.num_world_steps} takes a {wanted}, such as "
            "nvidia/Cosmos-Predict2-2B-Video2World"
        )
    if guardrail is None and not is_cosmos_guardrail_available():
        raise ValueError(
            f"num_world_steps {config.num_world_steps} takes the package {PACKAGE}, as NVIDIA's licence asks that the "
            f"model's guardrail looks at the prompt and at predicted frames: pip install {PACKAGE}"
        )


def describe_rollout(config: Config) -> dict[str, Any]:
    """Return the fields of a fingerprint that say what was predicted, by which model, from which prompt."""
    guided = config.rollout_guidance > 1
    return {
        "rollout_pipeline": Cosmos2VideoToWorldPipeline.__name__,
        "rollout_negative_prompt": DEFAULT_NEGATIVE_PROMPT if guided else None,
        "rollout_fps": FPS,
        **config.rollout_settings,
        **dict.fromkeys(_LOADED, UNTIL_LOADED),
        PACKAGE: _installed(PACKAGE),
        "transformers": version("transformers"),
    }


class Rollout:
    """The pipeline for one prompt, which is checked and encoded once; the text encoder is dropped then."""

    def __init__(
        self,
        config: Config,
        dtype: torch.dtype,
        device: torch.device,
        revision: str | None = None,
        guardrail: Any = None,
    ) -> None:
        """`revision`: the commit of a hub model. `guardrail`: in place of the pipeline's own, an object of the same
        three methods (`to`, `check_text_safety`, `check_video_safety`); there is no way to do without.

        Raises ValueError as `check_rollout` does, and if the prompt is too long or the guardrail refuses it.
        """
        check_rollout(config, guardrail)
        self.config, self.device = config, device
        name = config.cosmos_model_name
        if not Path(name).is_dir():
            name = Cosmos2VideoToWorldPipeline.download(name, revision=revision)
        own = {} if guardrail is None else {"safety_checker": guardrail}
        self.pipe = Cosmos2VideoToWorldPipeline.from_pretrained(name, dtype=dtype, **own).to(device)
        self.pipe.set_progress_bar_config(disable=True)
        self.guided = config.rollout_guidance > 1
        self.hashes = {
            f"rollout_{part}_sha256": files_sha256(Path(name) / part)
            for part in ("transformer", "text_encoder")
        }
        self.prompt = self._read_prompt()

    @torch.no_grad()
    def _read_prompt(self) -> dict[str, Tensor | None]:
        """Return the embeddings of the prompt and the negative prompt, as the pipeline takes them."""
        prompt, guardrail = self.config.rollout_prompt, self.pipe.safety_checker
        guardrail.to(self.device)
        if not guardrail.check_text_safety(prompt):
            raise ValueError(f"rollout_prompt {prompt!r}: the guardrail refuses it; say it in other words")
        guardrail.to("cpu")
        length = len(self.pipe.tokenizer(prompt).input_ids)
        if length > PROMPT_TOKENS:  # the pipeline would cut it
            raise ValueError(f"rollout_prompt has {length} tokens; allowed: at most {PROMPT_TOKENS}")
        own, negative = self.pipe.encode_prompt(
            prompt, do_classifier_free_guidance=self.guided, device=self.device
        )
        self.pipe.register_modules(text_encoder=None, tokenizer=None)  # the largest part of the pipeline
        return {"prompt_embeds": own, "negative_prompt_embeds": negative}

    def identity(self) -> dict[str, Any]:
        """Return the fields of `describe_rollout`, all with their values."""
        scheduler = {k: v for k, v in self.pipe.scheduler.config.items() if not k.startswith("_")}
        loaded = {
            "rollout_scheduler": type(self.pipe.scheduler).__name__,
            "rollout_scheduler_config": canonical_json(scheduler).decode(),
            "guardrail": type(self.pipe.safety_checker).__name__,
            **self.hashes,
        }
        assert loaded.keys() == set(_LOADED)
        return describe_rollout(self.config) | loaded

    def predict(self, pixels: np.ndarray, seed: int, **options: Any) -> Tensor:
        """uint8[S, S, 3] -> float32[1, C, K, H, W] on the device, as the diffusion model has them: normalised."""
        return self.pipe(
            image=Image.fromarray(pixels),
            height=pixels.shape[0],
            width=pixels.shape[1],
            num_frames=self.config.video_frames,
            num_inference_steps=self.config.rollout_steps,
            guidance_scale=self.config.rollout_guidance,
            fps=FPS,
            generator=torch.Generator("cpu").manual_seed(seed),
            output_type="latent",
            **self.prompt,
            **options,
        ).frames

    def predicted_frames(self, pixels: np.ndarray, seed: int) -> Tensor:
        """uint8[S, S, 3] -> float32[n, C, H, W]: the n latent frames after the photograph, not normalised, as the VAE
        itself would give them. Raises FramesRefused."""
        latents = self._as_encoded(self.predict(pixels, seed))
        latents = self._guarded(latents)
        return latents[0, :, 1 : 1 + self.config.num_world_steps].transpose(0, 1)

    def _as_encoded(self, latents: Tensor) -> Tensor:
        """float32[1, C, K, H, W] -> the same without the normalisation, as the pipeline undoes it to decode."""
        config = self.pipe.vae.config
        mean, std = (
            torch.tensor(values, device=latents.device).view(1, -1, 1, 1, 1)
            for values in (config.latents_mean, config.latents_std)
        )
        return latents.float() * std / self.pipe.scheduler.config.sigma_data + mean

    @torch.no_grad()
    def _guarded(self, latents: Tensor) -> Tensor:
        """float32[1, C, K, H, W] -> the same after the guardrail. Raises FramesRefused.

        The guardrail sees decoded frames, as in the pipeline, which does not ask it where latents are wanted. Frames
        that it changes (it makes faces unrecognisable) are encoded again.
        """
        vae, guardrail = self.pipe.vae, self.pipe.safety_checker
        video = vae.decode(latents.to(vae.dtype), return_dict=False)[0]
        video = self.pipe.video_processor.postprocess_video(video, output_type="np")[0]
        frames = (video * 255).astype(np.uint8)  # uint8[F, S, S, 3]
        guardrail.to(self.device)
        passed = guardrail.check_video_safety(frames.copy())  # it writes into what it is given
        guardrail.to("cpu")
        if passed is None:
            raise FramesRefused(REFUSED)
        kept = 1 + FRAMES_A_STEP * self.config.num_world_steps
        if np.array_equal(passed[:kept], frames[:kept]):
            return latents
        changed = torch.from_numpy(np.ascontiguousarray(passed[:kept])).permute(3, 0, 1, 2)[None]
        changed = changed.to(self.device).float() / 127.5 - 1
        return vae.encode(changed.to(vae.dtype)).latent_dist.mode().float()

    def measure(self, size: int) -> tuple[float, float]:
        """Return the seconds of one denoising step and of all that comes before the first, on a blank picture of this
        size. Nothing is decoded. Of two steps the first one warms up and is not counted."""
        ends: list[float] = []

        def after_step(pipe: Any, step: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            ends.append(time.perf_counter())
            pipe._interrupt = len(ends) == 2
            return {}

        start = time.perf_counter()
        self.predict(np.zeros((size, size, 3), np.uint8), 0, callback_on_step_end=after_step)
        step = ends[1] - ends[0]
        return step, max(0.0, ends[0] - start - step)


def _installed(package: str) -> str | None:
    """Return the version of a package, or None if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None
