"""Figures against values worked out by hand."""

import numpy as np
import pytest

from theworld.figures import accuracy, calibration, mcnemar, over_images, probabilities


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


def test_what_four_probabilities_are_worth() -> None:
    labels = np.array([1, 0, 1, 0])
    margin = np.array([3.0, 2.0, 1.0, -1.0])
    p_true = np.array([0.9, 0.8, 0.6, 0.3])
    found = probabilities(labels, p_true, margin)
    assert found["says_true"] == 0.75
    assert found["balanced_accuracy"] == 0.75  # 2 of 2 true statements, 1 of 2 false ones
    assert (
        found["auroc"] == 0.75
    )  # of four pairs of a true and a false statement only 1 against 2 is the wrong way
    assert found["brier"] == pytest.approx((0.01 + 0.64 + 0.16 + 0.09) / 4)
    # 0.9, 0.8, 0.6 and 0.3 are the lower ends of four bins, so each stands alone
    assert found["calibration_error"] == pytest.approx((0.1 + 0.8 + 0.4 + 0.3) / 4)


def test_of_one_kind_of_statements_no_balance_is_told() -> None:
    found = probabilities(np.array([1, 1]), np.array([0.9, 0.2]), np.array([2.0, -1.5]))
    assert found["balanced_accuracy"] is None
    assert found["auroc"] is None
    assert found["brier"] == pytest.approx((0.01 + 0.64) / 2)


def test_the_order_survives_probabilities_that_round_to_one() -> None:
    found = probabilities(np.array([1, 0]), np.array([1.0, 1.0]), np.array([60.0, 50.0]))
    assert found["auroc"] == 1.0


def test_the_bins_of_a_calibration() -> None:
    bins = calibration(np.array([0, 1, 1, 1]), np.array([0.05, 0.07, 0.95, 1.0]))
    assert [(b["from"], b["to"], b["n"]) for b in bins] == [(0.0, 0.1, 2), (0.9, 1.0, 2)]
    assert [b["p_true"] for b in bins] == pytest.approx([0.06, 0.975])
    assert [b["true"] for b in bins] == [0.5, 1.0]
    # Wilson of 1 of 2: (0.5 + z²/4) / (1 + z²/2) ± ..., which is 0.0945 to 0.9055
    assert (bins[0]["low"], bins[0]["high"]) == pytest.approx((0.094529, 0.905471), abs=1e-5)
    found = probabilities(
        np.array([0, 1, 1, 1]), np.array([0.05, 0.07, 0.95, 1.0]), np.array([-3, -2, 3, 9.0])
    )
    assert found["calibration_error"] == pytest.approx(0.5 * 0.44 + 0.5 * 0.025)


def test_two_images_come_whole_or_not_at_all() -> None:
    # Drawn twice with replacement: a and a (all right), b and b (all wrong), or one of each; a quarter is more than
    # 2.5 %, so the interval is all there is.
    images = ["a", "a", "a", "b"]
    right = np.array([[1, 1, 1, 0.0]])
    assert over_images(images, right) == [(0.0, 1.0)]
    assert over_images(images, np.array([[1, 1, 1, 1.0]])) == [(1.0, 1.0)]


def test_saying_the_same_twice_of_each_image_narrows_nothing() -> None:
    right = np.random.default_rng(1).integers(0, 2, 60).astype(float)
    images = [f"{i}.jpg" for i in range(60)]
    once, *_ = over_images(images, right[None])
    twice, *_ = over_images(images * 2, np.tile(right, 2)[None])
    assert once == twice
    other, *_ = over_images([f"{i}.jpg" for i in range(120)], np.tile(right, 2)[None])
    assert other is not None
    assert once is not None
    assert other[1] - other[0] < 0.8 * (once[1] - once[0])


def test_quantities_beside_each_other_have_the_intervals_that_they_have_alone() -> None:
    values = np.random.default_rng(2).integers(-1, 2, (3, 40)).astype(float)
    images = [str(i % 25) for i in range(40)]
    assert over_images(images, values) == [over_images(images, row[None])[0] for row in values]


def test_one_image_has_no_interval() -> None:
    assert over_images(["a", "a"], np.array([[1.0, 0.0], [1.0, 1.0]])) == [None, None]
    assert over_images(["a", "b"], np.zeros((0, 2))) == []
