"""From the records of an evaluation, and the files beside them, to one page with everything about it.

The page shows the verdict, the metrics, photographs and the commands that make it again. Its data come from a run, to
which a checkpoint belongs:

    metrics.jsonl                              written by training
    evaluation/*.jsonl, results*.jsonl         records of tools/eval.py, each with its .meta.json
    alignment.json, alignment.png              written by tools/visualize_alignment.py

The page names each file that is missing, with the command that makes it. Everything here is plain text and numbers;
templates/ turns them into HTML, where all text is escaped.
"""

import base64
import io
import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

from theworld.config.config import SPLIT_ALIASES
from theworld.data.benchmarks import BENCHMARKS
from theworld.data.images import ImageError, read_image
from theworld.data.references import footnotes, marks, quoted
from theworld.data.vsr import OWN, RELEASES
from theworld.evaluation.conditions import (
    CONDITION_TYPES,
    LABELS,
    checkpoint_of,
    checkpoints_in,
    condition_type,
    find_condition,
)
from theworld.evaluation.metrics import FEW, find_pair, summarise
from theworld.evaluation.records import Row, read_results
from theworld.evaluation.tables import options_words
from theworld.evaluation.verdict import (
    HELPS,
    HURTS,
    NO_EVIDENCE,
    NOT_THE_WORLD,
    UNCONTROLLED,
    UNTESTED,
    verdict,
)
from theworld.report.charts import (
    MINUS,
    Axis,
    Mark,
    Plot,
    Scale,
    Series,
    Tick,
    Track,
    number,
    scale_of,
    thinned,
)
from theworld.utils.commands import PLACEHOLDER, command
from theworld.utils.files import check_output, companion, publish_bytes

TEMPLATES = Path(__file__).parent / "templates"
VERDICTS = {  # of each kind of verdict: its CSS class and its words
    HELPS: ("good", "World tokens help"),
    HURTS: ("bad", "World tokens hurt"),
    NO_EVIDENCE: ("open", "No evidence"),
    NOT_THE_WORLD: ("open", "A gain, but not shown to be the world"),
    UNCONTROLLED: ("open", "A gain, not controlled"),
    UNTESTED: ("open", "Not tested"),
    "mixed": ("open", "Checkpoints do not agree"),
}
SMALLEST_GEMMA_WIDTH = 640  # hidden size of the smallest Gemma 3 that was published (270M)
NUM_PHOTOGRAPHS = 6  # of each kind
MAX_PHOTOGRAPH_SIDE = 480  # pixels
MAX_PICTURE_BYTES = 4 << 20  # of the alignment plots
MAX_STEP_ROWS = 40  # of the table of training

Summary = dict[str, Any]  # of theworld.evaluation.metrics.summarise
Source = dict[str, Any] | None  # of theworld.evaluation.records.read_results


@dataclass(frozen=True)
class Table:
    """A table of plain text. The first cell of a row is its heading."""

    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class ChartRow:
    """A row of a chart: its name with a note, its track, and a value with an addition in small type."""

    name: str
    track: Track
    value: str
    small: str = ""
    note: str = ""
    kind: str = ""  # CSS classes


@dataclass(frozen=True)
class Key:
    """The meaning of a mark of a chart."""

    kind: str
    hollow: bool
    meaning: str


@dataclass(frozen=True)
class Chart:
    """Rows of tracks over a common axis."""

    axis: Sequence[Tick]
    rows: Sequence[ChartRow]
    caption: str
    key: Sequence[Key] = ()


# ---- the files of a run


def write_report(
    run: Path,
    output: Path | None = None,
    results: Path | None = None,
    image_folder: Path | None = None,
) -> Path:
    """Write the page of a run, or of one of its checkpoints, and return its path: `output` or RUN/report.html.

    `results` are the records to show; the others are listed. By default they are the newest of a test split, of a
    benchmark (`theworld.data.benchmarks`) only if there are no others, or else the newest. `image_folder` holds the
    photographs if they are not where they were when the statements were scored. Raises ValueError and OSError for a run
    that does not exist and for damaged records.
    """
    shown, others = _choose(run, results)
    output = output or run / "report.html"
    check_output(output)
    text = render(run, shown, others, image_folder, output)
    output.parent.mkdir(parents=True, exist_ok=True)
    publish_bytes(output, text.encode("utf-8"), overwrite=True)
    return output


def plan_report(
    run: Path, output: Path | None = None, results: Path | None = None, image_folder: Path | None = None
) -> Iterator[str]:
    """Yield lines that say what `write_report` would do with the same arguments. Raises the same errors."""
    shown, others = _choose(run, results)
    if shown is not None:
        rows, source = read_results(shown)
        folder, lack = _photographs(image_folder, source)
        yield f"reads        {shown}: {len(rows):,} statements, {', '.join(rows[0]['systems'])}"
        yield f"             photographs: {folder or lack}"
    for path in (*others, run_of(run) / "metrics.jsonl", run_of(run) / "alignment.json"):
        yield f"             {path}{'' if path.is_file() else ': not there, which the page says'}"
    output = output or run / "report.html"
    yield f"writes       {output}{check_output(output)}"


def run_of(folder: Path) -> Path:
    """Return the run that a folder belongs to: the parent of a checkpoint, else the folder itself."""
    is_checkpoint = not (folder / "metrics.jsonl").is_file() and (folder.parent / "metrics.jsonl").is_file()
    return folder.parent if is_checkpoint else folder


def find_results(folder: Path) -> list[Path]:
    """Return the files of records of a run, or of one of its checkpoints, oldest first."""
    run = run_of(folder)
    of_one = f"{folder.name}-*.jsonl" if run != folder else "*.jsonl"
    found = [
        *(run / "evaluation").glob(of_one),
        *folder.glob("results*.jsonl"),
        *(folder / "evaluation").glob("*.jsonl"),
    ]
    return sorted(set(found), key=lambda path: (path.stat().st_mtime_ns, path.name))


def _choose(run: Path, results: Path | None) -> tuple[Path | None, list[Path]]:
    """Return the records to show, if any, and the other records of the run. Raises ValueError without a run."""
    if not run.is_dir():
        raise ValueError(
            f"{run}: no such folder; name a run such as checkpoints/vsr, or one of its checkpoints"
        )
    found = find_results(run)
    if results is None and found:
        results = max(enumerate(found), key=lambda item: (*_preference(item[1]), item[0]))[1]
    return results, [path for path in found if results is None or path.resolve() != results.resolve()]


def _preference(path: Path) -> tuple[bool, bool]:
    """Return whether records are of a test split, and of no benchmark, by their first line."""
    with path.open("rb") as file:
        try:
            first = json.loads(file.readline())
        except ValueError:
            return False, False
    if not isinstance(first, dict):
        return False, False
    split = str(first.get("split"))
    return SPLIT_ALIASES.get(split, split) == "test", first.get("dataset") not in BENCHMARKS


def _photographs(given: Path | None, source: Source) -> tuple[Path | None, str]:
    """Return the folder of the photographs, or None and the reason. Raises ValueError if `given` does not exist."""
    if given is not None:
        if not given.is_dir():
            raise ValueError(f"--image_folder {given}: no such folder")
        return given, ""
    named = source and source["image_folder"]
    if not named:
        return None, "The folder of the photographs is not known; name it."
    if not Path(named).is_dir():
        return None, f"The photographs were in {named}, which is not there; name their folder."
    return Path(named), ""


# ---- the page


def environment() -> Environment:
    """Return the environment of the templates, in which every value is escaped and an unknown name is an error."""
    found = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found.filters |= {"typeset": typeset, "signed": signed, "small": small}
    return found


def render(
    run: Path, results: Path | None, others: Sequence[Path], image_folder: Path | None, output: Path
) -> str:
    """Return the page as text. `output` is the path that it is written to."""
    return rendered("report.html", **_page(run, results, others, image_folder, output))


def rendered(template: str, **data: Any) -> str:
    """Return a page as text, with the style sheets in it."""
    styles = (files("theworld.utils") / "theme.css", TEMPLATES / "report.css")
    text = "".join(style.read_text(encoding="utf-8") for style in styles)
    return environment().get_template(template).render(styles=Markup(text), **data) + "\n"


def _page(
    run: Path, results: Path | None, others: Sequence[Path], image_folder: Path | None, output: Path
) -> dict[str, Any]:
    """Return the data of the page: one entry a section, None for a section that is left out."""
    rows, source = read_results(results) if results else ([], None)
    summary = summarise(rows) if rows else None
    data = _data_words(summary["data"], source) if summary else ""
    cache = Path(source["cache"]["folder"]) if source and source["cache"] else "cache/"
    score_command = command("eval", "--model", run, "--cache", cache)
    folder = run_of(run)
    return {
        "run": run,
        "title": f"Do world tokens help{f' on {data}' if data else ''}?",
        "score_command": score_command,
        "verdict": summary and _verdict(summary, data, source),
        "conditions": summary and _conditions(summary, data),
        "checkpoints": _checkpoints(summary) if summary and summary["checkpoints"] else None,
        "choices": _choices(summary["choices"]) if summary and "choices" in summary else None,
        "relations": summary and _relations(summary, {row["relation"]: row["category"] for row in rows}),
        "seen": summary and _seen(summary),
        "calibration": summary and _calibration(summary),
        "training": _training(folder / "metrics.jsonl"),
        "examples": _examples(rows, run, image_folder, source) if rows else None,
        "alignment": _alignment(run, folder, cache),
        "others": [_other(path) for path in others] or None,
        "source": _source(results, source, run, output, score_command) if results else None,
    }


def name_of(condition: str) -> str:
    """Return a condition in words, after the name of its checkpoint if it has one."""
    words = LABELS[condition_type(condition)]
    return f"{checkpoint_of(condition)}: {words}" if checkpoint_of(condition) else words


def _data_words(data: Sequence[tuple[str, str]], source: Source) -> str:
    """Return the data sets and splits in words: "the test split of VSR random"."""
    found = []
    for dataset, split in data:
        name = dataset.replace("vsr_", "VSR ") or "unnamed data"
        if dataset == OWN and source and source["annotations"]:
            name += f" ({Path(source['annotations']).name})"
        found.append(f"the {split} split of {name}" if split else name)
    return " and ".join(found)


def _verdict(summary: Summary, data: str, source: Source) -> dict[str, Any]:
    found = verdict(summary)
    kind, word = VERDICTS[found.kind]
    models = {one["model_name"] for one in source["checkpoints"].values()} if source else set()
    return {
        "kind": kind,
        "word": word,
        "scope": f"{_size(summary)}: {data}{'; ' if models else ''}{', '.join(sorted(models))}.",
        "toy": toy_warning(summary["data"], source),
        "sentence": found.sentence,
        "notes": found.notes,
        "tiles": _tiles(summary),
    }


def _size(summary: Summary) -> str:
    return f"{summary['statements']:,} statements about {summary['images']:,} images"


def toy_warning(data: Sequence[tuple[str, str]], source: Source) -> str:
    """Return a warning about models that are smaller than any published Gemma 3, or "" for all others."""
    shapes = [one["projection"] for one in source["checkpoints"].values()] if source else []
    widths = [shape["width"] for shape in shapes if shape.get("width", math.inf) < SMALLEST_GEMMA_WIDTH]
    if not widths:
        return ""
    own = any(dataset not in RELEASES for dataset, _ in data)
    return (
        f"Toy model: the hidden size of this Gemma is {min(widths)}, that of the smallest published Gemma 3 is "
        f"{SMALLEST_GEMMA_WIDTH}.{' The statements are no release of Visual Spatial Reasoning.' if own else ''} The "
        "result says nothing about published models."
    )


def _tiles(summary: Summary) -> list[tuple[str, str, str]]:
    """Return the headline figures: (name, value, addition)."""
    gain = summary["checkpoints"].get("gain")
    if gain:
        values = list(gain["each"].values())
        spread = f"standard deviation {100 * gain['sd']:.1f} points"
        return [
            ("checkpoints", str(len(values)), "on the same statements"),
            ("mean gain over plain Gemma", f"{signed(gain['mean'])} points", spread),
            ("smallest gain", f"{signed(min(values))} points", ""),
            ("largest gain", f"{signed(max(values))} points", ""),
        ]
    names = list(summary["systems"])
    world, baseline = (
        find_condition(names, checkpoints_in(names)[0], kind) for kind in ("world", "baseline")
    )
    tiles = []
    for condition in filter(None, (world, baseline)):
        score = summary["systems"][condition]
        interval = f"95 % interval {between(score['low'], score['high'])}"
        tiles.append((LABELS[condition_type(condition)], percent(score["accuracy"]), interval))
    pair = find_pair(summary["pairs"], world, baseline) if world and baseline else None
    if pair:
        ends = f"95 % interval {signed(pair['low'])} to {signed(pair['high'])}, cluster bootstrap over images"
        gain = f"{signed(pair['difference'])} points"
        tiles.append(("difference", gain, "" if pair["low"] is None else ends))
        counts = f"{pair['only_first']:,} right only with them, {pair['only_second']:,} only without"
        tiles.append(("exact McNemar", f"p = {pair['p_value']:.2g}", counts))
    return tiles


# ---- accuracy


def _conditions(summary: Summary, data: str) -> dict[str, Any]:
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
        "about": f"{_size(summary)}: {data}.",
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
            small(p["p_value"]),
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
        difference, p_value = f"{signed(p['difference'])} points", f"p = {small(p['p_value'], 1)}"
        against = f"against {name_of(p['second'])}"
        rows.append(
            ChartRow(against, Track([mark], scale, 0.0), difference, p_value, note=checkpoint_of(p["first"]))
        )
    axis = scale.labels(lambda points: number(points, "+.3g") if points else "0")
    caption = "Gain from world tokens in points, with 95 % intervals (cluster bootstrap over images)."
    return Chart(axis, rows, caption)


def _checkpoints(summary: Summary) -> Table:
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


# ---- choices


def _choices(choices: dict[str, Any]) -> dict[str, Any]:
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
        "about": f"{choices['groups']:,} choices between {options_words(choices)} statements, about "
        f"{choices['images']:,} images.",
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


# ---- groups of statements


def _relations(summary: Summary, categories: dict[str, str]) -> dict[str, Any]:
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


def _seen(summary: Summary) -> dict[str, Any]:
    """Return the accuracy on images that training showed, and on all others."""
    words = {"False": "images not seen in training", "True": "images seen in training"}
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


def _calibration(summary: Summary) -> dict[str, Any]:
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


# ---- training

# Of each figure of metrics.jsonl: its name, and the level of chance.
CURVES: dict[str, tuple[str, tuple[float, str] | None]] = {
    "loss": ("loss at the label, nats", (math.log(2), "chance, 0.693")),
    "accuracy": ("accuracy", (0.5, "chance")),
    "relation_loss": ("next-word loss on relations, nats a statement", None),
    "statement_loss": ("next-word loss on statements or captions, nats a statement", None),
}
Values = dict[str, dict[int, float]]  # of each figure: its value by optimizer step


def _training(metrics: Path) -> dict[str, Any]:
    """Return the curves of metrics.jsonl, with `lack` for a file that is missing or has no curve yet."""
    if not metrics.is_file():
        return {
            "lack": f"{metrics} is not there, so there are no training curves; training writes it.",
            "command": "",
        }
    lines = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    values = _values(lines)
    steps = sorted({step for found in values.values() for step in found})
    if not steps:
        return {"lack": f"{metrics} has no line of training with the label or words yet.", "command": ""}
    x = Axis(scale_of([0, *steps]), "optimizer step")
    shown = [key for key in values if values[key] or key.removeprefix("dev_") in ("loss", "accuracy")]
    head = ["step", *(key if key.startswith("dev_") else f"training_{key}" for key in shown)]
    some = _some(steps)
    rows = [[f"{s:,}", *(f"{values[k][s]:.4f}" if s in values[k] else "" for k in shown)] for s in some]
    return {
        "lack": "",
        "plots": [plot for key in CURVES if (plot := _curve(values, key, x))],
        "aligned": max((line["step"] for line in lines if line["phase"] == "align"), default=0),
        "words": max((line["step"] for line in lines if line["phase"] == "words"), default=0),
        "num_steps": len(steps),
        "table": Table("Figures while training", [name.replace("_", " ") for name in head], rows),
    }


def _values(lines: Sequence[dict[str, Any]]) -> Values:
    """Return the figures by step. The last line of a step counts: a run that was resumed may have taken it twice. Loss
    and accuracy at the label are shown from the main phase on, in which the label is trained."""
    values: Values = {f"{of}{key}": {} for of in ("", "dev_") for key in CURVES}
    for line in lines:
        for key, found in values.items():
            of_words = key.endswith(("relation_loss", "statement_loss"))
            if key in line and (line["phase"] == "train" or of_words):
                found[line["step"]] = line[key]
    return values


def _curve(values: Values, key: str, x: Axis) -> tuple[Plot, str] | None:
    """Return the plot of a figure on training and dev with its caption, or None without any value."""
    series = [
        Series(kind, label, thinned(sorted(values[name].items())))
        for name, kind, label in ((key, "baseline", "training"), (f"dev_{key}", "dev", "dev"))
        if values[name]
    ]
    if not series:
        return None
    title, level = CURVES[key]
    is_accuracy = key == "accuracy"
    every = [y for s in series for _, y in s.points] + ([level[0]] if level else [])
    scale = scale_of(every, low=None if is_accuracy else 0.0, high=1.0 if is_accuracy else None)
    last = "; ".join(f"{s.label} ends at {s.points[-1][1]:.3f}" for s in series)
    said = f"{title} by optimizer step: {last}"
    return Plot(f"training-{key}", said, series, x, Axis(scale, title), level), last


def _some(steps: Sequence[int]) -> list[int]:
    """Return at most `MAX_STEP_ROWS` steps, evenly spaced, with the last."""
    size = -(-len(steps) // MAX_STEP_ROWS)
    return [step for i, step in enumerate(reversed(steps)) if i % size == 0][::-1]


# ---- photographs


def _examples(rows: Sequence[Row], run: Path, image_folder: Path | None, source: Source) -> dict[str, Any]:
    """Return the most confident errors, and the statements that world tokens helped and harmed most."""
    folder, lack = _photographs(image_folder, source)
    links = bool(source and source.get("follow_links"))  # not in older files
    names = list(rows[0]["systems"])
    model = checkpoints_in(names)[0]
    world, baseline = (find_condition(names, model, kind) for kind in ("world", "baseline"))
    if world is None:
        return {"condition": ""}

    def confidence(row: Row, condition: str) -> float:
        """Return the probability of the right answer."""
        p = row["systems"][condition]["p_true"]
        return p if row["label"] else 1 - p

    def gain(row: Row) -> float:
        return confidence(row, world) - confidence(row, baseline) if baseline else 0.0

    def right(row: Row, condition: str) -> bool:
        return bool(row["systems"][condition]["correct"])

    wrong = [row for row in rows if not right(row, world)]
    kinds = [
        ("Most confident errors with world tokens", sorted(wrong, key=lambda row: confidence(row, world)))
    ]
    if baseline:
        helped = [row for row in rows if right(row, world) and not right(row, baseline)]
        harmed = [row for row in wrong if right(row, baseline)]
        helped.sort(key=gain, reverse=True)
        kinds.append(("Most helped: right with world tokens, wrong without", helped))
        kinds.append(("Most harmed: wrong with world tokens, right without", sorted(harmed, key=gain)))
    shown = [s for kind in CONDITION_TYPES if (s := find_condition(names, model, kind))]
    return {
        "condition": name_of(world),
        "lack": lack,
        "command": command("report", run, "--image_folder", PLACEHOLDER),
        "groups": [
            (title, len(found), [_card(row, shown, folder, links) for row in _one_an_image(found)])
            for title, found in kinds
        ],
    }


def _one_an_image(rows: Sequence[Row]) -> list[Row]:
    """Return the first rows about different images."""
    first = {row["image"]: row for row in reversed(rows)}
    return list(first.values())[::-1][:NUM_PHOTOGRAPHS]


def _card(row: Row, conditions: Sequence[str], folder: Path | None, links: bool) -> dict[str, Any]:
    answers = [(name_of(c), row["systems"][c]["p_true"], row["systems"][c]["correct"]) for c in conditions]
    return {
        "row": row,
        "picture": _photograph(folder, row["image"], links),
        "answers": [(name, probability(p), "right" if right else "wrong") for name, p, right in answers],
    }


def _photograph(folder: Path | None, name: str, follow_links: bool) -> dict[str, Any]:
    """Return a photograph, made small, as the attributes of an <img>, or the reason why it cannot be shown."""
    if folder is None:
        return {"lack": "photograph not at hand"}
    try:
        image = Image.fromarray(read_image(folder, name, follow_links=follow_links))
    except (ImageError, OSError) as error:
        return {"lack": str(error)}
    image.thumbnail((MAX_PHOTOGRAPH_SIDE, MAX_PHOTOGRAPH_SIDE))
    data = io.BytesIO()
    image.save(data, "JPEG", quality=82, optimize=True)
    return _embedded("jpeg", data.getvalue(), image)


def _embedded(kind: str, data: bytes, image: Image.Image) -> dict[str, Any]:
    source = f"data:image/{kind};base64,{base64.b64encode(data).decode('ascii')}"
    return {"lack": "", "src": source, "width": image.width, "height": image.height}


# ---- alignment

STATES = ("trained", "untrained")
COSINES = (("cosine", "world", "own image"), ("control_cosine", "baseline", "another image"))


def _alignment(run: Path, folder: Path, cache: object) -> dict[str, Any]:
    """Return the figures and plots that tools/visualize_alignment.py wrote, with `lack` if there are none."""
    path, picture = folder / "alignment.json", folder / "alignment.png"
    drawing = command("visualize_alignment", "--model", run, "--cache", cache, "--output", picture)
    if not path.is_file():
        lack = f"{path} is not there: where the world tokens lie was not measured for this run."
        return {"lack": lack, "command": drawing}
    result = json.loads(path.read_text(encoding="utf-8"))
    return {
        "lack": "",
        "command": drawing,
        "result": result,
        "chart": _cosines(result),
        "table": _alignment_table(result),
        "picture": _picture(picture),
    }


def _cosines(result: dict[str, Any]) -> Chart:
    """Return the chart of the mean cosines."""
    every = [q for state in STATES for key, *_ in COSINES for q in result[state][key]["quantiles"].values()]
    scale = scale_of([0.0, *every])
    rows = []
    for state in STATES:
        for key, kind, words in COSINES:
            found = result[state][key]
            low, high = found["quantiles"]["0.05"], found["quantiles"]["0.95"]
            mark = Mark(kind, found["mean"], low, high, hollow=kind == "baseline")
            mean, ends = number(found["mean"], ".2f"), f"{number(low, '.2f')} to {number(high, '.2f')}"
            rows.append(ChartRow(f"{state}, {words}", Track([mark], scale, 0.0), mean, ends))
    axis = scale.labels(lambda cosine: number(cosine, ".3g"))
    return Chart(axis, rows, "Mean cosine; the line holds 90 % of the tokens.")


def _alignment_table(result: dict[str, Any]) -> Table:
    def row(name: str, found: dict[str, Any], form: str) -> list[str]:
        values = (found["mean"], found["quantiles"]["0.05"], found["quantiles"]["0.95"])
        return [name, *(number(value, form) for value in values), f"{found['n']:,}"]

    rows = []
    for state in STATES:
        rows += [row(f"cosine, {state}, {words}", result[state][key], ".3f") for key, _, words in COSINES]
        rows += [row(f"norm, {state}, {kind}", norm, ".2f") for kind, norm in result[state]["norm"].items()]
    return Table("Cosines and norms", ["quantity", "mean", "5 %", "95 %", "tokens"], rows)


def _picture(path: Path) -> dict[str, Any]:
    """Return the alignment plots, reduced to 96 colours: they have few, and become small."""
    if not path.is_file():
        return {"lack": f"{path} is not there."}
    with Image.open(path) as image:
        reduced = image.convert("RGB").quantize(96)
    data = io.BytesIO()
    reduced.save(data, "PNG", optimize=True)
    if data.tell() > MAX_PICTURE_BYTES:
        return {"lack": f"{path} has {data.tell():,} bytes, too many for this page; open the file itself."}
    return _embedded("png", data.getvalue(), reduced)


# ---- sources


def _other(path: Path) -> dict[str, str]:
    """Return the verdict of other records, or the reason why they cannot be read."""
    try:
        summary = summarise(read_results(path)[0])
    except ValueError as error:
        return {"name": path.name, "scope": "", "verdict": str(error)}
    scope = f"{_data_words(summary['data'], None)}, {_size(summary)}"
    found = verdict(summary)
    said = found.notes[0] if "choices" in summary and found.notes else ""
    return {"name": path.name, "scope": scope, "verdict": f"{said} {found.sentence}".strip()}


def _source(results: Path, source: Source, run: Path, output: Path, score_command: str) -> dict[str, Any]:
    """Return checkpoints, fingerprints and versions, and the commands that make records, metrics and page again."""
    commands = {
        "metrics_command": command("eval", "--from", results),
        "page_command": command("report", run, "--results", results, "--output", output),
    }
    if source is None:
        meta = companion(results, ".meta.json", ".jsonl")
        lack = f"{meta} is not there, so the checkpoint and the cache behind these records are unknown."
        return commands | {"lack": lack, "records_command": score_command}
    data = f"{source['dataset']} {source['split']}, {source['statements_in_split']:,} statements"
    return commands | {
        "lack": "",
        "records_command": source["command"],
        "scored": [
            ("scored on", source["date"]),
            ("statements", f"{data}, from {source['annotations'] or 'the hub'}"),
            ("records, SHA-256", source["records_sha256"]),
            ("versions", ", ".join(f"{k} {v}" for k, v in source["versions"].items())),
        ],
        "checkpoints": [(name, _checkpoint(one)) for name, one in source["checkpoints"].items()],
        **_fingerprints(source),
    }


def _checkpoint(one: dict[str, Any]) -> list[tuple[str, str]]:
    parts = ", ".join(one["parts"])
    return [
        ("folder", one["checkpoint"]),
        ("optimizer steps", "unknown" if one["step"] is None else f"{one['step']:,}"),
        ("seed", str(one["seed"])),
        ("trained on", one["trained_on"]),
        ("modified parts of Gemma", parts or "none: Gemma as it was published"),
        ("trained parameters", f"{one['trained_parameters']:,}"),
        ("Gemma", f"{one['model_name']}, {one['model_revision'] or 'a local folder'}"),
        ("computed", f"in {one['dtype']} on {one['device']}"),
        ("projection", json.dumps(one["projection"])),
        ("fingerprint of its latents, SHA-256", one["fingerprint_sha256"]),
    ]


def _fingerprints(source: dict[str, Any]) -> dict[str, Any]:
    """Return the cache's folder and hashes, and all fields of the fingerprints."""
    if source["cache"] is None:
        cache = []
        fingerprints = {name or "latents": one["fingerprint"] for name, one in source["checkpoints"].items()}
    else:
        stores = {name: one for name, one in source["cache"].items() if name != "folder"}
        cache = [("folder", source["cache"]["folder"])]
        cache += [(f"{name}, SHA-256", one["sha256"]) for name, one in stores.items()]
        fingerprints = {name: one["fingerprint"] for name, one in stores.items()}
    tables = []
    for name, fields in fingerprints.items():
        rows = [[key, json.dumps(value)] for key, value in sorted(fields.items())]
        tables.append((name, Table(f"Fingerprint of {name}", ["field", "value"], rows)))
    return {"cache": cache, "fingerprints": tables}


# ---- numbers as text


def percent(share: float | None, digits: int = 1) -> str:
    """Format a share as "71.4 %", and None as "–"."""
    return "–" if share is None else f"{100 * share:.{digits}f}\u00a0%"


def between(low: float | None, high: float | None) -> str:
    """Format an interval of shares in percent, and a missing one as "–"."""
    return "–" if low is None or high is None else f"{100 * low:.1f} to {100 * high:.1f}"


def signed(difference: float | None) -> str:
    """Format a difference of shares in points with its sign, and None as "–"."""
    return "–" if difference is None else number(100 * difference, "+.1f")


def small(value: float, digits: int = 2) -> str:
    """Format a number that may be very small, such as a p value, with `digits` significant digits."""
    return typeset(f"{value:.{digits}g}")


def probability(p: float) -> str:
    """Format a probability with three decimals; 0 and 1 themselves are never shown for what is only close to them."""
    if 0 < p < 0.0005:
        return "<\u00a00.001"
    return ">\u00a00.999" if 0.9995 <= p < 1 else f"{p:.3f}"


def typeset(text: str) -> str:
    """Return plain text as print has it: no line begins with a per cent sign, powers of ten, U+2212 for minus."""
    text = re.sub(r"(\d) (%|points)", "\\1\u00a0\\2", text).replace("p = ", "p\u00a0=\u00a0")
    return re.sub(r"(?<![\w-])-(?=\d)", MINUS, re.sub(r"(\d)e-(\d+)", _power, text))


def _power(found: re.Match[str]) -> str:
    exponent = str(int(found[2])).translate(str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return f"{found[1]}\u00a0×\u00a010⁻{exponent}"
