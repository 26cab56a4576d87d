"""The batch scripts, run by a stand-in for SLURM on the embedded models: see tests/slurm.py."""

import os
import re
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from constants import ROOT
from jobs import content
from runs import Run, metrics, same_run
from slurm import Slurm
from torture import Tally

from theworld.config.config import Config, save_config
from theworld.extraction.extract import verify

EXTRACT, TRAIN, SWEEP, STUDY = (
    ROOT / f"tools/slurm/{name}.sh" for name in ("extract", "train", "sweep", "study")
)


def cluster(config: Config, folder: Path, **variables: str) -> Slurm:
    """A cluster where the scripts' places are those of this test."""
    save_config(config, folder / "settings.json")
    places = {
        "CONFIG": str(folder / "settings.json"),
        "PYTHON": sys.executable,
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    return Slurm(folder / "slurm", ROOT, places | variables)


@pytest.mark.parametrize("script", [EXTRACT, TRAIN, SWEEP, STUDY])
def test_scripts_are_bash_that_can_be_read(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True)
    assert os.access(script, os.X_OK)
    lines = script.read_text().splitlines()
    assert len(lines) < 80
    assert max(map(len, lines)) <= 120
    # SLURM reads its options up to the first command.
    last = max(i for i, line in enumerate(lines) if line.startswith("#SBATCH"))
    assert all(line.startswith("#") for line in lines[: last + 1])


@pytest.mark.heavy
@pytest.mark.torture("training", "SLURM: extraction as a job array (stand-in for sbatch)")
def test_an_array_of_tasks_makes_the_cache(
    config: Config, session_cache: Path, tmp_path: Path, tally: Tally
) -> None:
    places = {"CACHE": str(tmp_path / "cache"), "IMAGES": str(config.image_folder), "PARTS": "2"}
    slurm = cluster(config, tmp_path, **places)
    assert slurm.sbatch(EXTRACT, array=[3]) == [2]  # not one of two parts
    assert (
        "task 3 of 2 parts: make --array 1-2, or PARTS larger"
        in (slurm.folder / "extract-1_3.log").read_text()
    )
    assert not (tmp_path / "cache").exists()
    assert slurm.sbatch(EXTRACT, array=[2]) == [0]
    assert not (tmp_path / "cache/latents/manifest.json").exists()
    assert slurm.sbatch(EXTRACT, array=[1, 2]) == [0, 0]  # the second has nothing left to do
    assert verify(tmp_path / "cache") == []
    same = content(tmp_path / "cache") == content(session_cache)
    tally(tasks=4, same_bytes_as_one_process="yes" if same else "NO")
    assert same


@pytest.mark.heavy
@pytest.mark.torture("training", "SLURM: a sweep as a job array, queued again when its time is up (stand-in)")
def test_an_array_of_tasks_trains_a_sweep(
    config: Config, session_cache: Path, tmp_path: Path, tally: Tally
) -> None:
    for name in ("train", "dev"):  # controls of another image need two of them
        (tmp_path / "statements").mkdir(exist_ok=True)
        text = (Path(str(config.annotations)) / "train.jsonl").read_text()
        (tmp_path / "statements" / f"{name}.jsonl").write_text(text)
    config = replace(config, annotations=str(tmp_path / "statements"), num_epochs=10_000, max_steps=60)
    (tmp_path / "runs.json").write_text('{"runs": [{}, {"learning_rate": 0.002}]}')
    output = tmp_path / "sweep"
    places = {"CACHE": str(session_cache), "PARTS": "2", "RUNS": str(tmp_path / "runs.json")}
    slurm = cluster(config, tmp_path, OUTPUT=str(output), **places)
    assert slurm.sbatch(SWEEP, "--seeds", "0", array=[3]) == [2]  # not one of two parts
    asked: list[Path] = []

    def time_is_up(log: Path) -> bool:
        """Once, while the first run of the first task takes its steps."""
        lines = output / "runs/unchanged-0/metrics.jsonl"
        if asked or not lines.exists() or lines.read_bytes().count(b"\n") < 10:
            return False
        asked.append(log)
        return True

    assert slurm.sbatch(SWEEP, "--seeds", "0", array=[1, 2], limit=time_is_up) == [0, 0]
    first, second = ((slurm.folder / f"sweep-2_{task}.log").read_text() for task in (1, 2))
    assert first.count("sweep.sh: time is up (status 75); queued again") == 1
    assert "stopped as asked: 0 of 1 runs have ended; the same command goes on with 1 from where" in first
    assert "part 1 of 2 is done; 1 of 2 runs are still missing: those of other parts" in first
    assert second.endswith((output / "table.md").read_text())
    tally(tasks=3, queued_again=1)


@pytest.mark.heavy
@pytest.mark.torture("training", "SLURM: a study as a job array, queued again when its time is up (stand-in)")
def test_an_array_of_tasks_runs_a_study_from_photographs_to_its_page(
    config: Config, tmp_path: Path, tally: Tally
) -> None:
    (tmp_path / "statements").mkdir()
    for name in ("train", "dev", "test"):
        text = (Path(str(config.annotations)) / "train.jsonl").read_text()
        (tmp_path / "statements" / f"{name}.jsonl").write_text(text)
    config = replace(config, annotations=str(tmp_path / "statements"), num_epochs=10_000, max_steps=60)
    output, images = tmp_path / "study", str(config.image_folder)
    places = {"CACHE": str(tmp_path / "cache"), "OUTPUT": str(output), "IMAGES": images, "PARTS": "2"}
    slurm = cluster(config, tmp_path, **places)
    arms = '{"world": {}, "pixels": {"world_encoder": "pixels"}}'
    (tmp_path / "study.json").write_text(f'{{"settings": "settings.json", "arms": {arms}, "seeds": [0]}}')
    slurm.environment["CONFIG"] = str(tmp_path / "study.json")
    assert slurm.sbatch(STUDY, array=[3]) == [2]  # not one of two parts
    log = (slurm.folder / "study-1_3.log").read_text()
    assert "task 3 of 2 parts: make --array 1-2, or PARTS larger" in log
    assert slurm.sbatch(STUDY, "--max_steps", "0", array=[1]) == [1]  # fails by itself: not queued again
    assert "queued again" not in (slurm.folder / "study-2_1.log").read_text()

    # Both at once, as a cluster starts them: each extracts its part, waits for the other's, and trains its run.
    assert slurm.sbatch(STUDY, array=[1, 2]) == [0, 0]
    names = ("study.csv", "study.html", "study.json", "study.tex")
    assert sorted(path.name for path in output.glob("study.*")) == [*names]
    assert verify(tmp_path / "cache") == []

    # With the cache there: the first task is told that its time is up while it trains, and goes on.
    again = tmp_path / "again"
    slurm.environment["OUTPUT"] = str(again)
    lines = again / "runs/world-0/metrics.jsonl"
    asked: list[Path] = []

    def time_is_up(log: Path) -> bool:
        """Once, after ten steps of the first run."""
        if asked or not lines.exists() or lines.read_bytes().count(b"\n") < 10:
            return False
        asked.append(log)
        return True

    assert slurm.sbatch(STUDY, array=[1, 2], limit=time_is_up) == [0, 0]
    first, second = ((slurm.folder / f"study-4_{task}.log").read_text() for task in (1, 2))
    assert first.count("study.sh: time is up (status 75); queued again") == 1
    assert "stopped as asked: 0 of 2 runs are done; go on with: " in first
    assert "part 1 of 2 is done; 1 of 2 runs are still missing: those of other parts" in first
    assert second.endswith(f"page: {again / 'study.html'}\n")
    assert "queued again" not in second
    for run in ("world-0", "pixels-0"):  # to the same answers as the runs that nobody stopped
        own, other = (folder / "runs" / run / "evaluation/test.jsonl" for folder in (again, output))
        assert own.read_bytes() == other.read_bytes()
    tally(tasks=6, queued_again=1)


@pytest.mark.torture("training", "SLURM: training is queued again when its time is up (stand-in for sbatch)")
@pytest.mark.parametrize("gpus", [1, pytest.param(2, marks=pytest.mark.heavy)])
def test_training_goes_on_over_time_limits(
    gpus: int, config: Config, session_cache: Path, tmp_path: Path, tally: Tally
) -> None:
    limits = tally.number(3 if gpus == 1 else 2, sample=1)
    steps = 30 * limits + 130  # many more than a run takes between two looks of the stand-in
    config = replace(config, max_steps=steps, num_epochs=10_000, save_steps=1000, eval_steps=50)
    config = replace(config, gradient_accumulation_steps=2 // gpus, output_dir=str(tmp_path / "whole"))
    assert Run(config, session_cache, gpus).wait() == {0}
    slurm = cluster(
        replace(config, output_dir="checkpoints/unused"),
        tmp_path,
        CACHE=str(session_cache),
        OUTPUT=str(tmp_path / "run"),
        GPUS=str(gpus),
    )
    lines, reached = tmp_path / "run/metrics.jsonl", [0]

    def time_is_up(_: Path) -> bool:
        """Twenty lines after the start, for the first few starts."""
        have = lines.read_bytes().count(b"\n") if lines.exists() else 0
        if len(reached) > limits or have < reached[-1] + 20:
            return False
        reached.append(have)
        return True

    status = slurm.sbatch(TRAIN, limit=time_is_up)
    log = (slurm.folder / "train-1.log").read_text()
    assert status == [0], log
    assert log.count("time is up (status ") == limits
    assert set(re.findall(r"time is up \(status (\d+)\)", log)) == {"75" if gpus == 1 else "1"}
    assert log.count("stopped as asked: ") == limits
    assert len(re.findall("resumed after step ", log)) == limits
    same = same_run(tmp_path / "whole", tmp_path / "run", steps)
    tally(time_limits=limits, bitwise="yes" if same else "NO")
    assert same


@pytest.mark.heavy
@pytest.mark.torture("training", "SLURM: training is queued again when its time is up (stand-in for sbatch)")
def test_what_is_cancelled_or_fails_is_not_queued_again(
    config: Config, session_cache: Path, tmp_path: Path, tally: Tally
) -> None:
    config = replace(config, max_steps=1000, num_epochs=10_000, save_steps=2000)
    slurm = cluster(config, tmp_path, CACHE=str(session_cache), OUTPUT=str(tmp_path / "run"))
    lines = tmp_path / "run/metrics.jsonl"

    def cancel() -> None:
        """As scancel does: SIGTERM to the batch shell, which is the leader of its session."""
        while not lines.exists() or lines.read_bytes().count(b"\n") < 20:
            time.sleep(0.02)
        found = subprocess.run(
            ["pgrep", "-f", f"bash {slurm.folder}/job00001/slurm_script"], capture_output=True, text=True
        )
        os.kill(int(found.stdout.split()[0]), 15)

    thread = threading.Thread(target=cancel)
    thread.start()
    assert slurm.sbatch(TRAIN) == [75]
    thread.join()
    log = (slurm.folder / "train-1.log").read_text()
    assert "stopped as asked: " in log
    assert "queued again" not in log
    done = len(metrics(tmp_path / "run"))

    # Its time is up, but it was started too often; then it fails by itself.
    slurm.environment["MAX_RESTARTS"] = "0"
    asked: list[bool] = []

    def once(_: Path) -> bool:
        if asked or lines.read_bytes().count(b"\n") < done + 20:
            return False
        asked.append(True)
        return True

    assert slurm.sbatch(TRAIN, limit=once) == [75]
    assert (
        "started 0 times already (MAX_RESTARTS); not queued again"
        in (slurm.folder / "train-2.log").read_text()
    )
    assert slurm.sbatch(TRAIN, "--learning_rate", "-1") == [1]
    assert "queued again" not in (slurm.folder / "train-3.log").read_text()
    tally(not_queued_again=3)
