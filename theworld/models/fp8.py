"""Frozen linear layers in 8 bits: faster on Hopper GPUs, not exact.

Values are float8 e4m3 (largest 448) with one float32 scale a row of the weight and one a token, chosen from the largest
magnitude in it or a bound of that. The product is accumulated in hardware and comes out in bfloat16. Forward and the
gradient of the input are both in 8 bits.

Dimensions: T tokens, I inputs, O outputs; D the width of the model, F that between gate, up and down.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LARGEST = 448.0  # of float8 e4m3 (Micikevicius et al. 2022, arXiv 2209.05433)
FP8_CAPABILITY = (9, 0)  # Hopper


class Fp8Weight(NamedTuple):
    """A frozen weight in 8 bits."""

    weight: Tensor  # float8_e4m3fn[O, I]
    scale: Tensor  # float32[1, O]
    # What follows from these two, kept since computing it would be a kernel for each product:
    ones: Tensor  # float32[1, I]: the scale of its columns
    largest_scale: Tensor  # float32[1, 1]


def check_fp8(device: torch.device) -> None:
    """Raise ValueError unless a device is a GPU with 8-bit products (Hopper or newer)."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < FP8_CAPABILITY:
        raise ValueError(f"fp8 is true, but {device} has no 8-bit products: it takes a Hopper GPU or newer")


def largest_of(x: Tensor) -> Tensor:
    """dtype[T, I] -> float32[T, 1], the largest magnitude in each row."""
    return x.abs().amax(-1, keepdim=True).float()


def quantise(x: Tensor, largest: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """dtype[T, I] -> float8_e4m3fn[T, I] and float32[T, 1], their product being nearly x.

    `largest`, float32[T, 1]: a magnitude that no value of the row exceeds; by default the largest in it. A bound that
    is some powers of two too large costs precision in the values next to zero alone, since these are floats.
    """
    scale = (largest_of(x) if largest is None else largest).clamp(min=1e-12) / LARGEST
    return (x.float() * scale.reciprocal()).to(torch.float8_e4m3fn), scale  # a division a row, not a value


@torch.no_grad()
def to_fp8(weight: Tensor) -> Fp8Weight:
    """Return dtype[O, I] in 8 bits. Raises ValueError as `check_fp8` does."""
    check_fp8(weight.device)
    values, scale = quantise(weight)
    return _fp8_weight(values, scale.t().contiguous(), scale.new_ones(1, weight.shape[1]))


def _fp8_weight(values: Tensor, scale: Tensor, ones: Tensor) -> Fp8Weight:
    return Fp8Weight(values, scale, ones, scale.amax(1, keepdim=True))


def fp8_linear(x: Tensor, weight: Fp8Weight) -> Tensor:
    """bfloat16[..., I] -> bfloat16[..., O]."""
    return _Fp8Linear.apply(x.flatten(0, -2), *weight[:3]).unflatten(0, x.shape[:-1])


class Fp8Linear(nn.Module):
    """A frozen linear layer in 8 bits."""

    def __init__(self, weight: Fp8Weight) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, x: Tensor) -> Tensor:
        """bfloat16[..., I] -> bfloat16[..., O]."""
        return fp8_linear(x, self.weight)

    def split(self, sizes: Sequence[int]) -> "list[Fp8Linear]":
        """Return layers over the same memory that have so many of the outputs each."""
        whole = self.weight
        parts = zip(whole.weight.split(sizes), whole.scale.split(sizes, 1), strict=True)
        return [Fp8Linear(_fp8_weight(*part, whole.ones)) for part in parts]


class _Fp8Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, scale: Tensor, ones: Tensor) -> Tensor:
        ctx.save_for_backward(weight, scale, ones)
        return _product(x, weight.t(), scale)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # type: ignore[override]
        weight, scale, ones = ctx.saved_tensors
        return _product(gradient * scale, _turned(weight, gradient), ones), None, None, None


def _turned(weight: Tensor, gradient: Tensor) -> Tensor:
    """Return a weight column by column, as a product wants it, in a copy for the moment: copies of all weights would
    take as much memory as the weights."""
    # Zero, but compiled code cannot know: without a part of the gradient in it, the copy would be made in the forward
    # pass, and kept.
    zero = (gradient[:1, :1].abs() < 0).to(torch.uint8)
    return (weight.view(torch.uint8) + zero).t().contiguous().view(weight.dtype).t()


def _product(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """[T, S], float8_e4m3fn[S, R] stored column by column, and float32[1, R] -> bfloat16[T, R]."""
    return _multiply(*quantise(x), weight, scale)


def _multiply(values: Tensor, own_scale: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """The same of values in 8 bits, float8_e4m3fn[T, S], and their scale, float32[T, 1]."""
    return torch._scaled_mm(values, weight, own_scale, scale, out_dtype=torch.bfloat16, use_fast_accum=True)


def fp8_feed_forward(x: Tensor, gate: Fp8Weight, up: Fp8Weight, down: Fp8Weight) -> Tensor:
    """Return the feed-forward part of a decoder layer, bfloat16[T, D] -> bfloat16[T, D].

    The element-wise kernels between the products are limited by arithmetic. So the scale of a row of GELU(gate) * up,
    and of its gradients, is not its largest value, for which each value would be computed twice, but a bound: the
    product of the largest magnitudes of the factors. For the backward pass gate and up are kept in 8 bits; in 16 they
    would be more than half of what a layer keeps. RESULTS.md has the error of both.
    """
    return _Fp8FeedForward.apply(x, *gate, *up, *down)


class _Fp8FeedForward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *weights: Tensor) -> Tensor:
        gate_weight, up_weight, down_weight = _three(weights)
        values = quantise(x)
        gate = _multiply(*values, gate_weight.weight.t(), gate_weight.scale)
        up = _multiply(*values, up_weight.weight.t(), up_weight.scale)
        largest_gate, largest_up = largest_of(gate), largest_of(up)
        if ctx.needs_input_grad[0]:
            (gate8, gate_scale), (up8, up_scale) = quantise(gate, largest_gate), quantise(up, largest_up)
            ctx.save_for_backward(_bytes_to_keep(gate8), gate_scale, _bytes_to_keep(up8), up_scale, *weights)
        wide = gate.float()
        inner = wide * _gelu_factor(wide) * up.float()  # at most |gate| |up|
        return _multiply(
            *quantise(inner, largest_gate * largest_up), down_weight.weight.t(), down_weight.scale
        )

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # type: ignore[override]
        gate8, gate_scale, up8, up_scale, *weights = ctx.saved_tensors
        gate_weight, up_weight, down_weight = _three(weights)
        turned = _turned(down_weight.weight, gradient)
        of_inner = _product(
            gradient * down_weight.scale, turned, down_weight.ones
        )  # gradients of inner, gate, up
        gate = gate8.view(torch.float8_e4m3fn).float() * gate_scale
        up = up8.view(torch.float8_e4m3fn).float() * up_scale
        factor, wide, largest = _gelu_factor(gate), of_inner.float(), largest_of(of_inner) * LARGEST
        slope = factor + factor * (1 - factor) * gate * GELU_SCALE * (1 + 3 * GELU_CUBE * gate * gate)
        of_gate = quantise(
            wide * up * slope * gate_weight.scale,
            largest * up_scale * LARGEST_SLOPE * gate_weight.largest_scale,
        )
        of_up = quantise(
            wide * gate * factor * up_weight.scale, largest * gate_scale * up_weight.largest_scale
        )
        by_gate = _multiply(*of_gate, _turned(gate_weight.weight, gradient), gate_weight.ones)
        by_up = _multiply(*of_up, _turned(up_weight.weight, gradient), up_weight.ones)
        return by_gate + by_up, *[None] * len(weights)


def _three(tensors: Sequence[Tensor]) -> tuple[Fp8Weight, Fp8Weight, Fp8Weight]:
    """Return three weights from their tensors: an autograd function takes and keeps tensors alone."""
    count = len(Fp8Weight._fields)
    gate, up, down = (Fp8Weight(*tensors[i : i + count]) for i in range(0, 3 * count, count))
    return gate, up, down


def _bytes_to_keep(values: Tensor) -> Tensor:
    """float8_e4m3fn[T, F] -> its bytes, uint8[T, F], which compiled code keeps for the backward pass.

    Rounding is cheap, so torch's compiler would keep the 16 bits instead and round them again. The result of a flip it
    always keeps, and a flip along a dimension of size 1 moves nothing.
    """
    return values.view(torch.uint8)[None].flip(0)[0]


GELU_SCALE = 2 * math.sqrt(2 / math.pi)
GELU_CUBE = 0.044715  # Hendrycks and Gimpel 2016, arXiv 1606.08415
LARGEST_SLOPE = 1.13  # of GELU: 1.12899, at 1.4185


def _gelu_factor(x: Tensor) -> Tensor:
    """Return what transformers' "gelu_pytorch_tanh" multiplies x by, within rounding.

    (1 + tanh(a)) / 2 is sigmoid(2 a), whose exponential takes a GPU less than tanh does; beside 8 bits that bounds the
    kernel.
    """
    return torch.sigmoid(GELU_SCALE * (x + GELU_CUBE * x * x * x))


Weight = Tensor | Fp8Weight


def linear(x: Tensor, weight: Weight) -> Tensor:
    """Return x times the transposed weight."""
    return fp8_linear(x, weight) if isinstance(weight, Fp8Weight) else F.linear(x, weight)


def feed_forward(x: Tensor, gate: Weight, up: Weight, down: Weight) -> Tensor:
    """Return the feed-forward part of a decoder layer, dtype[T, D] -> dtype[T, D]."""
    if isinstance(gate, Fp8Weight) and isinstance(up, Fp8Weight) and isinstance(down, Fp8Weight):
        return fp8_feed_forward(x, gate, up, down)
    return linear(F.gelu(linear(x, gate), approximate="tanh") * linear(x, up), down)


def convert_layer(layer: Any, qkv: Tensor) -> Fp8Weight:
    """Put linear layers in 8 bits in the place of a transformers decoder layer's own, whose weights are freed by that.

    `qkv` is the merged matrix of the layer's queries, keys and values; return the same in 8 bits.
    """
    attention, mlp = layer.self_attn, layer.mlp
    names = ("q_proj", "k_proj", "v_proj")
    merged = Fp8Linear(to_fp8(qkv))
    sizes = [getattr(attention, name).out_features for name in names]
    for name, part in zip(names, merged.split(sizes), strict=True):
        setattr(attention, name, part)
    attention.o_proj = Fp8Linear(to_fp8(attention.o_proj.weight))
    for name in ("gate_proj", "up_proj", "down_proj"):
        setattr(mlp, name, Fp8Linear(to_fp8(getattr(mlp, name).weight)))
    return merged.weight
