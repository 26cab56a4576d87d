"""Linear layers in 8 bits: how near the values are, and where they are refused. Speed and training: test_cuda."""

import pytest
import torch
import torch.nn.functional as F
from constants import EMBEDDED_GEMMA

from theworld.models.fp8 import gated, linear, quantise, to_fp8
from theworld.models.gemma import Gemma, GemmaParts


def test_every_row_has_its_own_scale_and_comes_back_within_a_sixteenth() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 96, generator=generator) * torch.logspace(-6, 6, 64)[:, None]
    values, scale = quantise(x)
    assert (values.dtype, values.shape, scale.dtype, scale.shape) == (
        torch.float8_e4m3fn,
        (64, 96),
        torch.float32,
        (64, 1),
    )
    back = values.float() * scale
    # e4m3 has three bits behind the leading one: half a step is 1/16 of a normal value, below it 2^-10 of the scale
    assert ((back - x).abs() <= x.abs() / 16 + scale * 2**-10).all()
    torch.testing.assert_close(values.float().abs().amax(1), torch.full((64,), 448.0))


def test_gated_is_that_of_the_model_and_its_gradients_are_those_of_rounded_values() -> None:
    generator = torch.Generator().manual_seed(0)
    gate, up, gradient = (torch.randn(64, 96, generator=generator) * 4 for _ in range(3))
    kept = [quantise(one) for one in (gate, up)]
    rounded = [(values.float() * scale).double().requires_grad_() for values, scale in kept]
    gate.requires_grad_()
    up.requires_grad_()
    found = gated(gate, up)
    exact = F.gelu(gate.double(), approximate="tanh") * up.double()
    torch.testing.assert_close(found, exact.float(), atol=1e-5, rtol=1e-5)
    found.backward(gradient)
    (F.gelu(rounded[0], approximate="tanh") * rounded[1]).backward(gradient.double())
    for one, of_rounded in zip((gate, up), rounded, strict=True):
        assert one.grad is not None
        assert of_rounded.grad is not None
        torch.testing.assert_close(one.grad.double(), of_rounded.grad, atol=1e-4, rtol=1e-5)
    assert gated(gate.bfloat16(), up.bfloat16()).dtype == torch.bfloat16


def test_a_row_of_zeros_stays_zero() -> None:
    values, scale = quantise(torch.zeros(2, 8))
    assert not values.float().any()
    assert torch.isfinite(scale).all()


def relative(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found.float() - exact.float()).norm() / exact.float().norm())


def test_a_product_in_8_bits_and_its_gradient_are_those_of_the_rounded_weight(
    eight_bits_anywhere: None,
) -> None:
    weight, x, gradient = (torch.randn(*size).bfloat16() for size in ((512, 256), (3, 64, 256), (3, 64, 512)))
    rounded = to_fp8(weight)
    used = rounded.weight.float() * rounded.scale.t()
    x.requires_grad_()
    product = linear(x, rounded)
    product.backward(gradient)
    assert product.shape == (3, 64, 512)
    # Rounding x and the gradient alone: three bits behind the leading one.
    assert relative(product.detach(), x.detach().float() @ used.t()) < 0.03
    assert x.grad is not None
    assert relative(x.grad, gradient.float() @ used) < 0.03


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_is_refused_before_weights_load() -> None:
    for weights in (True, False):
        with pytest.raises(ValueError, match="fp8 is true, but cpu has no 8-bit products"):
            Gemma(str(EMBEDDED_GEMMA), fp8=True, weights=weights)
    with pytest.raises(ValueError, match="fp8 is true, but cpu has no 8-bit products: it takes a Hopper GPU"):
        to_fp8(torch.randn(16, 16))


def test_a_language_model_that_was_trained_is_not_in_8_bits() -> None:
    for parts in (("language",), ("lora",)):
        with pytest.raises(ValueError, match=r"the language model trains or was trained, .*use --no-fp8"):
            Gemma(str(EMBEDDED_GEMMA), parts=GemmaParts(parts, (), 2), fp8=True)
