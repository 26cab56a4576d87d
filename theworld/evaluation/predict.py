"""Phase 3, first half: what a model and its controls answer to each statement.

Beside the model with its world tokens stand the controls that an accuracy means nothing without: Gemma without
world tokens, zero latents, the latents of another image, and the text without the photograph. All of them are asked
in the same batches, where they share what is the same: the world of an image serves its own statements and those of
the image that is shown it.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from theworld.data.vsr import Statement, images_of
from theworld.evaluation.metrics import SYSTEMS
from theworld.extraction.batches import FeatureSource, Microbatch, make_microbatch, prefetch
from theworld.models.packing import Control, WorldSource
from theworld.models.theworld import TheWorld
from theworld.utils.console import progress
from theworld.utils.distributed import Processes


def shuffled_images(images: Sequence[str], seed: int = 0) -> dict[str, str]:
    """For each image another one: a random cycle through all of them. ValueError for fewer than two."""
    if len(images) < 2:
        raise ValueError(
            "latents of another image need at least two images; leave 'shuffled' out of --systems"
        )
    order = [sorted(images)[i] for i in np.random.default_rng(seed).permutation(len(images))]
    return dict(zip(order, order[1:] + order[:1], strict=True))


def possible_systems(systems: Sequence[str], sees: bool, name: str) -> list[str]:
    """Those that a Gemma of that name has, which sees photographs or does not. ValueError if none is left."""
    possible = [system for system in systems if system != "text" or sees]
    if not possible:
        raise ValueError(f"system 'text': {name} sees no photograph, so it is 'baseline'; ask for that")
    return possible


@torch.no_grad()
def predict(
    model: TheWorld,
    statements: Sequence[Statement],
    latents: FeatureSource,
    vision: FeatureSource | None,
    systems: Sequence[str] = ("world",),
    batch_size: int = 8,
    quiet: bool = True,
    processes: Processes | None = None,
) -> dict[str, np.ndarray]:
    """For each system float32[len(statements), 3]: for each statement, in the order given, the logits of '0' and '1',
    and the logarithm of the sum of exp over the logits of the whole vocabulary.

    `systems` are some of SYSTEMS; `vision` is None for a text-only Gemma, of which "text" is no system: it would be
    "baseline" again. Several `processes` share the work, and each gets all of the answers.
    """
    for system in systems:
        if system not in SYSTEMS:
            raise ValueError(f"system {system!r}: wanted one of {', '.join(SYSTEMS)}")
    if "text" in systems and not model.gemma.is_multimodal:
        raise ValueError(
            f"system 'text': {model.gemma.name} sees no photograph, so it is 'baseline'; leave it out"
        )
    device = model.gemma.device
    other = shuffled_images(images_of(statements)) if "shuffled" in systems else {}
    order = _order(statements, other)
    parts = _parts(model, order, batch_size, processes)
    packer = model.packer()

    def passes() -> Iterator[tuple[list[int], Microbatch]]:
        for chosen in parts:
            asked = [statements[i] for i in chosen or order[:1]]
            worlds = [_world(system, s.image, other) for system in systems for s in asked]
            yield chosen, make_microbatch(model, packer, asked * len(systems), latents, vision, worlds)

    logits = torch.zeros(len(systems), len(statements), 3, device=device)
    bar = progress(
        prefetch(passes()), total=len(parts), desc="evaluate", unit=" batches", leave=False, disable=quiet
    )
    for chosen, one in bar:
        one = one.to(device)
        assert one.batch is not None
        every_token = model(one.batch, one.latents, one.vision)
        two = every_token[:, list(model.gemma.answer_ids)]
        if chosen:
            answers = torch.cat([two, every_token.logsumexp(1, keepdim=True)], 1)
            logits[:, chosen] = answers.view(len(systems), len(chosen), 3)
    if processes is not None:
        (logits,) = processes.sum([logits])
    return dict(zip(systems, logits.cpu().numpy(), strict=True))


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
    """Next-word losses with world tokens, in nats a statement: "statement" on the words of true statements, "relation"
    on those of their relations (`TheWorld.losses`), as far as `words` names them. False statements count 0, as in
    training. Several `processes` share the work, and each gets all of it."""
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
    """What this process asks, batch by batch."""
    every = [list(order[start : start + batch_size]) for start in range(0, len(order), batch_size)]
    if processes is None:
        return every
    own = every[processes.rank :: processes.count]
    if model.shell is not None and len(own) < len(every[:: processes.count]):
        own.append([])  # sharded processes compute together: one with less to do goes along
    return own


def _order(statements: Sequence[Statement], other: dict[str, str]) -> list[int]:
    """Indices such that statements of one image stand side by side, and images beside the one they are shown."""
    images = images_of(statements)
    if other:
        images = images[:1]
        while other[images[-1]] != images[0]:
            images.append(other[images[-1]])
    place = {image: number for number, image in enumerate(images)}
    return sorted(range(len(statements)), key=lambda i: (place[statements[i].image], i))


def _world(system: str, image: str, other: dict[str, str]) -> WorldSource:
    """What the packer is told for a statement about `image`."""
    if system in ("world", "shuffled"):
        return image if system == "world" else other[image]
    return {"baseline": None, "zero": Control.ZERO, "text": Control.TEXT}[system]
