"""Metrics against values worked out by hand."""

import math

import numpy as np
import pytest

from theworld.metrics import accuracy, label_loss, mcnemar, records, summarise, table
from theworld.vsr import Statement


def statement(index: int, image: str, label: int, relation: str = "left of") -> Statement:
    return Statement(image=image, caption=f"caption {index}", label=label, relation=relation, index=index)


def test_a_record_holds_the_answer_of_each_system_and_what_follows_from_it() -> None:
    logits = {"world": np.array([[1.0, 3.0], [0.5, 0.5]], dtype=np.float32)}
    rows = records([statement(0, "a", 1), statement(7, "b", 0, "near")], logits, seen_images={"b"})
    assert rows[0] == {
        "index": 0,
        "image": "a",
        "statement": "caption 0",
        "relation": "left of",
        "category": "projective",
        "label": 1,
        "image_seen_in_train": False,
        "systems": {
            "world": {"logit_0": 1.0, "logit_1": 3.0, "p_true": 1 / (1 + math.exp(-2)), "correct": True},
        },
    }
    # A tie is an answer too: not true.
    assert rows[1]["systems"]["world"] == {"logit_0": 0.5, "logit_1": 0.5, "p_true": 0.5, "correct": True}
    assert rows[1]["image_seen_in_train"] is True


def test_an_answer_that_is_no_number_is_an_error_and_not_an_answer() -> None:
    with pytest.raises(ValueError, match=r"world: statement 3 \(a\) has logits nan, 1\.0"):
        records([statement(3, "a", 1)], {"world": np.array([[np.nan, 1.0]])}, set())


def test_wilson_interval_of_7_of_10() -> None:
    # Centre (p + z²/2n) / (1 + z²/n), half-width z sqrt(p(1-p)/n + z²/4n²) / (1 + z²/n), z = 1.959964, p = 0.7, n = 10
    score = accuracy([True] * 7 + [False] * 3)
    assert score["n"] == 10
    assert score["accuracy"] == 0.7
    assert score["low"] == pytest.approx(0.396775, abs=1e-5)
    assert score["high"] == pytest.approx(0.892209, abs=1e-5)


def test_exact_mcnemar_of_8_against_2() -> None:
    # two-sided binomial: 2 (C(10,0) + C(10,1) + C(10,2)) / 2^10 = 2 x 56 / 1024
    first = [True] * 8 + [False] * 2 + [True] * 5 + [False] * 5
    second = [False] * 8 + [True] * 2 + [True] * 5 + [False] * 5
    assert mcnemar(first, second) == {"only_first": 8, "only_second": 2, "p_value": pytest.approx(0.109375)}
    assert mcnemar(first, first) == {"only_first": 0, "only_second": 0, "p_value": 1.0}


def test_label_loss_is_the_cross_entropy_of_the_two_answers() -> None:
    logits = np.array([[0.0, 2.0], [1.0, 0.0]], dtype=np.float32)
    wanted = (math.log(1 + math.exp(-2)) + math.log(1 + math.exp(1))) / 2
    assert label_loss(logits, np.array([1, 1])) == pytest.approx(wanted)


def four_rows() -> list[dict]:
    statements = [
        statement(i, f"{i // 2}.jpg", y, r)
        for i, (y, r) in enumerate([(1, "on"), (0, "on"), (1, "near"), (1, "x")])
    ]
    world = np.array([[0, 1], [1, 0], [0, 1], [1, 0]], dtype=np.float32)  # right, right, right, wrong
    baseline = np.array([[1, 0], [1, 0], [1, 0], [0, 1]], dtype=np.float32)  # wrong, right, wrong, right
    return records(statements, {"world": world, "baseline": baseline}, seen_images={"1.jpg"})


def test_the_summary_of_four_statements() -> None:
    summary = summarise(four_rows())
    assert summary["statements"] == 4
    assert summary["images"] == 2
    assert summary["majority_class"] == 0.75
    assert summary["systems"]["world"]["accuracy"] == 0.75
    assert summary["systems"]["baseline"]["accuracy"] == 0.5
    assert summary["world_against"] == {"baseline": {"only_first": 2, "only_second": 1, "p_value": 1.0}}
    by_relation = {k: (v["world"]["n"], v["world"]["accuracy"]) for k, v in summary["by_relation"].items()}
    assert by_relation == {"near": (1, 1.0), "on": (2, 1.0), "x": (1, 0.0)}
    by_category = {k: v["baseline"]["accuracy"] for k, v in summary["by_category"].items()}
    assert by_category == {"proximity": 0.0, "topological": 0.5, "unknown": 1.0}
    assert {k: v["world"]["n"] for k, v in summary["by_seen"].items()} == {"False": 2, "True": 2}


def test_the_table_names_every_system_and_marks_small_numbers() -> None:
    text = table(summarise(four_rows()))
    assert "majority class" in text
    assert "2 right only with it, 1 only without, p = 1" in text
    assert "  on                         2  100.0% / 50.0%  (few)" in text


def test_no_statements_is_an_error() -> None:
    with pytest.raises(ValueError, match="no statements"):
        summarise([])
