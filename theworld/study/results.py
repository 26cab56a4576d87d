"""From the records of a study's runs to what they show: figures, a verdict, files for a paper, and a page."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from theworld.evaluation.records import Row, publish_json, read_results
from theworld.evaluation.study_verdict import PLAIN, Question, summarise_study
from theworld.study.protocol import Run, Study
from theworld.study.runner import SPLITS, read_done, records_of


def question_of(study: Study) -> Question:
    """Return the comparison that decides, as the statistics take it. Of a study that explores, each arm against the
    first: the arm that it is compared with."""
    primary = study.primary
    names = [arm.name for arm in study.arms]
    if primary is None:
        return Question(names[0], names[1], tuple(names[1:]))
    against = tuple(primary.against)
    return Question(primary.arm, against[0], against, alpha=primary.alpha, margin=primary.margin / 100)


def read_arms(study: Study, runs: Sequence[Run], split: str) -> dict[str, dict[int, list[Row]]]:
    """Return the records of all runs on a split by arm and seed; Gemma as it was published is the arm "plain".

    Raises ValueError naming the file for records that were changed since they were written.
    """
    arms: dict[str, dict[int, list[Row]]] = {arm.name: {} for arm in study.arms}
    for run in runs:
        path = records_of(run, split)
        arms[run.arm.name][run.config.seed] = rows = read_results(path)[0]
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


def write_results(study: Study, runs: Sequence[Run], output: Path) -> str:
    """Write study.json of a study whose runs are all done, and return what it has found, in words."""
    results = results_of(study, runs)
    publish_json(results, output / "study.json")
    return "\n".join([*table(results), "", said(study, results)])


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
