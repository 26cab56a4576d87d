"""The answers of a model to each statement, under every condition (see `theworld.evaluation.conditions`).

All conditions are answered in the same batches, so that they share prefixes: the latents of an image serve the
statements about it and those of the image that it is shown for under "shuffled".
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from theworld.config.config import Config
from theworld.data.vsr import Statement, images_of
from theworld.evaluation.conditions import CONDITIONS
from theworld.extraction.batches import FeatureSource, Microbatch, make_microbatch, prefetch
from theworld.models.packing import Control, WorldSource
from theworld.models.theworld import TheWorld
from theworld.utils.console import progress
from theworld.utils.distributed import Processes

# Why a condition is left out, and the condition that it would be.
SAME = {
    "text": ("this Gemma sees no photograph", "baseline"),
    "zero": ("these world tokens look at no picture", "world"),
    "shuffled": ("these world tokens look at no picture", "world"),
}


def shuffled_images(images: Sequence[str], seed: int = 0) -> dict[str, str]:
    """Return another image for each image, by a random cycle. Raises ValueError for fewer than two images."""
    if len(images) < 2:
        raise ValueError("condition 'shuffled' needs at least two images; leave it out of --conditions")
    order = [sorted(images)[i] for i in np.random.default_rng(seed).permutation(len(images))]
    return dict(zip(order, order[1:] + order[:1], strict=True))


def possible_conditions(conditions: Sequence[str], is_multimodal: bool, config: Config) -> list[str]:
    """Return the conditions without those that are others under another name: "text" of a text-only Gemma, and "zero"
    and "shuffled" of world tokens without a picture. `config`: the checkpoint's settings.

    Raises ValueError if none is left.
    """
    possible = [condition for condition in conditions if condition != "text" or is_multimodal]
    if config.world_encoder == "none":
        possible = [condition for condition in possible if condition not in ("zero", "shuffled")]
    if not possible:
        why, same = SAME[conditions[0]]
        raise ValueError(
            f"condition {conditions[0]!r}: {why} ({config.model_name}, world_encoder {config.world_encoder}), so it is "
            f"the same as {same!r}; give that"
        )
    return possible


def left_out(conditions: Sequence[str], possible: Sequence[str]) -> list[str]:
    """Return a line for each condition that `possible_conditions` has left out."""
    missing = [(condition, *SAME[condition]) for condition in conditions if condition not in possible]
    return [f"without {condition!r}: {why}, so it is {same!r}" for condition, why, same in missing]


@torch.no_grad()
def predict(
    model: TheWorld,
    statements: Sequence[Statement],
    latents: FeatureSource,
    vision: FeatureSource | None,
    conditions: Sequence[str] = ("world",),
    batch_size: int = 8,
    quiet: bool = True,
    processes: Processes | None = None,
) -> dict[str, np.ndarray]:
    """Return the answers under each condition, float32[len(statements), 3], in the order of the statements.

    Columns are the logits of "0" and "1" and the logsumexp over the vocabulary. `conditions` are some of CONDITIONS,
    without "text" for a text-only Gemma, whose `vision` is None. Several `processes` share the work; each returns all
    answers.
    """
    for condition in conditions:
        if condition not in CONDITIONS:
            raise ValueError(f"condition {condition!r}; wanted one of {', '.join(CONDITIONS)}")
    if "text" in conditions and not model.gemma.is_multimodal:
        raise ValueError(
            f"condition 'text': {model.gemma.name} sees no photograph, so it is the same as 'baseline'; leave it out"
        )
    device = model.gemma.device
    other = shuffled_images(images_of(statements)) if "shuffled" in conditions else {}
    order = _order(statements, other)
    parts = _parts(model, order, batch_size, processes)
    packer = model.packer()

    def passes() -> Iterator[tuple[list[int], Microbatch]]:
        for chosen in parts:
            asked = [statements[i] for i in chosen or order[:1]]
            worlds = [_world(condition, s.image, other) for condition in conditions for s in asked]
            yield chosen, make_microbatch(model, packer, asked * len(conditions), latents, vision, worlds)

    first, second = model.gemma.answer_ids
    places, found = list[int](), list[Tensor]()
    bar = progress(
        prefetch(passes()), total=len(parts), desc="evaluate", unit=" batches", leave=False, disable=quiet
    )
    for chosen, one in bar:
        one = one.to(device)
        assert one.batch is not None
        every_token = model(one.batch, one.latents, one.vision)
        if chosen:  # nothing in here waits for a GPU
            three = every_token[:, first], every_token[:, second], every_token.logsumexp(1)
            places += chosen
            found.append(torch.stack(three, 1).view(len(conditions), len(chosen), 3))
    logits = torch.zeros(len(conditions), len(statements), 3, device=device)
    if found:
        logits[:, places] = torch.cat(found, 1)
    if processes is not None:
        (logits,) = processes.sum([logits])
    return dict(zip(conditions, logits.cpu().numpy(), strict=True))


def label_loss(logits: np.ndarray, labels: np.ndarray) -> float:
    """Return the mean cross-entropy of the labels among the two answers, in nats. `logits`: float[n, 2 or more]."""
    margin = (logits[:, 1] - logits[:, 0]).astype(np.float64) * np.where(labels == 1, 1, -1)
    return float(np.logaddexp(0, -margin).mean())


@torch.no_grad()
def word_losses(
    model: TheWorld,
    statements: Sequence[Statement],
    latents: FeatureSource,
    vision: FeatureSource | None,
    words: Sequence[str],
    batch_size: int = 8,
    processes: Processes | None = None,
) -> dict[str, float]:
    """Return the mean language-modelling losses with world tokens, in nats a statement, of those that `words` names.

    "statement" is the loss on the words of true statements, "relation" that on the words of their relations (see
    `TheWorld.losses`); false statements count 0, as in training. Several `processes` share the work; each returns all.
    """
    weights = {f"{name}_loss_weight": 1.0 for name in words}
    order = _order(statements, {})
    packer, sums = model.packer(), torch.zeros(len(words), device=model.gemma.device)
    for chosen in _parts(model, order, batch_size, processes):
        asked = [statements[i] for i in chosen or order[:1]]
        one = make_microbatch(model, packer, asked, latents, vision).to(model.gemma.device)
        assert one.batch is not None
        losses = model.losses(one.batch, one.latents, one.vision, label_loss_weight=0.0, **weights)
        sums += torch.stack([losses[name] for name in words]) * bool(chosen)
    if processes is not None:
        (sums,) = processes.sum([sums])
    return dict(zip(words, (sums / len(statements)).tolist(), strict=True))


def _parts(
    model: TheWorld, order: Sequence[int], batch_size: int, processes: Processes | None
) -> list[list[int]]:
    """Return the batches of this process, as indices of statements."""
    every = [list(order[start : start + batch_size]) for start in range(0, len(order), batch_size)]
    if processes is None:
        return every
    own = every[processes.rank :: processes.count]
    if model.shell is not None and len(own) < len(every[:: processes.count]):
        own.append([])  # sharded processes compute together: an empty batch for one that has fewer
    return own


def _order(statements: Sequence[Statement], other: dict[str, str]) -> list[int]:
    """Return indices that put the statements of an image side by side, and an image beside the one shown for it."""
    images = images_of(statements)
    if other:
        images = images[:1]
        while other[images[-1]] != images[0]:
            images.append(other[images[-1]])
    rank = {image: number for number, image in enumerate(images)}
    return sorted(range(len(statements)), key=lambda i: (rank[statements[i].image], i))


def _world(condition: str, image: str, other: dict[str, str]) -> WorldSource:
    """Return the source of the world tokens before a statement about `image`."""
    if condition in ("world", "shuffled"):
        return image if condition == "world" else other[image]
    return {"baseline": None, "zero": Control.ZERO, "text": Control.TEXT}[condition]
