"""The figures of a study for other programs, as CSV, and as LaTeX tables for a paper."""

import csv
import io
from collections.abc import Iterator, Sequence
from typing import Any

from theworld.evaluation.comparison import METRICS
from theworld.evaluation.study_verdict import METRIC_WORDS, arm_words, data_words
from theworld.utils.text import counted

COLUMNS = ("scope", "quantity", "arm", "metric", "seed", "value", "low", "high", "p_value")
MORE_COLUMNS = ("against", "adjusted_p_value", "share")  # of a study that explores, and of learning curves


def study_csv(summary: dict[str, Any]) -> str:
    """Return a line for each arm, metric and seed, and for each difference of arms; shares, not percent."""
    found = list(_csv_lines(summary))
    more = [name for name in MORE_COLUMNS if any(name in line for line in found)]
    text = io.StringIO()
    lines = csv.DictWriter(text, [*COLUMNS, *more], restval="", lineterminator="\n")
    lines.writeheader()
    lines.writerows(found)
    return text.getvalue()


def _csv_lines(summary: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for name, scope in summary["scopes"].items():
        for quantity, what in (("metric", "arms"), ("difference", "differences")):
            for arm, metrics in scope[what].items():
                for metric in (m for m in METRICS if m in metrics):
                    own = {"scope": name, "quantity": quantity, "arm": arm, "metric": metric}
                    yield from _csv_values(own, metrics[metric])
        for pair in scope.get("pairs", ()):
            for metric in (m for m in METRICS if m in pair):
                own = {"scope": name, "quantity": "pair", "arm": pair["first"], "metric": metric}
                yield from _csv_values(own | {"against": pair["second"]}, pair[metric])
    for one in summary.get("learning", ()):
        for arm, metrics in one["arms"].items():
            for metric, found in metrics.items():
                own = {"scope": "all", "quantity": "learning", "arm": arm, "metric": metric}
                yield from _csv_values(own | {"share": one["share"]}, found)


def _csv_values(own: dict[str, Any], found: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield a line for the mean over seeds, with its interval and test, and one for each seed."""
    value = found["mean"] if "mean" in found else found["difference"]
    kept = ("low", "high", "p_value", *(["adjusted_p_value"] if "adjusted_p_value" in found else []))
    yield own | {"seed": "mean", "value": value} | {key: found.get(key, "") for key in kept}
    for seed, each in found["each"].items():
        yield own | {"seed": seed, "value": each}


def study_latex(summary: dict[str, Any], scope: str = "all") -> str:
    """Return tables: of the arms, means and deviations over seeds in percent, with the difference of world to each, or
    in its place the pairs of a study that explores; and of the learning curves if there are any."""
    own, question = summary["scopes"][scope], summary["question"]
    metrics = [m for m in METRICS if m in next(iter(own["arms"].values()))]
    tables = [_latex_arms(summary, own, metrics)]
    if "pairs" in own:
        tables.append(_latex_pairs(own["pairs"], question))
    if "learning" in summary:
        tables.append(_latex_learning(summary["learning"], question))
    return "\n".join(tables)


def _latex_arms(summary: dict[str, Any], own: dict[str, Any], metrics: Sequence[str]) -> str:
    question = summary["question"]
    note = (
        f"% {counted(len(summary['seeds']), 'seed')}, {counted(own['statements'], 'statement')} about "
        f"{counted(own['images'], 'image')}, {data_words(summary['data'])}. Deviations over seeds; intervals over "
        "images and seeds."
    )
    names = [METRIC_WORDS[m] for m in metrics]
    tests = {arm: found[question["metric"]] for arm, found in own["differences"].items()}
    columns = f"l{'c' * len(metrics)}" + ("rr" if question["decides"] else "")
    head = ["arm", *names]
    if question["decides"]:
        head += [f"$\\Delta$ {METRIC_WORDS[question['metric']]}", "$p$"]
    rows = []
    for arm, figures in own["arms"].items():
        cells = [_latex_text(arm_words(arm)), *(_latex_mean(figures[m]) for m in metrics)]
        if question["decides"]:
            cells += (
                [_latex_difference(tests[arm]), _latex_p(tests[arm]["p_value"])] if arm in tests else ["", ""]
            )
        rows.append(cells)
    return _latex_table(note, columns, head, rows)


def _latex_pairs(pairs: Sequence[dict[str, Any]], question: dict[str, Any]) -> str:
    metric = question["metric"]
    number = counted(len(pairs), "comparison")
    note = f"% {number}: intervals hold all together (Bonferroni), p-values adjusted after Holm."
    rows = [
        [
            _latex_text(arm_words(pair["first"])),
            _latex_text(arm_words(pair["second"])),
            _latex_difference(pair[metric]),
            _latex_p(pair[metric]["adjusted_p_value"]),
        ]
        for pair in pairs
    ]
    head = ["arm", "less", f"$\\Delta$ {METRIC_WORDS[metric]}", "$p$ (Holm)"]
    return _latex_table(note, "llrr", head, rows)


def _latex_learning(curve: Sequence[dict[str, Any]], question: dict[str, Any]) -> str:
    metric = question["metric"]
    note = (
        f"% {METRIC_WORDS[metric].capitalize()} by share of the training statements, in as many steps each."
    )
    head = ["arm", *(f"{100 * one['share']:g} \\%" for one in curve)]
    rows = [
        [_latex_text(arm_words(arm)), *(_latex_mean(one["arms"][arm][metric]) for one in curve)]
        for arm in curve[0]["arms"]
    ]
    return _latex_table(note, "l" + "c" * len(curve), head, rows)


def _latex_table(note: str, columns: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [f"{' & '.join(cells)} \\\\" for cells in (head, *rows)]
    begin = [note, f"\\begin{{tabular}}{{{columns}}}", "\\toprule", lines[0], "\\midrule"]
    return "\n".join([*begin, *lines[1:], "\\bottomrule", "\\end{tabular}", ""])


def _latex_mean(figures: dict[str, Any]) -> str:
    sd = "" if figures["sd"] is None else f" $\\pm$ {100 * figures['sd']:.1f}"
    return f"{100 * figures['mean']:.1f}{sd}"


def _latex_difference(test: dict[str, Any]) -> str:
    low, high = (f"{100 * test[end]:+.1f}" for end in ("low", "high"))
    return f"${100 * test['difference']:+.1f}$ [${low}$, ${high}$]"


def _latex_p(p: float) -> str:
    return "$<$ 0.001" if p < 0.001 else f"{p:.3f}"


def _latex_text(text: str) -> str:
    return "".join(f"\\{c}" if c in "&%$#_{}" else c for c in text)
