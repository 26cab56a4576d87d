"""What a study will be able to detect."""

import numpy as np
import pytest

from theworld.evaluation.comparison import Images, Variance
from theworld.evaluation.power import (
    Assumptions,
    expected_variance,
    plan_power,
    power,
    smallest_difference,
    smallest_points,
)

# Statements by image of VSR's random test.
COUNTS = np.repeat([1, 2, 3, 4, 5], [1609, 217, 41, 6, 1])


@pytest.mark.parametrize(
    ("seeds", "discordance", "spread", "wanted"),
    [
        (1, 0.08, 0.0, 1.72),
        (1, 0.145, 0.0, 2.32),
        (3, 0.08, 0.01, 3.61),
        (3, 0.145, 0.0, 2.38),
        (5, 0.08, 0.005, 1.63),
        (5, 0.145, 0.0, 1.91),
        (5, 0.145, 0.01, 2.50),
    ],
)
def test_the_smallest_difference_on_random_test(
    seeds: int, discordance: float, spread: float, wanted: float
) -> None:
    expected = expected_variance(Assumptions(discordance, spread=spread), COUNTS, seeds)
    found = smallest_difference(expected)
    assert 100 * found == pytest.approx(wanted, abs=0.005)
    assert power(expected, found) == pytest.approx(0.8)


def test_the_expected_variance_by_hand() -> None:
    """100 images with two statements each: the design effect is 1 + 0.1."""
    found = expected_variance(Assumptions(0.2, 0.5, 0.1, 0.01), [2] * 100, 4)
    one_seed = 0.2 * 1.1 / 200
    assert (found.image, found.seed, found.both) == pytest.approx(
        (one_seed * (0.5 + 0.5 / 4), 0.01**2 / 4 + one_seed * 0.5 / 4, one_seed * 0.5 / 4)
    )
    assert (found.num_images, found.num_seeds) == (100, 4)


def test_without_an_effect_the_power_is_that_of_half_the_level_or_less() -> None:
    for spread in (0.0, 0.01, 0.05):
        assert power(expected_variance(Assumptions(spread=spread), COUNTS, 3), 0.0) <= 0.025
    assert power(Variance(np.float64(1e-4), np.float64(0), np.float64(0), 10**9, 1), 0.0) == pytest.approx(
        0.025
    )


def test_arms_that_cannot_differ_by_chance_show_any_difference() -> None:
    nothing = Variance(np.float64(0), np.float64(0), np.float64(0), 100, 3)
    assert (power(nothing, 0.0), power(nothing, 0.001)) == (0.0, 1.0)
    assert smallest_difference(Variance(np.float64(1), np.float64(0), np.float64(0), 100, 1)) == 1.0


def test_a_pilot_gives_back_what_it_was_made_with() -> None:
    rng = np.random.default_rng(0)
    index = np.repeat(np.arange(4000), 2)
    # Of the variance of the sum of an image's two statements, 2 x 0.4 + 4 x 0.1 stays and 2 x 0.5 is of the run.
    kept = np.sqrt(0.1) * rng.normal(size=4000)[index] + np.sqrt(0.4) * rng.normal(size=8000)
    values = kept + np.sqrt(0.5) * rng.normal(size=(40, 8000)) + 0.02 * rng.normal(size=(40, 1))
    found = Assumptions.from_pilot(values, Images.of(index))
    assert found.discordance == pytest.approx(1.0, abs=0.02)
    assert found.persistence == pytest.approx(1.2 / 2.2, abs=0.02)
    assert found.image_correlation == pytest.approx(0.1, abs=0.03)
    assert found.spread == pytest.approx(0.02, abs=0.006)  # known to a tenth from 40 seeds
    assert found.source == "from a pilot"


def test_a_pilot_needs_two_seeds_and_a_difference() -> None:
    with pytest.raises(ValueError, match="a pilot of one seed"):
        Assumptions.from_pilot(np.ones((1, 4)), Images.of(range(4)))
    with pytest.raises(ValueError, match="answer every statement alike"):
        Assumptions.from_pilot(np.zeros((2, 4)), Images.of(range(4)))
    with pytest.raises(
        ValueError, match="a pilot of one image says nothing about the spread over images; give two"
    ):
        Assumptions.from_pilot(np.ones((2, 4)), Images.of([0] * 4))


def test_a_difference_that_cannot_be_is_named_in_words() -> None:
    """Two seeds that lie 50 points apart find no difference, and none is 100 points."""
    wide = list(plan_power([1, 1], 2, Assumptions(spread=0.5)))
    assert (
        wide[0]
        == "nothing: no difference of accuracy between two arms, however large, is found with 80 % power at 5 %"
    )
    assert [smallest_points(size) for size in (0.0, 0.0004, 0.0005, 0.0238, 0.9999, 1.0)] == [
        *("below 0.1", "below 0.1", "0.1", "2.4", "100.0", "none")
    ]


def test_the_plan_shows_what_it_assumes() -> None:
    assert list(plan_power(COUNTS, 5, Assumptions())) == [
        "2.5 points of accuracy: the smallest difference between two arms that is found with 80 % power at 5 %",
        "from 2,195 statements about 1,874 images and 5 seeds; assumed: 14.5 % of the statements differ between two "
        "runs of two arms, correlation 0.50 over seeds and 0.10 within an image, spread over seeds 1.00 points",
    ]
    assert "one seed shows a difference of two runs" in list(plan_power(COUNTS, 1, Assumptions()))[-1]


@pytest.mark.parametrize(
    ("counts", "words"), [([1], "1 statement about 1 image"), ([6], "6 statements about 1 image")]
)
def test_the_plan_of_a_single_image_says_that_nothing_can_be_found(counts: list[int], words: str) -> None:
    nothing, size, why = plan_power(counts, 3, Assumptions())
    assert nothing == (
        "nothing: no difference of accuracy between two arms, however large, is found with 80 % power at 5 %"
    )
    assert size.startswith(f"from {words} and 3 seeds; assumed: ")
    assert why == (
        "no interval over a single image: arms will have accuracies, and nothing that tells them apart; give "
        "statements about more"
    )
