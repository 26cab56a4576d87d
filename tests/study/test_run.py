"""A study as its tool runs it: to the verdict, shared by parts and processes, stopped, and gone on with."""

import json
import logging
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from commands import tool
from video2world import Guardrail

from theworld.evaluation.records import read_jsonl
from theworld.extraction.extract import extract
from theworld.store.reader import StoreReader
from theworld.study import run as study_run
from theworld.study import runner
from theworld.study.protocol import Arm, Study, runs_of
from theworld.study.run import run_study
from theworld.study.runner import ALL, DONE, is_done, records_of
from theworld.utils.distributed import Part
from theworld.utils.signals import StopRequest


def test_a_study_ends_with_its_verdict_and_its_files(study: Study, study_cache: Path, out: Path) -> None:
    found = run_study(study, study_cache, out, ALL, 1, StopRequest())
    assert not found.stopped
    assert found.failed == {}
    assert "No verdict on the test split of custom data" in found.text
    names = sorted(path.name for path in out.iterdir())
    assert names == ["protocol.json", "runs", "study.csv", "study.html", "study.json", "study.tex"]


def test_a_part_says_what_other_parts_have_still_to_do(study: Study, study_cache: Path, out: Path) -> None:
    runs = runs_of(study, out)
    (runs[1].folder / DONE).unlink()
    found = run_study(study, study_cache, out, Part(0, 2), 1, StopRequest())
    assert found.text == (
        "part 1 of 2 is done; 1 of 4 runs are still missing: those of other parts. Whichever part ends last writes the "
        "results"
    )
    assert not (out / "study.json").exists()


def test_a_stopped_study_says_how_to_go_on(study: Study, study_cache: Path, out: Path) -> None:
    (runs_of(study, out)[2].folder / DONE).unlink()
    stop = StopRequest()
    stop.ask("test")
    found = run_study(study, study_cache, out, ALL, 1, stop)
    assert found.stopped
    assert found.text.startswith("stopped as asked: 3 of 4 runs are done; go on with: ")


def test_a_run_that_failed_is_in_the_words_at_the_end(
    study: Study, study_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(study_run, "run_part", lambda *_: {"world-0": "the loss of step 1 is nan"})
    found = run_study(study, study_cache, tmp_path / "out", ALL, 1, StopRequest())
    assert (found.text, found.failed) == (
        "world-0 failed: the loss of step 1 is nan",
        {"world-0": "the loss of step 1 is nan"},
    )


@pytest.mark.heavy
def test_two_processes_do_the_runs_of_the_tool_and_the_page_is_drawn_once(
    study: Study, study_cache: Path, tmp_path: Path
) -> None:
    from theworld.config.config import save_config

    save_config(study.base, tmp_path / "recipe.json")
    (tmp_path / "study.json").write_text(
        '{"settings": "recipe.json", "arms": {"world": {}, "pixels": {"world_encoder": "pixels"}}, '
        '"primary": {"arm": "world", "against": ["pixels"]}, "seeds": [0, 1]}'
    )
    out = tmp_path / "out"
    given = ("--config", tmp_path / "study.json", "--cache", study_cache, "--output", out, "--processes", 2)
    done = tool("study", *given)
    assert done.stdout.count("page: ") == 1
    assert all(map(is_done, runs_of(replace(study, seeds=[0, 1]), out)))
    assert tool("study", *given, "--dry_run").stdout.splitlines()[0] == (
        "study        2 arms x 2 seeds: 4 runs, 4 done"
    )


@pytest.mark.heavy
def test_a_study_of_predicted_frames_rolls_out_each_number_into_a_cache_of_its_own(
    study: Study, video2world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "extract", partial(extract, guardrail=Guardrail()))
    base = replace(study.base, cosmos_model_name=str(video2world), rollout_steps=2)
    arms = [Arm("none", {}), Arm("one", {"num_world_steps": 1}), Arm("two", {"num_world_steps": 2})]
    frames = Study(base, arms, None, [0], baseline="none")
    found = run_study(frames, tmp_path / "cache", tmp_path / "out", ALL, 1, StopRequest())
    assert found.failed == {}
    assert sorted(path.name for path in (tmp_path / "cache").iterdir() if path.is_dir()) == [
        *("frames-1", "frames-2", "gemma_vision", "latents")
    ]
    shapes = [
        StoreReader(tmp_path / "cache" / folder / "latents").arrays["latents"].shape
        for folder in ("", "frames-1", "frames-2")
    ]
    assert shapes == [(16, 8, 8), (2, 16, 8, 8), (3, 16, 8, 8)]
    assert "corrected for 2 comparisons, no arm is shown to differ from none; of one seed each" in found.text


def test_a_study_on_a_single_photograph_says_so_before_it_runs_and_ends_with_its_accuracies(
    study: Study, study_cache: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "statements"
    shutil.copytree(str(study.base.annotations), folder)
    lines = (folder / "test.jsonl").read_text().splitlines(keepends=True)
    first = json.loads(lines[0])["image"]
    (folder / "test.jsonl").write_text("".join(line for line in lines if json.loads(line)["image"] == first))
    alone = replace(study, base=replace(study.base, annotations=str(folder)), seeds=[0])
    with caplog.at_level(logging.INFO):
        found = run_study(alone, study_cache, tmp_path / "out", ALL, 1, StopRequest())
    assert found.failed == {}
    plan = next(message for message in caplog.messages if message.startswith("study  "))
    assert (
        "no interval over a single image: arms will have accuracies, and nothing that tells them apart"
        in plan
    )
    assert [message for message in caplog.messages if "without 'shuffled'" in message] == [
        *["world-0: without 'shuffled' on test: a single photograph has no other"] * 2,  # measured first
        "pixels-0: without 'shuffled' on test: a single photograph has no other",
    ]
    assert "(2 statements about 1 image; 1 seed): it takes two images. So far " in found.text
    rows = {
        split: read_jsonl(records_of(runs_of(alone, tmp_path / "out")[0], split)) for split in ("dev", "test")
    }
    assert ["shuffled" in own[0]["systems"] for own in rows.values()] == [True, False]
    page = (tmp_path / "out" / "study.html").read_text(encoding="utf-8")
    assert page.count("no interval over a single image") == 4  # the verdict and three arms
