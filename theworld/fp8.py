"""Frozen linear layers in 8 bits: faster on Hopper GPUs, not exact. An option, never the default.

Values are float8 e4m3 (largest 448) with one float32 scale a row of the weight and one a token, chosen from the
largest magnitude in it. The product is accumulated in hardware and comes out in bfloat16. Forward and the gradient
of the input are both in 8 bits; frozen weights have no gradient.

Dimensions: T tokens, I inputs, O outputs.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

LARGEST = 448.0  # of float8 e4m3 (Micikevicius et al. 2022, arXiv 2209.05433)


class Fp8Weight(NamedTuple):
    """A frozen weight in 8 bits, twice: the product needs the summed dimension last."""

    weight: Tensor  # float8_e4m3fn[O, I]
    scale: Tensor  # float32[1, O]
    turned: Tensor  # float8_e4m3fn[I, O]
    turned_scale: Tensor  # float32[1, I]


def quantise(x: Tensor) -> tuple[Tensor, Tensor]:
    """dtype[T, I] -> float8_e4m3fn[T, I] and float32[T, 1], their product being nearly x."""
    scale = x.abs().amax(-1, keepdim=True).float().clamp(min=1e-12) / LARGEST
    return (x.float() / scale).to(torch.float8_e4m3fn), scale


@torch.no_grad()
def to_fp8(weight: Tensor) -> Fp8Weight:
    """dtype[O, I] in 8 bits. ValueError where it does not lie on a GPU that multiplies them (Hopper or newer)."""
    if not weight.is_cuda or torch.cuda.get_device_capability(weight.device) < (9, 0):
        raise ValueError(
            f"fp8 is true, but {weight.device} has no 8-bit products: it takes a Hopper GPU or newer"
        )
    own, scale = quantise(weight)
    turned, turned_scale = quantise(weight.t().contiguous())
    return Fp8Weight(own, scale.t().contiguous(), turned, turned_scale.t().contiguous())


def fp8_linear(x: Tensor, weight: Fp8Weight) -> Tensor:
    """bfloat16[..., I] -> bfloat16[..., O]."""
    return _Fp8Linear.apply(x.flatten(0, -2), *weight).unflatten(0, x.shape[:-1])


class _Fp8Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, scale: Tensor, turned: Tensor, turned_scale: Tensor
    ) -> Tensor:
        ctx.save_for_backward(turned, turned_scale)
        return _product(x, weight, scale)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # type: ignore[override]
        return _product(gradient, *ctx.saved_tensors), None, None, None, None


def _product(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    values, own_scale = quantise(x)
    return torch._scaled_mm(
        values, weight.t(), own_scale, scale, out_dtype=torch.bfloat16, use_fast_accum=True
    )
