"""P(true) from two logits."""

import math

import pytest

from theworld.answers import p_true


def test_it_is_the_softmax_of_the_two() -> None:
    assert p_true(0.0, 0.0) == 0.5
    assert p_true(0.0, math.log(3)) == pytest.approx(0.75, abs=1e-15)
    assert p_true(math.log(3), 0.0) == pytest.approx(0.25, abs=1e-15)
    assert p_true(7.0 + 1.5, 7.0) == pytest.approx(p_true(1.5, 0.0), abs=1e-15)


def test_far_apart_it_is_sure_and_does_not_overflow() -> None:
    assert p_true(-1e4, 1e4) == 1.0
    assert 0.0 <= p_true(1e4, -1e4) < 1e-300


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_is_no_answer(bad: float) -> None:
    with pytest.raises(ValueError, match="logits of '0' and '1' are "):
        p_true(bad, 0.0)
    with pytest.raises(ValueError, match="wanted two numbers"):
        p_true(0.0, bad)
