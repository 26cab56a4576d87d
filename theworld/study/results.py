"""From the records of a study's runs to what they show: figures, a verdict, files for a paper, and a page."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from theworld.evaluation.records import Row, publish_json, read_jsonl
from theworld.evaluation.score import read_source
from theworld.evaluation.study_verdict import PLAIN, Question, summarise_study
from theworld.report import study as report
from theworld.report.report import SMALLEST_GEMMA_WIDTH
from theworld.report.study import write_study
from theworld.study.protocol import Arm, Run, Study, runs_of
from theworld.study.runner import SPLITS, is_done, read_done, records_of, said_of
from theworld.training.memory import sizes_of
from theworld.utils.commands import command

TOYS = (
    "The models are of toy size. This study shows that the machinery tells its arms apart; it says nothing about Gemma "
    "3 4B, Cosmos or photographs."
)


def question_of(study: Study) -> Question:
    """Return the comparison that decides, as the statistics take it. Of a study that explores, each arm against the
    first: the arm that it is compared with."""
    primary = study.primary
    names = [arm.name for arm in study.arms]
    if primary is None:
        return Question(names[0], names[1], tuple(names[1:]), decides=False)
    against = tuple(primary.against)
    return Question(primary.arm, against[0], against, alpha=primary.alpha, margin=primary.margin / 100)


def read_arms(study: Study, runs: Sequence[Run], split: str) -> dict[str, dict[int, list[Row]]]:
    """Return the records of all runs on a split by arm and seed; Gemma as it was published is the arm "plain".

    Raises ValueError naming the file for records that were changed since they were written.
    """
    arms: dict[str, dict[int, list[Row]]] = {arm.name: {} for arm in study.arms}
    for run in runs:
        path = records_of(run, split)
        read_source(path)
        arms[run.arm.name][run.config.seed] = rows = read_jsonl(path)
        if run.number == 0 and "baseline" in rows[0]["systems"]:
            arms[PLAIN] = {run.config.seed: rows}
    return arms


def results_of(study: Study, runs: Sequence[Run]) -> dict[str, Any]:
    """Return everything that a study has found, as JSON. Raises as `read_arms` and `summarise_study` do."""
    question = question_of(study)
    return {
        "protocol": study.protocol(),
        "runs": {run.name: read_done(run) for run in runs},
        **{split: summarise_study(read_arms(study, runs, split), question) for split in SPLITS},
    }


def write_results(study: Study, output: Path) -> str:
    """Write study.json, study.csv, study.tex and study.html of a study whose runs are all done, and return what it has
    found, in words. Raises ValueError naming the first run that is not done."""
    runs = runs_of(study, output)
    for run in runs:
        if not is_done(run):
            raise ValueError(
                f"{run.folder} is not done yet, and a study is shown as a whole; the same command goes on"
            )
    if len(study.arms) == 1:
        return "\n".join([*map(said_of, runs), "one arm: there is nothing to compare"])
    results = results_of(study, runs)
    publish_json(results, output / "study.json")
    page = write_study(page_of(study, runs, results["test"], output), output)
    return "\n".join([*table(results), "", said(study, results), f"page: {page}"])


def page_of(study: Study, runs: Sequence[Run], summary: dict[str, Any], output: Path) -> report.Study:
    """Return what the page of a study shows: the summary of test, curves, costs, and what was fixed."""
    curves: dict[str, dict[int, list[tuple[float, float]]]] = {arm.name: {} for arm in study.arms}
    for run in runs:
        curves[run.arm.name][run.config.seed] = _losses(run)
    sizes = sizes_of(study.base.model_name)
    small = sizes is not None and sizes.hidden < SMALLEST_GEMMA_WIDTH
    return report.Study(
        output.resolve().name,
        summary,
        curves,
        {arm.name: _costs([run for run in runs if run.arm.name == arm.name]) for arm in study.arms},
        [(f"arm {arm.name}", _differs(arm)) for arm in study.arms],
        TOYS if small else "",
        command("report", output),
    )


def _losses(run: Run) -> list[tuple[float, float]]:
    """Return (step, loss at the label) of the main phase of a run."""
    text = (run.folder / "metrics.jsonl").read_text(encoding="utf-8")
    lines = [json.loads(line) for line in text.splitlines()]
    return [(line["step"], line["loss"]) for line in lines if line["phase"] == "train" and "loss" in line]


def _costs(runs: Sequence[Run]) -> dict[str, str]:
    done = [read_done(run) for run in runs]
    return {
        "trained parameters": f"{done[0]['trainable_parameters']:,}",
        "steps": f"{done[0]['steps']:,}",
        "statements a step": f"{done[0]['statements_per_step']:,}",
        "hours, all seeds": f"{sum(one['seconds'] for one in done) / 3600:.2f}",
        "device": done[0]["device"],
    }


def _differs(arm: Arm) -> str:
    changes = ", ".join(f"{key} {value}" for key, value in arm.changes.items()) or "the recipe as it is"
    return f"{changes}; rules out {arm.rules_out}" if arm.rules_out else changes


def said(study: Study, results: dict[str, Any]) -> str:
    """Return the verdict with its notes, on all statements of test and on those of unseen photographs."""
    if study.primary is None:
        return "no verdict: the study fixed no `primary` comparison before it ran"
    scopes = results["test"]["scopes"].values()
    return "\n".join(
        line for scope in scopes for line in (scope["verdict"]["sentence"], *scope["verdict"]["notes"])
    )


def table(results: dict[str, Any]) -> list[str]:
    """Return the accuracies of all arms on test, as lines for a terminal."""
    arms = results["test"]["scopes"]["all"]["arms"]
    width = max(map(len, arms))
    lines = [f"{'arm':{width}}  test     95 % interval    by seed"]
    for name, metrics in arms.items():
        own = metrics["accuracy"]
        seeds = " ".join(f"{100 * value:.1f}" for value in own["each"].values())
        lines.append(
            f"{name:{width}}  {100 * own['mean']:5.1f} %  {100 * own['low']:5.1f} to {100 * own['high']:5.1f}   {seeds}"
        )
    return lines
