"""The parts of a report that follow from a summary of `theworld.metrics` alone, as HTML."""

from collections.abc import Callable, Sequence
from html import escape
from typing import Any

from theworld.charts import Mark, Scale, scale_of, track, track_axis
from theworld.metrics import kind_of, model_of, models_in, pair_of, system_of
from theworld.page import between, chart, details, paragraph, percent, row, signed, table, words
from theworld.references import Reference, quoted
from theworld.tables import NAMES
from theworld.verdict import HELPS, HURTS, NO_EVIDENCE, NOT_THE_WORLD, UNCONTROLLED, UNTESTED, Verdict

WORDS = {
    HELPS: ("good", "World tokens help"),
    HURTS: ("bad", "World tokens hurt"),
    NO_EVIDENCE: ("open", "No evidence"),
    NOT_THE_WORLD: ("open", "A gain, but not shown to be the world"),
    UNCONTROLLED: ("open", "A gain, not controlled"),
    UNTESTED: ("open", "Not tested"),
    "mixed": ("open", "Checkpoints do not agree"),
}
Summary = dict[str, Any]


def name_of(system: str) -> str:
    """A system in words, behind its checkpoint."""
    words = NAMES[kind_of(system)]
    return f"{model_of(system)}: {words}" if model_of(system) else words


def header(summary: Summary, found: Verdict) -> str:
    """The verdict, what has to be said beside it, and the figures it rests on."""
    kind, word = WORDS[found.kind]
    notes = "".join(f"<li>{words(note)}</li>" for note in found.notes)
    return (
        f'<div class="verdict {kind}"><span class="word">{escape(word)}</span><p>{words(found.sentence)}</p></div>'
        + (f'<ul class="notes">{notes}</ul>' if notes else "")
        + _tiles(summary)
    )


def _tiles(summary: Summary) -> str:
    names = list(summary["systems"])
    models = models_in(names)
    gain = summary["checkpoints"].get("gain")
    if gain:
        values = list(gain["each"].values())
        tiles = [
            ("checkpoints", str(len(values)), "on the same statements"),
            (
                "mean gain over plain Gemma",
                f"{signed(gain['mean'])} points",
                f"sd {100 * gain['sd']:.1f} points",
            ),
            ("smallest gain", f"{signed(min(values))} points", ""),
            ("largest gain", f"{signed(max(values))} points", ""),
        ]
        return _tile_list(tiles)
    world, baseline = (system_of(names, models[0], kind) for kind in ("world", "baseline"))
    tiles = []
    for system in (world, baseline):
        if system:
            score = summary["systems"][system]
            interval = f"95 % interval {between(score['low'], score['high'])}"
            tiles.append((NAMES[kind_of(system)], percent(score["accuracy"]), interval))
    pair = pair_of(summary["pairs"], world, baseline) if world and baseline else None
    if pair:
        ends = f"95 % interval {signed(pair['low'])} to {signed(pair['high'])}, over images"
        tiles.append(
            ("difference", f"{signed(pair['difference'])} points", ends if pair["low"] is not None else "")
        )
        counts = f"{pair['only_first']:,} right only with them, {pair['only_second']:,} only without"
        tiles.append(("exact McNemar", f"p = {pair['p_value']:.2g}", counts))
    return _tile_list(tiles)


def _tile_list(tiles: Sequence[tuple[str, str, str]]) -> str:
    inner = "".join(
        f"<div><dt>{escape(k)}</dt><dd>{words(v)}{f'<small>{words(s)}</small>' if s else ''}</dd></div>"
        for k, v, s in tiles
    )
    return f'<dl class="tiles">{inner}</dl>'


# ---- accuracy


def systems(summary: Summary) -> str:
    """Accuracies with their intervals, published ones beside them; all figures of each system; every pair."""
    scores = summary["systems"]
    others = [(r, value) for data, split in summary["data"] for r, value in quoted(data, split)]
    ends = [x for s in scores.values() for x in (s["low"], s["high"])]
    scale = scale_of([*ends, summary["majority_class"], *(v for _, v in others)], high=1.0)
    rows = [axis(scale)]
    for system, score in scores.items():
        mark = Mark(kind_of(system), score["accuracy"], score["low"], score["high"])
        drawing = track([mark], scale, summary["majority_class"])
        rows.append(
            row(name_of(system), drawing, percent(score["accuracy"]), between(score["low"], score["high"]))
        )
    for reference, value in others:
        drawing = track([Mark("quoted", value, hollow=True)], scale, summary["majority_class"])
        rows.append(row(reference.system, drawing, percent(value), "quoted"))
    majority = percent(summary["majority_class"])
    caption = (
        f"Accuracy with its 95 % interval (Wilson). Dashed: always the more frequent answer, {majority}."
    )
    if others:
        caption += " Hollow: quoted from papers, not measured here."
    return "\n".join(
        [_about(summary, bool(others)), chart(rows, caption), _all_figures(summary, others), _pairs(summary)]
    )


def _about(summary: Summary, with_others: bool) -> str:
    data = ", ".join(f"{dataset} {split}".strip() for dataset, split in summary["data"])
    text = f"{summary['statements']:,} statements about {summary['images']:,} images{f' of {data}' if data else ''}."
    text += (
        " Plain Gemma has the photograph and no world tokens; zero latents are the mean latent, which says nothing; "
        "text only is Gemma without the photograph."
    )
    if any(kind_of(system) == "without" for system in summary["systems"]):
        text += " Its own Gemma alone is the one that was trained, without world tokens."
    if not with_others:
        text += " Published results are for the test splits of Visual Spatial Reasoning, so none is drawn beside these."
    return paragraph(text)


def axis(scale: Scale, shown: Callable[[float], str] = lambda x: f"{100 * x:.3g}\u00a0%") -> str:
    return row("", track_axis(scale, [shown(t) for t in scale.ticks]), "", kind="scale")


def _all_figures(summary: Summary, others: Sequence[tuple[Reference, float]]) -> str:
    head = [
        "system",
        "accuracy",
        "95 % (Wilson)",
        "95 % over images",
        "balanced",
        "AUROC",
        "Brier",
        "calibration",
    ]
    head += ["says true", "outside"]
    rows = []
    for system, s in summary["systems"].items():
        auroc = "–" if s["auroc"] is None else f"{s['auroc']:.3f}"
        rows.append(
            [
                name_of(system),
                percent(s["accuracy"]),
                between(s["low"], s["high"]),
                between(s["image_low"], s["image_high"]),
                percent(s["balanced_accuracy"]),
                auroc,
                f"{s['brier']:.3f}",
                f"{s['calibration_error']:.3f}",
                percent(s["says_true"]),
                f"{s['outside_mean']:.2g}",
            ]
        )
    note = (
        f"Over images: bootstrap of {summary['resamples']:,} resamples, images and not statements drawn again, since "
        "statements about one image are not independent. Balanced: mean of the accuracies on true and on false "
        "statements. Brier: squared distance of P(true) from the truth, 0.25 for always 0.5. Calibration: mean "
        "distance of P(true) from the share that is true, over ten bins. Outside: mean probability of all tokens but "
        "'0' and '1'."
    )
    return table("All figures of each system", head, rows) + paragraph(note) + _quoted(others)


def _quoted(others: Sequence[tuple[Reference, float]]) -> str:
    sources: dict[str, list[str]] = {}
    for reference, value in others:
        sources.setdefault(reference.source, []).append(f"{reference.system} {percent(value)}")
    quotes = "; ".join(f"{', '.join(found)} from {source}" for source, found in sources.items())
    return paragraph(f"Quoted, not measured here: {quotes}.") if others else ""


def _pairs(summary: Summary) -> str:
    if not summary["pairs"]:
        return ""
    rows = [
        [
            f"{name_of(p['first'])} − {name_of(p['second'])}",
            f"{signed(p['difference'])}",
            "–" if p["low"] is None else f"{signed(p['low'])} to {signed(p['high'])}",
            f"{p['only_first']:,}",
            f"{p['only_second']:,}",
            f"{p['p_value']:.2g}",
        ]
        for p in summary["pairs"]
    ]
    head = [
        "pair",
        "difference, points",
        "95 % over images",
        "only first right",
        "only second right",
        "p (exact McNemar)",
    ]
    note = (
        "p values are two-sided and not adjusted for their number; the question asked is that of world tokens against "
        "none."
    )
    return "\n".join(
        [
            "<h3>Each pair of systems on the same statements</h3>",
            _drawn_pairs(summary),
            details(f"All {len(rows)} pairs as a table", table("Every pair of systems", head, rows)),
            paragraph(note),
        ]
    )


def _drawn_pairs(summary: Summary) -> str:
    """World tokens against each other system, as far as there are intervals."""
    drawn = [p for p in summary["pairs"] if kind_of(p["first"]) == "world" and p["low"] is not None]
    if not drawn:
        return ""
    scale = scale_of([*(100 * x for p in drawn for x in (p["low"], p["high"])), 0.0])
    marks = [axis(scale, lambda x: f"{x:+.3g}".replace("-", "−") if x else "0")]
    for p in drawn:
        mark = Mark(kind_of(p["second"]), *(100 * p[k] for k in ("difference", "low", "high")))
        marks.append(
            row(
                f"against {name_of(p['second'])}",
                track([mark], scale, 0.0),
                f"{signed(p['difference'])} points",
                f"p = {p['p_value']:.1g}",
                note=model_of(p["first"]),
            )
        )
    return chart(marks, "What world tokens add, in points, with 95 % intervals over images.")


def checkpoints(summary: Summary) -> str:
    """Mean, deviation and each of several checkpoints."""
    found = summary["checkpoints"]
    models = list(dict.fromkeys(m for one in found.values() for m in one["each"]))
    names = NAMES | {"gain": "world tokens − plain Gemma, points"}
    shown = {kind: (signed if kind == "gain" else percent) for kind in found}
    rows = [
        [
            names[kind],
            shown[kind](one["mean"]),
            f"{100 * one['sd']:.1f}",
            *(shown[kind](one["each"].get(m)) for m in models),
        ]
        for kind, one in found.items()
    ]
    text = "The same statements for each; the deviation is that of a sample. What all checkpoints share is not listed."
    return paragraph(text) + table(
        "Accuracy over checkpoints", ["system", "mean", "standard deviation", *models], rows
    )
