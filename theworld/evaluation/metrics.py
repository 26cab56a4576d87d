"""The metrics of an evaluation, from its records alone (see `theworld.evaluation.records`).

Each statistic is scipy's or scikit-learn's, on plain arrays. Both take long to load, so they load with the first
statistic (scipy loads `scipy.stats` by itself), when an evaluation has its answers. `summarise` returns all of them as
JSON, whose keys stay:

    systems             metrics of each condition
    says_true           predicted-positive rate: share of the statements that are called true
    calibration_error   expected calibration error, from the bins in calibration
    outside_mean, _max  other-token probability
    image_low, _high    interval of the accuracy by cluster bootstrap over images
    choices             only for statements that are options of choices (see `theworld.evaluation.choices`):
        groups, images, options  choices, their photographs, and the numbers of options that they have
        chance                   expected accuracy of an option picked at random
        systems                  metrics of each condition over the choices, with `ties` and the accuracy of `sets`
        sets                     of each kind: their number n and chance
        pairs                    as those of statements

Dimensions: n statements, K quantities.
"""

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import scipy

from theworld.data.vsr import release_of
from theworld.evaluation.choices import choices_of, sets_of
from theworld.evaluation.conditions import CONDITION_TYPES, checkpoints_in, find_condition
from theworld.evaluation.records import Row, publish_json
from theworld.utils.files import companion

CONFIDENCE = 0.95  # of every interval
RESAMPLES = 9999  # resamples of a bootstrap
NUM_BINS = 10  # equally wide bins of P(true) in the expected calibration error
FEW = 30  # statements; below this an accuracy says little


# ---- metrics of one condition, and of two on the same statements


def accuracy(correct: Sequence[bool]) -> dict[str, Any]:
    """Return the share of correct answers with its 95 % interval (Wilson 1927)."""
    hits, n = sum(correct), len(correct)
    interval = scipy.stats.binomtest(hits, n).proportion_ci(CONFIDENCE, method="wilson")
    return {"n": n, "accuracy": hits / n, "low": float(interval.low), "high": float(interval.high)}


def mcnemar(first: Sequence[bool], second: Sequence[bool]) -> dict[str, Any]:
    """Return the exact McNemar test of two conditions on the same statements (McNemar 1947).

    It is the two-sided binomial test on the statements that only one of the two answers correctly.
    """
    only_first = sum(a and not b for a, b in zip(first, second, strict=True))
    only_second = sum(b and not a for a, b in zip(first, second, strict=True))
    discordant = only_first + only_second
    p = float(scipy.stats.binomtest(only_first, discordant, 0.5).pvalue) if discordant else 1.0
    return {"only_first": only_first, "only_second": only_second, "p_value": p}


def probability_metrics(labels: np.ndarray, p_true: np.ndarray, margin: np.ndarray) -> dict[str, Any]:
    """Return the metrics of P(true), float[n], against the labels.

    `margin`, float[n], is the logit of "1" less that of "0": it ranks statements as P(true) does, also where P(true)
    rounds to 0 or 1. Balanced accuracy and AUROC are None if all labels are equal. The Brier score is the mean squared
    distance of P(true) from the label (Brier 1950), 0.25 for P(true) = 0.5. The expected calibration error is the mean
    distance of P(true) from the share of true statements over the bins, weighted by their n (Naeini et al. 2015).
    """
    from sklearn.metrics import balanced_accuracy_score, brier_score_loss, roc_auc_score

    both = 0 < labels.sum() < len(labels)
    bins = calibration_bins(labels, p_true)
    expected_calibration_error = sum(b["n"] * abs(b["p_true"] - b["true"]) for b in bins) / len(labels)
    return {
        "says_true": float((margin > 0).mean()),
        "balanced_accuracy": float(balanced_accuracy_score(labels, margin > 0)) if both else None,
        "auroc": float(roc_auc_score(labels, margin)) if both else None,
        "brier": float(brier_score_loss(labels, p_true, pos_label=1)),
        "calibration_error": expected_calibration_error,
        "calibration": bins,
    }


def calibration_bins(labels: np.ndarray, p_true: np.ndarray) -> list[dict[str, Any]]:
    """Return the bins of P(true) that are not empty.

    Each has its limits (the upper one belongs to the next bin), n, the mean P(true), and the share of true statements
    with its interval.
    """
    edges = np.linspace(0, 1, NUM_BINS + 1)
    bin_numbers = scipy.stats.binned_statistic(p_true, None, "count", bins=edges).binnumber
    bins = []
    for number in np.unique(bin_numbers):
        inside = bin_numbers == number
        share = accuracy((labels[inside] == 1).tolist())
        bins.append(
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
    return bins


def cluster_bootstrap(images: Sequence[str], values: np.ndarray) -> list[tuple[float, float] | None]:
    """Return the 95 % interval of the mean of each quantity, `values` being float[K, n], by resampling images.

    Statements about one image are drawn together: they are not independent. The interval is the percentile bootstrap
    (Efron 1979) with a fixed seed. All K intervals are None if there are fewer than two images.
    """
    names, image_index = np.unique(np.asarray(images), return_inverse=True)
    if len(names) < 2 or not len(values):
        return [None] * len(values)
    # Sums for each image: a mean over statements is then a ratio of sums over images with any number of statements.
    sums = np.stack([np.bincount(image_index, row, len(names)) for row in np.asarray(values, float)])
    counts = np.bincount(image_index, minlength=len(names))

    def means(drawn: np.ndarray, axis: int = -1) -> np.ndarray:
        """int64[B, images] -> float64[K, B], of B resamples; one product where K sums would be taken image by image."""
        rows = np.arange(len(drawn))[:, None] * len(names)
        times = np.bincount((rows + drawn).ravel(), minlength=drawn.size).reshape(drawn.shape).T.astype(float)
        return sums @ times / (counts @ times)

    interval = scipy.stats.bootstrap(
        (np.arange(len(names)),),
        means,
        vectorized=True,
        axis=-1,
        confidence_level=CONFIDENCE,
        method="percentile",
        n_resamples=RESAMPLES,
        batch=max(1, 2**22 // len(names)),  # some tens of megabytes at a time
        rng=np.random.default_rng(0),
    ).confidence_interval
    return [(float(low), float(high)) for low, high in zip(interval.low, interval.high, strict=True)]


# ---- from records to a summary

SEEN_WORDS = {
    "False": "not seen in training",
    "True": "seen in training",
}  # of the keys of by_seen and gain_by_seen


def summarise(rows: Sequence[Row]) -> dict[str, Any]:
    """Return all metrics of the records as JSON.

    These are the metrics of each condition, the difference of each pair of conditions on the same statements, and the
    accuracies by category, by relation and by whether the image was seen in training. Raises ValueError for no records.
    """
    if not rows:
        raise ValueError("there are no statements to compute metrics from")
    conditions = list(rows[0]["systems"])
    correct = {c: [bool(row["systems"][c]["correct"]) for row in rows] for c in conditions}
    num_true = sum(row["label"] for row in rows)
    summary: dict[str, Any] = {
        "statements": len(rows),
        "images": len({row["image"] for row in rows}),
        "data": sorted({(row["dataset"], row["split"]) for row in rows}),
        "releases": _releases(rows),
        "majority_class": max(num_true, len(rows) - num_true) / len(rows),
        "statements_in_train": sum(row["statement_in_train"] for row in rows),
        "resamples": RESAMPLES,
        "systems": {c: _condition_metrics(rows, c) for c in conditions},
        "pairs": paired_differences(rows, list(itertools.combinations(conditions, 2))),
    }
    intervals = accuracy_intervals(rows, [(c, None) for c in conditions])
    for condition, (low, high) in zip(conditions, intervals, strict=True):
        summary["systems"][condition] |= {"image_low": low, "image_high": high}
    if "world" in conditions:
        summary["world_against"] = {
            c: mcnemar(correct["world"], correct[c]) for c in conditions if c != "world"
        }
    for key, name in (("category", "category"), ("relation", "relation"), ("image_seen_in_train", "seen")):
        places: dict[Any, list[int]] = {}
        for place, row in enumerate(rows):
            places.setdefault(row[key], []).append(place)
        summary[f"by_{name}"] = {
            str(value): {c: accuracy([correct[c][i] for i in places[value]]) for c in conditions}
            for value in sorted(places)
        }
    gains = [
        (world, baseline)
        for checkpoint in checkpoints_in(conditions)
        if (world := find_condition(conditions, checkpoint, "world"))
        and (baseline := find_condition(conditions, checkpoint, "baseline"))
    ]
    summary["gain_by_seen"] = {
        str(seen): paired_differences(group, gains)
        for seen in (False, True)
        if (group := [row for row in rows if row["image_seen_in_train"] is seen])
    }
    summary["checkpoints"] = spread_over_checkpoints(summary)
    if choices := choices_of(rows):
        summary["choices"] = _summarise_choices(choices)
    return summary


def _summarise_choices(choices: Sequence[Row]) -> dict[str, Any]:
    """Return the metrics of choices as JSON: those of each condition, and the difference of each pair of conditions."""
    conditions, sets = list(choices[0]["systems"]), sets_of(choices)
    systems = {}
    for condition, (low, high) in zip(
        conditions, accuracy_intervals(choices, [(c, None) for c in conditions]), strict=True
    ):

        def right(choice: Row, condition: str = condition) -> bool:
            return bool(choice["systems"][condition]["correct"])

        systems[condition] = {
            **accuracy([right(choice) for choice in choices]),
            "image_low": low,
            "image_high": high,
            "ties": sum(choice["systems"][condition]["tie"] for choice in choices),
            "sets": {kind: accuracy([all(map(right, own)) for own in found]) for kind, found in sets.items()},
        }
    return {
        "groups": len(choices),
        "images": len({choice["image"] for choice in choices}),
        "options": sorted({choice["options"] for choice in choices}),
        "chance": float(np.mean([1 / choice["options"] for choice in choices])),
        "systems": systems,
        "sets": {kind: {"n": len(found), "chance": _chance_of_sets(found)} for kind, found in sets.items()},
        "pairs": paired_differences(choices, list(itertools.combinations(conditions, 2))),
    }


def _chance_of_sets(sets: Sequence[Sequence[Row]]) -> float:
    """Return the expected share of sets that are all right where each option is picked at random."""
    return float(np.mean([math.prod(1 / choice["options"] for choice in own) for own in sets]))


def _releases(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """Return the (release, split) pairs that the statements are from, which published results belong beside.

    Older records do not have their release: they count as one if they are all statements of its split.
    """
    found = set()
    for dataset, split in {(row["dataset"], row["split"]) for row in rows}:
        own = [row for row in rows if (row["dataset"], row["split"]) == (dataset, split)]
        if any("release" in row for row in own):
            found |= {(row.get("release", ""), split) for row in own}
        else:
            found.add((release_of(((r["image"], r["statement"], r["label"]) for r in own), split), split))
    return sorted((release, split) for release, split in found if release)


def write_summary(rows: Sequence[Row], path: Path) -> dict[str, Any]:
    """Write the summary of the records of `path` beside them, as results.summary.json for results.jsonl; return it."""
    summary = summarise(rows)
    publish_json(summary, companion(path, ".summary.json", ".jsonl"))
    return summary


def _condition_metrics(rows: Sequence[Row], condition: str) -> dict[str, Any]:
    answers = [row["systems"][condition] for row in rows]
    column = {
        key: np.array([a[key] for a in answers], float) for key in ("logit_0", "logit_1", "p_true", "outside")
    }
    labels = np.array([row["label"] for row in rows])
    return {
        **accuracy([bool(a["correct"]) for a in answers]),
        **probability_metrics(labels, column["p_true"], column["logit_1"] - column["logit_0"]),
        "outside_mean": float(column["outside"].mean()),
        "outside_max": float(column["outside"].max()),
    }


def paired_differences(rows: Sequence[Row], pairs: Sequence[tuple[str, str]]) -> list[dict[str, Any]]:
    """Return for each (first, second) condition the difference of their accuracies, first less second.

    With it come its interval by cluster bootstrap over images (None for a single image), the number of statements that
    only one of the two answers correctly, and the exact McNemar test.
    """
    found = []
    for (first, second), (low, high) in zip(pairs, accuracy_intervals(rows, pairs), strict=True):
        test = mcnemar(*([bool(row["systems"][c]["correct"]) for row in rows] for c in (first, second)))
        difference = (test["only_first"] - test["only_second"]) / len(rows)
        names = {"first": first, "second": second, "n": len(rows)}
        found.append({**names, "difference": difference, "low": low, "high": high, **test})
    return found


def accuracy_intervals(
    rows: Sequence[Row], wanted: Sequence[tuple[str, str | None]]
) -> list[tuple[float | None, float | None]]:
    """Return the bootstrap interval of the accuracy of (condition, None), of the difference for (first, second)."""
    right = {c: np.array([row["systems"][c]["correct"] for row in rows], float) for c in rows[0]["systems"]}
    values = [right[first] - (right[second] if second else 0) for first, second in wanted]
    intervals = cluster_bootstrap([row["image"] for row in rows], np.array(values))
    return [interval or (None, None) for interval in intervals]


def spread_over_checkpoints(summary: dict[str, Any]) -> dict[str, Any]:
    """Return for each type of condition the accuracy of each checkpoint, their mean and sample standard deviation.

    "gain" is world less baseline. Types that all checkpoints share are left out, and all of them for one checkpoint.
    """
    conditions = list(summary["systems"])
    checkpoints = checkpoints_in(conditions)
    if len(checkpoints) < 2:
        return {}
    accuracies: dict[str, dict[str, float]] = {}
    for wanted_type in CONDITION_TYPES:
        named = {m: find_condition(conditions, m, wanted_type) for m in checkpoints}
        accuracies[wanted_type] = {m: summary["systems"][c]["accuracy"] for m, c in named.items() if c}
    world, baseline = accuracies["world"], accuracies["baseline"]
    accuracies["gain"] = {m: world[m] - baseline[m] for m in checkpoints if m in world and m in baseline}
    return {
        name: {"each": each, "mean": float(np.mean(values)), "sd": float(np.std(values, ddof=1))}
        for name, each in accuracies.items()
        if name not in conditions and len(values := list(each.values())) > 1
    }


def find_pair(pairs: Sequence[dict[str, Any]], first: str, second: str) -> dict[str, Any] | None:
    """Return the difference of two conditions from `paired_differences`, reversed if need be; None if it is missing."""
    for pair in pairs:
        if (pair["first"], pair["second"]) == (first, second):
            return pair
        if (pair["first"], pair["second"]) == (second, first):
            return reverse(pair)
    return None


def reverse(pair: dict[str, Any]) -> dict[str, Any]:
    """Return the same difference with first and second exchanged."""
    low, high = (None if x is None else -x for x in (pair["high"], pair["low"]))
    return pair | {
        "first": pair["second"],
        "second": pair["first"],
        "difference": -pair["difference"],
        "low": low,
        "high": high,
        "only_first": pair["only_second"],
        "only_second": pair["only_first"],
    }
