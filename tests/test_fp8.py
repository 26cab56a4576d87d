"""Linear layers in 8 bits: how near the values are, and where they are refused. Speed and training: test_cuda."""

import pytest
import torch

from theworld.fp8 import quantise, to_fp8


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


def test_a_row_of_zeros_stays_zero() -> None:
    values, scale = quantise(torch.zeros(2, 8))
    assert not values.float().any()
    assert torch.isfinite(scale).all()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_is_refused() -> None:
    with pytest.raises(ValueError, match="fp8 is true, but cpu has no 8-bit products: it takes a Hopper GPU"):
        to_fp8(torch.randn(16, 16))
