"""What a machine can do at best, and how much work each phase is: measured rates and counted operations.

A floor is the counted operations over the measured matrix multiplication rate: no phase can be faster than that on
this machine in this dtype. MFU (model FLOPs utilisation: Chowdhery et al. 2022, arXiv 2204.02311, appendix B) is the
floor over the measured time. One multiplication with its addition counts as two operations, here FLOPs.

Dimensions: T tokens, D width, F width of the feed-forward layer, H heads of size h, K key-value heads.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import WanAttentionBlock
from torch import Tensor, nn

from theworld.models.packing import Batch


def synchronize(device: torch.device) -> None:
    """Waits until the device has done what it was given; a CPU always has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_calls(
    call: Callable[[], Any], device: torch.device, repeats: int, warm_up: int = 1, inner: int = 1
) -> list[float]:
    """Seconds of each of `repeats` measurements of `inner` calls, a call; after `warm_up` calls."""
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
    """The median rate of [size, size] @ [size, size]: 2 size^3 FLOPs each."""
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    seconds = sorted(time_calls(lambda: a @ b, device, repeats, warm_up=3, inner=4))
    return 2 * size**3 / seconds[len(seconds) // 2]


def copy_bytes_per_second(device: torch.device, size: int, repeats: int = 5) -> float:
    """The median rate of copying `size` bytes on the device: each byte is read once and written once."""
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = sorted(time_calls(lambda: target.copy_(source), device, repeats, warm_up=2, inner=4))
    return 2 * size / seconds[len(seconds) // 2]


# ---- the VAE


def vae_encode_flops(vae: Any, size: int) -> dict[str, int]:
    """FLOPs to encode one picture of `size` pixels a side, counted layer by layer on the meta device.

    `frame`: what one frame needs, each causal 3-D convolution as the 2-D one of its last temporal tap.
    `as_it_is`: what diffusers computes, every tap, the zero padding in time too. A convolution is 2 x values out x
    values in each kernel; attention over T = H x W places of D channels is 4 T^2 D. Sampling, norms and activations
    are left out. `vae`: an `AutoencoderKLWan`, which is emptied of its weights by this.
    """
    counted = {"frame": 0, "as_it_is": 0}

    def convolution(module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        taps = module.kernel_size[0] if isinstance(module, nn.Conv3d) else 1
        flops = 2 * output.numel() * module.weight[0].numel()
        counted["as_it_is"] += flops
        counted["frame"] += flops // taps

    def attention(module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        flops = 4 * (output.shape[-1] * output.shape[-2]) ** 2 * output.shape[1]
        counted["as_it_is"] += flops
        counted["frame"] += flops

    vae = vae.to("meta")
    dtype = next(vae.parameters()).dtype
    hooks = [
        m.register_forward_hook(convolution) for m in vae.modules() if isinstance(m, nn.Conv2d | nn.Conv3d)
    ]
    hooks += [m.register_forward_hook(attention) for m in vae.modules() if isinstance(m, WanAttentionBlock)]
    with torch.no_grad():
        vae.encode(torch.empty(1, 3, 1, size, size, device="meta", dtype=dtype))
    for hook in hooks:
        hook.remove()
    return counted


# ---- SigLIP


def vision_flops(config: Any) -> int:
    """FLOPs of the vision tower on one photograph; `config`: a SiglipVisionConfig.

    T = (image / patch)^2 tokens; the patch embedding is 2 T D x 3 patch^2; a layer's linears are
    2 T (4 D^2 + 2 D F), its attention 4 T^2 D.
    """
    tokens = (config.image_size // config.patch_size) ** 2
    width, inner = config.hidden_size, config.intermediate_size
    embedding = 2 * tokens * width * config.num_channels * config.patch_size**2
    layer = 2 * tokens * (4 * width**2 + 2 * width * inner) + 4 * tokens**2 * width
    return embedding + config.num_hidden_layers * layer


# ---- the language model


Pairs = dict[str, int]  # by layer type: (query, key) that the mask allows


@dataclass(frozen=True)
class Work:
    """What one packed batch asks of the language model; padding is not asked for."""

    tokens: int
    tokens_after: int  # that see something trained: what the gradient runs through
    pairs: Pairs
    pairs_after: Pairs  # with the query among tokens_after
    pairs_within: Pairs  # with query and key among tokens_after
    label_pairs: Pairs  # with a label row as the query
    label_pairs_within: Pairs  # with a label row as the query and the key among tokens_after
    label_rows: int
    worlds: int  # blocks of world tokens


def work_of(batch: Batch, sliding_window: int) -> Work:
    """Counts one batch, tree by tree: tokens of different trees never see each other."""
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
    """The tokens of each tree in preorder, with marks: `opens` a world, is a `label` row. A row's preorder indices
    count from 0 without gaps, and a tree ends where the subtree of its first token does."""
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
    """bool[n, n] over the tokens of one tree: may query see key? The rule of `theworld.models.attention`."""
    preorder, group, position = tree["preorder"], tree["bidirectional_group"], tree["position_ids"]
    seen = (preorder[None] <= preorder[:, None]) & (preorder[:, None] < tree["subtree_end"][None])
    seen |= (group[:, None] >= 0) & (group[:, None] == group[None])
    return seen if window is None else seen & (position[:, None] - position[None] < window)


def decoder_parameters(config: Any) -> int:
    """Weights in the linear layers of one decoder layer: queries and output D x Hh each, keys and values D x Kh each,
    three of the gated feed-forward D x F. `config`: a Gemma3TextConfig."""
    queries = config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    return config.hidden_size * (2 * queries + 2 * keys + 3 * config.intermediate_size)


def language_flops(config: Any, works: Sequence[Work], projection: int = 0) -> dict[str, float]:
    """FLOPs of `forward` and `backward` on these batches together. `projection`: FLOPs of the projection on one image.

    Forward: 2 x parameters x tokens in the linears, 4 Hh a pair that the mask allows (scores and sums of values), the
    head at the label rows. Of the last layer only the label rows are wanted: all tokens need its keys and values
    alone. Backward: frozen weights need no gradient of their own, so a linear costs only its input's, the same again,
    and only for tokens that see a world token; attention costs 4 Hh a pair of such a query (of the scores and of the
    query) and 4 Hh a pair of such a query and key (of keys and values); recomputing scores, as fused kernels do, is
    not counted. The projection trains: twice its forward.
    """
    whole = (config.num_hidden_layers - 1) * decoder_parameters(config)
    keys = (
        2 * config.hidden_size * config.num_key_value_heads * config.head_dim
    )  # of the last layer, with values
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
    """FLOPs of the projection on one image: 2 x weights x tokens, a convolution at its borders too; in a transformer's
    layer 4 N^2 h more, for attention among the N tokens of a moment. `shape`: a `ProjectionShape`."""
    first, inner, last = shape.values_per_token, shape.inner, shape.width
    if shape.architecture == "linear":
        return 2 * shape.num_tokens * first * last
    weights = first * inner + inner * last
    if shape.architecture == "conv":
        weights += shape.depth * 9 * inner**2
    if shape.architecture == "transformer":  # of attention 4 h^2 and of the feed-forward layer 8 h^2
        weights += shape.depth * (12 * inner**2 + 2 * shape.tokens_per_frame * inner)
    return 2 * shape.num_tokens * weights
