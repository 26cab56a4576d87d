"""A study of two arms at tiny shapes, trained once for the tests that only read it."""

import itertools
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import tiny_run

from theworld.study import rates
from theworld.study.protocol import Arm, Primary, Study, runs_of
from theworld.study.runner import ALL, extract_missing, run_part
from theworld.utils.signals import StopRequest

ARMS = (Arm("world", {}), Arm("pixels", {"world_encoder": "pixels"}, "that any second look did it"))


@pytest.fixture(scope="session")
def study_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the study's cache and output are."""
    return tmp_path_factory.mktemp("study")


@pytest.fixture(scope="session")
def study(study_folder: Path, photographs: Path, annotations: Path) -> Study:
    """Two arms and two seeds of two steps; all six statements are dev and test too: controls need two images."""
    folder = study_folder / "statements"
    folder.mkdir()
    for name in ("train", "dev", "test"):
        (folder / f"{name}.jsonl").write_bytes((annotations / "train.jsonl").read_bytes())
    base = replace(tiny_run(study_folder, photographs, folder), max_steps=2, save_steps=1)
    return Study(base, ARMS, Primary("world", ["pixels"]), [0, 1])


@pytest.fixture(scope="session")
def study_cache(study: Study, study_folder: Path) -> Path:
    """The rows that both arms read. Nobody writes to it."""
    extract_missing(study, study_folder / "cache")
    return study_folder / "cache"


@pytest.fixture(scope="session")
def ended(study: Study, study_cache: Path, study_folder: Path) -> Path:
    """The study's folder with all runs done. Nobody writes to it."""
    output = study_folder / "ended"
    study.fix(output)
    assert run_part(runs_of(study, output), study_cache, ALL, StopRequest()) == {}
    return output


@pytest.fixture
def out(ended: Path, tmp_path: Path) -> Path:
    """A copy of it, for a test to write to."""
    shutil.copytree(ended, tmp_path / "out")
    return tmp_path / "out"


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that is a second later whenever it is read."""
    monkeypatch.setattr(rates, "perf_counter", itertools.count(0.0).__next__)
