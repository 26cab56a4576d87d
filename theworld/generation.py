"""Answers in words: any question about a photograph, with its world tokens or without.

The prompt is read once, by the masks that the projection was trained with, into transformers' key-value cache; from
there on transformers' own `generate` goes on, with all of its options.

Dimensions: B questions, L tokens of the longest prompt, D width of the language model.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache

from theworld.batch import Batch, Packer
from theworld.gemma import Gemma
from theworld.given import Photograph, look, paired
from theworld.masks import attention_masks
from theworld.vsr import Statement


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
