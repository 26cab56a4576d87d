"""A tokenizer with only those tokens that some texts take, which tokenises these texts as before.

A byte-pair tokenizer merges, again and again, the pair of neighbours that stands first in its list of merges (Sennrich
et al. 2016, arXiv 1508.07909). With every token that such merging of the texts passes through, and every merge that
makes one of them, the same merges are there at every step, so the result is the same.
"""

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

Json = dict[str, Any]


def passed_through(text: str, ranks: dict[tuple[str, str], int]) -> set[str]:
    """Every token on the way from the text's characters to its tokens. `ranks`: the place of each merge."""
    symbols = list(text)
    found = set(symbols)
    while len(symbols) > 1:
        pairs = list(pairwise(symbols))
        rank, at = min((ranks.get(pair, len(ranks)), i) for i, pair in enumerate(pairs))
        if rank == len(ranks):
            break
        symbols[at : at + 2] = ["".join(pairs[at])]
        found.add(symbols[at])
    return found


def cut_tokenizer(tokenizer: Json, texts: Iterable[str], always: Sequence[str]) -> tuple[Json, list[int]]:
    """A tokenizer.json with the tokens of `texts`, the `always` ones and the bytes alone, and the former id of each.

    `texts` hold no control tokens. ValueError for a tokenizer of another kind than Gemma's.
    """
    model = tokenizer["model"]
    if model["type"] != "BPE" or tokenizer["normalizer"] != {
        "type": "Replace",
        "pattern": {"String": " "},
        "content": "▁",
    }:
        raise ValueError(
            "a tokenizer.json of another kind than Gemma's: wanted BPE with ▁ in place of spaces"
        )
    vocab = model["vocab"]
    ranks = {(a, b): rank for rank, (a, b) in enumerate(model["merges"])}
    kept = {f"<0x{byte:02X}>" for byte in range(256)} | set(always)
    # No merge joins what follows ▁ to what stands before it, so words can be looked at one by one.
    for word in {piece for text in texts for piece in text.replace(" ", " ▁").split(" ")}:
        kept |= passed_through(word, ranks)
    ids = vocab | {own["content"]: own["id"] for own in tokenizer["added_tokens"]}  # some stand there alone
    former = sorted(ids[token] for token in kept if token in ids)
    new = {old: i for i, old in enumerate(former)}
    post = tokenizer["post_processor"]
    special = {
        name: own | {"ids": [new[i] for i in own["ids"]]} for name, own in post["special_tokens"].items()
    }
    cut = tokenizer | {
        "model": model
        | {
            "vocab": {token: new[i] for token, i in vocab.items() if i in new},
            "merges": [[a, b] for a, b in model["merges"] if a in kept and b in kept and a + b in kept],
        },
        "added_tokens": [
            own | {"id": new[own["id"]]} for own in tokenizer["added_tokens"] if own["id"] in new
        ],
        "post_processor": post | {"special_tokens": special},
    }
    return cut, former
