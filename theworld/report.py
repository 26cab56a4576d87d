"""One page that holds an evaluation: the verdict, the figures, the photographs, and how to make it again.

What it reads lies in a run, of which a checkpoint is a part:

    metrics.jsonl                              training wrote it
    evaluation/*.jsonl, results*.jsonl         records of tools/eval.py, each with .meta.json beside it
    alignment.json, alignment.png              of tools/visualize_alignment.py

What is not there is said on the page, with the command that makes it.
"""

from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from typing import Any

from theworld import report_figures as figures
from theworld import report_groups as by_group
from theworld import report_parts as parts
from theworld import report_source as origins
from theworld.files import publish_bytes
from theworld.metrics import Row, read_jsonl, summarise
from theworld.page import missing, page, paragraph, table
from theworld.places import check_output
from theworld.provenance import read_source
from theworld.verdict import verdict


def write_report(
    run: Path,
    output: Path | None = None,
    results: Path | None = None,
    image_folder: Path | None = None,
) -> Path:
    """Writes the page of a run or of one of its checkpoints and returns its path, `output` or RUN/report.html.

    `results`: the records to show; None: the newest that are there, the others in a table. `image_folder`: the
    photographs, if they are not where they were when the records were made. Raises ValueError and OSError for a run
    that is not there and for records that do not hold.
    """
    shown, others = _chosen(run, results)
    output = output or run / "report.html"
    check_output(output)
    text = render(run, shown, others, image_folder, output)
    output.parent.mkdir(parents=True, exist_ok=True)
    publish_bytes(output, text.encode("utf-8"), overwrite=True)
    return output


def plan_report(
    run: Path, output: Path | None = None, results: Path | None = None, image_folder: Path | None = None
) -> Iterator[str]:
    """What `write_report` would do with the same arguments, in lines. Raises ValueError and OSError as it does."""
    shown, others = _chosen(run, results)
    if shown is not None:
        rows = read_jsonl(shown)
        photographs = _photographs(image_folder, read_source(shown))
        yield f"reads        {shown}: {len(rows):,} statements, {', '.join(rows[0]['systems'])}"
        yield f"             photographs: {photographs.folder or photographs.lack}"
    for path in (*others, run_of(run) / "metrics.jsonl", run_of(run) / "alignment.json"):
        yield f"             {path}{'' if path.is_file() else ': not there, which the page says'}"
    output = output or run / "report.html"
    yield f"writes       {output}{check_output(output)}"


def _chosen(run: Path, results: Path | None) -> tuple[Path | None, list[Path]]:
    """The records to show, and the others of the run. ValueError if it is not there."""
    if not run.is_dir():
        raise ValueError(
            f"{run}: no such folder; name a run such as checkpoints/vsr, or one of its checkpoints"
        )
    found = find_results(run)
    shown = results or (found[-1] if found else None)
    return shown, [path for path in found if shown is None or path.resolve() != shown.resolve()]


def run_of(folder: Path) -> Path:
    """The run that a folder belongs to: a checkpoint's parent, else the folder itself."""
    is_checkpoint = not (folder / "metrics.jsonl").is_file() and (folder.parent / "metrics.jsonl").is_file()
    return folder.parent if is_checkpoint else folder


def find_results(folder: Path) -> list[Path]:
    """The records of a run, or of one of its checkpoints, oldest first."""
    run = run_of(folder)
    of_one = f"{folder.name}-*.jsonl" if run != folder else "*.jsonl"
    found = [
        *(run / "evaluation").glob(of_one),
        *folder.glob("results*.jsonl"),
        *(folder / "evaluation").glob("*.jsonl"),
    ]
    return sorted(set(found), key=lambda path: (path.stat().st_mtime_ns, path.name))


def render(
    run: Path, results: Path | None, others: Sequence[Path], image_folder: Path | None, output: Path
) -> str:
    """The page as text; `output` is where it is going to lie."""
    rows = read_jsonl(results) if results else []
    source = read_source(results) if results else None
    head = f'<p class="kicker">TheWorld, evaluation of {escape(str(run))}</p><h1>Do world tokens help?</h1>'
    sections: list[tuple[str, str, str]] = []
    if results and rows:
        summary = summarise(rows)
        head += figures.header(summary, verdict(summary))
        sections += _measured(summary, rows)
    else:
        head += missing(
            f"Not evaluated yet: there are no records in {run / 'evaluation'}.",
            f"python tools/eval.py --model_name {run} --cache cache/",
        )
    sections.append(("training", "Training", parts.training(run_of(run) / "metrics.jsonl")))
    if results and rows:
        sections.append(("examples", "Photographs", parts.examples(rows, _photographs(image_folder, source))))
    sections.append(("alignment", "Where the world tokens lie", origins.alignment(run, run_of(run))))
    if others:
        sections.append(("others", "Other evaluations of this run", _others(others)))
    if results:
        sections.append(("source", "How to make this again", origins.source(results, source, run, output)))
    made = "Made by tools/report.py from the records and what lies beside them."
    footer = paragraph(f"{made} This page loads nothing and runs no script.")
    return page(f"Do world tokens help? {run.name}", head, sections, footer)


def _measured(summary: dict[str, Any], rows: Sequence[Row]) -> list[tuple[str, str, str]]:
    relations = {row["relation"]: row["category"] for row in rows}
    sections = [("systems", "Systems side by side", figures.systems(summary))]
    if summary["checkpoints"]:
        sections.append(("checkpoints", "Over checkpoints", figures.checkpoints(summary)))
    return [
        *sections,
        ("relations", "By relation", by_group.relations(summary, relations)),
        ("seen", "Images seen in training and others", by_group.seen(summary)),
        ("calibration", "Calibration", by_group.calibration(summary)),
    ]


def _photographs(given: Path | None, source: dict[str, Any] | None) -> parts.Photographs:
    if given is not None:
        if not given.is_dir():
            raise ValueError(f"--image-dir {given}: no such folder")
        return parts.Photographs(given)
    named = source and source["image_folder"]
    if not named:
        return parts.Photographs(None, "Which folder holds the photographs is not known; name it.")
    if not Path(named).is_dir():
        return parts.Photographs(
            None, f"The photographs were in {named}, which is not there; name their folder."
        )
    return parts.Photographs(Path(named))


def _others(paths: Sequence[Path]) -> str:
    """A row for each; records that do not hold are named with what is wrong with them."""
    rows = []
    for path in paths:
        try:
            summary = summarise(read_jsonl(path))
        except ValueError as error:
            rows.append([path.name, "", str(error)])
            continue
        rows.append([path.name, f"{summary['statements']:,}", verdict(summary).sentence])
    return table("Other records", ["records", "statements", "verdict"], rows) + paragraph(
        "Each has a page of its own with --results."
    )
