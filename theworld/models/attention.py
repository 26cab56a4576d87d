"""What a token of a packed row may see, for each of Gemma's two kinds of layers, dense or in blocks.

    q sees k    if  place[k] <= place[q] < end[k]   k's segment is q's own or one of those that lead to it
                or  block[q] == block[k] >= 0       both are tokens of one image, or world tokens of one world
                and, on sliding layers, position[k] > position[q] - window

Dimensions: R rows of L tokens, Q of them queries and K keys; B blocks of 64 tokens.

Block lists are cheap to make on the host, in the thread that packs, and dear on a GPU: dozens of small kernels before
the first layer of every step (`prepare_masks`). Compiled code takes them as plain tensors whose lengths vary, and
makes flex attention's `BlockMask` of them inside, so that one piece of code serves every length.
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
    """By kind of layer the mask of these queries, columns from where to where (None: all), on the keys up to them:
    bool[R, 1, Q, K] (True: may see), as `Gemma3TextModel.forward` takes it, or flex attention's BlockMask."""
    start, stop = queries or (0, batch.token_ids.shape[1])
    make = _listed_mask if attention == "flex_attention" else _dense_mask
    return {FULL: make(batch, None, start, stop), SLIDING: make(batch, sliding_window, start, stop)}


class Numbers(NamedTuple):
    """What the rule compares: int32, of which a kernel's registers hold twice as many as of int64."""

    place: Tensor  # int32[R, K]
    end: Tensor  # int32[R, K]
    block: Tensor  # int32[R, K]
    position: Tensor  # int32[R, K]
    own_place: Tensor  # int32[R, Q]
    own_block: Tensor  # int32[R, Q]
    horizon: Tensor  # int32[R, Q]: the last position that is too far back


class BlockLists(NamedTuple):
    """What flex attention reads of a mask: the blocks that a block of queries looks at, those where the rule decides
    token by token and those that it sees whole, and the same from the side of the keys. All tensors are contiguous:
    the kernels of the backward pass take the lists for that, whatever their strides are."""

    kv_num_blocks: Tensor  # int32[R, 1, B of the queries]
    kv_indices: Tensor  # int32[R, 1, B of the queries, B of the keys]: those that count come first
    full_kv_num_blocks: Tensor
    full_kv_indices: Tensor
    q_num_blocks: Tensor  # int32[R, 1, B of the keys]
    q_indices: Tensor  # int32[R, 1, B of the keys, B of the queries]
    full_q_num_blocks: Tensor
    full_q_indices: Tensor
    numbers: Numbers


def _numbers(batch: Batch, window: int | None, start: int, stop: int) -> Numbers:
    """The numbers of queries from `start` to `stop` and of the keys up to them."""
    keys = [x[:, :stop].int() for x in (batch.place, batch.end, batch.block, batch.position_ids)]
    place, _, block, position = keys
    horizon = torch.full_like(position, -1) if window is None else position - window
    return Numbers(*keys, *(x[:, start:].contiguous() for x in (place, block, horizon)))


def _rule(numbers: Numbers) -> Callable[[Any, Any, Any, Any], Tensor]:
    """The rule as flex attention takes it; the same code for both kinds of layers, so that it compiles once."""
    place, end, block, position, own_place, own_block, horizon = numbers

    def may_see(r: Any, head: Any, q: Any, k: Any) -> Tensor:
        on_path = (place[r, k] <= own_place[r, q]) & (own_place[r, q] < end[r, k])
        seen = on_path | ((own_block[r, q] >= 0) & (own_block[r, q] == block[r, k]))
        return seen & (position[r, k] > horizon[r, q])

    return may_see


def _dense_mask(batch: Batch, window: int | None, start: int, stop: int) -> Tensor:
    device = batch.token_ids.device
    r = torch.arange(len(batch.token_ids), device=device)[:, None, None]
    q = torch.arange(stop - start, device=device)[None, :, None]
    k = torch.arange(stop, device=device)[None, None, :]
    return _rule(_numbers(batch, window, start, stop))(r, 0, q, k)[:, None]


def _listed_mask(batch: Batch, window: int | None, start: int, stop: int) -> BlockMask:
    return block_mask(block_lists(batch, window, start, stop), stop - start, stop)


def block_mask(lists: BlockLists, num_queries: int, num_keys: int) -> BlockMask:
    """Flex attention's own form of a mask. Compiled code may call this."""
    rule = _rule(lists.numbers)
    return BlockMask((num_queries, num_keys), *lists[:-1], BLOCK_SIZE=(BLOCK, BLOCK), mask_mod=rule)


def block_lists(batch: Batch, window: int | None, start: int, stop: int) -> BlockLists:
    """Which blocks of keys a block of queries has to look at, from the smallest and largest numbers in each: L / 64
    squared comparisons, where flex attention's own way makes L squared of them at every step."""
    some, every = visible_blocks(batch, window, start, stop)
    part = some & ~every
    of_queries = *_ordered(part), *_ordered(every)
    of_keys = *_ordered(part.mT), *_ordered(every.mT)
    return BlockLists(*of_queries, *of_keys, _numbers(batch, window, start, stop))


def prepare_masks(batch: Batch, sliding_window: int) -> Batch:
    """The same batch with the block lists that the decoder is going to ask for."""
    frozen, length = batch.num_frozen, batch.token_ids.shape[1]
    windows = {FULL: None, SLIDING: sliding_window}
    parts = [(0, frozen), (frozen, length)] if frozen else [(0, length)]
    masks = {part: {kind: block_lists(batch, w, *part) for kind, w in windows.items()} for part in parts}
    return replace(batch, masks=masks)


def visible_blocks(batch: Batch, window: int | None, start: int, stop: int) -> tuple[Tensor, Tensor]:
    """(some, every), bool[R, B of the queries, B of the keys] each: whether a block of queries may see anything of a
    block of keys (True more often than need be: the rule itself then decides token by token), and whether it sees
    all of it (never True wrongly)."""
    assert start % BLOCK == 0, f"queries from {start} on do not begin with a block of {BLOCK}"
    assert stop % BLOCK == 0, f"rows of {stop} tokens are no whole blocks of {BLOCK}"

    def least_and_most(values: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        least, most = values[:, :stop].unflatten(1, (-1, BLOCK)).aminmax(dim=-1)
        own = slice(start // BLOCK, None)
        return least[:, own, None], most[:, own, None], least[:, None], most[:, None]

    least_q, last_q, _, last_k = least_and_most(batch.place)
    first_q, _, first_k, _ = least_and_most(_without(batch.place))
    _, _, end_k, last_end_k = least_and_most(batch.end)
    some = (first_k <= last_q) & (first_q < last_end_k)
    every = (last_k <= least_q) & (last_q < end_k)
    number_q, high_q, number_k, high_k = least_and_most(batch.block)
    low_q, _, low_k, _ = least_and_most(
        _without(batch.block)
    )  # numbers grow along a row, with -1 between them
    some |= (low_q <= high_k) & (low_k <= high_q)
    every |= (number_q >= 0) & (number_q == high_q) & (number_q == number_k) & (number_k == high_k)
    if window is not None:
        near_q, far_q, near_k, far_k = least_and_most(batch.position_ids)
        some &= far_k > near_q - window
        every &= near_k > far_q - window
    first = torch.arange(0, stop, BLOCK, device=some.device)
    return some | (first[start // BLOCK :, None] == first[None]), every


def _without(values: Tensor) -> Tensor:
    """The same without negative numbers, which stand for padding and for no block, where the least is looked for."""
    return values.masked_fill(values < 0, 1 << 62)


def _ordered(wanted: Tensor) -> tuple[Tensor, Tensor]:
    """bool[R, B, B] -> for each block of queries, how many blocks of keys are wanted, int32[R, 1, B], and which, those
    first, int32[R, 1, B, B]."""
    order = wanted.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
    order = order.to(torch.int32, memory_format=torch.contiguous_format)
    return wanted.sum(-1, dtype=torch.int32)[:, None], order[:, None]
