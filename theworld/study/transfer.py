"""What the arms of a study learnt, on other benchmarks: the last checkpoint of each run, scored on each of them.

A benchmark is a folder as tools/get_benchmark.py makes it: test.jsonl, and its photographs in images/. Its items are
choices, scored by the largest P(true), or statements and questions. Records are beside those of the run
(transfer-NAME.jsonl), and are not made again; the page is drawn from them alone. Arms whose world tokens need more than
the photograph (predicted frames, another image's latents) are left out, and named.
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from theworld.data.benchmarks import IMAGES, STATEMENTS
from theworld.data.images import missing_photographs
from theworld.data.vsr import Statement, images_of, load_statements
from theworld.evaluation.choices import choices_of
from theworld.evaluation.comparison import NO_INTERVAL, Estimate, Images, estimate, holm
from theworld.evaluation.records import Row, publish_json, read_results, read_source
from theworld.evaluation.score import gemma_key, score_to_file
from theworld.evaluation.study_verdict import PLAIN
from theworld.models.gemma import Gemma, load_gemma
from theworld.models.serialization import SavedModel
from theworld.report.sources import toy_warning
from theworld.report.transfer import write_transfer
from theworld.study.protocol import Run, Study, runs_of
from theworld.study.results import question_of
from theworld.study.runner import ALL, is_done, read_done
from theworld.study.sizes import equal_sizes
from theworld.utils.commands import command
from theworld.utils.distributed import Part
from theworld.utils.hub import GEMMA_FILE
from theworld.utils.text import counted

logger = logging.getLogger(__name__)

PREFIX = "transfer-"  # of the records of a benchmark
NOT_ALONE = "a photograph alone is not enough for its world tokens"


def check_benchmarks(folders: Sequence[Path], follow_links: bool = False) -> None:
    """Raise ValueError unless these are folders of benchmarks with different names, whose statements can be read and
    whose photographs are there."""
    for folder in folders:
        if not ((folder / STATEMENTS).is_file() and (folder / IMAGES).is_dir()):
            raise ValueError(
                f"--benchmarks {folder}: wanted a folder of tools/get_benchmark.py, with {STATEMENTS} and {IMAGES}/"
            )
        images = images_of(load_statements(folder, "test"))
        missing = missing_photographs(images, folder / IMAGES, follow_links)
        if missing:
            name, reason = next(iter(missing.items()))
            raise ValueError(
                f"--benchmarks {folder}: {len(missing):,} of {counted(len(images), 'photograph')} cannot be read, such "
                f"as {name}: {reason}; get them with: {command('get_benchmark', 'NAME', '--output', folder)}"
            )
    names = [folder.resolve().name for folder in folders]
    if len(set(names)) < len(names):
        raise ValueError(f"--benchmarks: {', '.join(names)}; give folders of different names")


def plan_transfer(study: Study, folders: Sequence[Path]) -> Iterator[str]:
    """Yield lines that say what `score_benchmarks` would do."""
    runs = runs_of(study, Path())
    alone = _alone(runs)
    left_out = _names(runs) - _names(alone)
    for folder in folders:
        statements = load_statements(folder, "test")
        single = f", {NO_INTERVAL}" if len(images_of(statements)) == 1 else ""
        yield f"then scores  {counted(len(alone), 'run')} on {folder}: {counted(len(statements), 'statement')}{single}"
    if folders and left_out:
        yield f"leaves out   {', '.join(sorted(left_out))}: {NOT_ALONE}"


def score_benchmarks(study: Study, folders: Sequence[Path], output: Path, part: Part = ALL) -> str | None:
    """Score the runs of a part that are done on benchmarks; then draw the page, if all runs are scored, and return
    lines to show. Return None for no benchmarks.

    Records that are there are kept. Raises what `check_benchmarks` and `score_to_file` do.
    """
    if not folders:
        return None
    check_benchmarks(folders, study.base.follow_links)
    runs = runs_of(equal_sizes(study), output)
    alone, kept = _alone(runs), _Gemma()
    if not alone:
        return f"no arm is scored on the benchmarks: {NOT_ALONE}"
    for folder in folders:
        for run in (run for run in alone if part.owns(run.number) and is_done(run)):
            _score(run, folder, kept)
    names = [folder.resolve().name for folder in folders]
    left = [run.name for run in alone if not all(transfer_records(run, name).is_file() for name in names)]
    if not left:
        return draw_transfer(study, runs, output)
    return f"not yet scored on the benchmarks: {', '.join(left)}; transfer.html is drawn when all runs are"


def draw_transfer(study: Study, runs: Sequence[Run], output: Path) -> str | None:
    """Write transfer.json and transfer.html from the records of a study's runs, of every benchmark on which all of them
    are scored, and return lines to show, or None where there is no such benchmark.

    Raises ValueError naming the file for records that were changed or are of other statements than those of other runs.
    """
    alone, reference = _alone(runs), question_of(study).world
    names = scored_on(runs)
    if not names:
        return None
    found: dict[str, Any] = {}
    for name in names:
        arms: dict[str, dict[int, list[Row]]] = {}
        plain: dict[str, dict[int, list[Row]]] = {}
        for run in alone:
            rows = read_results(transfer_records(run, name))[0]
            _check_same(rows, transfer_records(run, name), arms)
            arms.setdefault(run.arm.name, {})[run.config.seed] = rows
            if "baseline" in rows[0]["systems"]:
                plain[PLAIN] = {run.config.seed: rows}
        found[name] = transfer_of(arms | plain, reference)
    left_out = sorted(_names(runs) - _names(alone))
    results = {"reference": reference, "left_out": left_out, "benchmarks": _adjusted(found)}
    publish_json(results, output / "transfer.json")
    source = read_source(transfer_records(alone[0], names[0]))
    caution = " ".join(filter(None, [study.caution, toy_warning([], source)]))
    page = write_transfer(results, output, caution)
    return "\n".join([*table(results), f"page: {page}"])


def needs_cache(run: Run) -> bool:
    """Return whether the world tokens of a run need more than the photograph."""
    return bool(run.config.num_world_steps) or run.config.world_encoder == "mismatched"


def transfer_records(run: Run, name: str) -> Path:
    """Return the file of a run's records on the benchmark of this name."""
    return run.folder / "evaluation" / f"{PREFIX}{name}.jsonl"


def _alone(runs: Sequence[Run]) -> list[Run]:
    """Return the runs that are scored: those on all training statements, whose arms need the photograph alone."""
    return [run for run in runs if run.share == 1 and not needs_cache(run)]


def _names(runs: Sequence[Run]) -> set[str]:
    return {run.arm.name for run in runs}


def scored_on(runs: Sequence[Run]) -> list[str]:
    """Return the names of the benchmarks on which all runs of a study have records, but for those left out; sorted."""
    found = [
        {
            path.stem.removeprefix(PREFIX)
            for path in transfer_records(run, "*").parent.glob(f"{PREFIX}*.jsonl")
        }
        for run in _alone(runs)
    ]
    return sorted(set.intersection(*found)) if found else []


@dataclass
class _Gemma:
    """The published Gemma that stays loaded from one run to the next that has the same."""

    key: tuple[Any, ...] = ()
    loaded: Gemma | None = None

    def of(self, checkpoint: Path, overrides: dict[str, Any]) -> Gemma | None:
        """Return the Gemma of a checkpoint, or None for one that has a Gemma of its own."""
        saved = SavedModel.open_folder(checkpoint)
        key = gemma_key(saved, overrides)
        if saved.world["parts"] or key != self.key:
            self.key, self.loaded = (), None  # before another is loaded
        if self.loaded is None and not saved.world["parts"]:
            config = saved.config(overrides)
            saved.locate(config, config.model_name, GEMMA_FILE)
            self.key, self.loaded = key, load_gemma(config, revision=saved.world["model_revision"])
        return self.loaded


def _score(run: Run, folder: Path, kept: _Gemma) -> None:
    """Write the records of a run on a benchmark, unless they are there for the same statements."""
    output = transfer_records(run, folder.resolve().name)
    statements = load_statements(folder, "test")
    there = output.is_file() and read_source(output) is not None
    if there and _asked(read_results(output)[0]) == sorted(map(_content, statements)):
        return
    conditions = ("world", "baseline") if run.number == 0 else ("world",)
    checkpoint = run.folder / read_done(run)["checkpoint"]
    given = {"model": checkpoint, "annotations": folder, "image_folder": folder / IMAGES, "output": output}
    flags = [word for name, value in given.items() for word in (f"--{name}", str(value))]
    words = ["python", "tools/eval.py", *flags, "--conditions", *conditions]
    overrides: dict[str, Any] = {key: getattr(run.config, key) for key in ("device", "num_workers")}
    overrides["annotations"] = str(folder)
    logger.info("%s on %s", run.name, folder)
    gemma = kept.of(checkpoint, overrides)
    score_to_file(
        *([checkpoint], "test", None, folder / IMAGES, conditions, overrides, words, output),
        train_annotations=run.config.annotations,
        gemma=gemma,
    )


def _content(s: Statement) -> tuple[Any, ...]:
    return s.image, s.caption, s.label, s.is_question, s.group, tuple(sorted(s.sets))


def _asked(rows: Sequence[Row]) -> list[tuple[Any, ...]]:
    """Return what records say of their statements, as `_content`, sorted."""
    return sorted(
        (
            *(row[key] for key in ("image", "statement", "label")),
            row.get("question", False),
            row.get("group", ""),
            tuple(sorted(row.get("sets", {}).items())),
        )
        for row in rows
    )


def _check_same(rows: Sequence[Row], path: Path, arms: dict[str, dict[int, list[Row]]]) -> None:
    """Raise ValueError unless records are of the same statements as those that were read before."""
    first = next((one for own in arms.values() for one in own.values()), rows)
    if _asked(rows) != _asked(first):
        raise ValueError(
            f"{path}: its {counted(len(rows), 'statement')} are not the {len(first):,} of the other runs, as the "
            "benchmark has changed; run the study again with --benchmarks, which scores all runs anew"
        )


def transfer_of(arms: dict[str, dict[int, list[Row]]], reference: str) -> dict[str, Any]:
    """Return the accuracy of each arm on one benchmark, and what the reference arm is better by than each other.

    `arms` has the records by arm and seed; plain Gemma's are under its name. Items are the choices, and the statements
    that belong to none. Intervals are over photographs and seeds.
    """
    hits: dict[str, np.ndarray] = {}
    for name, own in arms.items():
        condition = "baseline" if name == PLAIN else "world"
        hits[name] = np.array([_hits(own[seed], condition) for seed in sorted(own)], float)
    first = next(iter(next(iter(arms.values())).values()))
    items = _items(first)
    images = Images.of([item["image"] for item in items])
    found = {name: estimate(values, images) for name, values in hits.items()}
    return {
        "items": len(items),
        "images": len(images.counts),
        "choices": sum("options" in item for item in items),
        "chance": float(np.mean([1 / item.get("options", 2) for item in items])),
        "seen": sum(row["image_seen_in_train"] for row in first) / len(first),
        "arms": {
            name: _figures(one, one.share_interval())
            | {"each": dict(zip(map(str, sorted(arms[name])), one.each, strict=True))}
            for name, one in found.items()
        },
        "differences": {
            name: _figures(one, one.interval()) | {"p_value": one.p_value()}
            for name, values in hits.items()
            if name != reference and reference in hits
            for one in [estimate(hits[reference] - values, images)]
        },
    }


def _items(rows: Sequence[Row]) -> list[Row]:
    return [*choices_of(rows), *(row for row in rows if not row.get("group"))]


def _hits(rows: Sequence[Row], condition: str) -> list[bool]:
    return [bool(item["systems"][condition]["correct"]) for item in _items(rows)]


def _figures(one: Estimate, interval: tuple[float, float]) -> dict[str, float]:
    return {"mean": one.value, "low": interval[0], "high": interval[1]}


def _adjusted(found: dict[str, Any]) -> dict[str, Any]:
    """Add the p values of all differences, adjusted for their number (Holm): no comparison was fixed before."""
    every = [one for benchmark in found.values() for one in benchmark["differences"].values()]
    for one, p_value in zip(every, holm([one["p_value"] for one in every]), strict=True):
        one["adjusted_p_value"] = p_value
    return found


def table(results: dict[str, Any]) -> list[str]:
    """Return the accuracies on each benchmark as lines for a terminal."""
    lines = ["", f"{'benchmark':24}{'arm':16}{'items':>6}  {'chance':>6}  accuracy  95 % (images and seeds)"]
    for name, found in results["benchmarks"].items():
        for arm, one in found["arms"].items():
            interval = f"{one['low']:.1%} to {one['high']:.1%}" if found["images"] > 1 else NO_INTERVAL
            lines.append(
                f"{name:24}{arm:16}{found['items']:>6}  {found['chance']:>6.1%}  {one['mean']:>8.1%}  {interval}"
            )
    if results["left_out"]:
        lines.append(f"not scored: {', '.join(results['left_out'])}; {NOT_ALONE}")
    return lines
