"""Records, and metrics from them, against values worked out by hand."""

import numpy as np
import pytest
from records import four_rows, statement, with_rest

from theworld.evaluation.metrics import (
    accuracy,
    calibration_bins,
    cluster_bootstrap,
    find_pair,
    mcnemar,
    probability_metrics,
    summarise,
)
from theworld.evaluation.records import records
from theworld.evaluation.tables import table


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


def test_the_metrics_of_four_probabilities() -> None:
    labels = np.array([1, 0, 1, 0])
    margin = np.array([3.0, 2.0, 1.0, -1.0])
    p_true = np.array([0.9, 0.8, 0.6, 0.3])
    found = probability_metrics(labels, p_true, margin)
    assert found["says_true"] == 0.75
    assert found["balanced_accuracy"] == 0.75  # 2 of 2 true statements, 1 of 2 false ones
    # of four pairs of a true and a false statement only 1 against 2 is the wrong way
    assert found["auroc"] == 0.75
    assert found["brier"] == pytest.approx((0.01 + 0.64 + 0.16 + 0.09) / 4)
    # 0.9, 0.8, 0.6 and 0.3 are the lower ends of four bins, so each stands alone
    assert found["calibration_error"] == pytest.approx((0.1 + 0.8 + 0.4 + 0.3) / 4)


def test_balanced_accuracy_and_auroc_are_none_if_all_labels_are_equal() -> None:
    found = probability_metrics(np.array([1, 1]), np.array([0.9, 0.2]), np.array([2.0, -1.5]))
    assert found["balanced_accuracy"] is None
    assert found["auroc"] is None
    assert found["brier"] == pytest.approx((0.01 + 0.64) / 2)


def test_auroc_ranks_by_logits_where_probabilities_round_to_one() -> None:
    found = probability_metrics(np.array([1, 0]), np.array([1.0, 1.0]), np.array([60.0, 50.0]))
    assert found["auroc"] == 1.0


def test_the_calibration_bins_of_four_probabilities() -> None:
    bins = calibration_bins(np.array([0, 1, 1, 1]), np.array([0.05, 0.07, 0.95, 1.0]))
    assert [(b["from"], b["to"], b["n"]) for b in bins] == [(0.0, 0.1, 2), (0.9, 1.0, 2)]
    assert [b["p_true"] for b in bins] == pytest.approx([0.06, 0.975])
    assert [b["true"] for b in bins] == [0.5, 1.0]
    # Wilson of 1 of 2: (0.5 + z²/4) / (1 + z²/2) ± ..., which is 0.0945 to 0.9055
    assert (bins[0]["low"], bins[0]["high"]) == pytest.approx((0.094529, 0.905471), abs=1e-5)
    found = probability_metrics(
        np.array([0, 1, 1, 1]), np.array([0.05, 0.07, 0.95, 1.0]), np.array([-3, -2, 3, 9.0])
    )
    assert found["calibration_error"] == pytest.approx(0.5 * 0.44 + 0.5 * 0.025)


def test_the_bootstrap_draws_all_statements_of_an_image_together() -> None:
    # Drawn twice with replacement: a and a (all right), b and b (all wrong), or one of each; a quarter is more than
    # 2.5 %, so the interval is all there is.
    images = ["a", "a", "a", "b"]
    right = np.array([[1, 1, 1, 0.0]])
    assert cluster_bootstrap(images, right) == [(0.0, 1.0)]
    assert cluster_bootstrap(images, np.array([[1, 1, 1, 1.0]])) == [(1.0, 1.0)]


def test_repeating_the_statements_of_each_image_does_not_narrow_the_bootstrap_interval() -> None:
    right = np.random.default_rng(1).integers(0, 2, 60).astype(float)
    images = [f"{i}.jpg" for i in range(60)]
    once, *_ = cluster_bootstrap(images, right[None])
    twice, *_ = cluster_bootstrap(images * 2, np.tile(right, 2)[None])
    assert once == twice
    other, *_ = cluster_bootstrap([f"{i}.jpg" for i in range(120)], np.tile(right, 2)[None])
    assert other is not None
    assert once is not None
    assert other[1] - other[0] < 0.8 * (once[1] - once[0])


def test_the_bootstrap_of_several_quantities_equals_that_of_each_alone() -> None:
    values = np.random.default_rng(2).integers(-1, 2, (3, 40)).astype(float)
    images = [str(i % 25) for i in range(40)]
    assert cluster_bootstrap(images, values) == [cluster_bootstrap(images, row[None])[0] for row in values]


def test_the_bootstrap_of_one_image_has_no_interval() -> None:
    assert cluster_bootstrap(["a", "a"], np.array([[1.0, 0.0], [1.0, 1.0]])) == [None, None]
    assert cluster_bootstrap(["a", "b"], np.zeros((0, 2))) == []


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


def test_each_pair_has_its_difference_interval_and_discordant_counts() -> None:
    summary = summarise(four_rows())
    (pair,) = summary["pairs"]
    # Image 0: world 2 of 2, baseline 1 of 2; image 1: 1 of 2 each. So 0.5, 0.25 or 0 when images are drawn again.
    assert pair == {
        "first": "world",
        "second": "baseline",
        "n": 4,
        "difference": 0.25,
        "low": 0.0,
        "high": 0.5,
        "only_first": 2,
        "only_second": 1,
        "p_value": 1.0,
    }
    world, baseline = summary["systems"]["world"], summary["systems"]["baseline"]
    assert (world["image_low"], world["image_high"]) == (0.5, 1.0)
    assert (baseline["image_low"], baseline["image_high"]) == (0.5, 0.5)
    seen, unseen = summary["gain_by_seen"]["True"], summary["gain_by_seen"]["False"]
    assert [(p["n"], p["difference"], p["low"]) for p in (*seen, *unseen)] == [(2, 0.0, None), (2, 0.5, None)]
    turned = find_pair(summary["pairs"], "baseline", "world")
    assert turned is not None
    assert (turned["difference"], turned["low"], turned["high"]) == (-0.25, -0.5, 0.0)
    assert (turned["only_first"], turned["only_second"]) == (1, 2)
    assert find_pair(summary["pairs"], "world", "zero") is None


def test_the_summary_has_the_other_token_probability() -> None:
    world = summarise(four_rows())["systems"]["world"]
    assert world["outside_mean"] == pytest.approx(0.5)
    assert world["outside_max"] == pytest.approx(0.5)
    assert world["balanced_accuracy"] == pytest.approx((2 / 3 + 1) / 2)
    assert world["says_true"] == 0.5


def three_seeds() -> list[dict]:
    statements = [statement(i, f"{i}.jpg", 1) for i in range(4)]
    right, wrong = [0.0, 1.0], [1.0, 0.0]
    hits = {"s0:world": 4, "s1:world": 3, "s2:world": 2, "baseline": 1}
    answers = {s: with_rest(np.array([right] * n + [wrong] * (4 - n))) for s, n in hits.items()}
    return records(statements, answers, set())


def test_the_spread_over_checkpoints_is_mean_sample_deviation_and_each() -> None:
    found = summarise(three_seeds())["checkpoints"]
    assert set(found) == {"world", "gain"}  # a shared condition has no spread
    assert found["world"] == {
        "each": {"s0": 1.0, "s1": 0.75, "s2": 0.5},
        "mean": 0.75,
        "sd": pytest.approx(0.25),
    }
    assert found["gain"] == {
        "each": {"s0": 0.75, "s1": 0.5, "s2": 0.25},
        "mean": 0.5,
        "sd": pytest.approx(0.25),
    }
    assert summarise(four_rows())["checkpoints"] == {}
    assert "  world                   75.0%   25.0%  s0 100.0%, s1 75.0%, s2 50.0%" in table(
        summarise(three_seeds())
    )


def test_no_statements_are_refused() -> None:
    with pytest.raises(ValueError, match="no statements"):
        summarise([])
