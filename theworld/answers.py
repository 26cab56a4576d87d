"""What the logits of the two answers, '0' and '1', say about a statement: the one rule for it."""

import math


def p_true(logit_0: float, logit_1: float) -> float:
    """P(true), 0 to 1: the softmax of the two logits alone. Raises ValueError for a logit that is no finite number."""
    if not (math.isfinite(logit_0) and math.isfinite(logit_1)):
        raise ValueError(f"logits of '0' and '1' are {logit_0}, {logit_1}; wanted two numbers")
    return 1 / (1 + math.exp(min(logit_0 - logit_1, 700)))  # beyond 709 exp overflows
