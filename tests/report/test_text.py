"""Numbers as text."""

from theworld.evaluation.verdict import p_words
from theworld.report.text import p_value


def test_a_p_value_too_small_for_a_float_is_not_0() -> None:
    assert [p_value(p) for p in (1.0, 0.0312, 2.3e-57, 1e-101, 0.0)] == [
        *("1", "0.031", "2.3\u00a0×\u00a010⁻⁵⁷", "<\u00a01\u00a0×\u00a010⁻¹⁰⁰", "<\u00a01\u00a0×\u00a010⁻¹⁰⁰")
    ]
    assert [p_words(p, 1) for p in (0.0312, 0.0)] == ["p = 0.03", "p < 1e-100"]
