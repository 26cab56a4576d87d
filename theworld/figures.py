"""The figures of one system, and of two on the same statements: each from scipy or scikit-learn, on plain arrays.

Dimensions: n statements, K quantities, I images.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.stats import binned_statistic, binomtest, bootstrap
from sklearn.metrics import balanced_accuracy_score, brier_score_loss, roc_auc_score

LEVEL = 0.95  # of every interval
RESAMPLES = 9999  # of the images, in the bootstrap
NUM_BINS = 10  # of P(true), equally wide, in the calibration


def accuracy(correct: Sequence[bool]) -> dict[str, Any]:
    """Share of right answers with its 95 % interval (Wilson 1927)."""
    hits, n = sum(correct), len(correct)
    interval = binomtest(hits, n).proportion_ci(LEVEL, method="wilson")
    return {"n": n, "accuracy": hits / n, "low": float(interval.low), "high": float(interval.high)}


def mcnemar(first: Sequence[bool], second: Sequence[bool]) -> dict[str, Any]:
    """Exact McNemar test of two systems on the same statements: two-sided binomial over those where only one
    of them is right (McNemar 1947)."""
    only_first = sum(a and not b for a, b in zip(first, second, strict=True))
    only_second = sum(b and not a for a, b in zip(first, second, strict=True))
    discordant = only_first + only_second
    p = float(binomtest(only_first, discordant, 0.5).pvalue) if discordant else 1.0
    return {"only_first": only_first, "only_second": only_second, "p_value": p}


def probabilities(labels: np.ndarray, p_true: np.ndarray, margin: np.ndarray) -> dict[str, Any]:
    """What P(true), float[n], is worth. The margin, float[n], is the logit of '1' less that of '0': it orders
    statements as P(true) does, and goes on doing so where that rounds to 0 or 1.

    balanced_accuracy, the mean of the accuracies on true and on false statements, and auroc are None where only one
    kind is there. brier: mean squared distance of P(true) from the label (Brier 1950), 0 to 1, less is better, 0.25
    for one who always says 0.5. calibration_error: distance of P(true) from the share that is true, mean over the
    bins of `calibration` weighted by their n.
    """
    both = 0 < labels.sum() < len(labels)
    bins = calibration(labels, p_true)
    return {
        "says_true": float((margin > 0).mean()),
        "balanced_accuracy": float(balanced_accuracy_score(labels, margin > 0)) if both else None,
        "auroc": float(roc_auc_score(labels, margin)) if both else None,
        "brier": float(brier_score_loss(labels, p_true, pos_label=1)),
        "calibration_error": sum(b["n"] * abs(b["p_true"] - b["true"]) for b in bins) / len(labels),
        "calibration": bins,
    }


def calibration(labels: np.ndarray, p_true: np.ndarray) -> list[dict[str, Any]]:
    """The bins of P(true) that are not empty: limits (the upper one belongs to the next bin), n, mean P(true), and
    the share that is true with its interval."""
    edges = np.linspace(0, 1, NUM_BINS + 1)
    which = binned_statistic(p_true, None, "count", bins=edges).binnumber
    found = []
    for number in np.unique(which):
        inside = which == number
        share = accuracy((labels[inside] == 1).tolist())
        found.append(
            {
                "from": float(edges[number - 1]),
                "to": float(edges[number]),
                "n": share["n"],
                "p_true": float(p_true[inside].mean()),
                "true": share["accuracy"],
                "low": share["low"],
                "high": share["high"],
            }
        )
    return found


def over_images(images: Sequence[str], values: np.ndarray) -> list[tuple[float, float] | None]:
    """The 95 % interval of the mean of each quantity, float[K, n], with images resampled and not statements: those
    about one image come together. Percentile bootstrap (Efron 1979), `RESAMPLES` resamples, always the same ones.
    None, K times, where there are fewer than two images."""
    names, place = np.unique(np.asarray(images), return_inverse=True)
    if len(names) < 2 or not len(values):
        return [None] * len(values)
    # Sums an image: a mean over statements is then a ratio of means over images, for images of any n.
    sums = np.stack([np.bincount(place, row, len(names)) for row in np.asarray(values, float)])
    counts = np.broadcast_to(np.bincount(place, minlength=len(names)).astype(float), sums.shape)
    interval = bootstrap(
        (sums, counts),
        lambda total, n, axis=-1: total.sum(axis) / n.sum(axis),
        paired=True,
        vectorized=True,
        axis=-1,
        confidence_level=LEVEL,
        method="percentile",
        n_resamples=RESAMPLES,
        batch=max(1, 2**22 // sums.size),  # some tens of megabytes at a time
        rng=np.random.default_rng(0),
    ).confidence_interval
    return [(float(low), float(high)) for low, high in zip(interval.low, interval.high, strict=True)]
