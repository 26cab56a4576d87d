"""The losses of a packed batch, from the hidden states of the tokens that predict something."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from theworld.batch import Batch
from theworld.gemma import Gemma


def weighted_losses(
    gemma: Gemma, hidden: Callable[[Tensor], Tensor], batch: Batch, weights: dict[str, float]
) -> dict[str, Tensor]:
    """See `TheWorld.losses`. `hidden` gives dtype[K, D] for flat indices int64[K]; `weights`: of label, statement and
    relation. Words without a weight are not asked for."""
    words = {
        "statement": (batch.word_rows, batch.words, batch.word_counts),
        "relation": (batch.relation_rows, batch.relations, batch.relation_counts),
    }
    asked = {name: own for name, own in words.items() if weights[name] > 0 and len(own[0]) > 0}
    wanted = [batch.label_rows, *(rows for rows, _, _ in asked.values())]
    states = hidden(torch.cat(wanted)).split([len(rows) for rows in wanted])
    logits = gemma.logits(states[0])
    losses = {"label": F.cross_entropy(logits, batch.labels, reduction="sum")}
    losses |= dict.fromkeys(words, torch.zeros_like(losses["label"]))
    for (name, (_, ids, counts)), own in zip(asked.items(), states[1:], strict=True):
        each = F.cross_entropy(gemma.logits(own), ids, reduction="none")
        losses[name] = (each * (1 / counts.to(each.dtype))).sum()
    total = torch.stack([weights[name] * loss for name, loss in losses.items()]).sum()
    answers = torch.stack([logits[:, token] for token in gemma.answer_ids], 1).detach()
    return {"total": total, "logits": answers} | {name: loss.detach() for name, loss in losses.items()}
