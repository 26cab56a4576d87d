"""Answers in words: any question about a photograph, with its world tokens or without.

The prompt is read once, by the masks that the projection was trained with, into transformers' key-value cache; from
there on transformers' own `generate` goes on, with all of its options.

Dimensions: B questions, L tokens of the longest prompt, D width of the language model.

What the logits of the two answers, '0' and '1', say about a statement: the one rule for it.

Photographs as a caller hands them over, and what the two frozen models see of each.

P(true) of any statement about any photograph, with its world tokens and beside its controls.
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

from theworld.data.images import photograph
from theworld.data.vsr import Statement
from theworld.models import world_encoder
from theworld.models.attention import attention_masks
from theworld.models.encoder import Encoder
from theworld.models.gemma import Gemma
from theworld.models.packing import ZERO, Batch, Packer


def p_true(logit_0: float, logit_1: float) -> float:
    """P(true), 0 to 1: the softmax of the two logits alone. Raises ValueError for a logit that is no finite number."""
    if not (math.isfinite(logit_0) and math.isfinite(logit_1)):
        raise ValueError(f"logits of '0' and '1' are {logit_0}, {logit_1}; wanted two numbers")
    return 1 / (1 + math.exp(min(logit_0 - logit_1, 700)))  # beyond 709 exp overflows


Photograph = str | Path | np.ndarray | Image.Image


@dataclass(frozen=True)
class Seen:
    """One photograph as the models see it, on the CPU."""

    latent: Tensor | None  # dtype[1, C, H, W]; None where no world tokens are wanted
    vision: Tensor | None  # dtype[1, N, V]; None for a text-only Gemma


def paired(
    images: Photograph | Sequence[Photograph], texts: str | Sequence[str], what: str
) -> tuple[list[Photograph], list[str]]:
    """Both as lists, which pair up one to one, or one image with all texts. ValueError else; `what` the texts are."""
    texts = [texts] if isinstance(texts, str) else list(texts)
    pictures = [images] if isinstance(images, str | Path | np.ndarray | Image.Image) else list(images)
    if not texts or len(pictures) not in (1, len(texts)):
        raise ValueError(
            f"{len(pictures)} images and {len(texts)} {what}: give as many, or one image for all"
        )
    return pictures, texts


def look(model: Any, pictures: Sequence[Photograph], with_world: bool) -> tuple[list[Seen], list[int]]:
    """What a `TheWorld` sees of each different photograph, and for each picture the index of its own.

    Photographs of the same pixels are encoded once, and a file that is named again is not read again. Each is encoded
    by itself, since in 16 bits latents depend on their batch. Raises ImageError and ValueError as `photograph` does.
    """
    seen: list[Seen] = []
    files: dict[str, int] = {}
    pixels_of: dict[Any, int] = {}
    numbers = []
    for picture in pictures:
        file = str(picture) if isinstance(picture, str | Path) else None
        number = files.get(file) if file is not None else None
        if number is None:
            pixels = photograph(picture, model.config.max_image_pixels)
            key = (pixels.shape, hashlib.sha256(pixels.tobytes()).digest())
            if key not in pixels_of:
                pixels_of[key] = len(seen)
                seen.append(_see(model, pixels, with_world))
            number = pixels_of[key]
            if file is not None:
                files[file] = number
        numbers.append(number)
    return seen, numbers


def _see(model: Any, pixels: np.ndarray, with_world: bool) -> Seen:
    gemma = model.gemma
    latent = vision = None
    if with_world:
        latent = model.encoder.encode(model.encoder.prepare(pixels)[None]).cpu()
    if gemma.is_multimodal:
        vision = gemma.vision_features(gemma.pixel_values([pixels])).cpu()
    return Seen(latent, vision)


def load_encoder(model: Any) -> Encoder:
    """Return the encoder of the rows that a `TheWorld` was trained on, in the same revision.

    Raises ValueError where world tokens take more than a photograph, StoreMismatch if it is another encoder.
    """
    model.check_no_steps("generate needs no cache with enable_world=False, nor does score")
    gemma = model.gemma
    config = replace(
        model.config,
        device=str(gemma.device),
        dtype=str(gemma.dtype).removeprefix("torch."),
        compile=False,
        latent_dtype=None,
        num_world_steps=0,
    )
    kind, trained = world_encoder.encoder_class(config), model.fingerprint
    kind.describe(config, trained).check_serves(trained)  # before its weights load
    encoder = kind(config, trained)
    encoder.spec.check_serves(trained)
    return encoder


# Those of `theworld.evaluation.metrics.SYSTEMS` that one photograph is enough for.
SYSTEMS = ("world", "baseline", "zero")


@torch.no_grad()
def ask(
    model: Any,
    images: Photograph | Sequence[Photograph],
    statements: str | Sequence[str],
    systems: Sequence[str] = ("world",),
    batch_size: int | None = None,
) -> dict[str, list[float]]:
    """For each system P(true) of each statement, in the order given; see `TheWorld.score`, whose `model` this is.

    All systems are asked in the same batches, where they share what is the same, as in `theworld.evaluation.predict`.
    """
    batch_size = model.config.eval_statements if batch_size is None else batch_size
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; give 1 or more")
    for system in systems:
        if system not in SYSTEMS:
            raise ValueError(f"system {system!r}: wanted one of {', '.join(SYSTEMS)}")
    pictures, captions = paired(images, statements, "statements")
    for number, caption in enumerate(captions, 1):
        if not caption.strip():
            raise ValueError(f"statement {number} is empty; leave it out, or say what it states")
    seen, numbers = look(model, pictures, "world" in systems)
    asked = [
        Statement(str(numbers[i if len(numbers) > 1 else 0]), caption, 0, "", i)
        for i, caption in enumerate(captions)
    ]
    asked.sort(
        key=lambda statement: (int(statement.image), statement.index)
    )  # of one photograph side by side
    packer = model.packer()
    found: dict[str, list[float]] = {system: [0.0] * len(asked) for system in systems}
    for start in range(0, len(asked), batch_size):
        some = asked[start : start + batch_size]
        logits = _logits(model, packer, some, systems, seen).cpu().unflatten(0, (len(systems), len(some)))
        for system, own in zip(systems, logits.tolist(), strict=True):
            for statement, (zero, one) in zip(some, own, strict=True):
                found[system][statement.index] = p_true(zero, one)
    return found


def _logits(
    model: Any, packer: Packer, asked: list[Statement], systems: Sequence[str], seen: list[Seen]
) -> Tensor:
    """float32[systems x statements, 2]: the logits of '0' and '1'."""

    def latents(images: Sequence[str]) -> Tensor:
        return torch.cat([latent for i in images if (latent := seen[int(i)].latent) is not None])

    worlds = [_world(system, statement.image) for system in systems for statement in asked]
    batch = packer.pack(asked * len(systems), worlds)
    rows = model.latents(batch, latents)
    device = model.gemma.device
    vision = [features for i in batch.images if (features := seen[int(i)].vision) is not None]
    answers = model(
        batch.to(device),
        None if rows is None else rows.to(device),
        torch.cat(vision).to(device) if vision else None,
    )
    return answers[:, list(model.gemma.answer_ids)]


def _world(system: str, image: str) -> str | None:
    if system == "baseline":
        return None
    return image if system == "world" else ZERO


def generate_ids(
    model: Any,
    images: Photograph | Sequence[Photograph],
    questions: str | Sequence[str],
    with_world: bool,
    **options: Any,
) -> Tensor:
    """The new tokens, int64[B, longest answer]; see `TheWorld.generate`, whose `model` this is."""
    pictures, questions = paired(images, questions, "questions")
    prompts = _prompts(model, pictures, questions, with_world)
    length = max(embeddings.shape[1] for _, embeddings in prompts)
    cache = _read(model.gemma, prompts, length)
    ids = torch.cat([_left_padded(batch.token_ids, length) for batch, _ in prompts])
    real = torch.cat([_left_padded(torch.ones_like(batch.token_ids), length) for batch, _ in prompts])
    answers = model.gemma.model.generate(input_ids=ids, attention_mask=real, past_key_values=cache, **options)
    return answers[:, length:]


def _prompts(
    model: Any, pictures: list[Photograph], questions: list[str], with_world: bool
) -> list[tuple[Batch, Tensor]]:
    """For each question its prompt as a row of its own, and its embeddings dtype[1, L, D]."""
    device = model.gemma.device
    seen, numbers = look(model, pictures, with_world)
    packer: Packer = model.packer(with_world)
    packer.question_template, packer.flex = "{caption}", False
    prompts = []
    for number, question in enumerate(questions):
        own = seen[numbers[number if len(numbers) > 1 else 0]]
        asked = Statement(image="photograph", caption=question, label=0, relation="", index=number)
        batch = packer.pack([asked]).to(device)
        latent = None if own.latent is None else own.latent.to(device)
        prompts.append((batch, model.embed(batch, latent, own.vision)))
    return prompts


def _read(gemma: Gemma, prompts: list[tuple[Batch, Tensor]], length: int) -> DynamicCache:
    """Keys and values of all prompt tokens but the last, which `generate` reads; padded on the left."""
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
