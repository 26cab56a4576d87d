"""What the arms of a study learnt, on other benchmarks: the last checkpoint of each run, scored on each of them.

A benchmark is a folder as tools/get_benchmark.py makes it: test.jsonl, and its photographs in images/. Its items are
choices, scored by the largest P(true), or statements and questions. Records are beside those of the run, and are not
made again. Arms whose world tokens need more than the photograph (predicted frames, another image's latents) are left
out, and named.
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from theworld.data.benchmarks import IMAGES, STATEMENTS
from theworld.data.vsr import load_statements, statements_sha256
from theworld.evaluation.choices import choices_of
from theworld.evaluation.comparison import Estimate, Images, estimate, holm
from theworld.evaluation.records import Row, publish_json, read_results, read_source
from theworld.evaluation.score import score_to_file
from theworld.evaluation.study_verdict import PLAIN
from theworld.report.transfer import write_transfer
from theworld.study.protocol import Run, Study, runs_of
from theworld.study.results import question_of
from theworld.study.runner import is_done, read_done
from theworld.study.sizes import equal_sizes

logger = logging.getLogger(__name__)


def check_benchmarks(folders: Sequence[Path]) -> None:
    """Raise ValueError unless these are folders of benchmarks with different names."""
    for folder in folders:
        if not ((folder / STATEMENTS).is_file() and (folder / IMAGES).is_dir()):
            raise ValueError(
                f"--benchmarks {folder}: wanted a folder of tools/get_benchmark.py, with {STATEMENTS} and {IMAGES}/"
            )
    names = [folder.resolve().name for folder in folders]
    if len(set(names)) < len(names):
        raise ValueError(f"--benchmarks: {', '.join(names)}; give folders of different names")


def score_if_done(study: Study, folders: Sequence[Path], output: Path) -> str | None:
    """Score a study whose runs are all done, as `score_benchmarks`; return None for no benchmarks and before that."""
    runs = runs_of(equal_sizes(study), output) if folders else []
    return score_benchmarks(study, runs, folders, output) if runs and all(map(is_done, runs)) else None


def score_benchmarks(study: Study, runs: Sequence[Run], folders: Sequence[Path], output: Path) -> str:
    """Score all runs of a study on benchmarks, write transfer.json and transfer.html, and return lines to show.

    The runs are done. Raises what `check_benchmarks` and `score_to_file` do.
    """
    check_benchmarks(folders)
    whole = [run for run in runs if run.share == 1]
    alone = [run for run in whole if not needs_cache(run)]
    left_out = sorted({run.arm.name for run in whole} - {run.arm.name for run in alone})
    found: dict[str, Any] = {}
    for folder in folders:
        arms: dict[str, dict[int, list[Row]]] = {}
        for run in alone:
            rows = _records(run, folder)
            arms.setdefault(run.arm.name, {})[run.config.seed] = rows
            if "baseline" in rows[0]["systems"]:
                arms[PLAIN] = {run.config.seed: rows}
        found[folder.resolve().name] = transfer_of(arms, question_of(study).world)
    results = {"reference": question_of(study).world, "left_out": left_out, "benchmarks": _adjusted(found)}
    publish_json(results, output / "transfer.json")
    page = write_transfer(results, output)
    return "\n".join([*table(results), f"page: {page}"])


def needs_cache(run: Run) -> bool:
    """Return whether the world tokens of a run need more than the photograph."""
    return bool(run.config.num_world_steps) or run.config.world_encoder == "mismatched"


def _records(run: Run, folder: Path) -> list[Row]:
    """Return the records of a run on a benchmark, made now unless they are there for the same statements."""
    output = run.folder / "evaluation" / f"transfer-{folder.resolve().name}.jsonl"
    statements = load_statements(folder, "test")
    wanted = statements_sha256((s.image, s.caption, s.label) for s in statements)
    source = read_source(output) if output.is_file() else None
    if source is None or source["statements_sha256"] != wanted:
        conditions = ("world", "baseline") if run.number == 0 else ("world",)
        checkpoint = run.folder / read_done(run)["checkpoint"]
        words = [
            "--model",
            checkpoint,
            "--annotations",
            folder,
            "--image_folder",
            folder / IMAGES,
            "--output",
            output,
        ]
        command = ["python", "tools/eval.py", *map(str, words), "--conditions", *conditions]
        overrides = {"annotations": str(folder)}
        overrides |= {key: getattr(run.config, key) for key in ("device", "num_workers")}
        logger.info("%s on %s", run.name, folder)
        given = (conditions, overrides, command, output)
        score_to_file(
            [checkpoint], "test", None, folder / IMAGES, *given, train_annotations=run.config.annotations
        )
    return read_results(output)[0]


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
            lines.append(
                f"{name:24}{arm:16}{found['items']:>6}  {found['chance']:>6.1%}  {one['mean']:>8.1%}  "
                f"{one['low']:.1%} to {one['high']:.1%}"
            )
    if results["left_out"]:
        lines.append(f"not scored, as a photograph alone is not enough: {', '.join(results['left_out'])}")
    return lines
