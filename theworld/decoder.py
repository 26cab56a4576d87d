"""Gemma's frozen decoder over packed rows: what transformers computes, with less work.

Nothing here trains, so a layer is a pure function of its input and fixed weights: matrices that read the same input
are one matrix, nothing is computed for weight gradients, and the last layer goes on with the wanted rows alone. The
functions compile as a whole; all layers share their compiled code, since weights are arguments.

Dimensions: R rows of L tokens, K wanted tokens, D width, H query heads and G key-value heads of E.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention
from torch.utils.checkpoint import checkpoint

from theworld.fp8 import Fp8Weight, fp8_linear, to_fp8
from theworld.gemma import Gemma

Weight = Tensor | Fp8Weight


class Layer(NamedTuple):
    """The weights of one decoder layer; norms are transformers' `weight`, to which 1 is added."""

    before_attention: Tensor
    after_attention: Tensor
    before_mlp: Tensor
    after_mlp: Tensor
    query_norm: Tensor
    key_norm: Tensor
    qkv: Weight  # [(H + 2 G) E, D]
    out: Weight  # [D, H E]
    gate_up: Weight  # [2 F, D]
    down: Weight  # [D, F]


class Shape(NamedTuple):
    """What a layer has to know of the model's config."""

    num_heads: int  # H
    num_key_value_heads: int  # G
    head_width: int  # E
    scale: float
    epsilon: float


class Decoder:
    """Calls the decoder of one Gemma. Its weights stay Gemma's own: views of merged matrices take their place, so
    transformers' own forward goes on working, and there is one copy of them; with `fp8` two more in 8 bits."""

    def __init__(self, gemma: Gemma, compiled: bool = False, fp8: bool = False, checkpointed: bool = False):
        """`compiled`: with torch.compile. `checkpointed`: keep only each layer's input for the backward pass.

        Raises ValueError for a Gemma that computes something else than Gemma 3 does, or for 8 bits without a GPU
        that has them.
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
        )
        self.kinds = list(config.layer_types)
        model = gemma.text_model
        self.layers = [_merged(layer, fp8) for layer in model.layers]
        self._layer, self._last = decoder_layer, last_layer
        if compiled:
            # As a whole or not at all: outside of compiled code flex attention writes out every score.
            self._layer = torch.compile(decoder_layer, fullgraph=True)
            self._last = torch.compile(last_layer, fullgraph=True)
            torch._dynamo.config.recompile_limit = max(32, torch._dynamo.config.recompile_limit)

    def __call__(self, x: Tensor, position_ids: Tensor, masks: dict[str, Any], wanted: Tensor) -> Tensor:
        """Hidden states after the final norm, dtype[K, D], of the tokens whose flat indices are `wanted`, int64[K].

        x: embeddings, dtype[R, L, D]; position_ids: int64[R, L]; masks: see `theworld.masks`, dense ones bool.
        """
        model, flex = self.gemma.text_model, self.gemma.attention == "flex_attention"
        turns = {kind: model.rotary_emb(x, position_ids, kind) for kind in sorted(set(self.kinds))}
        if not flex:  # once for all layers; -inf where a token may not see
            masks = {kind: x.new_zeros(m.shape).masked_fill(~m, -torch.inf) for kind, m in masks.items()}
        for layer, kind in zip(self.layers[:-1], self.kinds[:-1], strict=True):
            x = self._run(self._layer, x, layer, *turns[kind], masks[kind])
        kind = self.kinds[-1]
        x = self._run(self._last, x, self.layers[-1], *turns[kind], masks[kind], wanted)
        return rms_norm(x, model.norm.weight, self.shape.epsilon)

    def _run(self, function: Any, *arguments: Any) -> Tensor:
        if self.checkpointed and torch.is_grad_enabled():
            return checkpoint(function, *arguments, self.shape, use_reentrant=False)
        return function(*arguments, self.shape)


def decoder_layer(x: Tensor, w: Layer, cos: Tensor, sin: Tensor, mask: Any, shape: Shape) -> Tensor:
    """dtype[R, L, D] -> dtype[R, L, D]."""
    attended = attention(rms_norm(x, w.before_attention, shape.epsilon), w, cos, sin, mask, shape)
    return _after_attention(x, attended, w, shape.epsilon)


def last_layer(
    x: Tensor, w: Layer, cos: Tensor, sin: Tensor, mask: Any, wanted: Tensor, shape: Shape
) -> Tensor:
    """dtype[R, L, D] -> dtype[K, D]: nothing reads the other tokens, so most of the layer is for these alone."""
    attended = attention(rms_norm(x, w.before_attention, shape.epsilon), w, cos, sin, mask, shape)
    return _after_attention(x.flatten(0, 1)[wanted], attended.flatten(0, 1)[wanted], w, shape.epsilon)


def _after_attention(x: Tensor, attended: Tensor, w: Layer, epsilon: float) -> Tensor:
    x = x + rms_norm(linear(attended, w.out), w.after_attention, epsilon)
    gate, up = linear(rms_norm(x, w.before_mlp, epsilon), w.gate_up).chunk(2, -1)
    return x + rms_norm(linear(F.gelu(gate, approximate="tanh") * up, w.down), w.after_mlp, epsilon)


def attention(x: Tensor, w: Layer, cos: Tensor, sin: Tensor, mask: Any, shape: Shape) -> Tensor:
    """dtype[R, L, D] -> dtype[R, L, H E]: grouped queries, normalised queries and keys, rotary positions."""
    heads, groups, width, scale, epsilon = shape
    projected = linear(x, w.qkv).unflatten(-1, (-1, width)).transpose(1, 2)  # R, H + 2 G, L, E
    query, key, value = projected.split((heads, groups, groups), 1)
    query = _turn(rms_norm(query, w.query_norm, epsilon), cos, sin)
    key = _turn(rms_norm(key, w.key_norm, epsilon), cos, sin)
    if isinstance(mask, Tensor):
        repeats = heads // groups
        key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)
    else:
        attended = flex_attention(query, key, value, block_mask=mask, scale=scale, enable_gqa=True)
    return attended.transpose(1, 2).flatten(2)


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """Gemma's RMS norm, as transformers rounds it: in float32, times 1 + weight, back to the dtype of x."""
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)
    return (wide * (1.0 + weight.float())).type_as(x)


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions (Su et al. 2021, arXiv 2104.09864), the two halves of a head being the pairs."""
    first, second = x.chunk(2, -1)
    return x * cos[:, None] + torch.cat((-second, first), -1) * sin[:, None]


def linear(x: Tensor, weight: Weight) -> Tensor:
    """x times the transposed weight."""
    return fp8_linear(x, weight) if isinstance(weight, Fp8Weight) else F.linear(x, weight)


def _merged(layer: Any, fp8: bool) -> Layer:
    """A layer's weights with those that read the same input in one matrix; transformers' modules keep views."""
    attention, mlp = layer.self_attn, layer.mlp
    qkv = _one_matrix([attention.q_proj, attention.k_proj, attention.v_proj])
    gate_up = _one_matrix([mlp.gate_proj, mlp.up_proj])
    matrices: Sequence[Any] = (qkv, attention.o_proj.weight, gate_up, mlp.down_proj.weight)
    return Layer(
        layer.input_layernorm.weight,
        layer.post_attention_layernorm.weight,
        layer.pre_feedforward_layernorm.weight,
        layer.post_feedforward_layernorm.weight,
        attention.q_norm.weight,
        attention.k_norm.weight,
        *(to_fp8(m) if fp8 else m for m in matrices),
    )


@torch.no_grad()
def _one_matrix(modules: Sequence[Any]) -> Tensor:
    merged = torch.cat([module.weight for module in modules])
    for module, part in zip(modules, merged.split([len(m.weight) for m in modules]), strict=True):
        module.weight.data = part
    return merged


def _check(config: Any, name: str) -> None:
    """What this file takes for granted of a Gemma 3."""
    wanted = {
        "attention_bias": False,
        "hidden_activation": "gelu_pytorch_tanh",
        "attn_logit_softcapping": None,
        "use_bidirectional_attention": False,
    }
    for key, value in wanted.items():
        found = getattr(config, key, value)
        if found != value:
            raise ValueError(
                f"model_name {name!r}: {key} is {found!r}; this is built for {value!r}, as Gemma 3 has"
            )
