"""The arms of a study on other benchmarks: figures by hand, scored once, and one page."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import benchmark_data
import numpy as np
import pytest
from records import statement, with_rest

from theworld.data.benchmarks import BENCHMARKS, get_benchmark
from theworld.evaluation.records import Row, read_jsonl, records
from theworld.evaluation.study_verdict import PLAIN
from theworld.study import transfer
from theworld.study.protocol import Study, runs_of
from theworld.study.runner import DONE
from theworld.study.transfer import (
    check_benchmarks,
    needs_cache,
    score_benchmarks,
    score_if_done,
    transfer_of,
)


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


def test_all_runs_are_scored_once_and_drawn_on_one_page(
    study: Study, ended: Path, whatsup: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    shutil.copytree(ended, out)
    runs = runs_of(study, out)
    text = score_benchmarks(study, runs, [whatsup], out)
    results = json.loads((out / "transfer.json").read_text())
    found = results["benchmarks"]["whatsup_a"]
    assert (found["items"], found["choices"], found["chance"]) == (8, 8, 0.25)
    assert list(found["arms"]) == ["world", PLAIN, "pixels"]
    assert (results["reference"], results["left_out"]) == ("world", [])
    rows = read_jsonl(runs[0].folder / "evaluation" / "transfer-whatsup_a.jsonl")
    assert list(rows[0]["systems"]) == ["world", "baseline"]
    assert all(one["adjusted_p_value"] >= one["p_value"] for one in found["differences"].values())
    page = (out / "transfer.html").read_text()
    assert page.count('<div class="row ') == 1 + 3  # the axis, and each arm
    assert "8 choices" in page
    assert text.splitlines()[-1] == f"page: {out / 'transfer.html'}"
    monkeypatch.setattr(transfer, "score_to_file", None)  # nothing is scored again
    assert score_if_done(study, [whatsup], out) == text
    assert (out / "transfer.html").read_text() == page
    assert score_if_done(study, [], out) is None
    (runs[2].folder / DONE).unlink()
    assert score_if_done(study, [whatsup], out) is None


def test_folders_that_are_no_benchmarks_and_arms_that_need_a_cache_are_named(
    study: Study, ended: Path, whatsup: Path, tmp_path: Path
) -> None:
    with pytest.raises(
        ValueError, match=rf"--benchmarks {tmp_path}: wanted a folder of tools/get_benchmark.py, with"
    ):
        check_benchmarks([whatsup, tmp_path])
    with pytest.raises(ValueError, match="whatsup_a, whatsup_a; give folders of different names"):
        check_benchmarks([whatsup, whatsup])
    run = runs_of(study, ended)[0]
    changes = ({}, {"world_encoder": "mismatched"}, {"num_world_steps": 1})
    assert [needs_cache(replace(run, config=replace(run.config, **c))) for c in changes] == [
        False,
        True,
        True,
    ]
