"""The attention masks of packed rows, for each of Gemma's two kinds of layers, dense or in blocks.

    q sees k    if  preorder[k] <= preorder[q] < subtree_end[k]   k's segment is q's own or leads to it
                or  group[q] == group[k] >= 0                     both are in one bidirectional group: tokens of one
                                                                  image, or world tokens of one world
                and, on sliding layers, position[k] > position[q] - window

Dimensions: R rows of L tokens, Q of them queries and K keys; B blocks of 64 tokens.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from theworld.models.packing import ROW_MULTIPLE, Batch

BLOCK = 64  # smaller than a row's multiple: fewer of them straddle two trees
assert ROW_MULTIPLE % BLOCK == 0
FULL, SLIDING = "full_attention", "sliding_attention"  # transformers' names of the two kinds of layers


def attention_masks(
    batch: Batch, sliding_window: int, attention: str, queries: tuple[int, int] | None = None
) -> dict[str, Any]:
    """Return by kind of layer the mask of some queries on the keys up to them.

    `queries` are the columns from start to end; None is all of them. A mask is bool[R, 1, Q, K] (True: may see), as
    `Gemma3TextModel.forward` takes it, or flex attention's BlockMask.
    """
    start, stop = queries or (0, batch.token_ids.shape[1])
    make = _listed_mask if attention == "flex_attention" else _dense_mask
    return {FULL: make(batch, None, start, stop), SLIDING: make(batch, sliding_window, start, stop)}


class RuleTensors(NamedTuple):
    """The numbers that the rule compares, in 32 bits, of which a kernel's registers hold twice as many as of 64."""

    preorder: Tensor  # int32[R, K]
    end: Tensor  # int32[R, K]
    group: Tensor  # int32[R, K]
    position: Tensor  # int32[R, K]
    own_preorder: Tensor  # int32[R, Q]
    own_group: Tensor  # int32[R, Q]
    horizon: Tensor  # int32[R, Q]: the last position that is too far back


class BlockLists(NamedTuple):
    """The tensors of flex attention's mask: the blocks of keys that each block of queries looks at, divided into those
    in which the rule decides token by token and those that are seen whole, and the same by block of keys.

    All are contiguous: the kernels of the backward pass assume that without asking for strides. As plain tensors they
    can be made on the host and copied, and code compiled for one length serves all.
    """

    kv_num_blocks: Tensor  # int32[R, 1, B of the queries]
    kv_indices: Tensor  # int32[R, 1, B of the queries, B of the keys]: the blocks that count come first
    full_kv_num_blocks: Tensor
    full_kv_indices: Tensor
    q_num_blocks: Tensor  # int32[R, 1, B of the keys]
    q_indices: Tensor  # int32[R, 1, B of the keys, B of the queries]
    full_q_num_blocks: Tensor
    full_q_indices: Tensor
    rule: RuleTensors


def _rule_tensors(batch: Batch, window: int | None, start: int, stop: int) -> RuleTensors:
    fields = (batch.preorder, batch.subtree_end, batch.bidirectional_group, batch.position_ids)
    # With the strides of whole tensors: both kinds of layers share their compiled code.
    keys = [x[:, :stop].to(torch.int32, memory_format=torch.contiguous_format) for x in fields]
    preorder, _, group, position = keys
    horizon = torch.full_like(position, -1) if window is None else position - window
    return RuleTensors(*keys, *(x[:, start:].contiguous() for x in (preorder, group, horizon)))


def _rule(tensors: RuleTensors) -> Callable[[Any, Any, Any, Any], Tensor]:
    """Return the rule as flex attention takes it: the same code for both kinds of layers, so that it compiles once."""
    preorder, end, group, position, own_preorder, own_group, horizon = tensors

    def may_see(r: Any, head: Any, q: Any, k: Any) -> Tensor:
        on_path = (preorder[r, k] <= own_preorder[r, q]) & (own_preorder[r, q] < end[r, k])
        seen = on_path | ((own_group[r, q] >= 0) & (own_group[r, q] == group[r, k]))
        return seen & (position[r, k] > horizon[r, q])

    return may_see


def seen_by(queries: Tensor, tensors: RuleTensors) -> Tensor:
    """Return what some queries, flat indices int64[K], see of the keys of all rows, one row after the other:
    bool[K, R L] for rows of L keys."""
    rows, num_keys = tensors.preorder.shape
    keys = torch.arange(rows * num_keys, device=queries.device)
    row, column = (
        (queries // tensors.own_preorder.shape[1])[:, None],
        (queries % tensors.own_preorder.shape[1])[:, None],
    )
    return (row == keys // num_keys) & _rule(tensors)(row, 0, column, keys % num_keys)


def _dense_mask(batch: Batch, window: int | None, start: int, stop: int) -> Tensor:
    device = batch.token_ids.device
    r = torch.arange(len(batch.token_ids), device=device)[:, None, None]
    q = torch.arange(stop - start, device=device)[None, :, None]
    k = torch.arange(stop, device=device)[None, None, :]
    return _rule(_rule_tensors(batch, window, start, stop))(r, 0, q, k)[:, None]


def _listed_mask(batch: Batch, window: int | None, start: int, stop: int) -> BlockMask:
    return block_mask(block_lists(batch, window, start, stop), stop - start, stop)


def block_mask(lists: BlockLists, num_queries: int, num_keys: int) -> BlockMask:
    """Return flex attention's own form of a mask. Compiled code may call this."""
    rule = _rule(lists.rule)
    return BlockMask((num_queries, num_keys), *lists[:-1], BLOCK_SIZE=(BLOCK, BLOCK), mask_mod=rule)


def block_lists(batch: Batch, window: int | None, start: int, stop: int) -> BlockLists:
    """Return the tensors of flex attention's mask, made from the smallest and largest numbers in each block.

    That takes (L / 64)^2 comparisons; flex attention's own way takes L^2 at every step.
    """
    some, every = visible_blocks(batch, window, start, stop)
    part = some & ~every
    by_query = *_ordered(part), *_ordered(every)
    by_key = *_ordered(part.mT), *_ordered(every.mT)
    return BlockLists(*by_query, *by_key, _rule_tensors(batch, window, start, stop))


def prepare_masks(batch: Batch, sliding_window: int) -> Batch:
    """Return the batch with the block lists that the decoder needs. On a GPU they take dozens of small kernels before
    the first layer; on the host they are made while the GPU computes another step."""
    start, length = batch.num_prefix_tokens, batch.token_ids.shape[1]
    windows = {FULL: None, SLIDING: sliding_window}
    parts = [(0, start), (start, length)] if start else [(0, length)]
    masks = {part: {kind: block_lists(batch, w, *part) for kind, w in windows.items()} for part in parts}
    return replace(batch, masks=masks)


def visible_blocks(batch: Batch, window: int | None, start: int, stop: int) -> tuple[Tensor, Tensor]:
    """Return (some, every), bool[R, B of the queries, B of the keys] each.

    `some`: whether a block of queries may see anything of a block of keys; it may be True needlessly, since the rule
    itself then decides token by token. `every`: whether all of it is seen; it is never True wrongly.
    """
    assert start % BLOCK == 0, f"queries from {start} on do not begin with a block of {BLOCK}"
    assert stop % BLOCK == 0, f"rows of {stop} tokens are no whole blocks of {BLOCK}"

    def least_and_most(values: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        blocks = values[:, :stop].unflatten(1, (-1, BLOCK))
        # Not `aminmax`, which wakes all threads of the CPU for any size and waits for them.
        least, most = blocks.amin(-1), blocks.amax(-1)
        own = slice(start // BLOCK, None)
        return least[:, own, None], most[:, own, None], least[:, None], most[:, None]

    least_q, last_q, _, last_k = least_and_most(batch.preorder)
    first_q, _, first_k, _ = least_and_most(_without_negative(batch.preorder))
    _, _, end_k, last_end_k = least_and_most(batch.subtree_end)
    some = (first_k <= last_q) & (first_q < last_end_k)
    every = (last_k <= least_q) & (last_q < end_k)
    number_q, high_q, number_k, high_k = least_and_most(batch.bidirectional_group)
    # Groups have growing numbers along a row, with -1 between them.
    low_q, _, low_k, _ = least_and_most(_without_negative(batch.bidirectional_group))
    some |= (low_q <= high_k) & (low_k <= high_q)
    every |= (number_q >= 0) & (number_q == high_q) & (number_q == number_k) & (number_k == high_k)
    if window is not None:
        near_q, far_q, near_k, far_k = least_and_most(batch.position_ids)
        some &= far_k > near_q - window
        every &= near_k > far_q - window
    first = torch.arange(0, stop, BLOCK, device=some.device)
    return some | (first[start // BLOCK :, None] == first[None]), every


def _without_negative(values: Tensor) -> Tensor:
    """Return the values with the largest number in place of negative ones, which mean padding or no group."""
    return values.masked_fill(values < 0, 1 << 62)


def _ordered(wanted: Tensor) -> tuple[Tensor, Tensor]:
    """bool[R, B, B] -> the number of wanted blocks of keys for each block of queries, int32[R, 1, B], and the indices
    of all blocks, wanted ones first, int32[R, 1, B, B]."""
    order = wanted.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
    order = order.to(torch.int32, memory_format=torch.contiguous_format)
    return wanted.sum(-1, dtype=torch.int32)[:, None], order[:, None]
