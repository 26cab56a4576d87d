"""What a token of a packed row may see, for each of Gemma's two kinds of layers, dense or in blocks.

    q sees k    if  k <= q < end[k]                 k's segment is q's own or one of those that lead to it
                or  block[q] == block[k] >= 0       both are tokens of one image, or world tokens of one world
                and, on sliding layers, position[k] > position[q] - window

Dimensions: R rows of L tokens; B blocks of 128 tokens in a row.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from theworld.batch import ROW_MULTIPLE, Batch

BLOCK = ROW_MULTIPLE
FULL, SLIDING = "full_attention", "sliding_attention"  # transformers' names of the two kinds of layers


def attention_masks(batch: Batch, sliding_window: int, attention: str) -> dict[str, Any]:
    """The masks that `Gemma3TextModel.forward` takes, by kind of layer: bool[R, 1, L, L] (True: may see), or flex
    attention's BlockMask of the same rule."""
    make = _block_mask if attention == "flex_attention" else _dense_mask
    return {FULL: make(batch, None), SLIDING: make(batch, sliding_window)}


def _rule(batch: Batch, window: int | None) -> Callable[[Any, Any, Any, Any], Tensor]:
    """The rule as flex attention takes it; the same code for both kinds of layers, so that it compiles once."""
    end, block, position = batch.end, batch.block, batch.position_ids
    horizon = torch.full_like(position, -1) if window is None else position - window

    def may_see(r: Any, head: Any, q: Any, k: Any) -> Tensor:
        seen = ((k <= q) & (q < end[r, k])) | ((block[r, q] >= 0) & (block[r, q] == block[r, k]))
        return seen & (position[r, k] > horizon[r, q])

    return may_see


def _dense_mask(batch: Batch, window: int | None) -> Tensor:
    rows, length = batch.token_ids.shape
    device = batch.token_ids.device
    r = torch.arange(rows, device=device)[:, None, None]
    place = torch.arange(length, device=device)
    return _rule(batch, window)(r, 0, place[None, :, None], place[None, None, :])[:, None]


def _block_mask(batch: Batch, window: int | None) -> BlockMask:
    """Which blocks of keys a block of queries has to look at, from the smallest and largest `end`, `block` and position
    in each: L / 128 squared comparisons, where flex attention's own way makes L squared of them at every step."""
    some, every = visible_blocks(batch, window)
    return BlockMask.from_kv_blocks(
        *_ordered(some & ~every), *_ordered(every), BLOCK_SIZE=BLOCK, mask_mod=_rule(batch, window)
    )


def visible_blocks(batch: Batch, window: int | None) -> tuple[Tensor, Tensor]:
    """(some, every), bool[R, B, B] each: whether a query block may see anything of a key block (True more often than
    need be: the rule itself then decides token by token), and whether it sees all of it (never True wrongly)."""
    rows, length = batch.token_ids.shape
    assert length % BLOCK == 0, f"rows of {length} tokens are no whole blocks of {BLOCK}"
    end, block, position = (x.view(rows, -1, BLOCK) for x in (batch.end, batch.block, batch.position_ids))
    first = torch.arange(0, length, BLOCK, device=end.device)
    first_q, first_k = first[:, None], first[None, :]
    last_q, last_k = first_q + BLOCK - 1, first_k + BLOCK - 1
    some = (first_k <= last_q) & (first_q < end.amax(-1)[:, None, :])
    every = (last_k <= first_q) & (last_q < end.amin(-1)[:, None, :])
    # Numbers of blocks grow along a row, with -1 between them; 1 << 62 stands for no number at all.
    low, high = block.masked_fill(block < 0, 1 << 62).amin(-1), block.amax(-1)
    some |= (low[:, :, None] <= high[:, None, :]) & (low[:, None, :] <= high[:, :, None])
    whole = (block.amin(-1) == high) & (high >= 0)
    every |= whole[:, :, None] & whole[:, None, :] & (high[:, :, None] == high[:, None, :])
    if window is not None:
        some &= position.amin(-1)[:, :, None] - position.amax(-1)[:, None, :] < window
        every &= position.amax(-1)[:, :, None] - position.amin(-1)[:, None, :] < window
    return some, every


def _ordered(wanted: Tensor) -> tuple[Tensor, Tensor]:
    """bool[R, B, B] -> for each query block, how many key blocks are wanted, int32[R, 1, B], and which, first of all,
    int32[R, 1, B, B]."""
    order = wanted.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
    return wanted.sum(-1, dtype=torch.int32)[:, None], order.to(torch.int32)[:, None]
