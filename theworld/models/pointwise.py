"""RMS norm and rotary positions for a CPU that does not compile, in fewer passes over memory.

Without a compiler autograd writes every step of both to memory, forward and backward, which was a third of a training
step on two cores. These compute the same numbers in the same order, to the last bit (tests/models/test_pointwise.py),
and keep nothing but their input. Nothing that a norm or a rotary table is made of gets a gradient.

Dimensions: R rows of L tokens, H heads, E width of what is normalised or rotated.
"""

from typing import Any

import torch
from torch import Tensor


class RmsNorm(torch.autograd.Function):
    """`theworld.models.decoder.rms_norm` in float32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        """float32[..., E] and float32[E] -> float32[..., E]."""
        scale = 1.0 + weight
        inverse = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + epsilon)  # float32[..., 1]
        ctx.save_for_backward(x, inverse, scale)
        return (x * inverse).mul_(scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        """Return the gradient of the input."""
        x, inverse, scale = ctx.saved_tensors
        grad = grad * scale
        product = grad * x
        of_square = product.sum(-1, keepdim=True) * -0.5 * inverse.pow(3) / x.shape[-1]
        return grad.mul_(inverse).add_(torch.mul(x, 2 * of_square, out=product)), None, None


class Rotary(torch.autograd.Function):
    """`theworld.models.decoder.apply_rotary`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """float32[R, H, L, E], with tables float32[R, 1, L, E] -> float32[R, H, L, E]."""
        ctx.save_for_backward(cos, sin)
        half = x.shape[-1] // 2
        turned = x * cos
        turned[..., :half].sub_(x[..., half:] * sin[..., :half])  # not addcmul_, which rounds once
        turned[..., half:].add_(x[..., :half] * sin[..., half:])
        return turned

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        """Return the gradient of the input: the other way around."""
        cos, sin = ctx.saved_tensors
        half = grad.shape[-1] // 2
        back = grad * cos
        back[..., :half].add_(grad[..., half:] * sin[..., half:])
        back[..., half:].sub_(grad[..., :half] * sin[..., :half])
        return back, None, None
