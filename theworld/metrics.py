"""Phase 3, second half: per-statement records, and every metric from those alone."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import binomtest

from theworld.answers import p_true
from theworld.vsr import Statement, meta_category

SYSTEMS = ("world", "baseline", "zero", "shuffled")


def label_loss(logits: np.ndarray, labels: np.ndarray) -> float:
    """Mean cross-entropy of the true answer among the two, in nats."""
    margin = (logits[:, 1] - logits[:, 0]).astype(np.float64) * np.where(labels == 1, 1, -1)
    return float(np.logaddexp(0, -margin).mean())


def records(
    statements: Sequence[Statement], logits: dict[str, np.ndarray], seen_images: set[str]
) -> list[dict[str, Any]]:
    """One JSON record a statement; every metric follows from these alone."""
    rows = []
    for i, statement in enumerate(statements):
        systems = {}
        for system, values in logits.items():
            zero, one = (float(x) for x in values[i])
            if not (math.isfinite(zero) and math.isfinite(one)):
                raise ValueError(
                    f"{system}: statement {statement.index} ({statement.image}) has logits {zero}, {one}"
                )
            correct = (one > zero) == (statement.label == 1)
            systems[system] = {
                "logit_0": zero,
                "logit_1": one,
                "p_true": p_true(zero, one),
                "correct": correct,
            }
        rows.append(
            {
                "index": statement.index,
                "image": statement.image,
                "statement": statement.caption,
                "relation": statement.relation,
                "category": meta_category(statement.relation),
                "label": statement.label,
                "image_seen_in_train": statement.image in seen_images,
                "systems": systems,
            }
        )
    return rows


def write_jsonl(rows: Sequence[dict[str, Any]], path: str | Path) -> None:
    """One record a line."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def accuracy(correct: Sequence[bool]) -> dict[str, Any]:
    """Share of right answers with its 95 % interval (Wilson 1927)."""
    hits, n = sum(correct), len(correct)
    interval = binomtest(hits, n).proportion_ci(0.95, method="wilson")
    return {"n": n, "accuracy": hits / n, "low": float(interval.low), "high": float(interval.high)}


def mcnemar(first: Sequence[bool], second: Sequence[bool]) -> dict[str, Any]:
    """Exact McNemar test of two systems on the same statements: two-sided binomial over those where only one
    of them is right (McNemar 1947)."""
    only_first = sum(a and not b for a, b in zip(first, second, strict=True))
    only_second = sum(b and not a for a, b in zip(first, second, strict=True))
    discordant = only_first + only_second
    p = float(binomtest(only_first, discordant, 0.5).pvalue) if discordant else 1.0
    return {"only_first": only_first, "only_second": only_second, "p_value": p}


def summarise(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """All metrics of the records: accuracies with intervals, McNemar of world against each control, and accuracies by
    category, relation and whether the image was seen in training."""
    if not rows:
        raise ValueError("no statements were scored")
    systems = list(rows[0]["systems"])
    correct = {s: [bool(row["systems"][s]["correct"]) for row in rows] for s in systems}
    true = sum(row["label"] for row in rows)
    summary: dict[str, Any] = {
        "statements": len(rows),
        "images": len({row["image"] for row in rows}),
        "majority_class": max(true, len(rows) - true) / len(rows),
        "systems": {s: accuracy(correct[s]) for s in systems},
    }
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
    return summary


def table(summary: dict[str, Any]) -> str:
    """The summary as text for a terminal."""
    lines = [f"{summary['statements']:,} statements, {summary['images']:,} images"]
    lines.append(
        f"{'':<24}{'n':>6}  {'accuracy':>8}  {'95 % interval':<15}  world against it (exact McNemar)"
    )
    lines.append(f"{'majority class':<24}{summary['statements']:>6}  {summary['majority_class']:>8.1%}")
    for system, score in summary["systems"].items():
        lines.append(_row(system, score) + _against(summary.get("world_against", {}).get(system)))
    for title, key in (
        ("category", "by_category"),
        ("relation", "by_relation"),
        ("image seen in training", "by_seen"),
    ):
        lines += ["", f"by {title} ({' / '.join(summary['systems'])})"]
        for value, scores in summary[key].items():
            n = next(iter(scores.values()))["n"]
            shares = " / ".join(f"{score['accuracy']:.1%}" for score in scores.values())
            lines.append(f"  {value:<22}{n:>6}  {shares}{'  (few)' if n < 30 else ''}")
    return "\n".join(lines)


def _row(name: str, score: dict[str, Any]) -> str:
    interval = f"{score['low']:.1%}–{score['high']:.1%}"
    return f"{name:<24}{score['n']:>6}  {score['accuracy']:>8.1%}  {interval:<15}"


def _against(test: dict[str, Any] | None) -> str:
    if test is None:
        return ""
    return f"  {test['only_first']} right only with it, {test['only_second']} only without, p = {test['p_value']:.2g}"
