"""The summary of an evaluation as text for a terminal."""

from collections.abc import Mapping, Sequence
from typing import Any

from theworld.data.references import footnotes, marks, quoted
from theworld.data.vsr import split_words
from theworld.evaluation.conditions import CONDITION_TYPES
from theworld.evaluation.metrics import FEW, SEEN_WORDS
from theworld.evaluation.verdict import p_words, points, verdict
from theworld.utils.text import counted

LEGEND = """\
95 % intervals of the accuracy: Wilson, and cluster bootstrap over images
other tokens: probability of all tokens but '0' and '1'; ECE: expected calibration error"""


def table(summary: dict[str, Any]) -> str:
    """Return the conditions, their pairs, the groups of statements and the verdict."""
    conditions = list(summary["systems"])
    width = max(24, *(len(c) + 2 for c in conditions))
    data = " and ".join(split_words(dataset, split) for dataset, split in summary["data"])
    lines = [
        f"{counted(summary['statements'], 'statement')} about {counted(summary['images'], 'image')}"
        + (f": {data}" if data else "")
    ]
    lines += [*_accuracies(summary, width), "", *_probabilities(summary, width), LEGEND]
    lines += _choices(summary.get("choices"), width)
    if len(conditions) > 1:
        lines += ["", *_pairs(summary["pairs"], width)]
    lines += _checkpoints(summary["checkpoints"])
    for title, key in (
        ("category", "by_category"),
        ("relation", "by_relation"),
        ("whether training showed the image", "by_seen"),
    ):
        lines += [
            "",
            f"accuracy by {title} ({' / '.join(conditions)}; 95 % intervals, Wilson; few: fewer than {FEW} statements)",
        ]
        names = SEEN_WORDS if key == "by_seen" else {}
        lines += [_group(names.get(value, value), scores) for value, scores in summary[key].items()]
    found = verdict(summary)
    return "\n".join([*lines, "", found.sentence, *(f"- {note}" for note in found.notes)])


def _accuracies(summary: dict[str, Any], width: int) -> list[str]:
    lines = [
        f"{'condition':<{width}}{'n':>6}  {'accuracy':>8}  {'95 % (Wilson)':<15}  {'95 % (images)':<15}  "
        "world against it (exact McNemar)",
        f"{'majority class':<{width}}{summary['statements']:>6}  {summary['majority_class']:>8.1%}",
    ]
    for condition, score in summary["systems"].items():
        line = f"{condition:<{width}}{score['n']:>6}  {score['accuracy']:>8.1%}"
        line += (
            f"  {span(score['low'], score['high']):<15}  {span(score['image_low'], score['image_high']):<15}"
        )
        lines.append((line + _against(summary.get("world_against", {}).get(condition))).rstrip())
    found = [one for dataset, split in summary["releases"] for one in quoted(dataset, split)]
    notes = footnotes(found)
    for one in found:
        how = f"{one.measured}; " if one.measured else ""
        line = f"{one.name:<{width + 6}}  {one.accuracy:>8.1%}  quoted: {how}{one.source.words} {marks(one, notes)}"
        lines.append(line.rstrip())
    return lines + [f"[{number}] {note}" for number, note in enumerate(notes, 1)]


def _against(test: dict[str, Any] | None) -> str:
    if test is None:
        return ""
    counts = f"{test['only_first']} right only with world tokens, {test['only_second']} only without"
    return f"  {counts}, {p_words(test['p_value'])}"


def _probabilities(summary: dict[str, Any], width: int) -> list[str]:
    lines = [
        f"{'condition':<{width}}{'predicted positive':>18}  {'balanced accuracy':>17}  {'AUROC':>6}  {'Brier':>6}  "
        f"{'ECE':>6}  other tokens"
    ]
    for condition, score in summary["systems"].items():
        lines.append(
            f"{condition:<{width}}{score['says_true']:>18.1%}  {_or_none(score['balanced_accuracy'], '.1%'):>17}  "
            f"{_or_none(score['auroc'], '.3f'):>6}  {score['brier']:>6.3f}  {score['calibration_error']:>6.3f}  "
            f"mean {score['outside_mean']:.2g}, maximum {score['outside_max']:.2g}"
        )
    return lines


def _pairs(pairs: Sequence[dict[str, Any]], width: int) -> list[str]:
    width = max(width, max(len(f"{p['first']} − {p['second']}") for p in pairs) + 2)
    lines = [
        f"{'pair':<{width}}{'difference':>13}  {'95 % (images)':<17}  only first / only second right, p "
        "(exact McNemar, not adjusted for the number of pairs)"
    ]
    for pair in pairs:
        name = f"{pair['first']} − {pair['second']}"
        interval = "none" if pair["low"] is None else f"{100 * pair['low']:+.1f} to {100 * pair['high']:+.1f}"
        lines.append(
            f"{name:<{width}}{points(pair['difference']):>13}  {interval.replace('-', '−'):<17}  "
            f"{pair['only_first']} / {pair['only_second']}, {p_words(pair['p_value'])}"
        )
    return lines


def _choices(choices: Mapping[str, Any] | None, width: int) -> list[str]:
    """Return the accuracy of choices under each condition, of the sets of choices, and the pairs of conditions."""
    if choices is None:
        return []
    lines = [
        "",
        f"choices: {counted(choices['groups'], 'group')} of {options_words(choices)} statements about "
        f"{counted(choices['images'], 'image')}; right: the true one has the largest P(true), alone",
        f"{'condition':<{width}}{'n':>6}  {'accuracy':>8}  {'95 % (Wilson)':<15}  {'95 % (images)':<15}  ties"
        + "".join(f"  {kind + 's right':>12}" for kind in choices["sets"]),
        f"{'chance':<{width}}{choices['groups']:>6}  {choices['chance']:>8.1%}{'':>40}"
        + "".join(f"  {one['chance']:>12.1%}" for one in choices["sets"].values()),
    ]
    for condition, score in choices["systems"].items():
        line = f"{condition:<{width}}{score['n']:>6}  {score['accuracy']:>8.1%}"
        line += (
            f"  {span(score['low'], score['high']):<15}  {span(score['image_low'], score['image_high']):<15}"
        )
        line += f"  {score['ties']:>4}" + "".join(
            f"  {one['accuracy']:>12.1%}" for one in score["sets"].values()
        )
        lines.append(line)
    return lines + (["", *_pairs(choices["pairs"], width)] if choices["pairs"] else [])


def options_words(choices: Mapping[str, Any]) -> str:
    """Return the numbers of options that choices have in words: "4", or "2 to 6"."""
    fewest, most = min(choices["options"]), max(choices["options"])
    return str(most) if fewest == most else f"{fewest} to {most}"


def _checkpoints(found: Mapping[str, Any]) -> list[str]:
    if not found:
        return []
    lines = ["", "accuracy over checkpoints (mean, sample standard deviation, each checkpoint)"]
    for name in (*CONDITION_TYPES, "gain"):
        if name in found:
            spread = found[name]
            label = "world − baseline" if name == "gain" else name
            each = ", ".join(f"{m} {value:.1%}" for m, value in spread["each"].items())
            lines.append(f"  {label:<22}{spread['mean']:>7.1%}  {spread['sd']:>6.1%}  {each}")
    return lines


def _group(value: str, scores: dict[str, Any]) -> str:
    n = next(iter(scores.values()))["n"]
    shares = " / ".join(f"{score['accuracy']:.1%}" for score in scores.values())
    spans = " / ".join(span(score["low"], score["high"]) for score in scores.values())
    return f"  {value:<22}{n:>6}  {shares}{'  (few)' if n < FEW else ''}  [{spans}]"


def span(low: float | None, high: float | None) -> str:
    """Return an interval of shares in percent, "" if there is none."""
    return "" if low is None or high is None else f"{low:.1%}–{high:.1%}"


def _or_none(value: float | None, form: str) -> str:
    return "none" if value is None else format(value, form)
