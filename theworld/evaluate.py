"""Phase 3, first half: what a model and its controls answer to each statement.

Beside the model with its world tokens stand the controls that an accuracy means nothing without: Gemma without
world tokens, zero latents, and the latents of another image.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from theworld.console import progress
from theworld.metrics import SYSTEMS
from theworld.model import TheWorld
from theworld.vsr import Statement, images_of

Fetch = Callable[[Sequence[str]], Tensor]  # image paths -> one row an image


def shuffled_images(images: Sequence[str], seed: int = 0) -> dict[str, str]:
    """For each image another one: a random cycle through all of them. ValueError for fewer than two."""
    if len(images) < 2:
        raise ValueError(
            "latents of another image need at least two images; leave 'shuffled' out of --systems"
        )
    order = [sorted(images)[i] for i in np.random.default_rng(seed).permutation(len(images))]
    return dict(zip(order, order[1:] + order[:1], strict=True))


@torch.no_grad()
def predict(
    model: TheWorld,
    statements: Sequence[Statement],
    latents: Fetch,
    vision: Fetch | None,
    system: str = "world",
    batch_size: int = 8,
    quiet: bool = True,
) -> np.ndarray:
    """float32[len(statements), 2]: the logits of '0' and '1' for each statement, in the order given.

    `system` is one of SYSTEMS; `vision` is None for a text-only Gemma.
    """
    if system not in SYSTEMS:
        raise ValueError(f"system {system!r}: wanted one of {', '.join(SYSTEMS)}")
    device = model.gemma.device
    packer = model.packer(with_world=system != "baseline")
    other = shuffled_images(images_of(statements)) if system == "shuffled" else {}
    # Statements of one image side by side, so that they share its prefix.
    order = sorted(range(len(statements)), key=lambda i: (statements[i].image, i))
    logits = np.zeros((len(statements), 2), dtype=np.float32)
    for start in progress(
        range(0, len(order), batch_size), desc=system, unit=" batches", leave=False, disable=quiet
    ):
        chosen = order[start : start + batch_size]
        batch = packer.pack([statements[i] for i in chosen])
        world = None
        if system == "zero":  # zero after normalisation: the mean latent, which says nothing
            world = model.projection.latents_mean.expand(
                len(batch.images), *model.projection.shape.latent_shape
            )
        elif system != "baseline":
            world = latents([other.get(image, image) for image in batch.images]).to(device)
        seen = vision(batch.images).to(device) if vision is not None else None
        answers = model(batch.to(device), world, seen)[:, list(model.gemma.answer_ids)]
        # `chosen` is sorted by image, as the batch is, so rows and statements are in the same order.
        logits[chosen] = answers.cpu().numpy()
    return logits
