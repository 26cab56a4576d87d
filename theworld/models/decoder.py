"""Gemma's decoder over packed rows, which computes what transformers computes, with less work where Gemma is frozen.

In `Decoder` nothing trains, so a layer is a pure function of its input and fixed weights: queries, keys and values come
from one matrix, nothing is computed for weight gradients, and the last layer goes on with the wanted rows alone. The
functions compile as a whole; all layers share their compiled code, since weights are arguments. `HFDecoder` calls
transformers' own layers, for a language model that trains or has LoRA matrices.

Dimensions: R rows of L tokens, K wanted tokens, D width, H query heads and G key-value heads of E.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint

from theworld.models.attention import attention_masks, block_mask, prepare_masks, seen_by
from theworld.models.fp8 import Weight, feed_forward, linear
from theworld.models.gemma import Gemma
from theworld.models.packing import Batch
from theworld.models.pointwise import RmsNorm, Rotary

# dense and flex masks, with gradients and without, with a prefix, fixed and changing lengths
RECOMPILE_LIMIT = 32


# Options of flex attention in bfloat16 on a Hopper GPU at Gemma's heads of 256, the fastest that were tried
# (RESULTS.md). With its own choice of 4 warps the gradients of keys and values do not fit into registers.
HOPPER_KERNELS = {
    **{"fwd_BLOCK_M": 64, "fwd_BLOCK_N": 64, "fwd_num_stages": 3, "fwd_num_warps": 4},
    **{"bwd_BLOCK_M1": 64, "bwd_BLOCK_N1": 64, "bwd_BLOCK_M2": 64, "bwd_BLOCK_N2": 64},
    **{"bwd_num_stages": 2, "bwd_num_warps": 8},
}


class Layer(NamedTuple):
    """The weights of one decoder layer. Those of norms are transformers' `weight`, to which 1 is added."""

    before_attention: Tensor
    after_attention: Tensor
    before_mlp: Tensor
    after_mlp: Tensor
    query_norm: Tensor
    key_norm: Tensor
    qkv: Weight  # [(H + 2 G) E, D]
    out: Weight  # [D, H E]
    gate: Weight  # [F, D]
    up: Weight  # [F, D]
    down: Weight  # [D, F]


class Shape(NamedTuple):
    """The values of the model's config that a layer needs."""

    num_heads: int  # H
    num_key_value_heads: int  # G
    head_width: int  # E
    scale: float
    epsilon: float
    kernel_options: tuple[tuple[str, int], ...]  # of flex attention


class Decoder:
    """The decoder of a frozen Gemma. Its weights are Gemma's own, without a copy, and in as many bits."""

    def __init__(self, gemma: Gemma, compiled: bool = False, checkpointed: bool = False) -> None:
        """`compiled`: use torch.compile. `checkpointed`: keep only each layer's input for the backward pass.

        Raises ValueError for a Gemma that computes something else than Gemma 3 does.
        """
        config = gemma.text_config
        _check(config, gemma.name)
        self.gemma, self.checkpointed = gemma, checkpointed
        self.shape = Shape(
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
            config.query_pre_attn_scalar**-0.5,
            config.rms_norm_eps,
            _kernel_options(config.head_dim, gemma),
        )
        self.kinds = list(config.layer_types)
        layers = zip(gemma.text_model.layers, gemma.qkv, strict=True)
        self.layers = [_layer(layer, qkv) for layer, qkv in layers]
        self.compiled = compiled
        self.functions: dict[Any, Any] = {f: _compile(f) if compiled else f for f in WITH_GRADIENT}
        self.with_gradients = set[Any]()  # functions that were compiled for a backward pass

    def __call__(self, x: Tensor, batch: Batch, wanted: Tensor) -> Tensor:
        """Return the hidden states after the final norm of some tokens, dtype[K, D].

        `x`, dtype[R, L, D], are the embeddings and `wanted`, int64[K], flat indices of tokens. The tokens of the prefix
        (see `Batch`) take part, but have no gradient and cannot be wanted.
        """
        with enough_graphs() if self.compiled else nullcontext():
            x = self._layers(x, batch, wanted)
        return rms_norm(x, self.gemma.text_model.norm.weight, self.shape.epsilon)

    def _layers(self, x: Tensor, batch: Batch, wanted: Tensor) -> Tensor:
        """Return what the last layer gives for the wanted tokens, dtype[K, D]."""
        length, start = x.shape[1], batch.num_prefix_tokens
        wanted = wanted - (wanted // length + 1) * start  # counted without the prefix
        chosen = [*[None] * (len(self.layers) - 1), wanted]
        layers = zip(self.layers, self.kinds, chosen, strict=True)
        masks = self._masks(x[:, start:], batch, (start, length))
        # Whole tensors, as the layers return them: views would compile once more.
        if not start:
            x = x.flatten(0, 1).clone()
            for weights, kind, rows in layers:
                x = self._checkpointed(self._layer, x, weights, *masks[kind], rows)
        else:
            masks0 = self._masks(x, batch, (0, start))
            prefix, x = x[:, :start].detach().flatten(0, 1).clone(), x[:, start:].flatten(0, 1).clone()
            for weights, kind, rows in layers:
                own = *masks0[kind], *masks[kind]
                prefix, x = self._checkpointed(self._layer_after_prefix, prefix, x, weights, *own, rows)
        return x

    def _layer(
        self, x: Tensor, w: Layer, cos: Tensor, sin: Tensor, mask: Any, wanted: Tensor | None
    ) -> Tensor:
        """dtype[R L, D] -> the same; for the last layer dtype[K, D], since nothing reads the other tokens."""
        if wanted is None:
            return self._run(layer, x, w, cos, sin, mask)
        query, key, value = self._run(project_qkv, x, w, cos, sin)
        # So few tokens that they take no longer without being compiled, which itself takes seconds.
        attended = attention_of(wanted, query, key, value, mask, self.shape)
        return after_attention(x[wanted], attended, w, self.shape)

    def _layer_after_prefix(
        self, prefix: Tensor, x: Tensor, w: Layer, cos0: Tensor, sin0: Tensor, mask0: Any, cos: Tensor, sin: Tensor,
        mask: Any, wanted: Tensor | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """The same for a prefix, dtype[R start, D], and for the rest of the rows."""
        if wanted is None:
            return self._run(layer_after_prefix, prefix, x, w, cos0, sin0, mask0, cos, sin, mask)
        query, key, value = self._run(project_qkv, x, w, cos, sin)
        _, key0, value0 = self._run(project_qkv, prefix, w, cos0, sin0)
        key, value = torch.cat((key0, key), 2), torch.cat((value0, value), 2)
        attended = attention_of(wanted, query, key, value, mask, self.shape)
        return prefix, after_attention(x[wanted], attended, w, self.shape)

    def _checkpointed(self, function: Any, *arguments: Any) -> Any:
        if self.checkpointed and torch.is_grad_enabled():
            return checkpoint(function, *arguments, use_reentrant=False)
        return function(*arguments)

    def _masks(
        self, x: Tensor, batch: Batch, queries: tuple[int, int]
    ) -> dict[str, tuple[Tensor, Tensor, Any]]:
        """Return by kind of layer cos, sin and mask of the columns in `x`; dense masks are added to the scores."""
        rotary = self.gemma.text_model.rotary_emb
        positions = batch.position_ids[:, slice(*queries)]
        if self.gemma.attention == "flex_attention":
            if batch.masks is None:
                batch = prepare_masks(batch, self.gemma.sliding_window)
            masks = batch.masks[queries]
        else:
            seen = attention_masks(batch, self.gemma.sliding_window, "sdpa", queries)
            masks = {k: x.new_zeros(m.shape).masked_fill(~m, -torch.inf) for k, m in seen.items()}
        return {kind: (*rotary(x, positions, kind), masks[kind]) for kind in sorted(set(self.kinds))}

    def _run(self, function: Any, *arguments: Any) -> Any:
        if self.compiled:
            if any(arguments[at].requires_grad for at in WITH_GRADIENT[function]):
                self.with_gradients.add(function)
            elif function in self.with_gradients:
                return self._run_as_in_training(function, *arguments)
            mark_lengths_dynamic(*arguments)
        return self.functions[function](*arguments, self.shape)

    def _run_as_in_training(self, function: Any, *arguments: Any) -> Any:
        """Run without gradients what was compiled with them: a run that evaluates compiles nothing. What a backward
        pass would need is kept for one layer at a time."""
        given = list(arguments)
        with torch.enable_grad():
            for at in WITH_GRADIENT[function]:
                given[at] = given[at].detach().requires_grad_()
            found = self._run(function, *given)
        return tree_map_only(Tensor, Tensor.detach, found)


class HFDecoder:
    """transformers' own decoder over packed rows, for a language model that trains or has LoRA matrices beside it."""

    def __init__(self, gemma: Gemma) -> None:
        self.gemma = gemma

    def __call__(self, x: Tensor, batch: Batch, wanted: Tensor) -> Tensor:
        """Return hidden states as `Decoder` does; there is no prefix."""
        assert not batch.num_prefix_tokens, "every token depends on weights that train"
        masks = attention_masks(batch, self.gemma.sliding_window, "sdpa")
        options = {"position_ids": batch.position_ids, "use_cache": False}
        with self.gemma.computing():
            output = self.gemma.text_model(inputs_embeds=x, attention_mask=masks, **options)
        return output.last_hidden_state.flatten(0, 1)[wanted].to(self.gemma.dtype)


def mark_lengths_dynamic(*arguments: Any) -> None:
    """Mark the sizes of a layer's arguments that differ from batch to batch, for torch.compile: all sizes of rows,
    rotary tables, masks and wanted tokens, except widths. Without marks the first batch compiles for its own lengths
    alone, and the second once more for all."""
    for value in arguments:
        if isinstance(value, Layer | Shape):
            continue
        if not isinstance(value, Tensor):
            mark_lengths_dynamic(*value)
        elif not hasattr(value, "_dynamo_weak_dynamic_indices"):  # a mask serves many layers
            has_width = value.is_floating_point() and value.ndim in (2, 3)
            lengths = range(value.ndim - has_width)
            torch._dynamo.maybe_mark_dynamic(value, [d for d in lengths if value.shape[d] > 1])


def layer(x: Tensor, w: Layer, cos: Tensor, sin: Tensor, mask: Any, shape: Shape) -> Tensor:
    """dtype[R L, D] -> the same."""
    attended = attention(*project_qkv(x, w, cos, sin, shape), mask, shape)
    return after_attention(x, attended, w, shape)


def layer_after_prefix(
    prefix: Tensor, x: Tensor, w: Layer, cos0: Tensor, sin0: Tensor, mask0: Any, cos: Tensor, sin: Tensor, mask: Any,
    shape: Shape,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The same as `layer` of the prefix of rows, dtype[R start, D], which has no gradient and sees nothing of the rest,
    and of the rest."""
    query0, key0, value0 = project_qkv(prefix, w, cos0, sin0, shape)
    query, key, value = project_qkv(x, w, cos, sin, shape)
    attended0 = attention(query0, key0, value0, mask0, shape)
    attended = attention(query, torch.cat((key0, key), 2), torch.cat((value0, value), 2), mask, shape)
    return after_attention(prefix, attended0, w, shape), after_attention(x, attended, w, shape)


def after_attention(x: Tensor, attended: Tensor, w: Layer, shape: Shape) -> Tensor:
    """dtype[T, D] and attention's output, dtype[T, H E], of any T tokens -> dtype[T, D]."""
    x = x + rms_norm(linear(attended, w.out), w.after_attention, shape.epsilon)
    fed = feed_forward(rms_norm(x, w.before_mlp, shape.epsilon), w.gate, w.up, w.down)
    return x + rms_norm(fed, w.after_mlp, shape.epsilon)


def project_qkv(x: Tensor, w: Layer, cos: Tensor, sin: Tensor, shape: Shape) -> tuple[Tensor, Tensor, Tensor]:
    """dtype[R L, D] -> queries, dtype[R, H, L, E], keys and values, dtype[R, G, L, E]; the first two normalised and
    rotated."""
    heads, groups, width, _, epsilon, _ = shape
    projected = linear(rms_norm(x, w.before_attention, epsilon), w.qkv)
    projected = projected.view(*cos.shape[:2], -1, width).transpose(1, 2)  # R, H + 2 G, L, E
    query, key, value = projected.split((heads, groups, groups), 1)
    query = _computed_again(normed_and_rotated, query, w.query_norm, cos, sin, epsilon)
    return query, _computed_again(normed_and_rotated, key, w.key_norm, cos, sin, epsilon), value


def normed_and_rotated(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, epsilon: float) -> Tensor:
    """Return queries or keys as attention takes them, in the shape of `x`, dtype[R, heads, L, E]."""
    return apply_rotary(rms_norm(x, weight, epsilon), cos, sin)


def _computed_again(function: Callable[..., Tensor], *arguments: Any) -> Tensor:
    """Call a cheap function with a large result, which compiled code computes again in the backward pass and does not
    keep. Code that is not compiled keeps it, since every operation takes time of its own there."""
    if torch.compiler.is_compiling():
        return checkpoint(function, *arguments, use_reentrant=False)  # type: ignore[no-any-return]
    return function(*arguments)


def attention(query: Tensor, key: Tensor, value: Tensor, mask: Any, shape: Shape) -> Tensor:
    """Return attention's output, dtype[R Q, H E]; H / G queries share a key."""
    if isinstance(mask, Tensor):
        repeats = shape.num_heads // shape.num_key_value_heads
        key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=shape.scale)
    else:
        options: Any = dict(shape.kernel_options)
        mask = block_mask(mask, query.shape[2], key.shape[2])
        attended = flex_attention(
            query, key, value, block_mask=mask, scale=shape.scale, enable_gqa=True, kernel_options=options
        )
    return attended.transpose(1, 2).reshape(-1, query.shape[1] * query.shape[3])


def attention_of(
    wanted: Tensor, query: Tensor, key: Tensor, value: Tensor, mask: Any, shape: Shape
) -> Tensor:
    """Return attention's output for some queries, flat indices int64[K]: dtype[K, H E].

    With a mask of blocks all scores are computed explicitly, in float32. torch's own attention would call cuDNN, which
    builds a plan for each new number of keys while the host waits.
    """
    if isinstance(mask, Tensor):
        return attention(query, key, value, mask, shape)[wanted]
    groups = shape.num_key_value_heads
    chosen = query.transpose(1, 2).flatten(0, 1)[wanted]  # K, H, E
    chosen = chosen.unflatten(1, (groups, -1)).permute(1, 2, 0, 3)  # G, H / G, K, E
    keys, values = (one.transpose(0, 1).flatten(1, 2).float() for one in (key, value))  # G, R L, E
    scores = (chosen.float().flatten(1, 2) @ keys.mT * shape.scale).unflatten(1, chosen.shape[1:3])
    shares = scores.masked_fill(~seen_by(wanted, mask.rule), -torch.inf).softmax(-1)  # G, H / G, K, R L
    attended = (shares.flatten(1, 2) @ values).unflatten(1, chosen.shape[1:3])
    return attended.permute(2, 0, 1, 3).flatten(1).to(query.dtype)


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """Gemma's RMS norm, as transformers rounds it: in float32, times 1 + weight, back to the dtype of x."""
    if _fewer_passes(x):
        return RmsNorm.apply(x, x, weight, epsilon)
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)
    return (wide * (1.0 + weight.float())).type_as(x)


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply rotary positions (Su et al. 2021, arXiv 2104.09864), whose pairs are the two halves of a head."""
    if _fewer_passes(x):
        return Rotary.apply(x, cos[:, None], sin[:, None])
    first, second = x.chunk(2, -1)
    return x * cos[:, None] + torch.cat((-second, first), -1) * sin[:, None]


# What is compiled, and which of its arguments have a gradient.
WITH_GRADIENT: dict[Callable[..., Any], tuple[int, ...]] = {
    layer: (0,),
    layer_after_prefix: (1,),
    project_qkv: (0,),
}


def _fewer_passes(x: Tensor) -> bool:
    """Return whether `theworld.models.pointwise` computes the same: in float32 on a CPU, where nothing is compiled."""
    return x.device.type == "cpu" and x.dtype == torch.float32 and not torch.compiler.is_compiling()


def _kernel_options(head_width: int, gemma: Gemma) -> tuple[tuple[str, int], ...]:
    """Return options of flex attention, or none, and it chooses for itself. In float32 these would not fit."""
    if gemma.device.type != "cuda":
        return ()
    hopper = torch.cuda.get_device_capability(gemma.device)[0] == 9
    known = hopper and head_width == 256 and gemma.dtype == torch.bfloat16
    # Rows are whole blocks (`ROW_MULTIPLE`), which code for lengths that vary cannot know: it would check every load.
    return (("IS_DIVISIBLE", True), *(HOPPER_KERNELS.items() if known else ()))


def _compile(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a layer function as a whole: outside of compiled code flex attention writes out every score."""
    return torch.compile(function, fullgraph=True)


def enough_graphs() -> AbstractContextManager[None]:
    """Let the functions compile as often as they need within the block."""
    config = torch._dynamo.config
    return config.patch(recompile_limit=max(RECOMPILE_LIMIT, config.recompile_limit))


def _layer(layer: Any, qkv: Weight) -> Layer:
    """Return the weights of a layer of transformers; `qkv` are those of its queries, keys and values.

    Gate and up stay two matrices: the gradients of both halves would have to be put side by side for the product that
    follows, which costs more than one large product saves over two.
    """
    attention, mlp = layer.self_attn, layer.mlp
    return Layer(
        layer.input_layernorm.weight,
        layer.post_attention_layernorm.weight,
        layer.pre_feedforward_layernorm.weight,
        layer.post_feedforward_layernorm.weight,
        attention.q_norm.weight,
        attention.k_norm.weight,
        qkv,
        attention.o_proj.weight,
        mlp.gate_proj.weight,
        mlp.up_proj.weight,
        mlp.down_proj.weight,
    )


def _check(config: Any, name: str) -> None:
    """Raise ValueError unless a config has the fields and values of a Gemma 3 that this file relies on."""
    required = {
        "attention_bias": False,
        "hidden_activation": "gelu_pytorch_tanh",
        "attn_logit_softcapping": None,
        "use_bidirectional_attention": False,
    }
    sizes = "num_attention_heads num_key_value_heads head_dim query_pre_attn_scalar rms_norm_eps layer_types".split()
    missing = [key for key in (*required, *sizes) if not hasattr(config, key)]
    if missing:
        raise ValueError(f"model_name {name!r}: its config has no {', '.join(missing)}, which Gemma 3 has")
    for key, value in required.items():
        found = getattr(config, key)
        if found != value:
            raise ValueError(
                f"model_name {name!r}: {key} is {found!r}; this is built for {value!r}, as Gemma 3 has"
            )
