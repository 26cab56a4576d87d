"""Phase 3, second half: per-statement records, and every metric from those alone.

A record holds what each system answered to one statement:

    {"index": 7, "image": "000000000142.jpg", "statement": "The cat ...", "relation": "left of",
     "category": "projective", "label": 1, "dataset": "vsr_random", "split": "test",
     "image_seen_in_train": false, "statement_in_train": false,
     "systems": {"world": {"logit_0": 0.5, "logit_1": 2.5, "logsumexp": 2.75, "p_true": 0.88, "outside": 0.11,
                           "correct": true}, ...}}

`p_true` weighs the two answers against each other, `outside` is the probability of all other tokens. Where several
checkpoints were scored, their systems are called `checkpoint:world` and so on.

The figures of one system, and of two on the same statements: each from scipy or scikit-learn, on plain arrays.

Dimensions: n statements, K quantities, I images.
"""

import itertools
import json
import math
from collections.abc import Sequence, Set
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import binned_statistic, binomtest, bootstrap
from sklearn.metrics import balanced_accuracy_score, brier_score_loss, roc_auc_score

from theworld.data.vsr import Statement, meta_category
from theworld.models.inference import p_true
from theworld.utils.files import publish_bytes

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


SYSTEMS = ("world", "baseline", "zero", "shuffled", "text")
# Of a checkpoint that has a Gemma of its own also what that answers without world tokens.
KINDS = (*SYSTEMS, "without")
FEW = 30  # statements: below this a share says little
Row = dict[str, Any]


def label_loss(logits: np.ndarray, labels: np.ndarray) -> float:
    """Mean cross-entropy of the true answer among the two, in nats."""
    margin = (logits[:, 1] - logits[:, 0]).astype(np.float64) * np.where(labels == 1, 1, -1)
    return float(np.logaddexp(0, -margin).mean())


# ---- records


def records(
    statements: Sequence[Statement],
    logits: dict[str, np.ndarray],
    seen_images: Set[str],
    in_train: Set[tuple[str, str]] = frozenset(),
    dataset: str = "",
    split: str = "",
) -> list[Row]:
    """One JSON record a statement; every metric follows from these alone.

    `logits`: for each system what `predict` gives; `seen_images` and `in_train`: the images, and
    the statements as (image, caption), that training had. Raises ValueError for an answer that is no number.
    """
    rows = []
    for i, statement in enumerate(statements):
        systems = {}
        for system, values in logits.items():
            zero, one, every = (float(x) for x in values[i])
            if not all(map(math.isfinite, (zero, one, every))):
                raise ValueError(
                    f"{system}: statement {statement.index} ({statement.image}) has logits {zero}, {one} and a "
                    f"logsumexp of {every}"
                )
            systems[system] = _answer(zero, one, every, statement.label)
        rows.append(
            {
                "index": statement.index,
                "image": statement.image,
                "statement": statement.caption,
                "relation": statement.relation,
                "category": meta_category(statement.relation),
                "label": statement.label,
                "dataset": dataset,
                "split": split,
                "image_seen_in_train": statement.image in seen_images,
                "statement_in_train": (statement.image, statement.caption) in in_train,
                "systems": systems,
            }
        )
    return rows


def _answer(zero: float, one: float, every: float, label: int) -> Row:
    """What a system says of one statement. A tie is an answer too: not true."""
    return {
        "logit_0": zero,
        "logit_1": one,
        "logsumexp": every,
        "p_true": p_true(zero, one),
        "outside": max(0.0, 1 - math.exp(min(zero - every, 0)) - math.exp(min(one - every, 0))),
        "correct": (one > zero) == (label == 1),
    }


def write_jsonl(rows: Sequence[Row], path: str | Path) -> None:
    """One record a line; a file is replaced as a whole or not at all."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    publish_bytes(Path(path), text.encode("utf-8"), overwrite=True)


def publish_json(value: Row, path: Path) -> None:
    """A JSON file, indented, replaced as a whole or not at all."""
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    publish_bytes(path, text.encode("utf-8"), overwrite=True)


def read_jsonl(path: str | Path) -> list[Row]:
    """What `write_jsonl` wrote. Raises ValueError naming file, line and field for what is no record, for an answer
    that does not follow from its logits, and for lines that do not have the same systems or are there twice."""
    rows: list[Row] = []
    for number, line in enumerate(Path(path).read_bytes().splitlines(), 1):
        where = f"{path}:{number}"
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{where}: {error}; wanted one record of tools/eval.py a line") from None
        _check(row, where)
        if rows and list(row["systems"]) != list(rows[0]["systems"]):
            raise ValueError(
                f"{where}: has the systems {', '.join(row['systems'])}, line 1 has {', '.join(rows[0]['systems'])}"
            )
        rows.append(row)
    if not rows:
        raise ValueError(f"{path}: no statements were scored")
    seen: dict[tuple[Any, ...], int] = {}
    for number, row in enumerate(rows, 1):
        first = seen.setdefault((row["dataset"], row["split"], row["index"]), number)
        if first != number:
            raise ValueError(f"{path}:{number}: is statement {row['index']}, as line {first} is; remove one")
    return rows


_FIELDS: dict[str, type] = {
    **dict.fromkeys(("image", "statement", "relation", "category", "dataset", "split"), str),
    **dict.fromkeys(("image_seen_in_train", "statement_in_train"), bool),
    **dict.fromkeys(("index", "label"), int),
}


def _check(row: Any, where: str) -> None:
    """ValueError unless `row` is a record."""
    if not isinstance(row, dict) or not isinstance(row.get("systems"), dict) or not row["systems"]:
        raise ValueError(f"{where}: has no systems; wanted one record of tools/eval.py a line")
    for field, kind in _FIELDS.items():
        if type(row.get(field)) is not kind:
            raise ValueError(f"{where}: {field} is {row.get(field)!r}; wanted {kind.__name__}")
    if row["label"] not in (0, 1):
        raise ValueError(f"{where}: label is {row['label']}; wanted 0 or 1")
    for system, found in row["systems"].items():
        answer: Row = found if isinstance(found, dict) else {}
        numbers: list[Any] = [answer.get(key) for key in ("logit_0", "logit_1", "logsumexp")]
        if not all(type(x) in (int, float) and math.isfinite(x) for x in numbers):
            raise ValueError(
                f"{where}: {system} has logit_0, logit_1, logsumexp {numbers}; wanted three numbers"
            )
        zero, one, every = map(float, numbers)
        for key, value in _answer(zero, one, every, row["label"]).items():
            if type(answer.get(key)) not in (int, float, bool) or abs(answer[key] - value) > 1e-9:
                raise ValueError(
                    f"{where}: {system} has {key} {answer.get(key)!r}; its logits and label give {value!r}"
                )


# ---- from records to figures


def kind_of(system: str) -> str:
    """One of KINDS: "world" of "run-1:world"."""
    return system.rpartition(":")[2]


def model_of(system: str) -> str:
    """The checkpoint: "run-1" of "run-1:world"; "" where there is but one, or for what all of them share."""
    return system.rpartition(":")[0]


def models_in(systems: Sequence[str]) -> list[str]:
    """The checkpoints that have a system of their own, in order; [""] where there is but one."""
    return list(dict.fromkeys(model_of(s) for s in systems if model_of(s))) or [""]


def system_of(systems: Sequence[str], model: str, kind: str) -> str | None:
    """The system of that kind: the checkpoint's own, or the one that all share; None where it was not scored."""
    return next((s for s in (f"{model}:{kind}", kind) if s in systems), None)


def summarise(rows: Sequence[Row]) -> dict[str, Any]:
    """All metrics of the records, as JSON: each system's figures, each pair of systems on the same statements, and
    accuracies by category, relation and whether the image was seen in training. Raises ValueError for no records."""
    if not rows:
        raise ValueError("no statements were scored")
    systems = list(rows[0]["systems"])
    correct = {s: [bool(row["systems"][s]["correct"]) for row in rows] for s in systems}
    true = sum(row["label"] for row in rows)
    summary: dict[str, Any] = {
        "statements": len(rows),
        "images": len({row["image"] for row in rows}),
        "data": sorted({(row["dataset"], row["split"]) for row in rows}),
        "majority_class": max(true, len(rows) - true) / len(rows),
        "statements_in_train": sum(row["statement_in_train"] for row in rows),
        "resamples": RESAMPLES,
        "systems": {s: _figures(rows, s) for s in systems},
        "pairs": pairs(rows, list(itertools.combinations(systems, 2))),
    }
    for system, (low, high) in zip(systems, _intervals(rows, [(s, None) for s in systems]), strict=True):
        summary["systems"][system] |= {"image_low": low, "image_high": high}
    if "world" in systems:
        summary["world_against"] = {s: mcnemar(correct["world"], correct[s]) for s in systems if s != "world"}
    for key, name in (("category", "category"), ("relation", "relation"), ("image_seen_in_train", "seen")):
        values = sorted({row[key] for row in rows})
        summary[f"by_{name}"] = {
            str(v): {
                s: accuracy([c for c, row in zip(correct[s], rows, strict=True) if row[key] == v])
                for s in systems
            }
            for v in values
        }
    gains = [
        (world, base)
        for m in models_in(systems)
        if (world := system_of(systems, m, "world")) and (base := system_of(systems, m, "baseline"))
    ]
    summary["gain_by_seen"] = {
        str(seen): pairs(some, gains)
        for seen in (False, True)
        if (some := [row for row in rows if row["image_seen_in_train"] is seen])
    }
    summary["checkpoints"] = over_checkpoints(summary)
    return summary


def write_summary(rows: Sequence[Row], path: Path) -> dict[str, Any]:
    """The summary of the records of `path`, which goes beside them: results.jsonl, results.summary.json."""
    summary = summarise(rows)
    publish_json(summary, path.with_suffix(".summary.json"))
    return summary


def _figures(rows: Sequence[Row], system: str) -> dict[str, Any]:
    answers = [row["systems"][system] for row in rows]
    column = {
        key: np.array([a[key] for a in answers], float) for key in ("logit_0", "logit_1", "p_true", "outside")
    }
    outside = column["outside"]
    return {
        **accuracy([bool(a["correct"]) for a in answers]),
        **probabilities(
            np.array([row["label"] for row in rows]), column["p_true"], column["logit_1"] - column["logit_0"]
        ),
        "outside_mean": float(outside.mean()),
        "outside_max": float(outside.max()),
    }


def pairs(rows: Sequence[Row], wanted: Sequence[tuple[str, str]]) -> list[dict[str, Any]]:
    """For each (first, second) on these rows: the difference of their accuracies, first less second, with its interval
    over images (None for a single image), how often only one of them is right, and the exact McNemar test."""
    found = []
    for (first, second), (low, high) in zip(wanted, _intervals(rows, wanted), strict=True):
        right = [[bool(row["systems"][s]["correct"]) for row in rows] for s in (first, second)]
        test = mcnemar(*right)
        difference = (test["only_first"] - test["only_second"]) / len(rows)
        names = {"first": first, "second": second, "n": len(rows)}
        found.append({**names, "difference": difference, "low": low, "high": high, **test})
    return found


def _intervals(
    rows: Sequence[Row], wanted: Sequence[tuple[str, str | None]]
) -> list[tuple[float | None, float | None]]:
    """Of the accuracy of a system, or of one less another's, with images resampled."""
    right = {s: np.array([row["systems"][s]["correct"] for row in rows], float) for s in rows[0]["systems"]}
    values = [right[first] - (right[second] if second else 0) for first, second in wanted]
    found = over_images([row["image"] for row in rows], np.array(values))
    return [interval or (None, None) for interval in found]


def over_checkpoints(summary: dict[str, Any]) -> dict[str, Any]:
    """For each kind of system of several checkpoints its accuracies, their mean and sample standard deviation; "gain"
    is world less baseline. Empty for a single checkpoint."""
    systems = list(summary["systems"])
    models = models_in(systems)
    if len(models) < 2:
        return {}
    found = {}
    for kind in KINDS:
        named = {m: system_of(systems, m, kind) for m in models}
        found[kind] = {m: summary["systems"][s]["accuracy"] for m, s in named.items() if s}
    both = [m for m in models if m in found["world"] and m in found["baseline"]]
    found["gain"] = {m: found["world"][m] - found["baseline"][m] for m in both}
    found = {
        kind: each for kind, each in found.items() if kind not in systems
    }  # what all share has no spread
    return {
        kind: {"each": each, "mean": float(np.mean(values)), "sd": float(np.std(values, ddof=1))}
        for kind, each in found.items()
        if len(values := list(each.values())) > 1
    }


def pair_of(found: Sequence[dict[str, Any]], first: str, second: str) -> dict[str, Any] | None:
    """That pair of `pairs`, turned round where it stands the other way; None where it was not measured."""
    for pair in found:
        if (pair["first"], pair["second"]) == (first, second):
            return pair
        if (pair["first"], pair["second"]) == (second, first):
            low, high = (None if x is None else -x for x in (pair["high"], pair["low"]))
            turned = {
                "first": first,
                "second": second,
                "difference": -pair["difference"],
                "low": low,
                "high": high,
            }
            return pair | turned | {"only_first": pair["only_second"], "only_second": pair["only_first"]}
    return None
