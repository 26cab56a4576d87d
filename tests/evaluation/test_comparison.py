"""Two arms over seeds: values of each statement, two-way clustered variance, intervals and tests."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats
from scipy.stats import binomtest
from sklearn.metrics import accuracy_score, balanced_accuracy_score, roc_auc_score

from theworld.evaluation.comparison import (
    METRICS,
    Estimate,
    Images,
    Variance,
    difference_values,
    estimate,
    holm,
    pigeonhole_interval,
    sign_flip_p_value,
    statement_values,
)


@pytest.fixture
def margins() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Margins of two arms, three seeds, 40 statements, with ties; and the labels."""
    rng = np.random.default_rng(0)
    labels = (rng.random(40) < 0.6).astype(int)
    first, second = (np.round(rng.normal(size=(3, 40)) + signal * labels, 1) for signal in (1.5, 0.5))
    return first, second, labels


def test_the_mean_of_the_values_is_the_metric_of_each_seed(margins: tuple[np.ndarray, ...]) -> None:
    first, _, labels = margins
    for seed in range(3):
        wanted = {
            "accuracy": accuracy_score(labels, first[seed] > 0),
            "balanced_accuracy": balanced_accuracy_score(labels, first[seed] > 0),
            "auroc": roc_auc_score(labels, first[seed]),
        }
        for metric in METRICS:
            found = statement_values(metric, first, labels)
            assert found.shape == (3, 40)
            assert found[seed].mean() == pytest.approx(wanted[metric], abs=1e-12)


def test_the_spread_of_the_values_of_auroc_is_that_of_delong(margins: tuple[np.ndarray, ...]) -> None:
    first, second, labels = margins
    n1, n0 = int(labels.sum()), int((1 - labels).sum())
    placements = []
    for scores in (first[0], second[0]):
        true, false = scores[labels == 1], scores[labels == 0]
        wins = (true[:, None] > false) + 0.5 * (true[:, None] == false)
        placements.append((wins.mean(1), wins.mean(0)))
    (a1, a0), (b1, b0) = placements
    # DeLong's variance of the difference, with n in place of n - 1 in each group.
    wanted = (a1 - b1).var() / n1 + (a0 - b0).var() / n0
    values = difference_values("auroc", first[:1], second[:1], labels)
    assert values.var() / 40 == pytest.approx(wanted, rel=1e-12)
    found = Variance.of(values, Images.of(range(40)))
    assert found.image == pytest.approx(wanted * 40 / 39, rel=1e-12)


@pytest.mark.parametrize("metric", ["balanced_accuracy", "auroc"])
def test_metrics_of_two_labels_need_both(metric: str) -> None:
    with pytest.raises(ValueError, match=f"{metric} needs true and false statements; all 3 have the same"):
        statement_values(metric, np.zeros((1, 3)), np.ones(3))


def test_one_statement_an_image_gives_the_analysis_of_variance() -> None:
    rng = np.random.default_rng(1)
    values = rng.normal(size=(4, 30)) + np.arange(4)[:, None] + 2 * rng.normal(size=30)
    found = Variance.of(values, Images.of(range(30)))
    by_image, by_seed, grand = values.mean(0), values.mean(1), values.mean()
    rest = values - by_image - by_seed[:, None] + grand
    mean_squares = (
        4 * ((by_image - grand) ** 2).sum() / 29,
        30 * ((by_seed - grand) ** 2).sum() / 3,
        (rest**2).sum() / (29 * 3),
    )
    assert (found.image, found.seed, found.both) == pytest.approx([m / 120 for m in mean_squares])
    assert found.total == pytest.approx((mean_squares[0] + mean_squares[1] - mean_squares[2]) / 120)


def test_variance_of_two_images_and_two_seeds_by_hand() -> None:
    """Images a (two statements) and b (one). Means of the seeds 2/3 and 1/3, of all 1/2."""
    values = np.array([[1.0, 0, 1], [0, 0, 1]])
    found = Variance.of(values, Images.of(["a", "a", "b"]))
    # Sums by image less 1/2 a statement: seed 0: 0, 1/2; seed 1: -1, 1/2. Means of the images: -1/2, 1/2.
    assert found.image == pytest.approx(2 * (1 / 4 + 1 / 4) / 9)
    assert found.seed == pytest.approx((2 / 36) / 2)
    # What is left: a: 1/2 - 2/6, -1/2 + 2/6; b: 0 - 1/6, 0 + 1/6.
    assert found.both == pytest.approx(2 * (4 / 36) / 9 / 2)
    assert (found.num_images, found.num_seeds) == (2, 2)
    assert found.total == pytest.approx(found.image + found.seed - found.both)


def test_for_one_seed_the_interval_is_clustered_by_image() -> None:
    rng = np.random.default_rng(2)
    values, index = rng.normal(size=(1, 50)), rng.permutation(np.arange(50) % 20)
    sums = np.bincount(index, values[0] - values.mean())
    wanted = math.sqrt(20 / 19 * (sums**2).sum()) / 50
    found = estimate(values, Images.of(index))
    half = stats.t.ppf(0.975, 19) * wanted
    assert found.interval() == pytest.approx((values.mean() - half, values.mean() + half))
    assert found.p_value() == pytest.approx(2 * stats.t.sf(abs(values.mean()) / wanted, 19))


def test_the_interval_of_a_share_ends_at_0_and_at_1() -> None:
    images = Images.of(["a", "a", "b", "b", "c"])
    found = estimate(np.array([[1.0, 1, 1, 0, 1]]), images)
    low, high = found.interval()
    assert low > 0
    assert found.value + (found.value - low) > 1  # where it would end
    assert found.share_interval() == (low, high) == (low, 1.0)
    assert estimate(np.array([[0.0, 0, 0, 1, 0]]), images).share_interval() == (0.0, pytest.approx(1 - low))


@pytest.mark.parametrize("sign", [-1, 1])
def test_the_interval_of_a_difference_ends_at_minus_1_and_at_1(sign: int) -> None:
    """Two seeds whose differences are 0.2 and 0.6: Student's t for one degree of freedom is 12.7."""
    values = sign * np.array([[0.0, 0, 0, 0, 1], [0, 0, 1, 1, 1]])
    found = estimate(values, Images.of(["a", "b", "c", "d", "e"]))
    half = found.variance.critical_value(0.05) * found.standard_error
    assert half > 1.4
    assert found.value == pytest.approx(sign * 0.4)
    assert found.interval() == (-1.0, 1.0)
    low, high = found.interval(0.5)  # which ends before
    half = found.variance.critical_value(0.5) * found.standard_error
    assert (low, high) == pytest.approx((found.value - half, found.value + half))


def test_the_bootstrap_of_a_metric_of_few_statements_ends_at_1() -> None:
    """Influence values of balanced accuracy: of two false statements, each counts 1.5 times where n is 6."""
    labels = np.array([1, 1, 1, 1, 0, 0])
    margin = np.where(labels == 1, 1.0, -1.0)
    margin[4] = 1.0  # the only wrong answer
    values = statement_values("balanced_accuracy", margin[None], labels)
    assert values.max() == 1.5  # the mean of a resample that has this statement alone
    _, high = pigeonhole_interval(values, Images.of(range(6)), resamples=2000)
    assert high == 1.0


@pytest.mark.parametrize("num_seeds", [1, 3])
@pytest.mark.parametrize("values", [[0.0, 0.0], [1.0, 0.0], [1.0, 1.0]])
def test_a_single_image_has_its_mean_and_excludes_nothing(values: list[float], num_seeds: int) -> None:
    given, image = np.array([values] * num_seeds), Images.of(["a", "a"])
    found = estimate(given, image)
    assert found.value == sum(values) / 2
    assert (found.interval(), found.share_interval()) == ((-1.0, 1.0), (0.0, 1.0))
    assert (found.p_value(), found.equivalence_p_value(0.01)) == (1.0, 0.5)
    assert pigeonhole_interval(given, image) == (-1.0, 1.0)


@pytest.mark.parametrize(
    ("parts", "wanted"),
    [
        ((1.0, 0.0, 0.0), stats.t.ppf(0.975, 99)),
        ((0.0, 1.0, 0.0), stats.t.ppf(0.975, 2)),
        ((0.75, 0.25, 0.0), 0.75 * stats.t.ppf(0.975, 99) + 0.25 * stats.t.ppf(0.975, 2)),
        # A spread below that of single statements adds nothing to the variance, and keeps its part of the weight.
        ((1.0, 0.2, 0.3), 0.8 * stats.t.ppf(0.975, 99) + 0.2 * stats.t.ppf(0.975, 2)),
        ((0.0, 0.0, 0.0), stats.t.ppf(0.975, 99)),
    ],
)
def test_the_critical_value_is_weighted_by_the_parts_of_the_variance(
    parts: tuple[float, float, float], wanted: float
) -> None:
    assert Variance(*map(np.float64, parts), 100, 3).critical_value(0.05) == pytest.approx(wanted)


def test_the_p_value_is_the_level_at_which_the_interval_ends_at_zero() -> None:
    found = Estimate(0.02, (0.01, 0.02, 0.03), Variance(*map(np.float64, (4e-5, 3e-5, 1e-5)), 500, 3))
    low, high = found.interval(found.p_value())
    assert (low, high) == pytest.approx((0.0, 0.04), abs=1e-9)
    assert found.p_value(0.02) == 1.0


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("num_images", [2, 4, 6, 9, 2000])
def test_a_difference_of_any_size_has_a_p_value(num_images: int) -> None:
    found = Estimate(1.0, (), Variance(*map(np.float64, (1e-20, 0.0, 0.0)), num_images, 3))
    wanted = 2 * stats.t.sf(1e10, num_images - 1)
    assert found.p_value() == (pytest.approx(wanted, rel=1e-6) if wanted > 1e-100 else 0.0)


def test_arms_that_never_vary_have_the_p_value_of_a_sign_test() -> None:
    found = estimate(np.ones((3, 5)), Images.of(range(5)))
    assert found.interval() == (1.0, 1.0)
    assert found.p_value() == 2 / 2**5


@pytest.mark.parametrize("value", [-0.012, -0.004, 0.0, 0.003, 0.02])
@pytest.mark.parametrize("error", [0.003, 0.0045])
def test_arms_are_equal_where_the_interval_of_90_percent_is_within_the_margin(
    value: float, error: float
) -> None:
    variance = Variance(np.float64(error**2), np.float64(error**2 / 4), np.float64(error**2 / 4), 500, 5)
    found = Estimate(value, (), variance)
    low, high = found.interval(0.1)
    assert (found.equivalence_p_value(0.01) < 0.05) == (low > -0.01 and high < 0.01)


def test_an_arm_without_seeds_is_compared_with_each_seed(margins: tuple[np.ndarray, ...]) -> None:
    first, second, labels = margins
    values = difference_values("accuracy", first, second[:1], labels)
    right = [(m > 0) == (labels == 1) for m in (first, second)]
    assert values.mean(-1) == pytest.approx(right[0].mean(-1) - right[1][0].mean())
    with pytest.raises(ValueError, match="the first arm has 3 seeds and the second 2"):
        difference_values("accuracy", first, second[:2], labels)


def test_the_bootstrap_agrees_with_the_interval_for_many_images_and_seeds() -> None:
    rng = np.random.default_rng(3)
    index = np.arange(600) // 2
    values = rng.normal(0, 1, (12, 1)) * 0.1 + rng.normal(0, 1, 300)[index] + rng.normal(0, 1, (12, 600))
    images = Images.of(index)
    low, high = pigeonhole_interval(values, images, resamples=2000)
    assert (low, high) == pigeonhole_interval(values, images, resamples=2000)
    # Within 10 % of the width: t over 12 seeds and 2,000 draws.
    assert (low, high) == pytest.approx(estimate(values, images).interval(), abs=0.03)
    both = pigeonhole_interval(np.stack([values, -values]), images, resamples=2000)
    assert both[0] == pytest.approx([low, -high])


def test_flipped_signs_of_single_statements_are_the_mcnemar_test() -> None:
    differences = np.array([[1] * 9 + [-1] * 2 + [0] * 30])
    found = sign_flip_p_value(differences, Images.of(range(41)))
    assert found == pytest.approx(binomtest(2, 11).pvalue)


def test_flipped_signs_of_images_are_all_counted() -> None:
    rng = np.random.default_rng(4)
    differences, index = rng.integers(-1, 2, (3, 20)), np.arange(20) // 2
    sums = [differences[:, index == i].sum() for i in range(10)]
    totals = [np.dot(signs, sums) for signs in itertools.product((-1, 1), repeat=10)]
    wanted = np.mean(np.abs(totals) >= abs(sum(sums)))
    assert sign_flip_p_value(differences, Images.of(index)) == pytest.approx(wanted)
    assert sign_flip_p_value(np.zeros((3, 20), int), Images.of(index)) == 1.0


def test_holm_adjusts_for_the_number_of_tests() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.9, 0.5]) == pytest.approx([1.0, 1.0])
    assert holm([]) == []
