"""The sections about accuracy: conditions, choices, checkpoints, groups of statements and calibration."""

from collections.abc import Sequence
from typing import Any

from theworld.data.references import footnotes, marks, quoted
from theworld.evaluation.conditions import (
    LABELS,
    checkpoint_of,
    checkpoints_in,
    condition_type,
    find_condition,
)
from theworld.evaluation.metrics import FEW, SEEN_WORDS
from theworld.evaluation.tables import options_words
from theworld.evaluation.verdict import p_words
from theworld.report.charts import MINUS, Axis, Mark, Plot, Scale, Series, Tick, Track, number, scale_of
from theworld.report.page import Chart, ChartRow, Key, Table
from theworld.report.text import between, p_value, percent, signed, small
from theworld.utils.text import counted

Summary = dict[str, Any]  # of theworld.evaluation.metrics.summarise


def name_of(condition: str) -> str:
    """Return a condition in words, after the name of its checkpoint if it has one."""
    words = LABELS[condition_type(condition)]
    return f"{checkpoint_of(condition)}: {words}" if checkpoint_of(condition) else words


def size_words(summary: Summary) -> str:
    return f"{counted(summary['statements'], 'statement')} about {counted(summary['images'], 'image')}"


def conditions_section(summary: Summary, data: str) -> dict[str, Any]:
    """Return accuracies with their intervals beside published ones, all metrics of each condition, and each pair."""
    scores = summary["systems"]
    published = [one for dataset, split in summary["releases"] for one in quoted(dataset, split)]
    notes = footnotes(published)
    majority = summary["majority_class"]
    ends = [x for s in scores.values() for x in (s["low"], s["high"])]
    scale = scale_of([*ends, majority, *(one.accuracy for one in published)], high=1.0)
    rows = [
        ChartRow(
            name_of(condition),
            Track([Mark(condition_type(condition), s["accuracy"], s["low"], s["high"])], scale, majority),
            percent(s["accuracy"]),
            between(s["low"], s["high"]),
        )
        for condition, s in scores.items()
    ]
    sources: dict[str, list[str]] = {}
    for one in published:
        track = Track([Mark("quoted", one.accuracy, hollow=True)], scale, majority)
        note = f"{one.measured} {marks(one, notes)}".strip()
        rows.append(ChartRow(one.name, track, percent(one.accuracy), "quoted", note=note))
        sources.setdefault(str(one.source), []).append(f"{one.name} {percent(one.accuracy)}")
    caption = (
        f"Accuracy with 95 % interval (Wilson). Dashed: always the more frequent answer, {percent(majority)}."
    )
    if published:
        caption += " Hollow: quoted, not measured here."
    return {
        "about": f"{size_words(summary)}: {data}.",
        "own_gemma": any(condition_type(condition) == "without" for condition in scores),
        "chart": Chart(_share_axis(scale), rows, caption),
        "table": _metrics_table(summary),
        "resamples": f"{summary['resamples']:,}",
        "quoted": "; ".join(f"{', '.join(found)} from {source}" for source, found in sources.items()),
        "notes": [f"[{number}] {note}" for number, note in enumerate(notes, 1)],
        "pairs": summary["pairs"] and {"chart": _pairs_chart(summary), "table": _pairs_table(summary)},
    }


def _share_axis(scale: Scale) -> list[Tick]:
    return scale.labels(lambda share: f"{100 * share:.3g}\u00a0%")


def _metrics_table(summary: Summary) -> Table:
    head = ["condition", "accuracy", "95 % (Wilson)", "95 % (cluster bootstrap)", "balanced accuracy"]
    head += ["AUROC", "Brier score", "expected calibration error", "predicted-positive rate"]
    head += ["other-token probability"]
    rows = [
        [
            name_of(condition),
            percent(s["accuracy"]),
            between(s["low"], s["high"]),
            between(s["image_low"], s["image_high"]),
            percent(s["balanced_accuracy"]),
            "–" if s["auroc"] is None else f"{s['auroc']:.3f}",
            f"{s['brier']:.3f}",
            f"{s['calibration_error']:.3f}",
            percent(s["says_true"]),
            small(s["outside_mean"]),
        ]
        for condition, s in summary["systems"].items()
    ]
    return Table("All metrics of each condition", head, rows)


def _pairs_table(summary: Summary) -> Table:
    head = ["pair", "difference, points", "95 % (cluster bootstrap)"]
    head += ["only first right", "only second right", "p (exact McNemar)"]
    rows = [
        [
            f"{name_of(p['first'])} {MINUS} {name_of(p['second'])}",
            signed(p["difference"]),
            "–" if p["low"] is None else f"{signed(p['low'])} to {signed(p['high'])}",
            f"{p['only_first']:,}",
            f"{p['only_second']:,}",
            p_value(p["p_value"]),
        ]
        for p in summary["pairs"]
    ]
    return Table("Every pair of conditions", head, rows)


def _pairs_chart(summary: Summary) -> Chart | None:
    """Return world tokens against each other condition, or None if no pair has an interval."""
    drawn = [p for p in summary["pairs"] if condition_type(p["first"]) == "world" and p["low"] is not None]
    if not drawn:
        return None
    scale = scale_of([*(100 * x for p in drawn for x in (p["low"], p["high"])), 0.0])
    rows = []
    for p in drawn:
        mark = Mark(condition_type(p["second"]), *(100 * p[key] for key in ("difference", "low", "high")))
        difference, chance = f"{signed(p['difference'])} points", p_words(p["p_value"], 1)
        against = f"against {name_of(p['second'])}"
        rows.append(
            ChartRow(against, Track([mark], scale, 0.0), difference, chance, note=checkpoint_of(p["first"]))
        )
    axis = scale.labels(lambda points: number(points, "+.3g") if points else "0")
    caption = "Gain from world tokens in points, with 95 % intervals (cluster bootstrap over images)."
    return Chart(axis, rows, caption)


def checkpoints_table(summary: Summary) -> Table:
    """Return the mean, the deviation and each value of several checkpoints."""
    found = summary["checkpoints"]
    models = list(dict.fromkeys(m for one in found.values() for m in one["each"]))
    names = LABELS | {"gain": f"world tokens {MINUS} plain Gemma, points"}
    rows = []
    for kind, one in found.items():
        shown = signed if kind == "gain" else percent
        each = [shown(one["each"].get(m)) for m in models]
        rows.append([names[kind], shown(one["mean"]), f"{100 * one['sd']:.1f}", *each])
    head = ["condition", "mean", "standard deviation", *models]
    return Table("Accuracy over checkpoints", head, rows)


def choices_section(choices: dict[str, Any]) -> dict[str, Any]:
    """Return the accuracy of choices and of their sets under each condition, and each pair of conditions."""
    scores, chance = choices["systems"], choices["chance"]
    scale = scale_of([*(x for s in scores.values() for x in (s["low"], s["high"])), chance], high=1.0)
    rows = [
        ChartRow(
            name_of(condition),
            Track([Mark(condition_type(condition), s["accuracy"], s["low"], s["high"])], scale, chance),
            percent(s["accuracy"]),
            between(s["low"], s["high"]),
        )
        for condition, s in scores.items()
    ]
    caption = f"Choices answered right, with 95 % interval (Wilson). Dashed: chance, {percent(chance)}."
    return {
        "about": f"{counted(choices['groups'], 'choice')} between {options_words(choices)} statements, about "
        f"{counted(choices['images'], 'image')}.",
        "chart": Chart(_share_axis(scale), rows, caption),
        "table": _choices_table(choices),
        "sets": bool(choices["sets"]),
        "pairs": choices["pairs"] and {"chart": _pairs_chart(choices), "table": _pairs_table(choices)},
    }


def _choices_table(choices: dict[str, Any]) -> Table:
    sets = choices["sets"]
    head = ["condition", "choices right", "95 % (Wilson)", "95 % (cluster bootstrap)", "ties"]
    for kind in sets:
        head += [f"{kind}s right", "95 % (Wilson)"]
    chances = [cell for one in sets.values() for cell in (percent(one["chance"]), f"of {one['n']:,}")]
    rows = [["chance", percent(choices["chance"]), f"of {choices['groups']:,}", "", "", *chances]]
    for condition, s in choices["systems"].items():
        own = [
            cell
            for kind in sets
            for cell in (
                percent(s["sets"][kind]["accuracy"]),
                between(s["sets"][kind]["low"], s["sets"][kind]["high"]),
            )
        ]
        interval = (between(s["low"], s["high"]), between(s["image_low"], s["image_high"]))
        rows.append([name_of(condition), percent(s["accuracy"]), *interval, f"{s['ties']:,}", *own])
    return Table("Choices under each condition", head, rows)


def relations_section(summary: Summary, categories: dict[str, str]) -> dict[str, Any]:
    """Return the accuracy by meta-category and relation. `categories`: the meta-category of each relation."""
    chosen = _world_and_baseline(summary)
    by_category, by_relation = summary["by_category"], summary["by_relation"]
    scores = [*by_category.values(), *by_relation.values()]
    scale = _group_scale([one for one in scores if _n(one) >= FEW] or scores, chosen)
    rows = []
    for category, score in sorted(by_category.items(), key=lambda item: -_n(item[1])):
        rows.append(_group_row(category, score, chosen, scale, "head"))
        inside = [(r, s) for r, s in by_relation.items() if categories[r] == category]
        inside.sort(key=lambda item: (-_n(item[1]), item[0]))
        rows += [_group_row(relation, s, chosen, scale) for relation, s in inside]
    caption = (
        f"95 % intervals (Wilson). Faint, marked few: fewer than {FEW} statements, too few to conclude from."
    )
    return {
        "chart": Chart(_share_axis(scale), rows, caption, _key(chosen)),
        "categories": _group_table("Accuracy by meta-category", "meta-category", by_category),
        "relations": _group_table("Accuracy by relation", "relation", by_relation),
    }


def seen_section(summary: Summary) -> dict[str, Any]:
    """Return the accuracy on images that training showed, and on all others."""
    words = {key: f"images {seen}" for key, seen in SEEN_WORDS.items()}
    chosen = _world_and_baseline(summary)
    found = {words[key]: score for key, score in summary["by_seen"].items()}
    scale = _group_scale(list(found.values()), chosen)
    rows = [_group_row(name, score, chosen, scale) for name, score in found.items()]
    return {
        "only": next(iter(found)) if len(found) == 1 else "",
        "gains": [(words[key], p) for key, pairs in summary["gain_by_seen"].items() for p in pairs],
        "chart": Chart(_share_axis(scale), rows, "95 % intervals (Wilson).", _key(chosen)),
        "table": _group_table("Accuracy by whether training showed the image", "images", found),
    }


def _group_table(caption: str, what: str, groups: dict[str, dict[str, Any]]) -> Table:
    names = list(next(iter(groups.values())))
    rows = [
        [value, f"{_n(score):,}{' (few)' if _n(score) < FEW else ''}"]
        + [f"{percent(score[s]['accuracy'])} ({between(score[s]['low'], score[s]['high'])})" for s in names]
        for value, score in groups.items()
    ]
    return Table(caption, [what, "n", *map(name_of, names)], rows)


def _world_and_baseline(summary: Summary) -> list[str]:
    """Return the conditions to draw: world tokens and plain Gemma of the first checkpoint, else the first two."""
    names = list(summary["systems"])
    model = checkpoints_in(names)[0]
    return [s for kind in ("world", "baseline") if (s := find_condition(names, model, kind))] or names[:2]


def _n(score: dict[str, Any]) -> int:
    return int(next(iter(score.values()))["n"])


def _group_scale(scores: Sequence[dict[str, Any]], chosen: Sequence[str]) -> Scale:
    return scale_of([s[c]["low"] for s in scores for c in chosen], high=1.0)


def _group_row(
    name: str, score: dict[str, Any], chosen: Sequence[str], scale: Scale, kind: str = ""
) -> ChartRow:
    few = _n(score) < FEW
    marks = [
        Mark(condition_type(c), score[c]["accuracy"], score[c]["low"], score[c]["high"], hollow=i > 0)
        for i, c in enumerate(chosen)
    ]
    value = " / ".join(f"{100 * score[c]['accuracy']:.0f}" for c in chosen) + "\u00a0%"
    note = f"n\u00a0{_n(score):,}{', few' if few else ''}"
    return ChartRow(
        name, Track(marks, scale), value, note=note, kind=f"{kind}{' faint' if few else ''}".strip()
    )


def _key(chosen: Sequence[str]) -> list[Key]:
    return [Key(condition_type(c), i > 0, name_of(c)) for i, c in enumerate(chosen)]


def calibration_section(summary: Summary) -> dict[str, Any]:
    """Return the share of true statements by P(true)."""
    unit = Scale(0.0, 1.0, (0.0, 0.2, 0.4, 0.6, 0.8, 1.0))
    plots = []
    for index, condition in enumerate(_world_and_baseline(summary)):
        score = summary["systems"][condition]
        bins, name = score["calibration"], name_of(condition)
        error = f"expected calibration error {score['calibration_error']:.3f}"
        points = [(b["p_true"], b["true"]) for b in bins]
        series = Series(condition_type(condition), "", points, bars=[(b["low"], b["high"]) for b in bins])
        title = f"Calibration of {name}: share of true statements by P(true), in {len(bins)} bins; {error}"
        x, y = Axis(unit, "P(true)"), Axis(unit, "share that is true")
        plot = Plot(f"calibration-{index}", title, [series], x, y, diagonal=True)
        plots.append((plot, f"{name}: {error}, Brier score {score['brier']:.3f}"))
    return {
        "plots": plots,
        "most_other_tokens": max(s["outside_mean"] for s in summary["systems"].values()),
        "tables": [_bins(name_of(name), s["calibration"]) for name, s in summary["systems"].items()],
    }


def _bins(name: str, bins: Sequence[dict[str, Any]]) -> Table:
    head = ["P(true)", "n", "mean P(true)", "share that is true", "95 % (Wilson)"]
    rows = []
    for b in bins:
        limits, mean = f"{b['from']:.1f} to {b['to']:.1f}", f"{b['p_true']:.3f}"
        rows.append([limits, f"{b['n']:,}", mean, percent(b["true"]), between(b["low"], b["high"])])
    return Table(f"Calibration of {name}", head, rows)
