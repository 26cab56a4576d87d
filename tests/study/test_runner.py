"""The runs of a study: what is extracted, that none is done twice, what goes on after a stop, how parts share it."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from forks import in_child

from theworld.evaluation.records import read_jsonl
from theworld.store.format import stores_of
from theworld.study import runner
from theworld.study.protocol import Arm, Study, runs_of
from theworld.study.runner import (
    ALL,
    by_cache,
    cache_of,
    extract_missing,
    is_done,
    lacking,
    read_done,
    records_of,
    run_part,
    waiting,
)
from theworld.training.memory import NotFinite
from theworld.utils.distributed import Part
from theworld.utils.locks import OutputLock
from theworld.utils.signals import StopRequest


def test_each_store_that_an_arm_reads_is_extracted_once(
    study: Study, study_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert [root.name for root in stores_of(study_cache)] == ["latents", "gemma_vision", "pixels"]
    assert lacking(study, study_cache) == ([], False)
    cache = tmp_path / "cache"

    def wanted() -> tuple[list[str], bool]:
        configs, vision = lacking(study, cache)
        return [config.world_encoder for config in configs], vision

    assert wanted() == (["cosmos", "pixels"], True)
    shutil.copytree(study_cache / "latents", cache / "latents")
    assert wanted() == (["pixels"], True)
    shutil.copytree(study_cache / "pixels", cache / "pixels")
    assert wanted() == ([], True)
    calls: list[Any] = []
    monkeypatch.setattr(
        runner, "extract", lambda config, *given, **more: calls.append((config, *given, more)) or True
    )
    monkeypatch.setattr(runner, "lacking", lambda *_: ([], False) if calls else ([study.base] * 2, True))
    extract_missing(study, cache)
    assert calls == [(study.base, cache, True, False, None, {"others": [study.base]})]


def test_each_number_of_predicted_frames_has_a_cache_of_its_own(study: Study, tmp_path: Path) -> None:
    arms = [Arm("none", {}), Arm("pixels", {"world_encoder": "pixels"}), Arm("two", {"num_world_steps": 2})]
    found = by_cache(replace(study, arms=arms), tmp_path)
    assert {root: [arm.name for arm in some.arms] for root, some in found.items()} == {
        tmp_path: ["none", "pixels"],
        tmp_path / "frames-2": ["two"],
    }
    assert cache_of(runs_of(replace(study, arms=arms), tmp_path)[2].config, tmp_path) == tmp_path / "frames-2"


def test_a_part_waits_for_the_shards_of_the_others(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slept = list[float]()
    monkeypatch.setattr(runner, "extract", lambda *_, **__: False)
    monkeypatch.setattr(runner.time, "sleep", slept.append)
    monkeypatch.setattr(
        runner, "lacking", lambda *_: ([], False) if len(slept) == 2 else ([study.base], True)
    )
    extract_missing(study, tmp_path / "cache", Part(0, 2))
    assert slept == [runner.POLL_SECONDS] * 2


def test_a_run_that_another_process_works_on_is_left_as_it_is(
    study: Study, study_cache: Path, tmp_path: Path
) -> None:
    (run, *_) = runs_of(study, tmp_path)
    ready, done = os.pipe(), os.pipe()

    def hold() -> None:
        with OutputLock(run.folder, "--output"):
            (run.folder / "metrics.jsonl").write_text("{}")
            os.write(ready[1], b"x")
            os.read(done[0], 1)

    child = in_child(hold)
    os.read(ready[0], 1)
    failed = run_part([run], study_cache, ALL, StopRequest())
    os.write(done[1], b"x")
    os.waitpid(child, 0)
    assert list(failed) == ["world-0"]
    assert f"{run.folder} is in use: process {child} on " in failed["world-0"]
    assert (run.folder / "metrics.jsonl").read_text() == "{}"
    assert not (run.folder / "starts.jsonl").exists()


def test_a_run_leaves_records_of_both_splits_and_what_it_took(study: Study, ended: Path) -> None:
    runs = runs_of(study, ended)
    assert all(map(is_done, runs))
    assert read_done(runs[1]).items() >= {
        *(("arm", "pixels"), ("seed", 0), ("steps", 2), ("checkpoint", "checkpoint-2")),
        ("training_statements", 6),
    }
    assert {run.name: read_done(run)["trainable_parameters"] for run in runs[:2]} == {
        "world-0": 8512,
        "pixels-0": 53568,
    }
    conditions = [list(read_jsonl(records_of(run, "test"))[0]["systems"]) for run in runs]
    assert conditions[0] == ["world", "baseline", "zero", "shuffled", "text"]
    assert conditions[1:] == [["world", "zero", "shuffled"]] * 3  # without world tokens all answer alike
    assert [len(read_jsonl(records_of(run, "dev"))) for run in runs] == [6] * 4


def test_a_finished_run_is_not_repeated_and_a_part_has_its_own(study: Study, ended: Path) -> None:
    runs = runs_of(study, ended)
    assert waiting(runs, ALL) == []
    again = runs_of(study, ended.parent / "none")
    assert [run.name for run in waiting(again, Part(1, 3))] == ["pixels-0"]
    assert [run.name for run in waiting(again, Part(0, 3))] == ["world-0", "pixels-1"]


def test_a_stopped_study_goes_on_to_the_same_answers(
    study: Study, study_cache: Path, ended: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop = StopRequest()
    (run, *_) = runs_of(study, tmp_path)
    stepped = runner.Trainer.train_step

    def step_and_ask(trainer: Any, *given: Any) -> Any:
        stop.ask("test")
        return stepped(trainer, *given)

    with monkeypatch.context() as patched:
        patched.setattr(runner.Trainer, "train_step", step_and_ask)
        assert run_part([run], study_cache, ALL, stop) == {}
    assert not is_done(run)
    assert [path.name for path in run.folder.glob("checkpoint-*")] == ["checkpoint-1"]
    assert run_part([run], study_cache, ALL, StopRequest()) == {}
    (first, *_) = runs_of(study, ended)
    for split in ("dev", "test"):
        assert records_of(run, split).read_bytes() == records_of(first, split).read_bytes()
    starts = [json.loads(line) for line in (run.folder / "starts.jsonl").read_text().splitlines()]
    assert len(starts) == 2
    assert read_done(run)["seconds"] == round(sum(start["seconds"] for start in starts), 1)


def test_the_training_statements_are_read_once_for_the_evaluations_of_a_run(
    study: Study, study_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    load_statements = runner.load_statements

    def load(source: str | None, split: str, name: str) -> Any:
        read.append(split)
        return load_statements(source, split, name)

    monkeypatch.setattr(runner, "load_statements", load)
    (run, *_) = runs_of(study, tmp_path)
    assert run_part([run], study_cache, ALL, StopRequest()) == {}
    assert read == ["dev", "train", "test"]


def test_a_failed_run_is_named_and_the_others_go_on(
    study: Study, study_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = runner.work_on

    def work_on(run: Any, *given: Any) -> bool:
        if run.name == "world-0":
            raise NotFinite("the loss of step 1 is nan")
        return trained(run, *given)

    monkeypatch.setattr(runner, "work_on", work_on)
    runs = runs_of(study, tmp_path)[:2]
    assert run_part(runs, study_cache, ALL, StopRequest()) == {"world-0": "the loss of step 1 is nan"}
    assert [is_done(run) for run in runs] == [False, True]


def test_the_runs_of_a_process_share_one_gemma_and_answer_as_each_with_its_own(
    study: Study, study_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    evaluated = runner.evaluate

    def evaluate(run: Any, checkpoint: Path, cache: Path, gemma: Any, *given: Any) -> bool:
        weights = {name: p.detach().clone() for name, p in gemma.model.named_parameters()}
        seen.append(
            (gemma.model, {name: p.data_ptr() for name, p in gemma.model.named_parameters()}, weights)
        )
        return evaluated(run, checkpoint, cache, gemma, *given)

    monkeypatch.setattr(runner, "evaluate", evaluate)
    together, alone = (runs_of(study, tmp_path / name)[:3] for name in ("together", "alone"))
    assert run_part(together, study_cache, ALL, StopRequest()) == {}
    assert all(model is seen[0][0] and pointers == seen[0][1] for model, pointers, _ in seen)
    assert all(torch.equal(w, seen[0][2][name]) for _, _, weights in seen for name, w in weights.items())
    for run in alone:
        assert run_part([run], study_cache, ALL, StopRequest()) == {}
    assert len({id(model) for model, *_ in seen}) == 4
    files = ("checkpoint-2/projection.safetensors", "evaluation/dev.jsonl", "evaluation/test.jsonl")
    for one, other in zip(together, alone, strict=True):
        assert [(one.folder / name).read_bytes() for name in files] == [
            (other.folder / name).read_bytes() for name in files
        ]


def test_after_a_run_that_failed_gemma_is_loaded_anew(
    study: Study, study_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[Any] = []

    def work_on(run: Any, cache: Path, stop: Any, one: Any) -> bool:
        kept.append(one.loaded)
        one.loaded = "loaded"
        if run.name == "pixels-0":
            raise NotFinite("the loss of step 1 is nan")
        return False

    monkeypatch.setattr(runner, "work_on", work_on)
    run_part(runs_of(study, tmp_path)[:3], study_cache, ALL, StopRequest())
    assert kept == [None, "loaded", None]
