"""The arms of a study on other benchmarks: figures by hand, scored once, and one page."""

import itertools
import json
import runpy
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import benchmark_data
import numpy as np
import pytest
from commands import main_of, tool
from constants import ROOT
from records import statement, with_rest

from theworld.config.config import save_config
from theworld.data.benchmarks import BENCHMARKS, get_benchmark
from theworld.evaluation import score
from theworld.evaluation.records import Row, read_jsonl, records
from theworld.evaluation.study_verdict import PLAIN
from theworld.report.transfer import write_transfer
from theworld.study import transfer
from theworld.study.protocol import Arm, Study, runs_of
from theworld.study.runner import DONE
from theworld.study.transfer import (
    check_benchmarks,
    draw_transfer,
    needs_cache,
    plan_transfer,
    score_benchmarks,
    transfer_of,
    transfer_records,
)
from theworld.utils.distributed import Part
from theworld.utils.files import companion


@pytest.fixture(scope="module")
def whatsup(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small stand-in for What'sUp A, as tools/get_benchmark.py makes it."""
    folder = tmp_path_factory.mktemp("benchmarks")
    small = replace(BENCHMARKS["whatsup_a"], rows=8)
    source = benchmark_data.write_files(
        folder / "hub", small.files, benchmark_data.whatsup_a(8), benchmark_data.WHATSUP
    )
    get_benchmark(small, folder / "whatsup_a", source)
    return folder / "whatsup_a"


def four_choices(right: str, condition: str = "world") -> list[Row]:
    """Return the records of four choices of two statements, of which those marked 1 are answered rightly."""
    asked = [replace(statement(i, f"{i // 2}.jpg", 1 - i % 2), group=f"{i // 2}") for i in range(8)]
    margins = [m for hit in right for m in ((1.0, 0.0) if hit == "1" else (0.0, 1.0))]
    answers = {condition: with_rest(np.stack([np.zeros(8), np.array(margins)], 1))}
    return records(asked, answers, {"0.jpg"}, set(), "own data", "test")


def test_the_accuracy_of_an_arm_is_its_choices_over_seeds_and_its_difference_is_of_the_same_items() -> None:
    arms = {
        "world": {0: four_choices("1110"), 1: four_choices("1111")},
        "pixels": {0: four_choices("1000"), 1: four_choices("1001")},
        PLAIN: {0: four_choices("1000", "baseline")},
    }
    found = transfer_of(arms, "world")
    assert [found[key] for key in ("items", "images", "choices", "chance", "seen")] == [4, 4, 4, 0.5, 0.25]
    assert found["arms"]["world"]["each"] == {"0": 0.75, "1": 1.0}
    assert [found["arms"][name]["mean"] for name in arms] == [0.875, 0.375, 0.25]
    assert {name: one["mean"] for name, one in found["differences"].items()} == {"pixels": 0.5, PLAIN: 0.625}
    one = found["differences"]["pixels"]
    assert one["low"] < 0.5 < one["high"]
    assert 0 < one["p_value"] < 1


def test_the_interval_of_a_difference_ends_at_plus_and_minus_100_points() -> None:
    arms = {
        "world": {0: four_choices("1111"), 1: four_choices("0000")},
        "pixels": {0: four_choices("0000"), 1: four_choices("0100")},
    }
    (one,) = transfer_of(arms, "world")["differences"].values()
    assert one.items() >= {("mean", 0.375), ("low", -1.0), ("high", 1.0)}


def test_all_runs_are_scored_once_and_drawn_on_one_page_which_the_report_draws_again(
    study: Study, out: Path, whatsup: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    runs = runs_of(study, out)
    text = score_benchmarks(study, [whatsup], out)
    assert text is not None
    results = json.loads((out / "transfer.json").read_text())
    found = results["benchmarks"]["whatsup_a"]
    assert (found["items"], found["choices"], found["chance"]) == (8, 8, 0.25)
    assert list(found["arms"]) == ["world", "pixels", PLAIN]
    assert (results["reference"], results["left_out"]) == ("world", [])
    rows = read_jsonl(transfer_records(runs[0], "whatsup_a"))
    assert list(rows[0]["systems"]) == ["world", "baseline"]
    assert all(one["adjusted_p_value"] >= one["p_value"] for one in found["differences"].values())
    page = (out / "transfer.html").read_text()
    assert page.count('<div class="row ') == 1 + 3  # the axis, and each arm
    assert "8 choices" in page
    assert "Toy model: the hidden size of this Gemma is 64" in page
    assert text.splitlines()[-1] == f"page: {out / 'transfer.html'}"
    monkeypatch.setattr(transfer, "score_to_file", None)  # nothing is scored again
    assert score_benchmarks(study, [whatsup], out) == text
    assert (out / "transfer.html").read_text() == page
    assert score_benchmarks(study, [], out) is None

    made = {path.name: path.read_bytes() for path in out.glob("transfer.*")}
    for name in made:
        (out / name).unlink()
    assert main_of("report", [out], monkeypatch, capsys)[1].splitlines()[-2:] == [
        "writes       transfer.json and transfer.html, of whatsup_a",
        "dry run: nothing was written",
    ]
    monkeypatch.setattr(sys, "argv", ["report.py", str(out)])
    with pytest.raises(SystemExit):
        runpy.run_path("tools/report.py", run_name="__main__")
    assert capsys.readouterr().out.endswith(f"{text}\n")
    assert {path.name: path.read_bytes() for path in out.glob("transfer.*")} == made


def test_each_part_scores_its_own_runs_and_the_last_draws_the_page_as_one_alone_would(
    study: Study, ended: Path, whatsup: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(ended, out)
    runs = runs_of(study, out)
    done = (runs[3].folder / DONE).read_bytes()
    (runs[3].folder / DONE).unlink()  # its training has not ended
    second = "not yet scored on the benchmarks: world-0, world-1, pixels-1; transfer.html is drawn when all runs are"
    assert [run.name for run in runs] == ["world-0", "pixels-0", "world-1", "pixels-1"]
    assert score_benchmarks(study, [whatsup], out, Part(1, 2)) == second
    assert [transfer_records(run, "whatsup_a").is_file() for run in runs] == [False, True, False, False]
    first = "not yet scored on the benchmarks: pixels-1; transfer.html is drawn when all runs are"
    assert score_benchmarks(study, [whatsup], out, Part(0, 2)) == first
    assert not (out / "transfer.html").exists()
    (runs[3].folder / DONE).write_bytes(done)
    by_parts = score_benchmarks(study, [whatsup], out, Part(1, 2))
    alone = tmp_path / "alone" / "out"
    shutil.copytree(ended, alone)
    assert by_parts == str(score_benchmarks(study, [whatsup], alone)).replace(str(alone), str(out))
    assert (out / "transfer.html").read_bytes() == (alone / "transfer.html").read_bytes()


def test_gemma_is_loaded_once_for_all_runs_and_a_benchmark_that_changed_is_scored_again(
    study: Study, ended: Path, whatsup: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, folder = tmp_path / "out", tmp_path / "whatsup_a"
    shutil.copytree(ended, out)
    shutil.copytree(whatsup, folder)
    loaded = []
    load = transfer.load_gemma
    monkeypatch.setattr(transfer, "load_gemma", lambda *a, **k: loaded.append(a) or load(*a, **k))
    monkeypatch.setattr(score, "load_gemma", None)
    score_benchmarks(study, [folder], out)
    assert len(loaded) == 1
    lines = (folder / "test.jsonl").read_text().splitlines(keepends=True)
    (folder / "test.jsonl").write_text("".join(lines[:16]))  # four of the eight choices
    last = runs_of(study, out)[-1]
    kept = transfer_records(last, "whatsup_a").read_bytes()
    score_benchmarks(study, [folder], out)
    assert json.loads((out / "transfer.json").read_text())["benchmarks"]["whatsup_a"]["items"] == 4
    transfer_records(last, "whatsup_a").write_bytes(kept)
    companion(transfer_records(last, "whatsup_a"), ".meta.json", ".jsonl").unlink()
    wanted = (
        "pixels-1/evaluation/transfer-whatsup_a.jsonl: its 32 statements are not the 16 of the other runs"
    )
    with pytest.raises(ValueError, match=wanted):
        draw_transfer(study, runs_of(study, out), out)


def test_folders_that_are_no_benchmarks_and_arms_that_need_a_cache_are_named(
    study: Study, ended: Path, whatsup: Path, tmp_path: Path
) -> None:
    with pytest.raises(
        ValueError, match=rf"--benchmarks {tmp_path}: wanted a folder of tools/get_benchmark.py, with"
    ):
        check_benchmarks([whatsup, tmp_path])
    with pytest.raises(ValueError, match="whatsup_a, whatsup_a; give folders of different names"):
        check_benchmarks([whatsup, whatsup])
    broken = tmp_path / "broken"
    shutil.copytree(whatsup, broken)
    photograph = next((broken / "images").iterdir()).name
    (broken / "images" / photograph).unlink()
    with pytest.raises(
        ValueError, match=rf"1 of 8 photographs cannot be read, such as {photograph}: no such file"
    ):
        check_benchmarks([broken])
    (broken / "test.jsonl").write_text("rubbish\n")
    with pytest.raises(ValueError, match=r"broken/test.jsonl:1:1: Expecting value"):
        check_benchmarks([broken])
    run = runs_of(study, ended)[0]
    changes = ({}, {"world_encoder": "mismatched"}, {"num_world_steps": 1})
    assert [needs_cache(replace(run, config=replace(run.config, **c))) for c in changes] == [
        False,
        True,
        True,
    ]
    mismatched = replace(
        study, arms=[study.arms[0], Arm("other", {"world_encoder": "mismatched"})], primary=None
    )
    assert list(plan_transfer(mismatched, [whatsup])) == [
        f"then scores  2 runs on {whatsup}: 32 statements",
        "leaves out   other: a photograph alone is not enough for its world tokens",
    ]
    none = replace(study, arms=[Arm("other", {"world_encoder": "mismatched"})], primary=None)
    assert score_benchmarks(none, [whatsup], tmp_path) == (
        "no arm is scored on the benchmarks: a photograph alone is not enough for its world tokens"
    )


@pytest.mark.heavy
def test_the_tool_scores_benchmarks_and_goes_on_after_a_request_to_stop_and_a_kill(
    study: Study, study_cache: Path, whatsup: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    save_config(study.base, tmp_path / "recipe.json")
    (tmp_path / "study.json").write_text(
        '{"settings": "recipe.json", "arms": {"world": {}, "pixels": {"world_encoder": "pixels", '
        '"rules_out": "that any second look did it"}}, "primary": {"arm": "world", "against": ["pixels"]}, '
        '"seeds": [0, 1]}'
    )
    places = ("--config", tmp_path / "study.json", "--cache", study_cache, "--output", out)
    command = [sys.executable, "tools/study.py", *map(str, places), "--benchmarks", str(whatsup)]
    tool("study", *places)  # trained from photographs to the verdict, without benchmarks
    alone = tmp_path / "alone" / "out"
    shutil.copytree(out, alone)
    for number, status in ((signal.SIGTERM, 75), (signal.SIGKILL, -signal.SIGKILL)):
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        assert process.stdout is not None
        lines = iter(process.stdout.readline, "")
        said = "".join(itertools.takewhile(lambda line: "world-0 on " not in line, lines))
        assert process.poll() is None, said  # that run is being scored
        process.send_signal(number)
        rest, _ = process.communicate()
        assert process.returncode == status, said + rest
        assert not (out / "transfer.html").exists()
    shown = tool("study", *places, "--benchmarks", whatsup).stdout
    assert shown.splitlines()[-1] == f"page: {out / 'transfer.html'}"
    tool("study", *places[:-1], alone, "--benchmarks", whatsup)  # at one go
    assert (alone / "transfer.html").read_bytes() == (out / "transfer.html").read_bytes()


def test_a_benchmark_of_a_single_photograph_has_accuracies_and_no_interval(
    study: Study, tmp_path: Path
) -> None:
    arms = {
        arm: {0: [row | {"image": "0.jpg"} for row in four_choices(right)]}
        for arm, right in {"world": "1110", "pixels": "1000"}.items()
    }
    found = {
        "one": transfer_of(arms, "world"),
        "four": transfer_of({"world": {0: four_choices("1110")}}, "world"),
    }
    assert (found["one"]["images"], found["one"]["differences"]["pixels"]["p_value"]) == (1, 1.0)
    results = {"reference": "world", "left_out": [], "benchmarks": transfer._adjusted(found)}
    assert transfer.table(results)[2:4] == [
        "one                     world                4   50.0%     75.0%  no interval over a single image",
        "one                     pixels               4   50.0%     25.0%  no interval over a single image",
    ]
    assert "interval" not in transfer.table(results)[4]
    page = write_transfer(results, tmp_path).read_text(encoding="utf-8")
    # Two arms in the chart and two in the table of accuracies, and their difference.
    assert page.count("no interval over a single image") == 5
    (tmp_path / "test.jsonl").write_text(
        json.dumps({"image": "a.png", "statement": "On it.", "label": 1}) + "\n"
    )
    assert list(plan_transfer(study, [tmp_path])) == [
        f"then scores  4 runs on {tmp_path}: 1 statement, no interval over a single image"
    ]
