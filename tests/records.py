"""Evaluation records made by hand."""

import math

import numpy as np

from theworld.data.vsr import Statement
from theworld.evaluation.records import records


def statement(index: int, image: str, label: int, relation: str = "left of") -> Statement:
    return Statement(image=image, caption=f"caption {index}", label=label, relation=relation, index=index)


def with_rest(logits: np.ndarray) -> np.ndarray:
    """float[n, 2] -> float[n, 3]: where the two answers have half of the probability."""
    return np.concatenate([logits, np.logaddexp(*logits.T)[:, None] + math.log(2)], 1)


def four_rows() -> list[dict]:
    statements = [
        statement(i, f"{i // 2}.jpg", y, r)
        for i, (y, r) in enumerate([(1, "on"), (0, "on"), (1, "near"), (1, "x")])
    ]
    world = np.array([[0, 1], [1, 0], [0, 1], [1, 0]], dtype=np.float32)  # right, right, right, wrong
    baseline = np.array([[1, 0], [1, 0], [1, 0], [0, 1]], dtype=np.float32)  # wrong, right, wrong, right
    answers = {"world": with_rest(world), "baseline": with_rest(baseline)}
    return records(statements, answers, seen_images={"1.jpg"})
