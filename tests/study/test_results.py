"""From the records of a study's runs to its figures and its verdict."""

import json
import runpy
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from constants import ROOT

from theworld.evaluation.records import read_jsonl
from theworld.evaluation.study_verdict import PLAIN, Question
from theworld.study.plan import plan_study
from theworld.study.protocol import Arm, Study, runs_of
from theworld.study.results import draw_again, page_of, question_of, read_arms, results_of, write_results
from theworld.study.runner import ALL, DONE, is_done, read_done, records_of, run_part
from theworld.utils.console import duration
from theworld.utils.signals import StopRequest


def test_the_comparison_that_was_fixed_is_the_one_that_decides(study: Study) -> None:
    assert question_of(study) == Question("world", "pixels", ("pixels",), "accuracy", 0.05, 0.01)
    explores = replace(study, primary=None, arms=(*study.arms, Arm("linear", {"projection": "linear"})))
    assert question_of(explores) == Question("world", "pixels", ("pixels", "linear"), decides=False)


def test_figures_follow_from_the_records_of_every_run(study: Study, ended: Path) -> None:
    runs = runs_of(study, ended)
    arms = read_arms(study, runs, "test")
    assert {name: sorted(own) for name, own in arms.items()} == {
        "world": [0, 1],
        "pixels": [0, 1],
        PLAIN: [0],
    }
    results = results_of(study, runs)
    right = [row["systems"]["world"]["correct"] for row in read_jsonl(records_of(runs[3], "test"))]
    found = results["test"]["scopes"]["all"]["arms"]["pixels"]["accuracy"]
    assert found["each"]["1"] == sum(right) / 6
    assert found["mean"] == sum(found["each"].values()) / 2
    assert results["protocol"] == json.loads((ended / "protocol.json").read_text())
    assert results["runs"]["pixels-1"]["steps"] == 2
    assert list(results["test"]["scopes"]) == ["all"]  # every photograph was in training


def test_what_is_written_is_shown_and_two_seeds_give_no_verdict(
    study: Study, ended: Path, tmp_path: Path
) -> None:
    shutil.copytree(ended, tmp_path / "out")
    runs = runs_of(study, tmp_path / "out")
    text = write_results(study, runs, tmp_path / "out")
    found = json.loads((tmp_path / "out" / "study.json").read_text())
    assert found == json.loads(json.dumps(results_of(study, runs)))
    assert [line.split()[0] for line in text.splitlines()[:4]] == ["arm", "world", "pixels", "plain"]
    assert (
        "No verdict on the test split of custom data (6 statements about 3 images; 2 seeds): it takes 3 seeds"
        in text
    )


def test_a_learning_curve_is_of_the_runs_on_each_share_and_the_verdict_of_those_on_all(
    study: Study, study_cache: Path, ended: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(ended, out)
    (out / "protocol.json").unlink()
    some = replace(study, train_shares=[0.5, 1.0])
    some.fix(out)
    runs = runs_of(some, out)
    assert [run.name for run in runs if not is_done(run)] == [
        *("world@0.5-0", "pixels@0.5-0", "world@0.5-1", "pixels@0.5-1")
    ]
    assert run_part(runs, study_cache, ALL, StopRequest()) == {}
    halves = [run for run in runs if run.share == 0.5]
    done = [read_done(run) for run in halves]
    assert [(one["training_statements"], one["steps"]) for one in done] == [(3, 2)] * 4
    text = write_results(some, runs, out)
    found = json.loads((out / "study.json").read_text())
    alone = results_of(study, runs_of(study, ended))
    curve = found["test"].pop("learning")
    assert found["test"] == json.loads(json.dumps(alone["test"]))
    assert [(one["share"], one["training_statements"]) for one in curve] == [(0.5, 3), (1.0, 6)]
    right = [row["systems"]["world"]["correct"] for row in read_jsonl(records_of(halves[1], "test"))]
    assert curve[0]["arms"]["pixels"]["accuracy"]["each"]["0"] == sum(right) / 6
    assert curve[1]["arms"]["pixels"] == found["test"]["scopes"]["all"]["arms"]["pixels"]
    lines = list(plan_study(some, runs, study_cache, out))
    assert lines[0] == "study        2 arms x 2 seeds x 2 shares: 8 runs, 8 done"
    assert draw_again(out) == text


FILES = ("study.json", "study.csv", "study.tex", "study.html")


def test_a_study_is_drawn_again_from_its_records_alone(
    study: Study,
    out: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = write_results(study, runs_of(study, out), out)
    files = {name: (out / name).read_bytes() for name in FILES}
    for name in FILES:
        (out / name).unlink()
    report = runpy.run_path(str(ROOT / "tools" / "report.py"))["main"]
    monkeypatch.setattr(sys, "argv", ["report.py", str(out)])
    assert report() == 0
    assert capsys.readouterr().out == f"{text}\n\npage: {out / 'study.html'}\n"
    assert {name: (out / name).read_bytes() for name in FILES} == files
    monkeypatch.setattr(sys, "argv", ["report.py", str(out), "--dry_run"])
    assert report() == 0
    assert "reads        the records of 4 runs: 2 arms, 2 seeds" in capsys.readouterr().out
    (runs_of(study, out)[3].folder / DONE).unlink()
    with pytest.raises(
        ValueError, match=r"not done: 1 of 4 runs, pixels-1; go on with: python tools/study\.py"
    ):
        draw_again(out)


def test_the_page_has_the_curves_the_costs_and_what_was_fixed(study: Study, ended: Path) -> None:
    runs = runs_of(study, ended)
    page = page_of(study, runs, results_of(study, runs), ended)
    assert {arm: {seed: len(c) for seed, c in own.items()} for arm, own in page.curves.items()} == {
        "world": {0: 2, 1: 2},
        "pixels": {0: 2, 1: 2},
    }
    trained = read_done(runs[0])["trainable_parameters"]
    assert page.costs["world"]["trainable parameters"] == f"{trained:,}"
    took = [read_done(run)["seconds"] for run in runs if run.arm.name == "world"]
    assert page.costs["world"]["seconds of each run"] == "{:.1f}, {:.1f}".format(*took)
    assert page.costs["world"]["time of all runs"] == duration(sum(took))
    assert not any("predicted" in name for name in page.costs["world"])
    results = results_of(study, runs)
    results["runs"]["pixels-1"]["predicted_seconds"] = 1.25
    assert page_of(study, runs, results, ended).costs["pixels"]["seconds predicted for each run"] == "–, 1.2"
    assert ("arm pixels", '{"world_encoder": "pixels"}; rules out that any second look did it') in page.fixed
    assert page.caution.startswith("Toy model: the hidden size of this Gemma is ")


def test_a_caution_stands_beside_the_verdict_again_too(study: Study, ended: Path, tmp_path: Path) -> None:
    out, warned = tmp_path / "out", replace(study, caution="A control: it was put in.")
    shutil.copytree(ended, out)
    (out / "protocol.json").unlink()
    warned.fix(out)
    text = write_results(warned, runs_of(warned, out), out)
    assert "\n\nA control: it was put in.\nNo verdict on the test split" in text
    assert "A control: it was put in. Toy model: " in (out / "study.html").read_text(encoding="utf-8")
    assert draw_again(out) == text


def test_records_that_were_changed_are_refused_by_name(study: Study, ended: Path, tmp_path: Path) -> None:
    shutil.copytree(ended, tmp_path / "out")
    runs = runs_of(study, tmp_path / "out")
    path = records_of(runs[2], "test")
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[::-1]))
    with pytest.raises(
        ValueError, match=r"runs/world-1/evaluation/test.meta.json is of records with SHA-256"
    ):
        write_results(study, runs, tmp_path / "out")
