"""From the records of an evaluation, and the files beside them, to one page with everything about it.

The page shows the verdict, the metrics, photographs and the commands that make it again. Its data come from a run, to
which a checkpoint belongs:

    metrics.jsonl                              written by training
    evaluation/*.jsonl, results*.jsonl         records of tools/eval.py, each with its .meta.json
    alignment.json, alignment.png              written by tools/visualize_alignment.py

The page names each file that is missing, with the command that makes it. Everything here is plain text and numbers;
templates/ turns them into HTML, where all text is escaped.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from theworld.config.config import SPLIT_ALIASES
from theworld.data.benchmarks import BENCHMARKS
from theworld.evaluation.conditions import LABELS, checkpoints_in, condition_type, find_condition
from theworld.evaluation.metrics import find_pair, summarise
from theworld.evaluation.records import read_results
from theworld.evaluation.verdict import (
    HELPS,
    HURTS,
    NO_EVIDENCE,
    NOT_THE_WORLD,
    UNCONTROLLED,
    UNTESTED,
    p_words,
    verdict,
)
from theworld.report.accuracy import (
    Summary,
    calibration_section,
    checkpoints_table,
    choices_section,
    conditions_section,
    relations_section,
    seen_section,
    size_words,
)
from theworld.report.alignment import alignment_section
from theworld.report.examples import examples_section, folder_of_photographs
from theworld.report.page import rendered
from theworld.report.sources import Source, data_words, other_records, source_section, toy_warning
from theworld.report.text import between, percent, signed
from theworld.report.training import training_section
from theworld.utils.commands import command
from theworld.utils.files import check_output, publish_bytes
from theworld.utils.text import counted

NAME_A_RUN = "name a run such as checkpoints/vsr, or one of its checkpoints"
OF_A_RUN = ("metrics.jsonl", "alignment.json", "config.json", "checkpoint-*")  # one of them is in every run
VERDICTS = {  # of each kind of verdict: its CSS class and its words
    HELPS: ("good", "World tokens help"),
    HURTS: ("bad", "World tokens hurt"),
    NO_EVIDENCE: ("open", "No evidence"),
    NOT_THE_WORLD: ("open", "A gain, but not shown to be the world"),
    UNCONTROLLED: ("open", "A gain, not controlled"),
    UNTESTED: ("open", "Not tested"),
    "mixed": ("open", "Checkpoints do not agree"),
}


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
        folder, lack = folder_of_photographs(image_folder, source)
        yield f"reads        {shown}: {counted(len(rows), 'statement')}, {', '.join(rows[0]['systems'])}"
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
        lack = "a file, and a folder is wanted" if run.exists() else "no such folder"
        raise ValueError(f"{run}: {lack}; {NAME_A_RUN}")
    found = find_results(run)
    if results is None and not found and not any(any(run.glob(pattern)) for pattern in OF_A_RUN):
        raise ValueError(
            f"{run}: neither a run or a checkpoint (none of {', '.join(OF_A_RUN)}) nor a study (no protocol.json); "
            f"{NAME_A_RUN}"
        )
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


def render(
    run: Path, results: Path | None, others: Sequence[Path], image_folder: Path | None, output: Path
) -> str:
    """Return the page as text. `output` is the path that it is written to."""
    return rendered("report.html", **_page(run, results, others, image_folder, output))


def _page(
    run: Path, results: Path | None, others: Sequence[Path], image_folder: Path | None, output: Path
) -> dict[str, Any]:
    """Return the data of the page: one entry a section, None for a section that is left out."""
    rows, source = read_results(results) if results else ([], None)
    summary = summarise(rows) if rows else None
    data = data_words(summary["data"], source) if summary else ""
    cache = Path(source["cache"]["folder"]) if source and source["cache"] else "cache/"
    score_command = command("eval", "--model", run, "--cache", cache)
    folder = run_of(run)
    return {
        "run": run,
        "title": f"Do world tokens help{f' on {data}' if data else ''}?",
        "score_command": score_command,
        "verdict": summary and _verdict(summary, data, source),
        "conditions": summary and conditions_section(summary, data),
        "checkpoints": checkpoints_table(summary) if summary and summary["checkpoints"] else None,
        "choices": choices_section(summary["choices"]) if summary and "choices" in summary else None,
        "relations": summary
        and relations_section(summary, {row["relation"]: row["category"] for row in rows}),
        "seen": summary and seen_section(summary),
        "calibration": summary and calibration_section(summary),
        "training": training_section(folder / "metrics.jsonl"),
        "examples": examples_section(rows, run, image_folder, source) if rows else None,
        "alignment": alignment_section(run, folder, cache),
        "others": [other_records(path) for path in others] or None,
        "source": source_section(results, source, run, output, score_command) if results else None,
    }


def _verdict(summary: Summary, data: str, source: Source) -> dict[str, Any]:
    found = verdict(summary)
    kind, word = VERDICTS[found.kind]
    models = {one["model_name"] for one in source["checkpoints"].values()} if source else set()
    return {
        "kind": kind,
        "word": word,
        "scope": f"{size_words(summary)}: {data}{'; ' if models else ''}{', '.join(sorted(models))}.",
        "toy": toy_warning(summary["data"], source),
        "sentence": found.sentence,
        "notes": found.notes,
        "tiles": _tiles(summary),
    }


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
        tiles.append(("exact McNemar", p_words(pair["p_value"]), counts))
    return tiles
