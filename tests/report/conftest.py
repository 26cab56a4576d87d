"""Studies whose page, and whose figures for other programs, the tests read."""

import json
from pathlib import Path

import pytest
from study_records import run, study

from theworld.evaluation.study_summary import learning_curve, summarise_study
from theworld.evaluation.study_verdict import PLAIN, Question
from theworld.report.study import StudyPage, write_study

ARMS = ("world", "prompt", "pixels", "untrained", "noise")


@pytest.fixture(scope="session")
def summary() -> dict:
    """A study in which pixels do nearly as well as world tokens, as its file has it."""
    arms = study(0.7, pixels=0.69) | {PLAIN: {0: run(0.55, 0, "baseline")}}
    return json.loads(json.dumps(summarise_study(arms)))


@pytest.fixture(scope="session")
def folder(summary: dict, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of the study."""
    folder = tmp_path_factory.mktemp("study") / "vsr"
    curves = {
        arm: {s: [(i, 0.7 - 0.001 * i + 0.01 * s) for i in range(300)] for s in range(3)} for arm in ARMS
    }
    costs = {arm: {"trainable parameters": "1,234,567"} for arm in ARMS} | {PLAIN: {"steps": "none"}}
    found = StudyPage(
        "vsr <1>", summary, curves=curves, costs=costs, fixed=[("recipe", "3 epochs")], caution="Toy model."
    )
    assert write_study(found, folder) == folder / "study.html"
    return folder


PATCHES = {"patch-4": 0.62, "patch-2": 0.66, "patch-1": 0.7}
SHARES = {0.1: 768, 0.3: 2304, 1.0: 7680}


@pytest.fixture(scope="session")
def explored(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, Path]:
    """The figures and the files of a study of three patch sizes on three shares, without a comparison that decides."""
    arms = {arm: {s: run(a, s) for s in range(3)} for arm, a in PATCHES.items()}
    question = Question("patch-4", "patch-2", ("patch-2", "patch-1"), decides=False)
    found = summarise_study(arms | {PLAIN: {0: run(0.55, 0, "baseline")}}, question)
    shares = {
        share: {arm: {s: run(a - 0.05 * (1 - share), s) for s in range(3)} for arm, a in PATCHES.items()}
        for share in SHARES
    }
    found = json.loads(json.dumps(found | {"learning": learning_curve(shares, SHARES, question)}))
    folder = tmp_path_factory.mktemp("study") / "patches"
    curves = {arm: {s: [(i, 0.7) for i in range(20)] for s in range(3)} for arm in PATCHES}
    write_study(StudyPage("patches", found, curves=curves), folder)
    return found, folder
