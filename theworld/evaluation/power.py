"""The smallest difference of two arms that a study will be able to show, from its size and from assumptions.

The assumptions are of accuracy, and come from a pilot (`Assumptions.from_pilot`) or are said to be assumed. From them
follow the expected parts of the variance (`theworld.evaluation.comparison`), and the power of the very test that the
study uses, with the spread over seeds as badly known as that many seeds let it be.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import scipy  # which loads scipy.stats when it is first used: half a second
from scipy.optimize import brentq

from theworld.evaluation.comparison import ALPHA, NO_INTERVAL, Images, Variance
from theworld.utils.text import counted

POWER = 0.8  # chance to find a difference as large as the smallest detectable
NUM_QUANTILES = 2000  # of the estimated variance over seeds, which the power is averaged over


@dataclass(frozen=True)
class Assumptions:
    """How two arms differ in their answers.

    discordance         share of the statements that only one of two runs, one of each arm, answers correctly
    persistence         correlation of an image's difference between two seeds: 1 if all seeds differ alike
    image_correlation   correlation of the differences of two statements about one image
    spread              standard deviation over seeds of the difference of the accuracies, beyond what statements
                        that change one by one bring about
    """

    discordance: float = 0.145
    persistence: float = 0.5
    image_correlation: float = 0.1
    spread: float = 0.01
    source: str = "assumed"

    @classmethod
    def from_pilot(
        cls, difference: np.ndarray, images: Images, source: str = "from a pilot"
    ) -> "Assumptions":
        """Estimate the assumptions from the differences of correct answers of a pilot, int[S, N] with S of 2 or more.

        Raises ValueError for a single seed or image, and for arms that answer every statement alike.
        """
        num_seeds, num_statements = difference.shape
        if num_seeds < 2:
            raise ValueError("a pilot of one seed says nothing about the spread over seeds; give two or more")
        if len(images.counts) < 2:
            raise ValueError(
                "a pilot of one image says nothing about the spread over images; give two or more"
            )
        if not difference.any():
            raise ValueError(
                "the arms of the pilot answer every statement alike; there is no spread to plan with"
            )
        values = difference.astype(np.float64)
        parts = Variance.of(values, images)
        persistent = max(float(parts.image - parts.both), 0.0)
        one_seed = persistent + num_seeds * float(parts.both)
        discordance = float((values**2).mean())
        alone = (
            discordance - float(values.mean()) ** 2
        ) / num_statements  # if all statements were independent
        pairs = float((images.counts**2).sum()) / num_statements - 1
        return cls(
            discordance,
            persistent / one_seed if one_seed else 0.0,
            min(1.0, max(0.0, one_seed / alone - 1) / pairs) if pairs and alone else 0.0,
            float(np.sqrt(max(num_seeds * float(parts.seed - parts.both), 0.0))),
            source,
        )

    def words(self) -> str:
        """Return the assumptions as a line."""
        return (
            f"{self.source}: {self.discordance:.1%} of the statements differ between two runs of two arms, "
            f"correlation {self.persistence:.2f} over seeds and {self.image_correlation:.2f} within an image, "
            f"spread over seeds {100 * self.spread:.2f} points"
        ).replace("%", " %")


def expected_variance(
    assumptions: Assumptions, counts: Sequence[int] | np.ndarray, num_seeds: int
) -> Variance:
    """Return the variance of a difference of accuracies over seeds. `counts` are the numbers of statements by image.

    For one seed it is that of this one pair of runs, and says nothing about other seeds.
    """
    counts = np.asarray(counts)
    design_effect = 1 + ((counts**2).sum() / counts.sum() - 1) * assumptions.image_correlation
    one_seed = assumptions.discordance * design_effect / counts.sum()
    if num_seeds == 1:
        return Variance(np.float64(one_seed), np.float64(0), np.float64(0), len(counts), 1)
    both = one_seed * (1 - assumptions.persistence) / num_seeds
    return Variance(
        np.float64(one_seed * assumptions.persistence + both),
        np.float64(assumptions.spread**2 / num_seeds + both),
        np.float64(both),
        len(counts),
        num_seeds,
    )


def power(variance: Variance, difference: float, alpha: float = ALPHA) -> float:
    """Return the chance that a true difference is found significant, on its own side, at the two-sided level `alpha`.

    `variance` is the true one. The study estimates V_seed with S - 1 degrees of freedom, and V_image well.
    """
    # which holds of the true parts, and not always of estimated ones
    seed = max(variance.seed, variance.both)
    if variance.num_images < 2:
        return 0.0
    true = np.sqrt(variance.image + seed - variance.both)
    if not true:
        return float(difference != 0)
    seed = np.broadcast_to(seed, NUM_QUANTILES)
    if variance.num_seeds > 1:
        seed = seed * _chi_squared(variance.num_seeds - 1)
    estimated = Variance(
        np.broadcast_to(variance.image, NUM_QUANTILES),
        seed,
        np.broadcast_to(variance.both, NUM_QUANTILES),
        variance.num_images,
        variance.num_seeds,
    )
    wanted = estimated.critical_value(alpha) * np.sqrt(estimated.total)
    return float(scipy.stats.norm.sf((wanted - abs(difference)) / true).mean())


@cache
def _chi_squared(degrees: int) -> np.ndarray:
    """Return equally likely values of an estimated variance as a share of the true one."""
    return scipy.stats.chi2.ppf((np.arange(NUM_QUANTILES) + 0.5) / NUM_QUANTILES, degrees) / degrees


NONE = 1.0  # the smallest difference where none is found, however large


def smallest_difference(variance: Variance, wanted: float = POWER, alpha: float = ALPHA) -> float:
    """Return the difference that is found with the power `wanted`; NONE if none is."""
    if power(variance, 1.0, alpha) < wanted:
        return NONE
    return float(brentq(lambda size: power(variance, size, alpha) - wanted, 0.0, 1.0, xtol=1e-9))


def smallest_points(size: float) -> str:
    """Return a smallest difference in points, as a figure of a table."""
    if size >= NONE:
        return "none"
    return f"{100 * size:.1f}" if size >= 0.0005 else "below 0.1"


def plan_power(
    counts: Sequence[int] | np.ndarray, num_seeds: int, assumptions: Assumptions, alpha: float = ALPHA
) -> Iterator[str]:
    """Yield lines that say what a study will be able to detect, before it runs."""
    counts = np.asarray(counts)
    size = smallest_difference(expected_variance(assumptions, counts, num_seeds), alpha=alpha)
    found = f"found with {POWER:.0%} power at {100 * alpha:.3g}%".replace("%", " %")
    if size >= NONE:
        yield f"nothing: no difference of accuracy between two arms, however large, is {found}"
    else:
        yield (
            f"{smallest_points(size)} points of accuracy: the smallest difference between two arms that is {found}"
        )
    of = counted(counts.sum(), "statement"), counted(len(counts), "image"), counted(num_seeds, "seed")
    yield f"from {of[0]} about {of[1]} and {of[2]}; {assumptions.words()}"
    if len(counts) == 1:
        yield f"{NO_INTERVAL}: arms will have accuracies, and nothing that tells them apart; give statements about more"
    if num_seeds == 1:
        yield "one seed shows a difference of two runs, not of two arms: other seeds may differ otherwise"
