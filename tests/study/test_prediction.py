"""What is predicted of a run from the rates of its kind: the clock of these tests is a counter."""

import json
from pathlib import Path

import pytest

from theworld.study.plan import plan_study
from theworld.study.prediction import Rates, kind_of, read_rates
from theworld.study.protocol import Study, runs_of
from theworld.study.rates import measure_missing
from theworld.utils.device import memory_of, resolve_device
from theworld.utils.files import StoreError

CPU = memory_of(resolve_device("cpu")).name


@pytest.mark.usefixtures("clock")
def test_rates_of_an_older_file_are_read_and_measured_again_by_a_start(
    study: Study, study_cache: Path, tmp_path: Path
) -> None:
    runs = runs_of(study, tmp_path)
    older = {"arm": "world", "device": CPU, "start": 1.0, "steps": {"train": 1.0}, "save": 1.0, "answer": 0.5}
    (tmp_path / "rates.json").write_text(json.dumps({kind_of(runs[0].config): older}))
    (found,) = read_rates(tmp_path).values()
    assert found == Rates("world", CPU, 1.0, {"train": 1.0}, 1.0, 0.5, evaluation=0.0, compiling=0.0)
    (time,) = [line for line in plan_study(study, runs, study_cache, tmp_path) if line.startswith("time")]
    # 5 + 60 / 2, and 3 x (5 + 36 / 2)
    assert time.startswith("time         about 1 min 44 s of one device for 4 runs")
    measure_missing(runs, study_cache, tmp_path)
    (found,) = read_rates(tmp_path).values()
    assert (found.answer, found.evaluation) == (1 / 18, 3.0)
    half = {kind_of(runs[0].config): older | {"evaluation": 1.0}}
    (tmp_path / "rates.json").write_text(json.dumps(half))
    with pytest.raises(StoreError, match=r"rates\.json: key 'compiling' is missing"):
        read_rates(tmp_path)
