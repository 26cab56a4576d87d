"""Linear layers in 8 bits: how near the values are, and where they are refused. Speed and training: test_cuda."""

import pytest
import torch
import torch.nn.functional as F
from constants import EMBEDDED_GEMMA

from theworld.models.fp8 import LARGEST_SLOPE, Fp8Weight, feed_forward, linear, quantise, to_fp8
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


def test_a_bound_that_is_too_large_costs_no_precision_but_near_zero() -> None:
    x = torch.randn(64, 96, generator=torch.Generator().manual_seed(0))
    largest = x.abs().amax(1, keepdim=True)
    exact, _ = quantise(x, largest)
    assert torch.equal(exact.float(), quantise(x)[0].float())
    for factor in (2, 16):  # powers of two: the same bits behind the leading one
        values, scale = quantise(x, largest * factor)
        back, kept = values.float() * scale, x.abs() > scale * 2**-6  # normal values of e4m3
        assert kept.float().mean() > 0.98
        assert torch.equal((values.float() * factor)[kept], exact.float()[kept])
        assert ((back - x).abs() <= x.abs() / 16 + scale * 2**-10).all()


def test_gelu_has_no_larger_slope() -> None:
    x = torch.linspace(-8, 8, 160_001, dtype=torch.float64, requires_grad=True)
    F.gelu(x, approximate="tanh").sum().backward()
    assert x.grad is not None
    assert 1.128 < x.grad.abs().max() <= LARGEST_SLOPE


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


def used(weight: Fp8Weight) -> torch.Tensor:
    """Return what a weight in 8 bits stands for, float64[O, I]."""
    return weight.weight.double() * weight.scale.t().double()


def test_a_feed_forward_part_in_8_bits_is_nearly_that_of_its_weights(eight_bits_anywhere: None) -> None:
    generator = torch.Generator().manual_seed(0)
    tokens, hidden, inner = 64, 128, 512
    sizes = (tokens, hidden), (tokens, hidden), (inner, hidden), (inner, hidden), (hidden, inner)
    x, gradient, *matrices = (torch.randn(*size, generator=generator).bfloat16() for size in sizes)
    gate, up, down = (to_fp8(matrix * len(matrix) ** -0.5) for matrix in matrices)
    x.requires_grad_()
    found = feed_forward(x, gate, up, down)
    found.backward(gradient)
    assert found.dtype == torch.bfloat16
    given = x.detach().double().requires_grad_()
    exact = (F.gelu(given @ used(gate).t(), approximate="tanh") * (given @ used(up).t())) @ used(down).t()
    exact.backward(gradient.double())
    # Rounding x and what is between the products, each with three bits behind the leading one.
    assert relative(found.detach(), exact.detach()) < 0.06
    assert x.grad is not None
    assert given.grad is not None
    assert relative(x.grad, given.grad) < 0.07


def test_where_all_largest_values_meet_nothing_leaves_the_range_of_8_bits(eight_bits_anywhere: None) -> None:
    """A bound that a value exceeded would make it NaN: here each row's values are as large as its bound says."""
    hidden, inner = 16, 32
    gate, up, down = (
        to_fp8(torch.full(size, 3.0).bfloat16())
        for size in ((inner, hidden), (inner, hidden), (hidden, inner))
    )
    for value in (1e-4, 0.0313, 1.0, 300.0):
        x = torch.full((4, hidden), value).bfloat16().requires_grad_()
        found = feed_forward(x, gate, up, down)
        found.backward(torch.full_like(found, 7.0))
        given = x.detach().double().requires_grad_()
        exact = (F.gelu(given @ used(gate).t(), approximate="tanh") * (given @ used(up).t())) @ used(down).t()
        exact.backward(torch.full_like(exact, 7.0))
        assert x.grad is not None
        assert given.grad is not None
        assert relative(found.detach(), exact.detach()) < 0.05
        assert relative(x.grad, given.grad) < 0.05


@pytest.mark.parametrize(("trains", "rounded"), [(False, 2), (True, 4)])
def test_gate_and_up_are_rounded_only_for_a_backward_pass(
    trains: bool, rounded: int, eight_bits_anywhere: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = [to_fp8(torch.randn(size).bfloat16()) for size in ((64, 32), (64, 32), (32, 64))]
    x = torch.randn(8, 32).bfloat16().requires_grad_(trains)
    calls = []
    monkeypatch.setattr(
        "theworld.models.fp8.quantise", lambda *given: calls.append(given) or quantise(*given)
    )
    assert feed_forward(x, *weights).requires_grad == trains
    assert len(calls) == rounded  # the input and what goes into `down`; and gate and up


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
