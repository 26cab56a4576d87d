"""P(true) of any statement about any photograph, with its world tokens and beside its controls."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from theworld.answers import p_true
from theworld.batch import ZERO, Packer
from theworld.given import Photograph, Seen, look, paired
from theworld.vsr import Statement

# Those of `theworld.metrics.SYSTEMS` that one photograph is enough for.
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

    All systems are asked in the same batches, where they share what is the same, as in `theworld.evaluate`.
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
