"""The page of a study, and its figures as CSV and a LaTeX table, from the records of its arms and seeds.

study.html    the verdict, all arms and seeds, differences to each control, groups, curves, costs, what was fixed
study.csv     a line for each arm, metric and seed, and for each difference
study.tex     the table of arms for a paper (needs booktabs)
"""

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from theworld.evaluation.comparison import METRICS
from theworld.evaluation.metrics import FEW
from theworld.evaluation.study_verdict import (
    CONTROL_AS_WELL,
    HELPS,
    LEAST_SEEDS,
    METRIC_WORDS,
    NO_DIFFERENCE,
    NO_VERDICT,
    WORLD,
    WORSE,
    Question,
    arm_words,
    data_words,
)
from theworld.report.charts import Axis, Mark, Plot, Series, Track, number, scale_of, thinned
from theworld.report.report import (
    Chart,
    ChartRow,
    Key,
    Table,
    between,
    percent,
    rendered,
    signed,
    small,
)
from theworld.utils.files import publish_bytes

VERDICTS = {  # of each outcome: its CSS class and its words
    HELPS: ("good", "Helps beyond every control"),
    CONTROL_AS_WELL: ("open", "Helps, but not beyond every control"),
    NO_DIFFERENCE: ("open", "No difference that this study could have detected"),
    WORSE: ("bad", "Worse"),
    NO_VERDICT: ("open", "No verdict"),
}
SCOPES = {"all": "All statements", "unseen": "Statements whose image is not in the training set"}
# CSS class of an arm, which gives its colour; an arm of another name has the last one.
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
class Study:
    """A study as the page shows it: its name, its summary, and what the summary does not know.

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
    def question(self) -> Question:
        """What was fixed before the study ran."""
        fields = self.summary["question"]
        return Question(**fields | {"controls": tuple(fields["controls"])})


def write_study(study: Study, folder: Path) -> Path:
    """Write the page and the figures for other programs to a folder, and return the path of the page."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = {
        "study.csv": study_csv(study.summary),
        "study.tex": study_latex(study.summary),
        "study.html": render(study),
    }
    for name, text in texts.items():
        publish_bytes(folder / name, text.encode("utf-8"), overwrite=True)
    return folder / "study.html"


def render(study: Study) -> str:
    """Return the page as text."""
    summary, question = study.summary, study.question
    return rendered(
        "study.html",
        study=study,
        title=_title(study),
        verdicts=[_verdict(name, scope) for name, scope in summary["scopes"].items()],
        arms=[_arms(name, scope, question) for name, scope in summary["scopes"].items()],
        differences=[_differences(name, scope, question) for name, scope in summary["scopes"].items()],
        seeds=_seeds(summary["scopes"]["all"], summary["seeds"]),
        groups=[_groups(summary, kind, question) for kind in ("category", "relation")],
        training=_training(study),
        costs=_costs(study),
        fixed=_fixed(study),
        limits=_limits(summary, question),
    )


def _title(study: Study) -> str:
    where = data_words(study.summary["data"])
    world = study.question.world
    if not study.question.decides:
        return f"Arms compared on {where}"
    return f"Does {'the video model' if world == WORLD else world} help on {where}?"


def _kind(arm: str) -> str:
    return KINDS.get(arm, OTHER_KIND)


def _verdict(name: str, scope: dict[str, Any]) -> dict[str, Any]:
    kind, word = VERDICTS[scope["verdict"]["kind"]]
    return {"kind": kind, "word": word, "scope": SCOPES[name], **scope["verdict"]} | {"kind": kind}


# ---- arms, and the differences between them


def _arms(name: str, scope: dict[str, Any], question: Question) -> dict[str, Any]:
    """Return the figure of arms by seeds, and all metrics as a table."""
    found = {arm: metrics[question.metric] for arm, metrics in scope["arms"].items()}
    ends = [x for one in found.values() for x in (one["low"], one["high"], *one["each"].values())]
    scale = scale_of(ends)
    rows = [
        ChartRow(
            arm,
            Track(
                [Mark(_kind(arm), one["mean"], one["low"], one["high"])],
                scale,
                dots=tuple(one["each"].values()),
            ),
            percent(one["mean"]),
            between(one["low"], one["high"]),
            note=arm_words(arm) if arm_words(arm) != arm else "",
        )
        for arm, one in found.items()
    ]
    key = [Key(_kind(question.world), True, "a seed"), Key(_kind(question.world), False, "mean over seeds")]
    level = f"{100 * (1 - question.alpha):g} %"
    caption = f"{METRIC_WORDS[question.metric].capitalize()}, with {level} intervals over images and seeds."
    axis = scale.labels(lambda share: f"{100 * share:.3g}\u00a0%")
    return {
        "scope": SCOPES[name],
        "size": f"{scope['statements']:,} statements about {scope['images']:,} images.",
        "chart": Chart(axis, rows, caption, key),
        "table": _metrics_table(name, scope),
    }


def _metrics_table(name: str, scope: dict[str, Any]) -> Table:
    rows = []
    for arm, metrics in scope["arms"].items():
        for metric, one in metrics.items():
            each = ", ".join(f"{100 * value:.1f}" for value in one["each"].values())
            sd = "–" if one["sd"] is None else f"{100 * one['sd']:.2f}"
            figures = [percent(one["mean"]), between(one["low"], one["high"]), sd, each]
            rows.append([arm, METRIC_WORDS[metric], *figures])
    head = ["arm", "metric", "mean", "interval", "deviation over seeds", "each seed"]
    return Table(f"Metrics of each arm: {SCOPES[name].lower()}", head, rows)


def _differences(name: str, scope: dict[str, Any], question: Question) -> dict[str, Any]:
    """Return the figure of the differences to each other arm, and all tests as a table."""
    found = {arm: metrics[question.metric] for arm, metrics in scope["differences"].items()}
    ends = [x for one in found.values() for x in (one["low"], one["high"], *one["each"].values())]
    scale = scale_of([*(100 * x for x in ends), 0.0])
    rows = []
    for arm, one in found.items():
        mark = Mark(_kind(arm), *(100 * one[key] for key in ("difference", "low", "high")))
        track = Track([mark], scale, 0.0, tuple(100 * value for value in one["each"].values()))
        decisive = question.decides and arm in question.controls
        note = "has to be beaten" if decisive else "beside the question" if question.decides else ""
        value, p = f"{signed(one['difference'])} points", f"p = {small(one['p_value'], 1)}"
        rows.append(ChartRow(f"against {arm}", track, value, p, note=note))
    axis = scale.labels(lambda points: number(points, "+.3g") if points else "0")
    caption = (
        f"{METRIC_WORDS[question.metric].capitalize()} of {question.world} less each other arm, in points: mean, "
        f"{100 * (1 - question.alpha):g} % interval over images and seeds, and each seed (hollow)."
    )
    return {
        "scope": SCOPES[name],
        "chart": Chart(axis, rows, caption),
        "table": _tests_table(name, scope, question),
    }


def _tests_table(name: str, scope: dict[str, Any], question: Question) -> Table:
    margin = f"p (equal within {100 * question.margin:g} point{'' if question.margin == 0.01 else 's'})"
    head = ["against", "metric", "difference, points", "interval", "p", margin, "interval (bootstrap)"]
    rows = []
    for arm, metrics in scope["differences"].items():
        for metric in (m for m in METRICS if m in metrics):
            one = metrics[metric]
            row = [arm, METRIC_WORDS[metric], signed(one["difference"]), _ends(one["low"], one["high"])]
            row += [small(one["p_value"]), small(one["equivalence_p_value"])]
            row += [_ends(one["bootstrap_low"], one["bootstrap_high"])]
            rows.append([*row, f"{100 * one['smallest_detectable']:.1f}"])
    head.append("smallest found with 80 % power, points")
    return Table(f"Tests of {question.world} against each arm: {SCOPES[name].lower()}", head, rows)


def _ends(low: float | None, high: float | None) -> str:
    return "–" if low is None or high is None else f"{signed(low)} to {signed(high)}"


def _seeds(scope: dict[str, Any], seeds: Sequence[int]) -> Table:
    """Return the comparison of each pair of runs."""
    rows = []
    for arm, metrics in scope["differences"].items():
        for seed in map(str, seeds):
            one = metrics["by_seed"][seed]
            counts = [f"{one['only_first']:,}", f"{one['only_second']:,}", small(one["p_value"])]
            rows.append(
                [f"{arm}, seed {seed}", signed(one["difference"]), _ends(one["low"], one["high"]), *counts]
            )
    head = ["against", "difference, points", "95 % interval over images", "only world right"]
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
            row += [signed(one["difference"]), _ends(one["low"], one["high"]), small(one["adjusted_p_value"])]
        rows.append(row)
    words = "meta-category" if kind == "category" else "relation"
    head = [words, "n", f"{question.world}, %"]
    for control in question.controls:
        head += [f"less {control}, points", "interval", "p (Holm)"]
    return Table(f"Exploratory: accuracy by {words}", head, rows)


# ---- training, costs, what was fixed and what is not shown


def _training(study: Study) -> dict[str, Any] | None:
    """Return the curves of all arms and seeds on one plot, or None without any."""
    curves = [
        Series(_kind(arm), arm, thinned(curve, CURVE_POINTS))
        for arm, by_seed in reversed(list(study.curves.items()))  # the first arm is drawn last, on top
        for curve in by_seed.values()
        if curve
    ]
    if not curves:
        return None
    points = [point for series in curves for point in series.points]
    x, y = (scale_of([point[i] for point in points]) for i in (0, 1))
    title = "Loss of every run by step"
    plot = Plot("training-plot", title, curves, Axis(x, "optimizer steps"), Axis(y, "loss, nats"))
    key = [Key(_kind(arm), False, arm) for arm in study.curves]
    return {"plots": [(plot, "Loss of every arm; a line for each seed.")], "key": key}


def _costs(study: Study) -> Table | None:
    if not study.costs:
        return None
    names = list(dict.fromkeys(name for costs in study.costs.values() for name in costs))
    rows = [[arm, *(costs.get(name, "–") for name in names)] for arm, costs in study.costs.items()]
    return Table("What each arm has and costs", ["arm", *names], rows)


def _fixed(study: Study) -> list[tuple[str, str]]:
    """Return what was fixed before the study ran, as names and values."""
    question, summary = study.question, study.summary
    against = f"{question.world} against {', '.join(question.controls)}, each to be beaten"
    return [
        ("primary comparison", against if question.decides else "none: the study explores"),
        ("metric", METRIC_WORDS[question.metric]),
        ("level", f"{100 * question.alpha:g} %, two-sided, for each comparison"),
        ("equal", f"within {100 * question.margin:g} points, by two one-sided tests"),
        ("data", data_words(summary["data"])),
        ("seeds", ", ".join(map(str, summary["seeds"]))),
        *study.fixed,
    ]


def _limits(summary: dict[str, Any], question: Question) -> list[str]:
    """Return what the study cannot show, in sentences."""
    primary = [
        summary["scopes"]["all"]["differences"][control][question.metric]["smallest_detectable"]
        for control in question.controls
    ]
    found = [
        f"Differences below {100 * max(primary):.1f} points: against one control or another, the study would have "
        "found them in fewer than four cases of five.",
        f"Anything beyond {data_words(summary['data'])}, this recipe and these models.",
        "Why a relation or a meta-category gains: groups are exploratory, and a new study has to confirm them.",
    ]
    lacking = [arm for arm in Question.controls if arm not in question.controls]
    if lacking and question.world == WORLD:
        found.append(f"That the gain is not one of {', '.join(map(arm_words, lacking))}: it was no control.")
    if len(summary["seeds"]) < LEAST_SEEDS:
        seeds = "one seed says" if len(summary["seeds"]) == 1 else f"{len(summary['seeds'])} seeds say"
        found.append(f"A difference of arms: {seeds} too little about others.")
    if summary["statements_in_train"]:
        found.append(
            f"Held-out accuracy: {summary['statements_in_train']:,} of the statements are in the training set."
        )
    return found


# ---- for other programs and for a paper


def study_csv(summary: dict[str, Any]) -> str:
    """Return a line for each arm, metric and seed, and for each difference of arms; shares, not percent."""
    text = io.StringIO()
    lines = csv.writer(text, lineterminator="\n")
    lines.writerow(["scope", "quantity", "arm", "metric", "seed", "value", "low", "high", "p_value"])
    lines.writerows(_csv_lines(summary))
    return text.getvalue()


def _csv_lines(summary: dict[str, Any]) -> Iterator[list[Any]]:
    for name, scope in summary["scopes"].items():
        for quantity, what, mean in (("metric", "arms", "mean"), ("difference", "differences", "difference")):
            for arm, metrics in scope[what].items():
                for metric in (m for m in METRICS if m in metrics):
                    one = metrics[metric]
                    start = [name, quantity, arm, metric]
                    yield [*start, "mean", one[mean], one["low"], one["high"], one.get("p_value", "")]
                    for seed, value in one["each"].items():
                        yield [*start, seed, value, "", "", ""]


def study_latex(summary: dict[str, Any], scope: str = "all") -> str:
    """Return the table of arms: means and deviations over seeds in percent, and the difference of world to each."""
    own, question = summary["scopes"][scope], summary["question"]
    metrics = [m for m in METRICS if m in next(iter(own["arms"].values()))]
    lines = [
        f"% {len(summary['seeds'])} seeds, {own['statements']} statements about {own['images']} images, "
        f"{data_words(summary['data'])}. Deviations over seeds; intervals over images and seeds.",
        f"\\begin{{tabular}}{{l{'c' * len(metrics)}rr}}",
        "\\toprule",
        f"arm & {' & '.join(METRIC_WORDS[m] for m in metrics)} & "
        f"$\\Delta$ {METRIC_WORDS[question['metric']]} & $p$ \\\\",
        "\\midrule",
    ]
    for arm, figures in own["arms"].items():
        cells = [
            f"{100 * figures[m]['mean']:.1f}"
            + ("" if figures[m]["sd"] is None else f" $\\pm$ {100 * figures[m]['sd']:.1f}")
            for m in metrics
        ]
        test = own["differences"].get(arm, {}).get(question["metric"])
        if test:
            low, high = (f"{100 * test[end]:+.1f}" for end in ("low", "high"))
            cells += [f"${100 * test['difference']:+.1f}$ [${low}$, ${high}$]", _latex_p(test["p_value"])]
        else:
            cells += ["", ""]
        lines.append(f"{_latex_text(arm_words(arm))} & {' & '.join(cells)} \\\\")
    return "\n".join([*lines, "\\bottomrule", "\\end{tabular}", ""])


def _latex_p(p: float) -> str:
    return "$<$ 0.001" if p < 0.001 else f"{p:.3f}"


def _latex_text(text: str) -> str:
    return "".join(f"\\{c}" if c in "&%$#_{}" else c for c in text)
