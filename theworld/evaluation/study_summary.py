"""What a study shows, from the records of its arms and seeds alone.

`summarise_study` returns every figure as JSON:

    question    what was fixed before the study ran
    scopes      "all" statements and, where there are both kinds, "unseen": those whose image is not in train, if these
                are about two images or more. Each has arms -> metric, differences of world less each other arm ->
                metric, and its verdict; of a study that explores also pairs: every two arms, or each and the baseline
    groups      exploratory: world less each control by meta-category and by relation, p-values adjusted after Holm

`learning_curve` returns the arms' figures where each is trained on several shares of the training statements.

World tokens have to beat every control. That is an intersection-union test (Berger 1982): each comparison is at the
full level, and none is corrected. Two arms that are not shown to differ are not shown to be equal: that takes two
one-sided tests within a margin that was set before. Where a study explores, any pair that differs is a finding, so
pairs are corrected for their number: p-values after Holm, and intervals that hold all together (Bonferroni).
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from itertools import combinations
from typing import Any

import numpy as np

from theworld.evaluation.comparison import (
    METRICS,
    Estimate,
    Images,
    difference_values,
    estimate,
    holm,
    pigeonhole_interval,
    sign_flip_p_value,
    statement_values,
)
from theworld.evaluation.metrics import FEW, mcnemar
from theworld.evaluation.power import smallest_difference
from theworld.evaluation.records import Row
from theworld.evaluation.study_verdict import PLAIN, Question, data_words, verdict_on_scope
from theworld.utils.text import counted

Arms = Mapping[str, Mapping[int, Sequence[Row]]]  # arm -> seed -> records of the same statements
Runs = dict[str, np.ndarray]  # arm -> margins, float64[S, N]


# ---- from records to arrays


def condition_of(arm: str) -> str:
    """Return the condition of the evaluation that an arm's answers are of."""
    return "baseline" if arm == PLAIN else "world"


def check_arms(arms: Arms, question: Question) -> list[int]:
    """Return the seeds of a study. Raises ValueError for a lacking arm or seed, and for other statements in a run."""
    if lacking := [arm for arm in (question.world, *question.controls) if arm not in arms]:
        raise ValueError(f"the study has no arm {', '.join(lacking)}; it has {', '.join(arms)}")
    seeds = sorted(arms[question.world])
    if not seeds or not arms[question.world][seeds[0]]:
        raise ValueError(f"the arm {question.world} has no records")
    wanted = _statements(arms[question.world][seeds[0]])
    for arm, runs in arms.items():
        if sorted(runs) != seeds and not (arm == PLAIN and len(runs) == 1):
            raise ValueError(
                f"the arm {arm} has the seeds {', '.join(map(str, sorted(runs))) or 'none'}; "
                f"{question.world} has {', '.join(map(str, seeds))}"
            )
        for seed, rows in runs.items():
            if _statements(rows) != wanted:
                raise ValueError(
                    f"the records of the arm {arm}, seed {seed}, are of other statements ({len(rows):,}) than those "
                    f"of {question.world}, seed {seeds[0]} ({len(wanted):,})"
                )
            if condition_of(arm) not in rows[0]["systems"]:
                raise ValueError(
                    f"the records of the arm {arm}, seed {seed}, have the conditions "
                    f"{', '.join(rows[0]['systems'])}; wanted {condition_of(arm)}"
                )
    return seeds


def _statements(rows: Sequence[Row]) -> list[tuple[Any, ...]]:
    return [
        tuple(row[k] for k in ("dataset", "split", "index", "image", "statement", "label")) for row in rows
    ]


def _margins(rows: Sequence[Row], condition: str) -> list[float]:
    answers = [row["systems"][condition] for row in rows]
    return [answer["logit_1"] - answer["logit_0"] for answer in answers]


# ---- the figures


def summarise_study(arms: Arms, question: Question | None = None) -> dict[str, Any]:
    """Return all figures of a study as JSON. Raises the errors of `check_arms`."""
    question = question or Question()
    seeds = check_arms(arms, question)
    rows = arms[question.world][seeds[0]]
    runs = {
        arm: np.array([_margins(of[s], condition_of(arm)) for s in sorted(of)]) for arm, of in arms.items()
    }
    unseen = np.array([not row["image_seen_in_train"] for row in rows])
    scopes = {"all": np.ones(len(rows), bool)}
    # as an interval needs
    several = len({row["image"] for row in rows if not row["image_seen_in_train"]}) > 1
    if several and not unseen.all():
        scopes["unseen"] = unseen
    data = sorted({(row["dataset"], row["split"]) for row in rows})
    summary: dict[str, Any] = {
        "question": asdict(question),
        "data": data,
        "seeds": seeds,
        "statements": len(rows),
        "images": len({row["image"] for row in rows}),
        "statements_with_unseen_image": int(unseen.sum()),
        "statements_in_train": sum(row["statement_in_train"] for row in rows),
        "scopes": {},
        "groups": {f"by_{key}": _groups(rows, runs, key, question) for key in ("category", "relation")},
    }
    for name, kept in scopes.items():
        inside = [row for row, is_kept in zip(rows, kept, strict=True) if is_kept]
        own = {arm: margin[:, kept] for arm, margin in runs.items()}
        summary["scopes"][name] = _scope(inside, own, seeds, question)
    for name, scope in summary["scopes"].items():
        scope["verdict"] = asdict(verdict_on_scope(scope, question, seeds, _place(summary, name)))
    return summary


def _scope(rows: Sequence[Row], runs: Runs, seeds: Sequence[int], question: Question) -> dict[str, Any]:
    """Return the figures of all arms on some statements."""
    labels, images = np.array([row["label"] for row in rows]), Images.of([row["image"] for row in rows])
    metrics = _metrics(labels)
    if question.metric not in metrics:
        raise ValueError(
            f"{question.metric} needs true and false statements; all {len(labels)} have the same label"
        )
    others = [arm for arm in runs if arm != question.world]
    values = {
        (arm, metric): difference_values(metric, runs[question.world], runs[arm], labels)
        for arm in others
        for metric in metrics
    }
    lows, highs = pigeonhole_interval(np.stack(list(values.values())), images, question.alpha)
    differences: dict[str, Any] = {arm: {} for arm in others}
    for (arm, metric), low, high in zip(values, lows, highs, strict=True):
        found = _difference(estimate(values[arm, metric], images), seeds, question)
        differences[arm][metric] = found | {"bootstrap_low": float(low), "bootstrap_high": float(high)}
    for arm in others:
        differences[arm]["by_seed"] = _by_seed(runs[question.world], runs[arm], labels, images, seeds)
    pairs = {} if question.decides else {"pairs": _pairs(runs, metrics, labels, images, seeds, question)}
    return pairs | {
        "statements": len(rows),
        "images": len(images.counts),
        "arms": _arms(runs, metrics, labels, images, seeds, question),
        "differences": differences,
    }


def _arm(found: Estimate, seeds: Sequence[int], question: Question) -> dict[str, Any]:
    """Return the metric of an arm: its mean over seeds with the interval of images and seeds, and each seed's."""
    low, high = found.share_interval(question.alpha)
    each = found.each
    return {
        "mean": found.value,
        "low": low,
        "high": high,
        "sd": float(np.std(each, ddof=1)) if len(each) > 1 else None,
        "each": {
            str(seed): value
            for seed, value in zip(seeds if len(seeds) == len(each) else [""], each, strict=True)
        },
    }


def _difference(found: Estimate, seeds: Sequence[int], question: Question) -> dict[str, Any]:
    """Return the difference of two arms with its interval, its tests and what it could have detected."""
    low, high = found.interval(question.alpha)
    equivalence = found.equivalence_p_value(question.margin)
    return {
        "difference": found.value,
        "low": low,
        "high": high,
        "p_value": found.p_value(),
        "standard_error": found.standard_error,
        "variance": {k: float(getattr(found.variance, k)) for k in ("image", "seed", "both")},
        "each": {str(seed): value for seed, value in zip(seeds, found.each, strict=True)},
        "equivalence_p_value": equivalence,
        "within_margin": equivalence < question.alpha,
        "smallest_detectable": smallest_difference(found.variance, alpha=question.alpha),
    }


def _pairs(
    runs: Runs,
    metrics: Sequence[str],
    labels: np.ndarray,
    images: Images,
    seeds: Sequence[int],
    question: Question,
) -> list[dict[str, Any]]:
    """Return the difference of every two arms, the later less the earlier, or of each arm and the baseline.

    They are corrected for their number, in each metric: intervals hold all together, p-values are adjusted after Holm.
    """
    names = [arm for arm in runs if arm != PLAIN]
    pairs = [(second, first) for first, second in combinations(names, 2)]
    if question.baseline is not None:
        pairs = [(arm, question.baseline) for arm in names if arm != question.baseline]
    together = replace(question, alpha=question.alpha / max(1, len(pairs)))
    found: list[dict[str, Any]] = [{"first": first, "second": second} for first, second in pairs]
    for metric in metrics:
        for pair in found:
            values = difference_values(metric, runs[pair["first"]], runs[pair["second"]], labels)
            pair[metric] = _difference(estimate(values, images), seeds, together)
        adjusted = holm([pair[metric]["p_value"] for pair in found])
        for pair, p_value in zip(found, adjusted, strict=True):
            pair[metric]["adjusted_p_value"] = p_value
    return found


def learning_curve(
    shares: Mapping[float, Arms], num_statements: Mapping[float, int], question: Question
) -> list[dict[str, Any]]:
    """Return the figures of all arms on each share of the training statements, by share, and exploratory: world less
    each control on each share, p-values adjusted after Holm over all of them. Of a study that explores it is each other
    arm less the arm that it is compared with.

    `num_statements` are the numbers of training statements. Raises the errors of `check_arms`.
    """
    found = [
        {"share": share, "training_statements": num_statements[share], **_on_share(shares[share], question)}
        for share in sorted(shares)
    ]
    tests = [test for one in found for test in one["differences"].values()]
    for test, adjusted in zip(tests, holm([test["p_value"] for test in tests]), strict=True):
        test["adjusted_p_value"] = adjusted
    return found


def _on_share(arms: Arms, question: Question) -> dict[str, Any]:
    """Return the figures of the arms on one share of the training statements, without plain Gemma."""
    trained = {arm: of for arm, of in arms.items() if arm != PLAIN}
    seeds = check_arms(trained, question)
    rows = trained[question.world][seeds[0]]
    runs = {arm: np.array([_margins(of[s], "world") for s in seeds]) for arm, of in trained.items()}
    labels, images = np.array([row["label"] for row in rows]), Images.of([row["image"] for row in rows])
    world, metric = runs[question.world], question.metric
    sides = {c: (world, runs[c]) if question.decides else (runs[c], world) for c in question.controls}
    values = {c: difference_values(metric, *pair, labels) for c, pair in sides.items()}
    return {
        "arms": _arms(runs, _metrics(labels), labels, images, seeds, question),
        "differences": {
            control: _difference(estimate(own, images), seeds, question) for control, own in values.items()
        },
    }


def _metrics(labels: np.ndarray) -> Sequence[str]:
    """Return the metrics that these labels allow: of one label alone, accuracy."""
    return METRICS if 0 < labels.sum() < len(labels) else METRICS[:1]


def _arms(
    runs: Runs,
    metrics: Sequence[str],
    labels: np.ndarray,
    images: Images,
    seeds: Sequence[int],
    question: Question,
) -> dict[str, Any]:
    """Return each metric of each arm."""
    return {
        arm: {
            metric: _arm(estimate(statement_values(metric, margin, labels), images), seeds, question)
            for metric in metrics
        }
        for arm, margin in runs.items()
    }


def _by_seed(
    first: np.ndarray, second: np.ndarray, labels: np.ndarray, images: Images, seeds: Sequence[int]
) -> dict[str, Any]:
    """Return for each seed alone the difference of its two runs: the interval over images and the McNemar test.

    They compare these two runs. Counts of several seeds are never added up.
    """
    right = [(margin > 0) == (labels == 1) for margin in (first, second)]
    found = {}
    for i, seed in enumerate(seeds):
        mine, other = right[0][i], right[1][i if len(right[1]) > 1 else 0]
        one = estimate((mine.astype(float) - other)[None], images)
        low, high = one.interval()
        test = mcnemar(mine.tolist(), other.tolist())
        found[str(seed)] = {"difference": one.value, "low": low, "high": high, **test}
    return found


def _groups(rows: Sequence[Row], runs: Runs, key: str, question: Question) -> list[dict[str, Any]]:
    """Return world less each control by group of statements: exploratory.

    The p-value is the larger of the exact one over images, for the seeds that there are, and the one over images and
    seeds. All p-values of the table are adjusted together. There is no interval for fewer than FEW statements.
    """
    found = []
    for value in sorted({row[key] for row in rows}):
        kept = np.array([row[key] == value for row in rows])
        labels = np.array([row["label"] for row in rows])[kept]
        images = Images.of([row["image"] for row in rows if row[key] == value])
        own = {arm: margin[:, kept] for arm, margin in runs.items()}
        group: dict[str, Any] = {"group": value, "statements": int(kept.sum()), "images": len(images.counts)}
        group["accuracy"] = {
            arm: float(statement_values("accuracy", margin, labels).mean()) for arm, margin in own.items()
        }
        group["differences"] = {
            control: _group_difference(
                difference_values("accuracy", own[question.world], own[control], labels), images, question
            )
            for control in question.controls
        }
        found.append(group)
    tests = [test for group in found for test in group["differences"].values()]
    for test, adjusted in zip(tests, holm([test["p_value"] for test in tests]), strict=True):
        test["adjusted_p_value"] = adjusted
    return found


def _group_difference(values: np.ndarray, images: Images, question: Question) -> dict[str, Any]:
    """Return the difference of a group, with a test that is valid for few statements."""
    p, low, high = sign_flip_p_value(values, images), None, None
    if len(images.counts) > 1:
        found = estimate(values, images)
        p = max(p, found.p_value())
        if values.shape[-1] >= FEW:
            low, high = found.interval(question.alpha)
    return {"difference": float(values.mean()), "low": low, "high": high, "p_value": p}


def _place(summary: dict[str, Any], scope: str) -> str:
    """Return the data, the size and the seeds in words."""
    own, seeds = summary["scopes"][scope], counted(len(summary["seeds"]), "seed")
    size = f"{counted(own['statements'], 'statement')} about {counted(own['images'], 'image')}"
    only = ", those whose image is not in the training set" if scope == "unseen" else ""
    return f"on {data_words(summary['data'])} ({size}{only}; {seeds})"
