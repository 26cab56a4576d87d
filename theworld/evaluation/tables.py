"""A summary of `theworld.evaluation.metrics` as text for a terminal."""

from collections.abc import Mapping, Sequence
from typing import Any

from theworld.data.vsr import quoted
from theworld.evaluation.metrics import FEW, KINDS
from theworld.evaluation.verdict import points, verdict

NAMES = {
    "world": "world tokens",
    "baseline": "plain Gemma",
    "zero": "zero latents",
    "shuffled": "another image's latents",
    "text": "text only",
    "without": "its own Gemma alone",
}


def table(summary: dict[str, Any]) -> str:
    """Verdict, systems, pairs and groups."""
    systems = list(summary["systems"])
    width = max(24, *(len(s) + 2 for s in systems))
    data = ", ".join(f"{dataset} {split}".strip() for dataset, split in summary["data"])
    lines = [
        f"{summary['statements']:,} statements, {summary['images']:,} images{f' of {data}' if data else ''}"
    ]
    lines += [*_systems(summary, width), "", *_probabilities(summary, width)]
    if len(systems) > 1:
        lines += ["", *_pairs(summary["pairs"], width)]
    lines += _checkpoints(summary["checkpoints"])
    for title, key in (
        ("category", "by_category"),
        ("relation", "by_relation"),
        ("image seen in training", "by_seen"),
    ):
        lines += ["", f"by {title} ({' / '.join(systems)}; 95 % intervals; few: below {FEW})"]
        lines += [_group(value, scores) for value, scores in summary[key].items()]
    found = verdict(summary)
    return "\n".join([*lines, "", found.sentence, *(f"- {note}" for note in found.notes)])


def _systems(summary: dict[str, Any], width: int) -> list[str]:
    lines = [
        f"{'':<{width}}{'n':>6}  {'accuracy':>8}  {'95 % (Wilson)':<15}  {'over images':<15}  "
        "world against it (exact McNemar)",
        f"{'majority class':<{width}}{summary['statements']:>6}  {summary['majority_class']:>8.1%}",
    ]
    for system, score in summary["systems"].items():
        line = f"{system:<{width}}{score['n']:>6}  {score['accuracy']:>8.1%}  {span(score['low'], score['high']):<15}"
        line += f"  {span(score['image_low'], score['image_high']):<15}"
        lines.append((line + _against(summary.get("world_against", {}).get(system))).rstrip())
    for dataset, split in summary["data"]:
        for reference, value in quoted(dataset, split):
            lines.append(f"{reference.system:<{width + 6}}  {value:>8.1%}  quoted: {reference.source}")
    return lines


def _against(test: dict[str, Any] | None) -> str:
    if test is None:
        return ""
    return f"  {test['only_first']} right only with it, {test['only_second']} only without, p = {test['p_value']:.2g}"


def _probabilities(summary: dict[str, Any], width: int) -> list[str]:
    lines = [
        f"{'':<{width}}{'says true':>9}  {'balanced':>8}  {'AUROC':>6}  {'Brier':>6}  {'calib. error':>12}"
        f"  probability outside '0' and '1'"
    ]
    for system, score in summary["systems"].items():
        lines.append(
            f"{system:<{width}}{score['says_true']:>9.1%}  {_or_none(score['balanced_accuracy'], '.1%'):>8}  "
            f"{_or_none(score['auroc'], '.3f'):>6}  {score['brier']:>6.3f}  {score['calibration_error']:>12.3f}  "
            f"mean {score['outside_mean']:.2g}, most {score['outside_max']:.2g}"
        )
    return lines


def _pairs(pairs: Sequence[dict[str, Any]], width: int) -> list[str]:
    wide = max(len(f"{p['first']} − {p['second']}") for p in pairs) + 2
    lines = [
        f"{'pairs':<{max(width, wide)}}{'difference':>13}  {'95 % over images':<17}  only first / only second right, "
        "p (exact McNemar, not adjusted for their number)"
    ]
    for pair in pairs:
        name = f"{pair['first']} − {pair['second']}"
        interval = "none" if pair["low"] is None else f"{100 * pair['low']:+.1f} to {100 * pair['high']:+.1f}"
        lines.append(
            f"{name:<{max(width, wide)}}{points(pair['difference']):>13}  {interval.replace('-', '−'):<17}  "
            f"{pair['only_first']} / {pair['only_second']}, p = {pair['p_value']:.2g}"
        )
    return lines


def _checkpoints(found: Mapping[str, Any]) -> list[str]:
    if not found:
        return []
    lines = ["", "over checkpoints (mean, sample standard deviation, each)"]
    for kind in (*KINDS, "gain"):
        if kind in found:
            one = found[kind]
            name = "world − baseline" if kind == "gain" else kind
            each = ", ".join(f"{m} {value:.1%}" for m, value in one["each"].items())
            lines.append(f"  {name:<22}{one['mean']:>7.1%}  {one['sd']:>6.1%}  {each}")
    return lines


def _group(value: str, scores: dict[str, Any]) -> str:
    n = next(iter(scores.values()))["n"]
    shares = " / ".join(f"{score['accuracy']:.1%}" for score in scores.values())
    spans = " / ".join(span(score["low"], score["high"]) for score in scores.values())
    return f"  {value:<22}{n:>6}  {shares}{'  (few)' if n < FEW else ''}  [{spans}]"


def span(low: float | None, high: float | None) -> str:
    """An interval of shares."""
    return "" if low is None or high is None else f"{low:.1%}–{high:.1%}"


def _or_none(value: float | None, form: str) -> str:
    return "none" if value is None else format(value, form)
