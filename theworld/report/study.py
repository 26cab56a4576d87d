"""The page of a study, and its figures as CSV and a LaTeX table, from the records of its arms and seeds.

study.html    the verdict, all arms and seeds, differences to each control or between arms, learning curves, groups,
              losses, costs, what was fixed
study.csv     a line for each arm, metric and seed, and for each difference
study.tex     tables for a paper (need booktabs): arms, pairs of a study that explores, learning curves
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from theworld.evaluation.comparison import METRICS, NO_INTERVAL
from theworld.evaluation.metrics import FEW
from theworld.evaluation.power import NONE, smallest_points
from theworld.evaluation.study_verdict import (
    CONTROL_AS_WELL,
    HELPS,
    LEAST_SEEDS,
    METRIC_WORDS,
    NO_DIFFERENCE,
    NO_VERDICT,
    PLAIN,
    WORLD,
    WORSE,
    Question,
    arm_words,
    data_words,
    point_words,
)
from theworld.evaluation.verdict import p_words
from theworld.report.charts import Axis, Mark, Plot, Scale, Series, Track, number, scale_of, thinned
from theworld.report.page import Chart, ChartRow, Key, Table, rendered
from theworld.report.study_files import study_csv, study_latex
from theworld.report.text import between, p_value, percent, signed
from theworld.utils.files import publish_bytes
from theworld.utils.text import counted

VERDICTS = {  # of each outcome: its CSS class and its words
    HELPS: ("good", "Helps beyond every control"),
    CONTROL_AS_WELL: ("open", "Helps, but not beyond every control"),
    NO_DIFFERENCE: ("open", "No difference that this study could have detected"),
    WORSE: ("bad", "Worse"),
    NO_VERDICT: ("open", "No verdict"),
}
SCOPES = {"all": "All statements", "unseen": "Statements whose image is not in the training set"}
# CSS class of an arm, which gives its colour; arms of other names have those that are left, then OTHER_KIND.
KINDS = {
    "world": "world",
    "prompt": "baseline",
    "pixels": "text",
    "untrained": "zero",
    "noise": "shuffled",
    "again": "without",
}
OTHER_KIND = "quoted"
CURVE_POINTS = 100  # of a training curve
Curve = Sequence[tuple[float, float]]  # (step, loss)


@dataclass(frozen=True)
class StudyPage:
    """What the page of a study shows: its name, its summary, and what the summary does not know.

    `curves` are the losses of each arm and seed, `costs` figures of each arm by name, such as its trainable parameters,
    `fixed` names and values of what was fixed before beside the comparison, `caution` a warning such as of toy models,
    `command` what makes the study again.
    """

    name: str
    summary: dict[str, Any]
    curves: Mapping[str, Mapping[int, Curve]] = field(default_factory=dict)
    costs: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    fixed: Sequence[tuple[str, str]] = ()
    caution: str = ""
    command: str = ""

    @property
    def kinds(self) -> dict[str, str]:
        """The CSS class of each arm."""
        arms = list(self.summary["scopes"]["all"]["arms"])
        left = [kind for arm, kind in KINDS.items() if arm not in arms]
        others = [arm for arm in arms if arm not in KINDS and arm != PLAIN]
        found = KINDS | dict(zip(others, left, strict=False))
        return {arm: found.get(arm, OTHER_KIND) for arm in arms}

    @property
    def question(self) -> Question:
        """What was fixed before the study ran."""
        fields = self.summary["question"]
        return Question(**fields | {"controls": tuple(fields["controls"])})


def write_study(page: StudyPage, folder: Path) -> Path:
    """Write the page and the figures for other programs to a folder, and return the path of the page."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = {
        "study.csv": study_csv(page.summary),
        "study.tex": study_latex(page.summary),
        "study.html": render(page),
    }
    for name, text in texts.items():
        publish_bytes(folder / name, text.encode("utf-8"), overwrite=True)
    return folder / "study.html"


def render(page: StudyPage) -> str:
    """Return the page as text."""
    summary, question = page.summary, page.question
    scopes = summary["scopes"].items()
    compared = _differences if question.decides else _pairs
    return rendered(
        "study.html",
        page=page,
        title=_title(page),
        verdicts=[_verdict(name, scope) for name, scope in scopes],
        arms=[_arms(name, scope, page) for name, scope in scopes],
        differences=[compared(name, scope, page) for name, scope in scopes],
        learning=_learning(page),
        seeds=_seeds(summary, question),
        groups=[_groups(summary, kind, question) for kind in ("category", "relation")],
        training=_training(page),
        costs=_costs(page),
        fixed=_fixed(page),
        limits=_limits(summary, question),
    )


def _title(page: StudyPage) -> str:
    where = data_words(page.summary["data"])
    world = page.question.world
    if not page.question.decides:
        return f"Arms compared on {where}"
    return f"Does {'the video model' if world == WORLD else world} help on {where}?"


def _verdict(name: str, scope: dict[str, Any]) -> dict[str, Any]:
    kind, word = VERDICTS[scope["verdict"]["kind"]]
    return scope["verdict"] | {"kind": kind, "word": word, "scope": SCOPES[name]}


# ---- arms, and the differences between them


def _arms(name: str, scope: dict[str, Any], page: StudyPage) -> dict[str, Any]:
    """Return the figure of arms by seeds, and all metrics as a table."""
    question, kinds = page.question, page.kinds
    found = {arm: metrics[question.metric] for arm, metrics in scope["arms"].items()}
    ends = [x for one in found.values() for x in (one["low"], one["high"], *one["each"].values())]
    scale = scale_of(ends)
    rows = [
        ChartRow(
            arm,
            Track(
                [Mark(kinds[arm], one["mean"], one["low"], one["high"])],
                scale,
                dots=tuple(one["each"].values()),
            ),
            percent(one["mean"]),
            between(one["low"], one["high"]) if scope["images"] > 1 else NO_INTERVAL,
            note=arm_words(arm) if arm_words(arm) != arm else "",
        )
        for arm, one in found.items()
    ]
    kind = kinds[question.world]
    key = [Key(kind, True, "a seed"), Key(kind, False, "mean over seeds")]
    level = f"{100 * (1 - question.alpha):g} %"
    caption = f"{METRIC_WORDS[question.metric].capitalize()}, with {level} intervals over images and seeds."
    axis = scale.labels(lambda share: f"{100 * share:.3g}\u00a0%")
    return {
        "scope": SCOPES[name],
        "size": f"{counted(scope['statements'], 'statement')} about {counted(scope['images'], 'image')}.",
        "chart": Chart(axis, rows, caption, key),
        "table": _metrics_table(name, scope),
    }


def _metrics_table(name: str, scope: dict[str, Any]) -> Table:
    rows = [
        [arm, METRIC_WORDS[metric], *_metric_cells(one)]
        for arm, metrics in scope["arms"].items()
        for metric, one in metrics.items()
    ]
    return Table(f"Metrics of each arm: {SCOPES[name].lower()}", ["arm", "metric", *METRIC_HEAD], rows)


METRIC_HEAD = ("mean", "interval", "deviation over seeds", "each seed")


def _metric_cells(one: dict[str, Any]) -> list[str]:
    """Return the cells of a metric of an arm, under METRIC_HEAD."""
    each = ", ".join(f"{100 * value:.1f}" for value in one["each"].values())
    sd = "–" if one["sd"] is None else f"{100 * one['sd']:.2f}"
    return [percent(one["mean"]), between(one["low"], one["high"]), sd, each]


def _differences(name: str, scope: dict[str, Any], page: StudyPage) -> dict[str, Any]:
    """Return the figure of the differences to each other arm, and all tests as a table."""
    question = page.question
    found = {arm: metrics[question.metric] for arm, metrics in scope["differences"].items()}
    scale = _scale(list(found.values()))
    rows = []
    for arm, one in found.items():
        note = "has to be beaten" if arm in question.controls else "beside the question"
        rows.append(_row(f"against {arm}", page.kinds[arm], one, scale, "p_value", note))
    axis = scale.labels(_signed_points)
    caption = (
        f"{METRIC_WORDS[question.metric].capitalize()} of {question.world} less each other arm, in points: mean, "
        f"{100 * (1 - question.alpha):g} % interval over images and seeds, and each seed (hollow)."
    )
    return {
        "scope": SCOPES[name],
        "chart": Chart(axis, rows, caption),
        "table": _tests_table(name, scope, question),
    }


def _pairs(name: str, scope: dict[str, Any], page: StudyPage) -> dict[str, Any]:
    """Return the figure of the differences between arms of a study that explores, and all tests as a table."""
    question, pairs = page.question, scope["pairs"]
    scale = _scale([pair[question.metric] for pair in pairs])
    rows = [
        _row(
            pair["first"],
            page.kinds[pair["first"]],
            pair[question.metric],
            scale,
            "adjusted_p_value",
            f"less {pair['second']}",
        )
        for pair in pairs
    ]
    level = f"{100 * (1 - question.alpha):g} %"
    together = f"The {len(pairs)} intervals hold all differences together in {level} of such studies."
    if len(pairs) == 1:
        together = f"The interval holds the difference in {level} of such studies."
    caption = (
        f"{METRIC_WORDS[question.metric].capitalize()} of one arm less another, in points: mean, interval over images "
        f"and seeds, and each seed (hollow). {together} p is adjusted (Holm)."
    )
    return {
        "scope": SCOPES[name],
        "chart": Chart(scale.labels(_signed_points), rows, caption),
        "table": _pairs_table(name, pairs),
    }


def _pairs_table(name: str, pairs: Sequence[dict[str, Any]]) -> Table:
    rows = []
    for pair in pairs:
        for metric in (m for m in METRICS if m in pair):
            one = pair[metric]
            row = [f"{pair['first']} less {pair['second']}", METRIC_WORDS[metric], signed(one["difference"])]
            row += [_ends(one["low"], one["high"]), p_value(one["p_value"]), p_value(one["adjusted_p_value"])]
            rows.append([*row, smallest_points(one["smallest_detectable"])])
    head = ["arms", "metric", "difference, points", "interval", "p", "p (Holm)"]
    head.append("smallest found with 80 % power, points")
    return Table(f"Tests between arms, each metric corrected by itself: {SCOPES[name].lower()}", head, rows)


def _scale(tests: Sequence[dict[str, Any]]) -> Scale:
    """Return the scale of differences in points, with 0 on it."""
    ends = [x for one in tests for x in (one["low"], one["high"], *one["each"].values())]
    return scale_of([*(100 * x for x in ends), 0.0])


def _row(name: str, kind: str, test: dict[str, Any], scale: Scale, p_key: str, note: str = "") -> ChartRow:
    """Return the row of a difference in points; `p_key` is the key of its p value."""
    mark = Mark(kind, *(100 * test[key] for key in ("difference", "low", "high")))
    track = Track([mark], scale, 0.0, tuple(100 * value for value in test["each"].values()))
    value, p = f"{signed(test['difference'])} points", p_words(test[p_key], 1)
    return ChartRow(name, track, value, p, note=note)


def _signed_points(points: float) -> str:
    return number(points, "+.3g") if points else "0"


def _tests_table(name: str, scope: dict[str, Any], question: Question) -> Table:
    margin = f"p (equal within {point_words(100 * question.margin)})"
    head = ["against", "metric", "difference, points", "interval", "p", margin, "interval (bootstrap)"]
    rows = []
    for arm, metrics in scope["differences"].items():
        for metric in (m for m in METRICS if m in metrics):
            one = metrics[metric]
            row = [arm, METRIC_WORDS[metric], signed(one["difference"]), _ends(one["low"], one["high"])]
            row += [p_value(one["p_value"]), p_value(one["equivalence_p_value"])]
            row += [_ends(one["bootstrap_low"], one["bootstrap_high"])]
            rows.append([*row, smallest_points(one["smallest_detectable"])])
    head.append("smallest found with 80 % power, points")
    return Table(f"Tests of {question.world} against each arm: {SCOPES[name].lower()}", head, rows)


def _ends(low: float | None, high: float | None) -> str:
    return "–" if low is None or high is None else f"{signed(low)} to {signed(high)}"


def _seeds(summary: dict[str, Any], question: Question) -> Table:
    """Return the comparison of each pair of runs."""
    scope, seeds = summary["scopes"]["all"], summary["seeds"]
    rows = []
    for arm, metrics in scope["differences"].items():
        for seed in map(str, seeds):
            one = metrics["by_seed"][seed]
            counts = [f"{one['only_first']:,}", f"{one['only_second']:,}", p_value(one["p_value"])]
            rows.append(
                [f"{arm}, seed {seed}", signed(one["difference"]), _ends(one["low"], one["high"]), *counts]
            )
    head = ["against", "difference, points", "95 % interval over images", f"only {question.world} right"]
    return Table("Each seed alone", [*head, "only the other right", "p (exact McNemar)"], rows)


def _groups(summary: dict[str, Any], kind: str, question: Question) -> Table:
    """Return the differences by meta-category or relation."""
    rows = []
    for group in summary["groups"][f"by_{kind}"]:
        few = " (few)" if group["statements"] < FEW else ""
        row = [
            group["group"],
            f"{group['statements']:,}{few}",
            f"{100 * group['accuracy'][question.world]:.1f}",
        ]
        for one in group["differences"].values():
            row += [
                signed(one["difference"]),
                _ends(one["low"], one["high"]),
                p_value(one["adjusted_p_value"]),
            ]
        rows.append(row)
    words = "meta-category" if kind == "category" else "relation"
    head = [words, "n", f"{question.world}, %"]
    for control in question.controls:
        head += [f"less {control}, points", "interval", "p (Holm)"]
    return Table(f"Exploratory: accuracy by {words}", head, rows)


# ---- learning curves


def _learning(page: StudyPage) -> dict[str, Any] | None:
    """Return the arms' figures on each share of the training statements as plots and tables, or None without any."""
    curve, question = page.summary.get("learning"), page.question
    if not curve:
        return None
    arms = list(curve[0]["arms"])
    metric, kinds = question.metric, page.kinds
    found = {arm: [one["arms"][arm][metric] for one in curve] for arm in arms}
    differences = {c: [one["differences"][c] for one in curve] for c in question.controls}
    shares = [one["share"] for one in curve]
    words = METRIC_WORDS[metric]
    gain = _gain_words(question)
    plots = [
        (
            _plot("learning-plot", f"{words}, %", found, "mean", shares, kinds),
            f"{words.capitalize()} by share of the training statements: mean with its interval over images and seeds, "
            "and beside it each seed (hollow).",
        ),
        (
            _plot("gain-plot", f"{words} of {gain}, points", differences, "difference", shares, kinds),
            f"{words.capitalize()} of {gain}, in the colour of the other arm. Dashed: no difference.",
        ),
    ]
    return {
        "plots": plots,
        "key": [Key(kinds[arm], False, arm) for arm in arms],
        "tables": [_learning_table(curve, question), _gain_table(curve, question)],
    }


def _gain_words(question: Question) -> str:
    """Return which differences are shown by share."""
    return f"{question.world} less each" if question.decides else f"each less {question.world}"


def _plot(
    id: str,
    title: str,
    found: Mapping[str, Sequence[dict[str, Any]]],
    value: str,
    shares: Sequence[float],
    kinds: Mapping[str, str],
) -> Plot:
    """Return lines over the shares on a logarithmic axis. Arms lie side by side, so that their intervals are seen."""
    span = math.log10(shares[-1] / shares[0])
    step = span / 25  # between two arms; the seeds lie half of it beside their mean
    room = step * (len(found) / 2 + 1)
    x = Scale(math.log10(shares[0]) - room, math.log10(shares[-1]) + room, tuple(map(math.log10, shares)))
    series: list[Series] = []
    for i, (arm, figures) in enumerate(found.items()):
        aside = (i - (len(found) - 1) / 2) * step
        places = [math.log10(share) + aside for share in shares]
        each = [
            (place - step / 2, 100 * one)
            for place, figure in zip(places, figures, strict=True)
            for one in figure["each"].values()
        ]
        means = [(place, 100 * figure[value]) for place, figure in zip(places, figures, strict=True)]
        bars = [(100 * figure["low"], 100 * figure["high"]) for figure in figures]
        series = [
            Series(kinds[arm], arm, each, False, hollow=True),
            Series(kinds[arm], arm, means, True, bars),
            *series,
        ]
    level = (0.0, "") if value == "difference" else None
    ends = [y for one in series for y in (*(y for _, y in one.points), *(y for bar in one.bars for y in bar))]
    axis = Axis(x, "share of the training statements, %", lambda tick: number(100 * 10**tick, ".3g"))
    return Plot(id, title, series, axis, Axis(scale_of([*ends, 0.0] if level else ends), title), level)


def _share(one: dict[str, Any]) -> str:
    return f"{100 * one['share']:g} % ({one['training_statements']:,})"


def _learning_table(curve: Sequence[dict[str, Any]], question: Question) -> Table:
    rows = [
        [arm, _share(one), *_metric_cells(one["arms"][arm][question.metric])]
        for arm in curve[0]["arms"]
        for one in curve
    ]
    words = f"{METRIC_WORDS[question.metric].capitalize()} by share of the training statements"
    return Table(words, ["arm", "share (statements)", *METRIC_HEAD], rows)


def _gain_table(curve: Sequence[dict[str, Any]], question: Question) -> Table:
    rows = []
    for control in question.controls:
        for one in curve:
            test = one["differences"][control]
            figures = [
                signed(test["difference"]),
                _ends(test["low"], test["high"]),
                p_value(test["adjusted_p_value"]),
            ]
            rows.append([control, _share(one), *figures])
    head = [
        "against" if question.decides else "arm",
        "share (statements)",
        "difference, points",
        "interval",
        "p (Holm)",
    ]
    return Table(f"Exploratory: {_gain_words(question)} by share", head, rows)


# ---- training, costs, what was fixed and what is not shown


def _training(page: StudyPage) -> dict[str, Any] | None:
    """Return the curves of all arms and seeds on one plot, or None without any."""
    curves = [
        Series(page.kinds[arm], arm, thinned(curve, CURVE_POINTS))
        for arm, by_seed in reversed(list(page.curves.items()))  # the first arm is drawn last, on top
        for curve in by_seed.values()
        if curve
    ]
    if not curves:
        return None
    points = [point for series in curves for point in series.points]
    x, y = (scale_of([point[i] for point in points]) for i in (0, 1))
    title = "Loss of every run by step"
    plot = Plot("training-plot", title, curves, Axis(x, "optimizer steps"), Axis(y, "loss, nats"))
    key = [Key(page.kinds[arm], False, arm) for arm in page.curves]
    return {"plots": [(plot, "Loss of every arm; a line for each seed.")], "key": key}


def _costs(page: StudyPage) -> Table | None:
    if not page.costs:
        return None
    names = list(dict.fromkeys(name for costs in page.costs.values() for name in costs))
    rows = [[arm, *(costs.get(name, "–") for name in names)] for arm, costs in page.costs.items()]
    return Table("What each arm has and costs", ["arm", *names], rows)


def _fixed(page: StudyPage) -> list[tuple[str, str]]:
    """Return what was fixed before the study ran, as names and values."""
    question, summary = page.question, page.summary
    against = f"{question.world} against {', '.join(question.controls)}, each to be beaten"
    each = "each comparison" if question.decides else "all comparisons together"
    pairs = f"each arm with {question.baseline}" if question.baseline else "every two arms"
    return [
        ("primary comparison", against if question.decides else f"none: the study explores, {pairs}"),
        ("metric", METRIC_WORDS[question.metric]),
        ("level", f"{100 * question.alpha:g} %, two-sided, for {each}"),
        ("equal", f"within {point_words(100 * question.margin)}, by two one-sided tests"),
        ("data", data_words(summary["data"])),
        ("seeds", ", ".join(map(str, summary["seeds"]))),
        *page.fixed,
    ]


def _limits(summary: dict[str, Any], question: Question) -> list[str]:
    """Return what the study cannot show, in sentences."""
    scope, metric = summary["scopes"]["all"], question.metric
    tests = [scope["differences"][control] for control in question.controls]
    tests, where = (
        (tests, "against one control or another")
        if question.decides
        else (scope["pairs"], "in one pair or another")
    )
    largest = max(test[metric]["smallest_detectable"] for test in tests)
    size = (
        f"Differences below {smallest_points(largest)} points"
        if largest < NONE
        else "Differences of any size"
    )
    found = [
        f"{size}: {where}, the study would have found them in fewer than four cases of five.",
        f"Anything beyond {data_words(summary['data'])}, this recipe and these models.",
        "Why a relation or a meta-category gains: groups are exploratory, and a new study has to confirm them.",
    ]
    lacking = [arm for arm in Question.controls if arm not in question.controls]
    if lacking and question.world == WORLD:
        found.append(f"That the gain is not one of {', '.join(map(arm_words, lacking))}: it was no control.")
    if len(summary["seeds"]) < LEAST_SEEDS:
        seeds = "one seed says" if len(summary["seeds"]) == 1 else f"{len(summary['seeds'])} seeds say"
        found.append(f"A difference of arms: {seeds} too little about others.")
    if "learning" in summary:
        found.append(
            "What more data and more steps give: every share takes as many steps, so a smaller one is seen more often. "
            "Intervals are over what the seeds drew."
        )
    if summary["statements_in_train"]:
        found.append(
            f"Held-out accuracy: {summary['statements_in_train']:,} of the statements are in the training set."
        )
    return found
