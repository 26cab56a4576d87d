"""RMS norm and rotary positions in fewer passes: the same bits as the plain formulas, forward and backward."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from theworld.models import decoder
from theworld.models.decoder import apply_rotary, rms_norm

SHAPES = [(2, 37, 256), (3, 5, 4, 64), (1, 1, 2, 16), (7, 8)]


def both_ways(
    function: Callable[[Tensor], Tensor], shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> list[tuple[Tensor, Tensor]]:
    """Return the output of a function and the gradient of its input, in fewer passes and by the plain formula.

    Heads are a transposed view, as in the decoder.
    """
    torch.manual_seed(0)
    values, found = 10 * torch.randn(shape), []
    for fewer in (True, False):
        with monkeypatch.context() as patch:
            if not fewer:
                patch.setattr(decoder, "_fewer_passes", lambda _: False)
            leaf = values.clone().requires_grad_()
            output = function(leaf.transpose(1, 2) if len(shape) == 4 else leaf)
            assert output.grad_fn is not None
            assert (output.grad_fn.name() in ("RmsNormBackward", "RotaryBackward")) == fewer
            output.backward(torch.randn(output.shape, generator=torch.Generator().manual_seed(1)))
        assert leaf.grad is not None
        found.append((output.detach(), leaf.grad))
    return found


@pytest.mark.parametrize("shape", SHAPES)
def test_rms_norm_has_the_same_bits(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(shape[-1], generator=torch.Generator().manual_seed(2))
    own, plain = both_ways(lambda x: rms_norm(x, weight, 1e-6), shape, monkeypatch)
    assert all(map(torch.equal, own, plain))


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if len(shape) == 4])
def test_rotary_positions_have_the_same_bits(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    cos, sin = torch.randn(2, shape[0], shape[1], shape[3], generator=torch.Generator().manual_seed(2))
    own, plain = both_ways(lambda x: apply_rotary(x, cos, sin), shape, monkeypatch)
    assert all(map(torch.equal, own, plain))


def test_only_float32_on_a_cpu_that_does_not_compile_takes_fewer_passes() -> None:
    x, weight = torch.ones(2, 4), torch.zeros(4)
    assert decoder._fewer_passes(x)
    assert not decoder._fewer_passes(x.bfloat16())
    assert not decoder._fewer_passes(x.to("meta"))
    names: list[str] = []

    def backend(graph: torch.fx.GraphModule, _: object) -> Callable[..., object]:
        names.extend(node.name for node in graph.graph.nodes)
        return graph.forward

    torch.compile(rms_norm, backend=backend, fullgraph=True)(x, weight, 1e-6)
    torch._dynamo.reset()
    assert "rsqrt" in names
    assert not any("autograd" in name for name in names)
