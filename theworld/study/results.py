"""From the records of a study's runs to what they show: figures, a verdict, files for a paper, and a page."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from theworld.config.config import config_from
from theworld.evaluation.records import Row, publish_json, read_results, read_source
from theworld.evaluation.study_summary import learning_curve, summarise_study
from theworld.evaluation.study_verdict import PLAIN, Question
from theworld.report.sources import toy_warning
from theworld.report.study import StudyPage, write_study
from theworld.study.protocol import PROTOCOL, SPLITS, Arm, Primary, Run, Study, read_protocol, runs_of
from theworld.study.runner import is_done, read_done, records_of, said_of
from theworld.training.logging import METRICS
from theworld.utils.commands import PLACEHOLDER, command
from theworld.utils.console import duration
from theworld.utils.text import counted


def question_of(study: Study) -> Question:
    """Return the comparison that decides, as the statistics take it. Of a study that explores, each arm against the
    first: the arm that it is compared with."""
    primary = study.primary
    names = [arm.name for arm in study.arms]
    if primary is None:
        world = study.baseline or names[0]
        others = tuple(name for name in names if name != world)
        return Question(world, others[0], others, decides=False, baseline=study.baseline)
    against = tuple(primary.against)
    return Question(primary.arm, against[0], against, alpha=primary.alpha, margin=primary.margin / 100)


def read_arms(
    study: Study, runs: Sequence[Run], split: str, share: float = 1.0
) -> dict[str, dict[int, list[Row]]]:
    """Return the records of all runs on a split by arm and seed, of those that were trained on a share of the training
    statements; Gemma as it was published is the arm "plain".

    Raises ValueError naming the file for records that were changed since they were written.
    """
    arms: dict[str, dict[int, list[Row]]] = {arm.name: {} for arm in study.arms}
    for run in (run for run in runs if run.share == share):
        path = records_of(run, split)
        arms[run.arm.name][run.config.seed] = rows = read_results(path)[0]
        if run.number == 0 and "baseline" in rows[0]["systems"]:
            arms[PLAIN] = {run.config.seed: rows}
    return arms


def results_of(study: Study, runs: Sequence[Run]) -> dict[str, Any]:
    """Return everything that a study has found, as JSON. Raises as `read_arms` and `summarise_study` do."""
    question, done = question_of(study), {run.name: read_done(run) for run in runs}
    found = {split: summarise_study(read_arms(study, runs, split), question) for split in SPLITS}
    if len(study.train_shares) > 1:
        numbers = {run.share: done[run.name]["training_statements"] for run in runs}
        for split, summary in found.items():
            shares = {share: read_arms(study, runs, split, share) for share in study.train_shares}
            summary["learning"] = learning_curve(shares, numbers, question)
    return {"protocol": study.protocol(), "runs": done, **found}


def write_results(study: Study, runs: Sequence[Run], output: Path) -> str:
    """Write the figures and the page of a study whose runs are all done, and return what it has found, in words. A
    single arm has nothing to be compared with, and no page."""
    if len(study.arms) == 1:
        return "\n".join(map(said_of, runs))
    results = results_of(study, runs)
    publish_json(results, output / "study.json")
    write_study(page_of(study, runs, results, output), output)
    return "\n".join([*table(results), "", *filter(None, [study.caution]), said(results)])


def page_of(study: Study, runs: Sequence[Run], results: dict[str, Any], output: Path) -> StudyPage:
    """Return what the page shows of a study: its figures on test, and what it fixed, took and learnt."""
    curves: dict[str, dict[int, list[tuple[float, float]]]] = {arm.name: {} for arm in study.arms}
    costs: dict[str, dict[str, str]] = {}
    for arm in study.arms:
        own = [run for run in runs if run.arm.name == arm.name]
        for run in (run for run in own if run.share == 1):
            curves[arm.name][run.config.seed] = _losses(run)
        done = [results["runs"][run.name] for run in own]
        costs[arm.name] = {
            "trainable parameters": f"{done[0]['trainable_parameters']:,}",
            "steps": f"{done[0]['steps']:,}",
            "time of all runs": duration(sum(one["seconds"] for one in done)),
            **_seconds(done),
            "device": ", ".join(sorted({one["device"] for one in done})),
        }
    fixed = [
        (f"arm {arm.name}", "; ".join(filter(None, [json.dumps(dict(arm.changes)), _rules_out(arm)])))
        for arm in study.arms
    ]
    source = read_source(records_of(runs[0], "test"))
    return StudyPage(
        output.resolve().name,
        results["test"],
        curves,
        costs,
        fixed,
        caution=" ".join(filter(None, [study.caution, toy_warning(results["test"]["data"], source)])),
    )


def _seconds(done: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Return what each run of an arm took, and what was predicted before it started, where anything was."""
    found = {"seconds of each run": ", ".join(f"{one['seconds']:.1f}" for one in done)}
    if any("predicted_seconds" in one for one in done):
        predicted = (one.get("predicted_seconds") for one in done)
        found["seconds predicted for each run"] = ", ".join(
            "–" if one is None else f"{one:.1f}" for one in predicted
        )
    return found


def _losses(run: Run) -> list[tuple[float, float]]:
    """Return the training losses at the label of a run, by step."""
    path = run.folder / METRICS
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [(line["step"], line["loss"]) for line in lines if line["phase"] == "train" and "loss" in line]


def _rules_out(arm: Arm) -> str:
    return f"rules out {arm.rules_out}" if arm.rules_out else ""


# ---- again, from the records alone


def study_in(folder: Path) -> tuple[Study, list[Run]]:
    """Return the study that a folder holds and its runs. Raises ValueError if a run is not done."""
    path = folder / PROTOCOL
    found = read_protocol(path)
    arms = [Arm(name, own, found["rules_out"].get(name, "")) for name, own in found["arms"].items()]
    primary = Primary(**found["primary"]) if found["primary"] else None
    shares, baseline = found.get("train_shares", [1.0]), found.get("baseline")
    base, caution = config_from(found["settings"], path), found.get("caution", "")
    study = Study(base, arms, primary, found["seeds"], shares, baseline, caution)
    runs = runs_of(study, folder)
    left = [run.name for run in runs if not is_done(run)]
    if left:
        again = command("study", "--config", "FILE", "--cache", PLACEHOLDER, "--output", folder)
        raise ValueError(
            f"{folder}: not done: {len(left)} of {counted(len(runs), 'run')}, {', '.join(left)}; go on with: {again}"
        )
    return study, runs


def draw_again(folder: Path) -> str:
    """Write the figures and the page of a study again from its records, and return what it has found, in words."""
    return write_results(*study_in(folder), folder)


def plan_again(folder: Path) -> Iterator[str]:
    """Yield lines that say what `draw_again` would do. Raises the same errors."""
    study, runs = study_in(folder)
    size = f"{counted(len(study.arms), 'arm')}, {counted(len(study.seeds), 'seed')}"
    yield f"reads        the records of {counted(len(runs), 'run')}: {size}"
    yield f"writes       study.json, study.csv, study.tex and study.html in {folder}"


def said(results: dict[str, Any]) -> str:
    """Return the verdict with its notes, on all statements of test and on those of unseen photographs."""
    scopes = results["test"]["scopes"].values()
    return "\n".join(
        line for scope in scopes for line in (scope["verdict"]["sentence"], *scope["verdict"]["notes"])
    )


def table(results: dict[str, Any]) -> list[str]:
    """Return the accuracies of all arms on test, as lines for a terminal."""
    scope, alpha = results["test"]["scopes"]["all"], results["test"]["question"]["alpha"]
    arms = scope["arms"]
    width = max(map(len, arms))
    lines = [f"{'arm':{width}}  test     {100 * (1 - alpha):g} % interval    by seed"]
    for name, metrics in arms.items():
        own = metrics["accuracy"]
        seeds = " ".join(f"{100 * value:.1f}" for value in own["each"].values())
        interval = f"{100 * own['low']:5.1f} to {100 * own['high']:5.1f}" if scope["images"] > 1 else "none"
        lines.append(f"{name:{width}}  {100 * own['mean']:5.1f} %  {interval:14}   {seeds}")
    return lines
