"""What a study says before it runs: what is done, what decides, what it takes and what it can detect."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from constants import ROOT

from theworld.study.plan import plan_study
from theworld.study.prediction import Rates, kind_of, write_rates
from theworld.study.protocol import Study, read_study, runs_of
from theworld.study.rates import measure_missing
from theworld.study.runner import DONE, read_done
from theworld.utils.console import duration
from theworld.utils.device import memory_of, resolve_device
from theworld.utils.distributed import Part

CPU = memory_of(resolve_device("cpu")).name


def test_the_plan_says_what_compiling_takes_once_in_a_process_beside_the_time_of_the_runs(
    study: Study, study_cache: Path, tmp_path: Path
) -> None:
    runs = runs_of(study, tmp_path)
    found = Rates("world", CPU, 1.0, {"train": 1.0}, 1.0, 1 / 30, 3.0, 54.6)
    write_rates({kind_of(runs[0].config): found}, tmp_path)
    lines = list(plan_study(study, runs, study_cache, tmp_path))
    at = next(number for number, line in enumerate(lines) if line.startswith("time"))
    assert lines[at].startswith(
        "time         about 38 s of one device for 4 runs, one after the other, 9 s each;"
    )
    assert (
        lines[at + 1] == "             and up to 55 s in each process, whose first run compiles code for all"
    )
    assert found.words().endswith("3.0 s to record and summarise, 55 s to compile, once in a process")


def test_runs_on_another_share_are_known_from_their_own_rates(
    study: Study, study_cache: Path, ended: Path, tmp_path: Path
) -> None:
    shutil.copytree(ended, tmp_path / "out")
    (tmp_path / "out" / "protocol.json").unlink()
    halves = replace(study, train_shares=[0.5, 1.0])  # those on all statements are done
    runs = runs_of(halves, tmp_path / "out")

    def source() -> str:
        lines = plan_study(halves, runs, study_cache, tmp_path / "out")
        (time,) = [line for line in lines if line.startswith("time")]
        return time.partition("; ")[2]

    assert source() == "from the mean of the others"
    measure_missing(runs, study_cache, tmp_path / "out")
    assert source() == f"from steps and answers that were timed on {CPU}"


@pytest.mark.parametrize(
    ("name", "arms"),
    [
        ("study_patch", {"patch-4": 20_800, "patch-2": 8_512, "patch-1": 5_440}),
        ("study_projection", {"linear": 4_352, "mlp": 8_512, "conv": 82_368}),
        ("study_placement", {"before": 8_512, "after": 8_512}),
    ],
)
def test_studies_of_settings_plan_on_a_cache(
    study: Study, study_cache: Path, tmp_path: Path, name: str, arms: dict[str, int]
) -> None:
    found = replace(read_study(ROOT / "configs" / f"{name}.json"), base=study.base)
    lines = list(plan_study(found, runs_of(found, tmp_path), study_cache, tmp_path))
    pairs = len(arms) * (len(arms) - 1) // 2
    assert lines[1] == (
        "decides      nothing: a study without `primary` explores. It compares every two arms on test: "
        f"{pairs}, corrected"
    )
    (detects,) = [line for line in lines if line.startswith("detects")]
    assert detects.endswith(f"with 80 % power at {5 / pairs:.3g} %")
    assert [line.split(";")[0] for line in lines if line.startswith("arm")] == [
        f"arm          {arm}: {number:,} parameters, 2 steps" for arm, number in arms.items()
    ]


def test_a_plan_says_what_is_done_what_decides_and_what_can_be_detected(
    study: Study, study_cache: Path, ended: Path, tmp_path: Path
) -> None:
    lines = list(plan_study(study, runs_of(study, ended), study_cache, ended))
    assert lines[0] == "study        2 arms x 2 seeds: 4 runs, 4 done"
    assert lines[1].startswith("decides      world against pixels on test, at 5")
    assert lines[1].endswith("; it takes 3 seeds for a verdict, and has 2")
    assert [line.split(";")[0] for line in lines if line.startswith("arm")] == [
        "arm          world: 8,512 parameters, 2 steps",
        "arm          pixels: 53,568 parameters, 2 steps",
    ]
    assert "time         all runs are done" in lines
    assert (
        "detects      nothing: no difference of accuracy between two arms, however large, is found with 80 %"
        in "".join(
            lines  # by the spread of the two seeds of 6 statements that are done
        )
    )

    once = runs_of(study, tmp_path / "once")
    shutil.copytree(ended, tmp_path / "once")
    (once[3].folder / DONE).unlink()
    seconds = read_done(once[1])["seconds"]  # of the only run of its arm that is done
    (time,) = [
        line for line in plan_study(study, once, study_cache, tmp_path / "once") if line.startswith("time")
    ]
    text = duration(seconds)
    assert time == (f"time         about {text} of one device for 1 run; from runs that are done")

    new = list(plan_study(study, runs_of(study, tmp_path / "new"), study_cache, tmp_path / "new"))
    assert new[0] == "study        2 arms x 2 seeds: 4 runs, 0 done"
    second = plan_study(study, runs_of(study, tmp_path / "new"), study_cache, tmp_path / "new", Part(1, 2))
    assert next(line for line in second if line.startswith("part")) == (
        "part         2 of 2 trains 2 of 4 runs not yet done"
    )
    (time,) = [line for line in new if line.startswith("time")]
    assert time.startswith("time         not known before anything has run: a start without ")
    assert any(
        line.strip().startswith("from 6 statements about 3 images and 2 seeds; assumed: ") for line in new
    )
    with pytest.raises(ValueError, match=r"--processes is 1000000: a run takes about .* give --processes"):
        list(plan_study(study, runs_of(study, tmp_path), study_cache, tmp_path, processes=1_000_000))
