"""What the runs of a study take, from a few timed steps: the clock of these tests is a counter."""

import itertools
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from theworld.study import rates
from theworld.study.plan import plan_study
from theworld.study.prediction import Rates, kind_of, read_rates
from theworld.study.protocol import Arm, Study, runs_of
from theworld.study.rates import measure, measure_missing
from theworld.study.run import run_study
from theworld.study.runner import ALL, read_done, records_of
from theworld.training.memory import OutOfMemory, Plan
from theworld.training.trainer import Trainer
from theworld.utils.device import memory_of, resolve_device
from theworld.utils.distributed import Part
from theworld.utils.files import StoreError
from theworld.utils.signals import StopRequest

CPU = memory_of(resolve_device("cpu")).name

pytestmark = pytest.mark.usefixtures("clock")


def test_a_run_is_timed_by_its_start_its_steps_a_checkpoint_answers_and_what_else_an_evaluation_does(
    study: Study, study_cache: Path, tmp_path: Path
) -> None:
    runs = runs_of(study, tmp_path)
    measure_missing(runs, study_cache, tmp_path)
    # One second each for the start, for the second of two steps, for the checkpoint, and for 6 statements under 3
    # conditions; the clock is read once before, between and after the answers on dev and on test. The other arm differs
    # in its encoder alone.
    found = {kind_of(runs[0].config): Rates("world", CPU, 1.0, {"train": 1.0}, 1.0, 1 / 18, 3.0)}
    assert read_rates(tmp_path) == found
    assert not (tmp_path / "runs").exists()
    (one,) = found.values()
    assert one.words() == (
        "world: 1,000 ms a step of 'train', 55.6 ms an answer, 1.0 s to start, 3.0 s to record and summarise"
    )
    plan = Plan(replace(runs[0].config, output_dir=str(tmp_path / "none")), study_cache)
    # The start, 2 steps, 2 checkpoints, 12 statements of dev and test under 5 conditions, or 3 of later runs, and what
    # else an evaluation does.
    assert one.seconds(runs[0], plan, 12) == pytest.approx(1 + 2 + 2 + 60 / 18 + 3)
    assert one.seconds(runs[1], plan, 12) == pytest.approx(1 + 2 + 2 + 36 / 18 + 3)
    (time,) = [line for line in plan_study(study, runs, study_cache, tmp_path) if line.startswith("time")]
    source = f"steps and answers that were timed on {CPU}"
    assert time == (
        f"time         about 41 s of one device for 4 runs, one after the other, 10 s each; from {source}"
    )


def test_what_the_first_steps_take_more_is_of_the_start(
    study: Study, study_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The start, 0 to 1; three steps that end at 5, 9 and, after the clock was read at 9, 11; then as above.
    clock = itertools.chain([0.0, 0.0, 1.0, 1.0, 5.0, 9.0, 9.0, 11.0], itertools.count(11.0))
    monkeypatch.setattr(rates, "perf_counter", clock.__next__)
    (run, *_) = runs_of(replace(study, base=replace(study.base, max_steps=3)), tmp_path)
    measure_missing([run], study_cache, tmp_path)
    (found,) = read_rates(tmp_path).values()
    assert found.steps == {"train": 2.0}
    assert found.start == 1.0 + (8.0 - 2 * 2.0)


@pytest.mark.parametrize(("second", "steps"), [(1.0, 11), (0.25, 20)])
def test_each_phase_is_timed_by_its_own_steps_for_ten_seconds_at_most(
    study: Study,
    study_cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    second: float,
    steps: int,
) -> None:
    monkeypatch.setattr(rates, "perf_counter", itertools.count(0.0, second).__next__)
    taken: list[int] = []
    train_step = Trainer.train_step

    def counted(trainer: Trainer, *given: Any) -> dict[str, float]:
        taken.append(trainer.step)
        return train_step(trainer, *given)

    monkeypatch.setattr(Trainer, "train_step", counted)
    aligned = replace(study, base=replace(study.base, max_steps=30, align_steps=25), arms=study.arms[:1])
    measure_missing(runs_of(aligned, tmp_path), study_cache, tmp_path)
    (found,) = read_rates(tmp_path).values()
    # The clock is read once a step. Two steps each are not timed; of the second phase there are five.
    assert taken == [*range(2 + steps), *range(25, 30)]
    assert found.steps == {"align": second, "train": second}


@pytest.mark.parametrize(
    ("compiled", "starts", "compiling"), [(False, [5.0], 0.0), (True, [60.0, 5.0], 55.0)]
)
def test_where_code_is_compiled_the_second_rehearsal_counts_and_compiling_is_counted_by_itself(
    study: Study,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    compiled: bool,
    starts: list[float],
    compiling: float,
) -> None:
    coming, now = iter(starts), [0.0]

    def rehearse(*_: object) -> Rates:
        start = next(coming)
        now[0] += start
        return Rates("world", CPU, start, {}, 0.0, 0.0)

    monkeypatch.setattr(rates, "perf_counter", lambda: now[0])
    monkeypatch.setattr(rates, "_rehearse", rehearse)
    monkeypatch.setattr(rates, "wants_compile", lambda *_: compiled)
    found = measure(runs_of(study, tmp_path)[0], tmp_path, CPU)
    assert (found.start, found.compiling) == (5.0, compiling)
    assert list(coming) == []


def test_what_is_known_is_not_measured_again(
    study: Study, study_cache: Path, ended: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[str] = []

    def measure(run: object, _: Path, device: str) -> Rates:
        measured.append(run.arm.name)  # type: ignore[attr-defined]
        return Rates(measured[-1], device, 1.0, {}, 1.0, 1.0, 1.0)

    monkeypatch.setattr(rates, "measure", measure)
    measure_missing(runs_of(study, ended), study_cache, tmp_path)
    assert measured == []  # its runs are done
    more = replace(study, arms=(*study.arms, Arm("linear", {"projection": "linear"})))
    for _ in range(2):
        measure_missing(runs_of(more, tmp_path), study_cache, tmp_path)
        assert measured == ["world", "linear"]
    text = (tmp_path / "rates.json").read_text().replace(CPU, "another machine")
    (tmp_path / "rates.json").write_text(text)
    measure_missing(runs_of(more, tmp_path), study_cache, tmp_path)
    assert measured == ["world", "linear"] * 2
    (tmp_path / "rates.json").write_text('{"kind": {"arm": "world"}}')
    with pytest.raises(StoreError, match=r"rates\.json: key 'answer' is missing"):
        read_rates(tmp_path)


def test_a_kind_of_run_that_fails_is_not_measured_and_named(
    study: Study,
    study_cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def measure(*_: object) -> Rates:
        raise OutOfMemory("step 1: out of memory")

    monkeypatch.setattr(rates, "measure", measure)
    runs = runs_of(study, tmp_path)
    with caplog.at_level(logging.WARNING):
        measure_missing(runs, study_cache, tmp_path)
    assert caplog.messages == ["world-0 was not measured: step 1: out of memory"]
    (time,) = [line for line in plan_study(study, runs, study_cache, tmp_path) if line.startswith("time")]
    assert time.startswith("time         not known before anything has run: a start without ")


def test_a_study_measures_before_its_first_run_and_trains_as_if_it_had_not(
    study: Study, study_cache: Path, ended: Path, tmp_path: Path
) -> None:
    alone = replace(study, arms=study.arms[:1], seeds=[0], primary=None)
    run_study(alone, study_cache, tmp_path, ALL, 1, StopRequest())
    assert [found.arm for found in read_rates(tmp_path).values()] == ["world"]
    assert read_done(runs_of(alone, tmp_path)[0])["predicted_seconds"] == 11.3  # by the clock of these tests
    assert "predicted_seconds" not in read_done(runs_of(alone, ended)[0])  # nothing was measured there
    for split in ("dev", "test"):
        own, other = (records_of(runs_of(alone, folder)[0], split) for folder in (tmp_path, ended))
        assert own.read_bytes() == other.read_bytes()


def test_the_first_part_measures_for_all(
    study: Study, study_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop = StopRequest()
    stop.ask("test")
    for part, known in ((Part(1, 2), False), (Part(0, 2), True)):
        run_study(study, study_cache, tmp_path, part, 1, stop)
        assert bool(read_rates(tmp_path)) == known
