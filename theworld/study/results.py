"""From the records of a study's runs to what they show: figures, a verdict, files for a paper, and a page."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from theworld.evaluation.records import Row, publish_json, read_jsonl
from theworld.evaluation.score import read_source
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
