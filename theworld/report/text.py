"""Numbers as text, as print has them."""

import re

from theworld.evaluation.verdict import p_words
from theworld.report.charts import MINUS, number


def percent(share: float | None, digits: int = 1) -> str:
    """Format a share as "71.4 %", and None as "–"."""
    return "–" if share is None else f"{100 * share:.{digits}f}\u00a0%"


def between(low: float | None, high: float | None) -> str:
    """Format an interval of shares in percent, and a missing one as "–"."""
    return "–" if low is None or high is None else f"{100 * low:.1f} to {100 * high:.1f}"


def signed(difference: float | None) -> str:
    """Format a difference of shares in points with its sign, and None as "–"."""
    return "–" if difference is None else number(100 * difference, "+.1f")


def small(value: float, digits: int = 2) -> str:
    """Format a number that may be very small with `digits` significant digits."""
    return typeset(f"{value:.{digits}g}")


def p_value(p: float, digits: int = 2) -> str:
    """Format a p value with `digits` significant digits; one too small for a float is not shown as 0."""
    return typeset(p_words(p, digits)).removeprefix("p\u00a0=\u00a0").replace("p < ", "<\u00a0")


def probability(p: float) -> str:
    """Format a probability with three decimals; 0 and 1 themselves are never shown for what is only close to them."""
    if 0 < p < 0.0005:
        return "<\u00a00.001"
    return ">\u00a00.999" if 0.9995 <= p < 1 else f"{p:.3f}"


def typeset(text: str) -> str:
    """Return plain text as print has it: no line begins with a per cent sign, powers of ten, U+2212 for minus."""
    text = re.sub(r"(\d) (%|points)", "\\1\u00a0\\2", text).replace("p = ", "p\u00a0=\u00a0")
    return re.sub(r"(?<![\w-])-(?=\d)", MINUS, re.sub(r"(\d)e-(\d+)", _power, text))


def _power(found: re.Match[str]) -> str:
    exponent = str(int(found[2])).translate(str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return f"{found[1]}\u00a0×\u00a010⁻{exponent}"
