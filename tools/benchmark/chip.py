"""Measured rates of a machine, and the FLOPs of each phase.

The floor of a phase is its FLOPs over the measured rate of matrix multiplication: the phase cannot be faster on this
machine in this dtype. MFU (model FLOPs utilisation: Chowdhery et al. 2022, arXiv 2204.02311, appendix B) is the floor
over the measured time. A multiplication with its addition counts as two FLOPs.

Dimensions: T tokens, D hidden size, F size of the feed-forward layer, H heads of size h, K key-value heads.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModel

from theworld.models.cosmos import CosmosEncoder, load_vae
from theworld.models.packing import Batch


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished its work; a CPU always has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_calls(
    call: Callable[[], Any], device: torch.device, repeats: int, warm_up: int = 1, inner: int = 1
) -> list[float]:
    """Return the seconds of a call in each of `repeats` measurements of `inner` calls, after `warm_up` calls.

    `torch.utils.benchmark.Timer` is not used: it runs two further calls in each measurement, on a single thread.
    """
    for _ in range(warm_up):
        call()
    seconds = []
    for _ in range(repeats):
        synchronize(device)
        start = time.perf_counter()
        for _ in range(inner):
            call()
        synchronize(device)
        seconds.append((time.perf_counter() - start) / inner)
    return seconds


def matmul_flops_per_second(device: torch.device, dtype: torch.dtype, size: int, repeats: int = 5) -> float:
    """Return the median rate of [size, size] @ [size, size], which takes 2 size^3 FLOPs."""
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    seconds = sorted(time_calls(lambda: a @ b, device, repeats, warm_up=3, inner=4))
    return 2 * size**3 / seconds[len(seconds) // 2]


def copy_bytes_per_second(device: torch.device, size: int, repeats: int = 5) -> float:
    """Return the median rate of copying `size` bytes on the device: each byte is read once and written once."""
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = sorted(time_calls(lambda: target.copy_(source), device, repeats, warm_up=2, inner=4))
    return 2 * size / seconds[len(seconds) // 2]


# ---- the frozen encoders


def count_flops(call: Callable[[], Any]) -> int:
    """Return the FLOPs of matrix multiplications, convolutions and attention in a call, as torch counts them.

    On the meta device nothing is computed, and attention is counted too, which it is not on a CPU.
    """
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def vae_encode_flops(name_or_path: str, size: int) -> dict[str, int]:
    """Return the FLOPs to encode one picture of `size` pixels a side with a VAE, a hub name or a local folder.

    `frame`: with `CosmosEncoder`, which computes one frame. `as_it_is`: with diffusers, which also convolves the zero
    padding in time.
    """
    encoder = CosmosEncoder(name_or_path, device="meta")
    vae = load_vae(name_or_path).to("meta")
    pixels = torch.empty(1, 3, size, size, device="meta")
    with torch.no_grad():
        return {
            "frame": count_flops(lambda: encoder.encode(pixels.byte())),
            "as_it_is": count_flops(lambda: vae.encode(pixels[:, :, None])),
        }


def vision_flops(config: Any) -> int:
    """Return the FLOPs of the vision tower on one photograph; `config`: a SiglipVisionConfig."""
    with torch.device("meta"), torch.no_grad():
        tower = AutoModel.from_config(config)
        pixels = torch.empty(1, config.num_channels, config.image_size, config.image_size)
        return count_flops(lambda: tower(pixel_values=pixels))


# ---- the language model


Pairs = dict[str, int]  # by layer type, the number of (query, key) pairs that the mask allows


@dataclass(frozen=True)
class Work:
    """The work of the language model on one packed batch, without padding."""

    tokens: int
    tokens_after: int  # tokens that see a world token, through which the gradient flows
    pairs: Pairs
    pairs_after: Pairs  # with the query among tokens_after
    pairs_within: Pairs  # with query and key among tokens_after
    label_pairs: Pairs  # with a label row as the query
    label_pairs_within: Pairs  # with a label row as the query and the key among tokens_after
    label_rows: int
    worlds: int  # groups of world tokens, one for each image


def work_of(batch: Batch, sliding_window: int) -> Work:
    """Return the work of one batch, counted tree by tree: tokens of different trees never see each other."""
    windows = {"full_attention": None, "sliding_attention": sliding_window}
    tokens = after = 0
    counts: list[Pairs] = [dict.fromkeys(windows, 0) for _ in range(5)]
    for tree in _trees(batch):
        preorder, end = tree["preorder"], tree["subtree_end"]
        world, world_end = preorder[tree["opens"]], end[tree["opens"]]
        trained = ((world <= preorder[:, None]) & (preorder[:, None] < world_end)).any(1)
        tokens += len(preorder)
        after += int(trained.sum())
        for name, window in windows.items():
            seen = _may_see(tree, window)
            own = (
                seen[trained],
                seen[trained][:, trained],
                seen[tree["label"]],
                seen[tree["label"]][:, trained],
            )
            for count, chosen in zip(counts, (seen, *own), strict=True):
                count[name] += int(chosen.sum())
    every, after_pairs, within, label, label_within = counts
    rows, worlds = len(batch.label_rows), len(batch.worlds)
    return Work(tokens, after, every, after_pairs, within, label, label_within, rows, worlds)


def _trees(batch: Batch) -> Iterator[dict[str, Tensor]]:
    """Yield the tokens of each tree in preorder, with the marks `opens` (first world token) and `label` (label row).

    The preorder indices of a row count from 0 without gaps; a tree ends where the subtree of its first token does.
    """
    names = ("preorder", "subtree_end", "bidirectional_group", "position_ids")
    fields = {name: getattr(batch, name) for name in names}
    for name, indices in (("opens", batch.world_slots[:, :1]), ("label", batch.label_rows)):
        marks = torch.zeros(batch.token_ids.numel(), dtype=torch.bool, device=indices.device)
        marks[indices.flatten()] = True
        fields[name] = marks.view_as(batch.token_ids)
    for row in range(len(batch.token_ids)):
        order = batch.preorder[row].argsort()
        order = order[batch.preorder[row][order] >= 0]
        start = 0
        while start < len(order):
            stop = int(batch.subtree_end[row][order[start]])
            yield {name: values[row][order[start:stop]] for name, values in fields.items()}
            start = stop


def _may_see(tree: dict[str, Tensor], window: int | None) -> Tensor:
    """Return for the tokens of one tree whether query sees key, bool[n, n]: the rule of `theworld.models.attention`."""
    preorder, group, position = tree["preorder"], tree["bidirectional_group"], tree["position_ids"]
    seen = (preorder[None] <= preorder[:, None]) & (preorder[:, None] < tree["subtree_end"][None])
    seen |= (group[:, None] >= 0) & (group[:, None] == group[None])
    return seen if window is None else seen & (position[:, None] - position[None] < window)


def decoder_parameters(config: Any) -> int:
    """Return the number of weights in the linear layers of one decoder layer; `config`: a Gemma3TextConfig.

    Queries and output have D x Hh each, keys and values D x Kh each, the gated feed-forward layer 3 x D x F.
    """
    queries = config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    return config.hidden_size * (2 * queries + 2 * keys + 3 * config.intermediate_size)


def language_flops(config: Any, works: Sequence[Work], projection: int = 0) -> dict[str, float]:
    """Return the FLOPs of `forward` and `backward` on all batches. `projection`: those of the projection on one image.

    Forward: 2 x parameters x tokens in the linear layers, 4 Hh for each pair that the mask allows (scores and sums of
    values), and the head at the label rows. The last layer computes only the label rows; of all other tokens it needs
    keys and values alone. Backward: frozen weights have no gradient, so a linear layer costs only that of its input,
    as much as forward, and only for tokens that see a world token. Attention costs 4 Hh for each pair with such a query
    (gradients of scores and queries) and 4 Hh for each pair with such a query and key (of keys and values); recomputed
    scores are not counted. The projection is trained: twice its forward.
    """
    whole = (config.num_hidden_layers - 1) * decoder_parameters(config)
    # weights of keys and values, doubled
    keys = 2 * config.hidden_size * config.num_key_value_heads * config.head_dim
    rest = decoder_parameters(config) - keys
    per_pair = 4 * config.num_attention_heads * config.head_dim
    head = 2 * config.hidden_size * config.vocab_size
    *kinds, last = config.layer_types
    forward = backward = 0.0
    for work in works:
        own = (2 * rest + head) * work.label_rows
        pairs = sum(work.pairs[kind] for kind in kinds) + work.label_pairs[last]
        forward += 2 * (whole + keys) * work.tokens + own + per_pair * pairs + projection * work.worlds
        if not work.tokens_after:
            continue
        pairs = sum(work.pairs_after[kind] + work.pairs_within[kind] for kind in kinds)
        pairs += work.label_pairs[last] + work.label_pairs_within[last]
        backward += (
            2 * (whole + keys) * work.tokens_after + own + per_pair * pairs + 2 * projection * work.worlds
        )
    return {"forward": forward, "backward": backward}


def projection_flops(shape: Any) -> int:
    """Return the FLOPs of the projection on one image: 2 x weights x tokens, also at the borders of a convolution.

    A layer of a transformer has 4 N^2 h more, for attention among the N tokens of a frame. `shape`: a
    `ProjectionShape`.
    """
    first, inner, last = shape.values_per_token, shape.inner, shape.width
    if shape.architecture == "linear":
        return 2 * shape.num_tokens * first * last
    weights = first * inner + inner * last
    if shape.architecture == "conv":
        weights += shape.depth * 9 * inner**2
    if shape.architecture == "transformer":  # attention 4 h^2, feed-forward layer 8 h^2
        weights += shape.depth * (12 * inner**2 + 2 * shape.tokens_per_frame * inner)
    return 2 * shape.num_tokens * weights
