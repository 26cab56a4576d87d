"""Two arms of a study on the same statements over the same seeds: their difference, its interval and its tests.

The statements are about images, and the runs are of seeds; both are samples, so both vary. A difference is a mean over
seeds and statements, and its variance is clustered both ways (Cameron, Gelbach and Miller 2011):

    V = V_image + max(V_seed - V_both, 0)

V_image is that of sums over each image, V_seed that of the means of the seeds, and V_both, which each of the two
holds, that of what is left when both have been taken away. For three or five seeds V_seed is itself known badly. The
critical value is therefore the mean of Student's t for images and for seeds, weighted by their parts of V (Cochran and
Cox 1957),

    c = ((V - V_seed) t(images - 1) + V_seed t(seeds - 1)) / V,

with which simulated studies without an effect are called different in at most 5 % (`tools/study_errors.py`).
Satterthwaite's degrees of freedom, the usual choice, give up to 8 % with three seeds (`satterthwaite`).

Balanced accuracy and AUROC take part through values of each statement whose mean is the metric and whose spread is its
sampling error: for AUROC the placements of DeLong, DeLong and Clarke-Pearson (1988).

A single image leaves no degrees of freedom: its critical value is infinite, so the interval is all that can be, p is 1,
and no difference is found, however large. Whoever shows an interval says NO_INTERVAL in its place.

Dimensions: S seeds, N statements, C images, ... any number of leading dimensions (simulated studies).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy  # which loads scipy.stats when it is first used: half a second
from scipy import special
from scipy.optimize import brentq

from theworld.utils.text import counted

METRICS = ("accuracy", "balanced_accuracy", "auroc")
ALPHA = 0.05  # two-sided level of a test
RESAMPLES = 9999  # of the bootstrap
NO_INTERVAL = "no interval over a single image"
LEAST_P = 1e-100  # smaller p-values are 0: quantiles of Student's t are exact down to here


# ---- values of each statement


def statement_values(metric: str, margin: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return float64[..., N] whose mean over N is the metric, and whose deviations from it are influence values.

    `margin` is float[..., N], the logit of "1" less that of "0"; `labels` is int[N]. Raises ValueError for balanced
    accuracy and AUROC if all labels are equal.
    """
    true = labels == 1
    correct = ((margin > 0) == true).astype(np.float64)
    if metric == "accuracy":
        return correct
    if true.all() or not true.any():
        raise ValueError(f"{metric} needs true and false statements; all {len(true)} have the same label")
    places = correct if metric == "balanced_accuracy" else _placements(margin, true)
    values = np.empty_like(places)
    means = [places[..., own].mean(-1, keepdims=True) for own in (true, ~true)]
    whole = (means[0] + means[1]) / 2  # for AUROC the two means are equal
    share = 0.5 if metric == "balanced_accuracy" else 1.0
    for own, mean in zip((true, ~true), means, strict=True):
        values[..., own] = whole + share * len(true) / own.sum() * (places[..., own] - mean)
    return values


def _placements(margin: np.ndarray, true: np.ndarray) -> np.ndarray:
    """Return for each statement the share of those with the other label that it is ranked rightly against."""
    ranks = scipy.stats.rankdata(margin, axis=-1)
    places = np.empty(margin.shape)
    for own in (true, ~true):
        below = ranks[..., own] - scipy.stats.rankdata(margin[..., own], axis=-1)
        places[..., own] = below / (~own).sum()
    places[..., ~true] = 1 - places[..., ~true]
    return places


# ---- variance, clustered by image and by seed


@dataclass(frozen=True)
class Images:
    """Which statements are about the same image: `order` sorts them by image, `starts` and `counts` are by image."""

    order: np.ndarray
    starts: np.ndarray
    counts: np.ndarray

    @classmethod
    def of(cls, images: Sequence[Any] | np.ndarray) -> "Images":
        """Group statements by the images that they are about, one for each statement."""
        _, index, counts = np.unique(np.asarray(images), return_inverse=True, return_counts=True)
        starts = np.concatenate([[0], np.cumsum(counts)[:-1]])
        return cls(np.argsort(index, kind="stable"), starts, counts)

    def sums(self, values: np.ndarray) -> np.ndarray:
        """Return the sums over the statements of each image: float[..., N] -> float[..., C]."""
        return np.add.reduceat(values[..., self.order], self.starts, axis=-1)


@dataclass(frozen=True)
class Variance:
    """The parts of the variance of a mean over seeds and statements. Each part is a number, or an array of studies."""

    image: Any
    seed: Any
    both: Any
    num_images: int
    num_seeds: int

    @classmethod
    def of(cls, values: np.ndarray, images: Images) -> "Variance":
        """Estimate the parts from values, float[..., S, N]. That over a single image is not known: it is then 1, the
        largest that a difference of shares can have."""
        num_seeds, num_statements = values.shape[-2:]
        num_images = len(images.counts)
        if num_images < 2:
            nothing = np.zeros(values.shape[:-2])
            return cls(nothing + 1, nothing, nothing, num_images, num_seeds)
        means = values.mean(-1)
        rest = images.sums(values) - images.counts * means.mean(-1)[..., None, None]
        by_image = rest.mean(-2)
        over_images = num_images / (num_images - 1) / num_statements**2
        image = over_images * (by_image**2).sum(-1)
        if num_seeds == 1:
            return cls(image, np.zeros_like(image), np.zeros_like(image), num_images, 1)
        by_seed = (means - means.mean(-1, keepdims=True))[..., None] * images.counts
        left = rest - by_image[..., None, :] - by_seed
        return cls(
            image,
            means.var(-1, ddof=1) / num_seeds,
            over_images * (left**2).sum((-2, -1)) / (num_seeds * (num_seeds - 1)),
            num_images,
            num_seeds,
        )

    @property
    def total(self) -> Any:
        """The variance of the mean. It is at least as large as either of its parts, also where `both` is larger."""
        return np.maximum(np.maximum(self.image, self.seed), self.image + self.seed - self.both)

    def critical_value(self, alpha: float) -> Any:
        """Return the number of standard errors beyond which a difference is significant, two-sided, at `alpha`."""
        if self.num_images < 2:
            return math.inf + np.zeros_like(self.image)
        # Student's t, without the checks of stats.t
        by_image = -special.stdtrit(self.num_images - 1, alpha / 2)
        if self.num_seeds == 1:
            return by_image + np.zeros_like(self.image)
        total = self.total
        weight = np.divide(self.seed, total, out=np.zeros_like(total), where=total > 0)
        return (1 - weight) * by_image + weight * -special.stdtrit(self.num_seeds - 1, alpha / 2)

    def satterthwaite(self) -> Any:
        """Return Satterthwaite's degrees of freedom (1946), for comparison: with few seeds they are too many."""
        parts = self.image**2 / (self.num_images - 1)
        if self.num_seeds > 1:
            parts = parts + self.seed**2 / (self.num_seeds - 1)
        return np.divide(self.total**2, parts, out=np.full_like(parts, self.num_images - 1), where=parts > 0)


# ---- one estimate, its interval and tests


@dataclass(frozen=True)
class Estimate:
    """A metric that is a share, or the difference of two arms in it: the mean over seeds, the value of each seed, and
    the variance."""

    value: float
    each: tuple[float, ...]
    variance: Variance

    @property
    def standard_error(self) -> float:
        """Square root of the variance."""
        return math.sqrt(self.variance.total)

    def interval(self, alpha: float = ALPHA) -> tuple[float, float]:
        """Return the interval at the level 1 - `alpha`, cut off at -1 and 1: no difference of shares lies beyond."""
        half = float(self.variance.critical_value(alpha)) * self.standard_error
        return max(self.value - half, -1.0), min(self.value + half, 1.0)

    def share_interval(self, alpha: float = ALPHA) -> tuple[float, float]:
        """Return the interval of a share, cut off at 0 and 1."""
        low, high = self.interval(alpha)
        return max(low, 0.0), high

    def p_value(self, against: float = 0.0) -> float:
        """Return the two-sided p-value of the value being `against`: the alpha whose interval ends there.

        Where all images and seeds agree exactly, there is no error to compare with: it is then that of a sign test of
        the images, 2 / 2^C.
        """
        distance, error = abs(self.value - against), self.standard_error
        if distance < 1e-12 or self.variance.num_images < 2:
            return 1.0
        if error < 1e-12:
            return 2.0 ** (1 - self.variance.num_images)
        wanted = distance / error

        def beyond(log_p: float) -> float:
            return float(self.variance.critical_value(math.exp(log_p))) - wanted

        least = math.log(LEAST_P)
        return math.exp(brentq(beyond, least, 0.0, xtol=1e-12)) if beyond(least) > 0 else 0.0

    def equivalence_p_value(self, margin: float) -> float:
        """Return the p-value of two one-sided tests (Schuirmann 1987) that the difference is within +-`margin`."""
        sides = []
        for bound, inside in ((-margin, self.value > -margin), (margin, self.value < margin)):
            half = self.p_value(bound) / 2
            sides.append(half if inside else 1 - half)
        return max(sides)


def estimate(values: np.ndarray, images: Images) -> Estimate:
    """Return the mean of values, float[S, N], over seeds and statements, with its variance."""
    each = values.mean(-1)
    return Estimate(float(each.mean()), tuple(map(float, each)), Variance.of(values, images))


def difference_values(metric: str, first: np.ndarray, second: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return the difference of `statement_values` of two arms, first less second, float64[..., S, N].

    `first` and `second` are margins, float[..., S, N], of the same seeds in the same order; an arm that has no seeds,
    such as plain Gemma, is float[..., 1, N]. Raises ValueError for other numbers of seeds.
    """
    if first.shape[-2] != second.shape[-2] and 1 not in (first.shape[-2], second.shape[-2]):
        raise ValueError(
            f"the first arm has {counted(first.shape[-2], 'seed')} and the second {second.shape[-2]}"
        )
    return statement_values(metric, first, labels) - statement_values(metric, second, labels)


def pigeonhole_interval(
    values: np.ndarray, images: Images, alpha: float = ALPHA, resamples: int = RESAMPLES
) -> tuple[Any, Any]:
    """Return the bootstrap interval of the mean of values, float[..., S, N] (Owen 2007): a check of the other one.

    Images and seeds are drawn independently, with a fixed seed, and the percentiles are taken. For few seeds it is too
    narrow: with three their deviation shrinks to 0.82 of itself. Of a single image it is -1 to 1, all that can be.
    """
    if len(images.counts) < 2:
        return np.full(values.shape[:-2], -1.0), np.full(values.shape[:-2], 1.0)
    rng = np.random.default_rng(0)
    sums = images.sums(values)
    num_seeds, num_images = sums.shape[-2:]
    means = []
    for batch in range(0, resamples, 256):
        size = min(256, resamples - batch)
        weights = rng.multinomial(num_images, np.full(num_images, 1 / num_images), size).astype(np.float64)
        seeds = rng.multinomial(num_seeds, np.full(num_seeds, 1 / num_seeds), size) / num_seeds
        totals = sums @ weights.T  # [..., S, size]
        means.append((totals * seeds.T).sum(-2) / (weights @ images.counts))
    # Influence values have means beyond 1 where few images are drawn many times.
    low, high = np.quantile(np.concatenate(means, -1), [alpha / 2, 1 - alpha / 2], axis=-1).clip(-1, 1)
    return low, high


# ---- groups of statements, which may be small


def sign_flip_p_value(differences: np.ndarray, images: Images) -> float:
    """Return the exact two-sided p-value of arms that are exchangeable within each image.

    `differences` is int[S, N], the difference of correct answers. Each image's sum over seeds and statements has either
    sign with the same probability; all 2^C combinations count. For one seed and one statement an image, it is the exact
    McNemar test. The seeds are those that there are: it says nothing about others.
    """
    sums = np.abs(images.sums(differences.sum(0))).astype(int)
    chance = np.ones(1)  # of each total from -(sum so far) to +(sum so far), in steps of 1
    for size in sums[sums > 0]:
        wider = np.zeros(len(chance) + 2 * size)
        wider[: len(chance)] += chance / 2
        wider[2 * size :] += chance / 2
        chance = wider
    totals = np.arange(len(chance)) - len(chance) // 2
    return min(1.0, float(chance[np.abs(totals) >= abs(int(differences.sum()))].sum()))


def holm(p_values: Sequence[float]) -> list[float]:
    """Return the p-values adjusted for their number (Holm 1979), in the order given."""
    order = np.argsort(p_values, kind="stable")
    adjusted = np.empty(len(order))
    scaled = np.asarray(p_values, float)[order] * np.arange(len(order), 0, -1)
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(scaled)) if len(order) else scaled
    return [float(p) for p in adjusted]
