"""The parts of a report about groups of statements and about probabilities, from a summary alone, as HTML."""

from collections.abc import Sequence
from html import escape
from typing import Any

from theworld.charts import Mark, Scale, Series, plot, scale_of, track
from theworld.metrics import FEW, kind_of, model_of, models_in, system_of
from theworld.page import between, chart, details, paragraph, percent, row, signed, table
from theworld.report_figures import Summary, axis, name_of


def relations(summary: Summary, categories: dict[str, str]) -> str:
    """Accuracy by meta-category and relation, with world tokens and without. `categories`: that of each relation."""
    names = list(summary["systems"])
    chosen = _world_and_baseline(names)
    scores = [*summary["by_category"].values(), *summary["by_relation"].values()]
    scale = _group_scale([one for one in scores if _n(one) >= FEW] or scores, chosen)
    rows = [axis(scale)]
    for category, score in sorted(summary["by_category"].items(), key=lambda item: -_n(item[1])):
        rows.append(_group_row(category, score, chosen, scale, "head"))
        inside = [(r, s) for r, s in summary["by_relation"].items() if categories[r] == category]
        rows += [
            _group_row(r, s, chosen, scale)
            for r, s in sorted(inside, key=lambda item: (-_n(item[1]), item[0]))
        ]
    caption = (
        f"95 % intervals (Wilson). Groups of fewer than {FEW} statements are marked few and drawn faintly: they say "
        "little."
    )
    return "\n".join(
        [
            paragraph("Meta-categories in bold, each with its relations, by number of statements."),
            chart(rows, caption, _key(chosen)),
            details(
                "Meta-categories as a table",
                group_table("Accuracy by meta-category", "meta-category", summary["by_category"]),
            ),
            details(
                "Relations as a table",
                group_table("Accuracy by relation", "relation", summary["by_relation"]),
            ),
        ]
    )


def seen(summary: Summary) -> str:
    """Images that training showed against those it did not."""
    words = {"False": "images not seen in training", "True": "images seen in training"}
    chosen = _world_and_baseline(list(summary["systems"]))
    found = {words[key]: score for key, score in summary["by_seen"].items()}
    scale = _group_scale(list(found.values()), chosen)
    rows = [axis(scale), *(_group_row(name, score, chosen, scale) for name, score in found.items())]
    parts = []
    if len(found) == 1:
        parts.append(paragraph(f"All statements are about {next(iter(found))}."))
    for key, pairs in summary["gain_by_seen"].items():
        for p in pairs:
            who = f"{model_of(p['first'])}: world" if model_of(p["first"]) else "World"
            interval = (
                "" if p["low"] is None else f", 95 % interval {signed(p['low'])} to {signed(p['high'])}"
            )
            parts.append(
                paragraph(
                    f"{who} tokens on {words[key]}: {signed(p['difference'])} points{interval}, exact "
                    f"McNemar p = {p['p_value']:.2g} ({p['only_first']:,} right only with them, {p['only_second']:,} "
                    "only without)."
                )
            )
    parts.append(chart(rows, "95 % intervals (Wilson).", _key(chosen)))
    parts.append(
        details("As a table", group_table("Accuracy by whether training showed the image", "images", found))
    )
    return "\n".join(parts)


def group_table(caption: str, what: str, groups: dict[str, dict[str, Any]]) -> str:
    """Accuracy and interval of every system in every group."""
    names = list(next(iter(groups.values())))
    rows = [
        [value, f"{_n(score):,}{' (few)' if _n(score) < FEW else ''}"]
        + [f"{percent(score[s]['accuracy'])} ({between(score[s]['low'], score[s]['high'])})" for s in names]
        for value, score in groups.items()
    ]
    return table(caption, [what, "n", *map(name_of, names)], rows)


def _world_and_baseline(names: Sequence[str]) -> list[str]:
    """What groups are drawn of: the first checkpoint's world tokens and plain Gemma, else whatever there is."""
    model = models_in(names)[0]
    found = [s for kind in ("world", "baseline") if (s := system_of(names, model, kind))]
    return found or list(names[:2])


def _n(score: dict[str, Any]) -> int:
    return int(next(iter(score.values()))["n"])


def _group_scale(scores: Sequence[dict[str, Any]], chosen: Sequence[str]) -> Scale:
    return scale_of([s[c]["low"] for s in scores for c in chosen], high=1.0)


def _group_row(name: str, score: dict[str, Any], chosen: Sequence[str], scale: Scale, kind: str = "") -> str:
    n, few = _n(score), _n(score) < FEW
    marks = [
        Mark(kind_of(c), score[c]["accuracy"], score[c]["low"], score[c]["high"], hollow=i > 0)
        for i, c in enumerate(chosen)
    ]
    figure = " / ".join(f"{100 * score[c]['accuracy']:.0f}" for c in chosen) + "\u00a0%"
    note = f"n\u00a0{n:,}{', few' if few else ''}"
    return row(name, track(marks, scale), figure, kind=f"{kind}{' faint' if few else ''}".strip(), note=note)


def _key(chosen: Sequence[str]) -> list[tuple[str, str, bool]]:
    return [(kind_of(c), name_of(c), i > 0) for i, c in enumerate(chosen)]


# ---- probabilities


def calibration(summary: Summary) -> str:
    """How often a statement is true that is given so much probability."""
    names = list(summary["systems"])
    ends = Scale(0.0, 1.0, (0.0, 0.2, 0.4, 0.6, 0.8, 1.0))
    drawings = []
    for number, system in enumerate(_world_and_baseline(names)):
        score = summary["systems"][system]
        bins = score["calibration"]
        points = Series(
            kind_of(system),
            "",
            [(b["p_true"], b["true"]) for b in bins],
            bars=[(b["low"], b["high"]) for b in bins],
        )
        title = (
            f"Calibration of {name_of(system)}: share of true statements by P(true), in {len(bins)} bins; "
            f"mean distance from equality {score['calibration_error']:.3f}"
        )
        drawing = plot(
            f"calibration-{number}",
            title,
            [points],
            (ends, "P(true)"),
            (ends, "share that is true"),
            diagonal=True,
        )
        caption = f"{name_of(system)}: calibration error {score['calibration_error']:.3f}, Brier {score['brier']:.3f}"
        drawings.append(f"<figure>{drawing}<figcaption>{escape(caption)}</figcaption></figure>")
    tables = [_bins(system, summary["systems"][system]["calibration"]) for system in names]
    most = max(summary["systems"].values(), key=lambda s: s["outside_mean"])
    intro = (
        "P(true) weighs the logits of '0' and '1' against each other. On the dashed line what is given a probability "
        "of 70 % is true in 70 % of the cases. Bars: 95 % intervals. "
        f"Outside the two answers lie at most {percent(most['outside_mean'], 2)} of the probability on average."
    )
    return (
        paragraph(intro)
        + f'<div class="pair">{"".join(drawings)}</div>'
        + details("As tables, for every system", "".join(tables))
    )


def _bins(system: str, bins: list[dict[str, Any]]) -> str:
    rows = [
        [
            f"{b['from']:.1f} to {b['to']:.1f}",
            f"{b['n']:,}",
            f"{b['p_true']:.3f}",
            percent(b["true"]),
            between(b["low"], b["high"]),
        ]
        for b in bins
    ]
    head = ["P(true)", "n", "mean P(true)", "share that is true", "95 % (Wilson)"]
    return table(f"Calibration of {name_of(system)}", head, rows)
