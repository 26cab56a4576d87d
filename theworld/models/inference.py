"""Photographs and questions as callers hand them over, and answers in words.

`TheWorld.generate`, `score` and `ask` are made of these functions. For an answer in words the prompt is read once, with
the masks that the projection was trained with, into transformers' key-value cache; transformers' own `generate` goes on
from there, with all of its options.

Dimensions: B questions, L tokens of the longest prompt, D width of the language model.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from transformers import DynamicCache

from theworld.config.config import Config
from theworld.data.images import photograph
from theworld.models import world_encoder
from theworld.models.attention import attention_masks
from theworld.models.encoder import Encoder, encode_alone
from theworld.models.gemma import Gemma
from theworld.models.packing import Batch, Control, WorldSource
from theworld.models.projection import ProjectionShape
from theworld.utils.commands import PLACEHOLDER, following
from theworld.utils.text import check_texts

Photograph = str | Path | np.ndarray | Image.Image
# The conditions of an evaluation (`theworld.evaluation.metrics`) that one photograph is enough for.
CONDITIONS = ("world", "baseline", "zero")


def p_true(logit_0: float, logit_1: float) -> float:
    """Return P(true), 0 to 1: the softmax of the two answers' logits. Raises ValueError for one that is not finite."""
    if not (math.isfinite(logit_0) and math.isfinite(logit_1)):
        raise ValueError(f"logits of '0' and '1' are {logit_0}, {logit_1}; wanted two numbers")
    return 1 / (1 + math.exp(min(logit_0 - logit_1, 700)))  # beyond 709 exp overflows


def world_source(condition: str, image: str) -> WorldSource:
    """Return the source of an image's world tokens under one of CONDITIONS."""
    if condition == "baseline":
        return None
    return image if condition == "world" else Control.ZERO


def pair_up(
    images: Photograph | Sequence[Photograph], texts: str | Sequence[str], kind: str
) -> tuple[list[Photograph], list[str]]:
    """Return images and texts as lists, which pair up one to one, or one image with all texts.

    Raises ValueError for other numbers of them, and for one that is no text; `kind` names the texts in it.
    """
    texts = [texts] if isinstance(texts, str) else list(texts)
    check_texts(texts, kind.removesuffix("s"), filled=kind == "statements")
    pictures = [images] if isinstance(images, str | Path | np.ndarray | Image.Image) else list(images)
    if not texts or len(pictures) not in (1, len(texts)):
        raise ValueError(
            f"{len(pictures)} images and {len(texts)} {kind}: give as many, or one image for all"
        )
    return pictures, texts


@dataclass(frozen=True)
class EncodedImage:
    """The inputs of the model for one photograph, on the CPU."""

    latent: Tensor | None  # dtype[1, *row_shape]; None where no world tokens are wanted
    vision: Tensor | None  # dtype[1, N, V]; None for a text-only Gemma


def load_encoder(
    config: Config, fingerprint: dict[str, Any], device: torch.device, dtype: torch.dtype
) -> Encoder:
    """Load the encoder of the rows that `fingerprint` describes, in the same revision.

    Raises StoreMismatch if the settings name another encoder.
    """
    arithmetic: dict[str, Any] = {"device": str(device), "dtype": str(dtype).removeprefix("torch.")}
    config = replace(config, **arithmetic, compile=False, latent_dtype=None, num_world_steps=0)
    spec = world_encoder.describe(config, fingerprint)
    spec.check_serves(fingerprint)  # before its weights load
    encoder = world_encoder.encoder_class(config)(config, fingerprint)
    replace(encoder.spec, use=spec.use).check_serves(fingerprint)
    return encoder


def check_alone(shape: ProjectionShape, config: Config, instead: str) -> None:
    """Raise ValueError if the world tokens of a photograph need more than that photograph; `instead`: what to do."""
    shape.check_no_steps(instead)
    if config.world_encoder == "mismatched":
        raise ValueError(
            "world_encoder mismatched: a photograph has the latents of another image, which only a cache holds; "
            f"{instead}; evaluate with: {following('eval', '--cache', PLACEHOLDER)}"
        )


def encode_images(
    gemma: Gemma, encoder: Encoder | None, pictures: Sequence[Photograph], max_image_pixels: int
) -> tuple[dict[str, EncodedImage], list[str]]:
    """Return each different photograph encoded, under a name of its own, and the name of every picture.

    `encoder` is None where no latents are wanted. Photographs of the same pixels are encoded once, and a file that is
    named again is not read again. Each photograph is encoded by itself, since in 16 bits latents depend on their batch.
    Raises ImageError and ValueError as `photograph` does.
    """
    encoded: dict[str, EncodedImage] = {}
    files: dict[str, str] = {}
    names = []
    for picture in pictures:
        file = str(picture) if isinstance(picture, str | Path) else None
        name = files.get(file) if file is not None else None
        if name is None:
            pixels = photograph(picture, max_image_pixels)
            name = f"{pixels.shape} {hashlib.sha256(pixels.tobytes()).hexdigest()}"
            if name not in encoded:
                encoded[name] = _encode(gemma, encoder, pixels)
            if file is not None:
                files[file] = name
        names.append(name)
    return encoded, names


def _encode(gemma: Gemma, encoder: Encoder | None, pixels: np.ndarray) -> EncodedImage:
    latent = vision = None
    if encoder is not None:
        latent = encode_alone(encoder, pixels).cpu()
    if gemma.is_multimodal:
        vision = gemma.vision_features(gemma.pixel_values([pixels])).cpu()
    return EncodedImage(latent, vision)


def generate_tokens(gemma: Gemma, prompts: list[tuple[Batch, Tensor]], **options: Any) -> Tensor:
    """Return the new tokens after each prompt, int64[B, longest answer].

    A prompt is a batch of one question and its embeddings, dtype[1, L, D]; `options` are those of transformers'
    `generate`.
    """
    length = max(embeddings.shape[1] for _, embeddings in prompts)
    ids = torch.cat([_left_padded(batch.token_ids, length) for batch, _ in prompts])
    real = torch.cat([_left_padded(torch.ones_like(batch.token_ids), length) for batch, _ in prompts])
    cache = _key_value_cache(gemma, prompts, length)
    answers = gemma.model.generate(input_ids=ids, attention_mask=real, past_key_values=cache, **options)
    return answers[:, length:]


def _key_value_cache(gemma: Gemma, prompts: list[tuple[Batch, Tensor]], length: int) -> DynamicCache:
    """Return keys and values of all prompt tokens but the last, which `generate` reads; padded on the left."""
    rows = torch.cat([F.pad(e, (0, 0, length - e.shape[1], 0)) for _, e in prompts])
    positions = torch.cat([_left_padded(batch.position_ids, length) for batch, _ in prompts])
    masks: dict[str, list[Tensor]] = {}
    for batch, _ in prompts:
        for kind, mask in attention_masks(batch, gemma.sliding_window, "sdpa").items():
            start = length - mask.shape[-1]
            padded = torch.eye(length, dtype=torch.bool, device=mask.device)  # padding sees itself
            padded[start:, start:] = mask[0, 0]
            masks.setdefault(kind, []).append(padded[None])
    cache = DynamicCache(config=gemma.text_config)
    gemma.text_model(
        inputs_embeds=rows[:, :-1],
        attention_mask={kind: torch.stack(own)[:, :, :-1, :-1] for kind, own in masks.items()},
        position_ids=positions[:, :-1],
        past_key_values=cache,
        use_cache=True,
    )
    return cache


def _left_padded(values: Tensor, length: int) -> Tensor:
    """int64[1, l] -> int64[1, L], zeros on the left."""
    return F.pad(values, (length - values.shape[1], 0))
