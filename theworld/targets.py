"""What a batch is to predict, and where: labels, and the words of the true statements and of their relations."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from theworld.gemma import Prompt
from theworld.vsr import Statement, relation_span

Found = tuple[int, Sequence[int], Sequence[int]]  # where a branch starts, its tokens, places in it


def targets(
    branches: Sequence[tuple[int, Prompt]],
    statements: Sequence[Statement],
    answer_ids: Sequence[int],
    captions: Sequence[tuple[int, Prompt]] | None = None,
) -> dict[str, Tensor]:
    """Fields of a `Batch`. `branches`: of each statement the flat index at which its branch starts, and its prompt.
    `captions`: the same of captions, whose words then count in place of those of true statements."""
    true = [branch for branch, s in zip(branches, statements, strict=True) if s.label == 1]
    told = true if captions is None else captions
    texts: list[Found] = [(start, prompt.branch, range(*prompt.caption)) for start, prompt in told]
    relations: list[Found] = []
    for (start, prompt), statement in zip(branches, statements, strict=True):
        if statement.label == 0:
            continue
        span = relation_span(statement.caption, statement.relation)
        if span is not None:
            relations.append((start, prompt.branch, prompt.tokens_of(*span)))
    return {
        "label_rows": integers([start + len(prompt.branch) - 1 for start, prompt in branches]),
        "labels": integers([answer_ids[s.label] for s in statements]),
        **dict(zip(("word_rows", "words", "word_counts"), _words(texts), strict=True)),
        **dict(zip(("relation_rows", "relations", "relation_counts"), _words(relations), strict=True)),
    }


def _words(found: Sequence[Found]) -> tuple[Tensor, Tensor, Tensor]:
    """The rows that predict these tokens, the tokens, and of how many in its branch each is one."""
    rows = [start + i - 1 for start, _, places in found for i in places]
    words = [branch[i] for _, branch, places in found for i in places]
    return integers(rows), integers(words), integers([len(own) for _, _, own in found for _ in own])


def integers(values: Any) -> Tensor:
    """int64 of numbers, or of an array."""
    return torch.from_numpy(np.asarray(values, np.int64))
