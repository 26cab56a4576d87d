"""A sweep: which runs, what each leaves, none twice, what goes on after a stop, how parts share it, and the ranking."""

import contextlib
import json
import os
import shutil
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from commands import held_sweep, tool
from constants import ROOT
from forks import fork
from jobs import held
from runs import metrics

from theworld.config.config import Config
from theworld.extraction.extract import extract
from theworld.training import sweep, trainer
from theworld.training.memory import NotFinite, OutOfMemory
from theworld.training.sweep import (
    ALL,
    grid,
    make_runs,
    name_of,
    plan_sweep,
    rank,
    read_changes,
    read_results,
    run_sweep,
    summary,
    unfinished,
)
from theworld.training.trainer import Trainer
from theworld.utils.distributed import Part
from theworld.utils.locks import InUse
from theworld.utils.signals import STATUS, StopRequest


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("shared")


@pytest.fixture
def cache(config: Config, shared: Path) -> Path:
    if not shared.joinpath("cache").exists():
        extract(config, shared / "cache", with_vision=True, allow_missing=False)
    return shared / "cache"


@pytest.fixture
def base(config: Config, annotations: Path, tmp_path: Path) -> Config:
    """The tiny run, with all six statements as dev: controls of another image need two of them."""
    folder = tmp_path / "statements"
    folder.mkdir()
    for name in ("train", "dev"):
        (folder / f"{name}.jsonl").write_bytes((annotations / "train.jsonl").read_bytes())
    return replace(config, annotations=str(folder), max_steps=2)


def test_a_grid_has_every_combination_in_the_types_of_the_settings() -> None:
    assert grid(["learning_rate=0.001,1", "world_positions=true", "projection_hidden=none"]) == [
        {"learning_rate": 0.001, "world_positions": True, "projection_hidden": None},
        {"learning_rate": 1.0, "world_positions": True, "projection_hidden": None},
    ]
    assert grid([]) == [{}]
    assert [name_of(c) for c in (grid(["world_patch=2"])[0], {}, {"name": "x", "seed": 1})] == [
        *("world_patch 2", "unchanged", "x"),
    ]


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("colour=red", "wanted key=a,b,c with the key of a setting"),
        ("world_patch", "wanted key=a,b,c"),
        ("world_patch=two", "--grid world_patch: 'two' is no value of that setting"),
        ("world_positions=1", "--grid world_positions: '1' is no value"),
    ],
)
def test_a_grid_that_makes_no_sense_is_refused(option: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        grid([option])


def test_runs_differ_by_what_they_learn_from_alone(base: Config, tmp_path: Path) -> None:
    runs = make_runs(base, [{}, {"name": "conv!", "projection": "conv"}], [0, 1], tmp_path)
    assert [(r.name, r.config.seed, r.folder.name) for r in runs] == [
        *(("unchanged", 0, "unchanged-0"), ("unchanged", 1, "unchanged-1")),
        *(("conv!", 0, "conv-0"), ("conv!", 1, "conv-1")),
    ]
    assert len({r.key for r in runs}) == 4
    elsewhere = make_runs(replace(base, output_dir="x", eval_steps=7, seed=5), [{}], [0], tmp_path / "other")
    assert elsewhere[0].key == runs[0].key
    assert make_runs(replace(base, learning_rate=0.5), [{}], [0], tmp_path)[0].key != runs[0].key


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ([{"colour": 1}], "run 'colour 1': colour is no setting, or one that the sweep decides"),
        ([{"seed": 1}], "seed is no setting, or one that"),
        ([{"name": "a", "world_patch": 0}], "run 'a': world_patch is 0; allowed"),
        ([{"name": "a"}, {"name": "a"}], "two runs, named 'a', have the folder .*/runs/a-0; give"),
        (
            [{"name": "a b"}, {"name": "a-b"}],
            "two runs, named 'a b' and 'a-b', have the folder .*/runs/a-b-0; give",
        ),
    ],
)
def test_runs_that_cannot_be_are_refused(
    base: Config, tmp_path: Path, changes: list[dict[str, object]], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make_runs(base, changes, [0], tmp_path)


def test_a_name_of_any_length_and_characters_has_a_folder_and_a_cell_of_the_table(
    base: Config, tmp_path: Path
) -> None:
    long = {
        "adam_beta2": 0.99,
        "learning_rate": 0.001,
        "question_template": "Is this true? {caption} " + "x" * 300,
    }
    changes = [
        {"name": "conv | after"},
        {"name": "|"},
        {"name": "…"},
        {"name": ".."},
        long,
        long | {"adam_beta2": 0.9},
    ]
    runs = make_runs(base, changes, [0, 2**32 - 1], tmp_path)
    names = [run.folder.name for run in runs]
    assert names[::2][:4] == ["conv-after-0", "72a2e324-0", "9ac37f78-0", "a8ca4457-0"]
    assert len(set(names)) == len(names)
    for run in runs:
        assert run.folder.parent == tmp_path / "runs"
        run.folder.mkdir(parents=True)
    line = {"seed": 0, "key": "k", "n": 4, "last_loss": 0.5, "left_chance_at": 3}
    line["correct"] = dict.fromkeys(("world", "baseline", "zero", "shuffled"), 3)
    row = rank([line | {"name": "conv | after,\nmore"}]).splitlines()[2]
    assert row.startswith("| conv \\| after, more | 75.0%")


def test_a_run_that_another_process_trains_is_left_alone(base: Config, cache: Path, tmp_path: Path) -> None:
    (run,) = make_runs(base, [{}], [0], tmp_path / "sweep")
    run.folder.mkdir(parents=True)
    # without a checkpoint yet: else the run would begin anew
    (run.folder / "metrics.jsonl").write_text("{}\n")
    with held(run.folder):
        with pytest.raises(InUse, match=f"--output {run.folder} is in use: process"):
            run_sweep([run], cache, tmp_path / "sweep")
        with pytest.raises(InUse):
            list(plan_sweep([run], cache, tmp_path / "sweep"))
    assert (run.folder / "metrics.jsonl").read_text() == "{}\n"
    assert read_results(tmp_path / "sweep") == []


def test_a_list_of_runs_is_read_and_anything_else_refused(tmp_path: Path) -> None:
    path = tmp_path / "runs.json"
    path.write_text('{"runs": [{"world_patch": 2}, {}]}  // two')
    assert read_changes(path) == [{"world_patch": 2}, {}]
    for text in ('{"runs": 3}', '{"runs": [3]}', '{"others": []}'):
        path.write_text(text)
        with pytest.raises(ValueError, match=r'wanted {"runs": \[{"projection"'):
            read_changes(path)


def test_a_sweep_trains_each_run_once_and_counts_what_evaluation_counts(
    base: Config, cache: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    output = tmp_path / "sweep"
    changes = [{}, {"name": "refused", "world_patch": 4, "align_steps": 1}]
    runs = make_runs(base, changes, [0, 1], output)
    table, left = run_sweep(runs, cache, output)
    assert left == []
    lines = read_results(output)
    assert [("failed" in line, line["seed"]) for line in lines] == [
        *((False, 0), (False, 1)),
        *((True, 0), (True, 1)),
    ]
    assert "do not lie on the same places" in lines[2]["failed"]
    assert (lines[0]["steps"], lines[0]["n"], lines[0]["statements_per_step"]) == (2, 6, 4)
    assert set(lines[0]["correct"]) == set(lines[0]["dev_loss"]) == {"world", "baseline", "zero", "shuffled"}
    logged = [json.loads(line) for line in (runs[0].folder / "metrics.jsonl").read_text().splitlines()]
    (dev,) = [line for line in logged if "dev_loss" in line]
    assert lines[0]["dev_loss"]["world"] == pytest.approx(dev["dev_loss"], abs=1e-4)
    assert lines[0]["correct"]["world"] / 6 == pytest.approx(dev["dev_accuracy"])
    assert lines[0]["last_loss"] == pytest.approx(sum(x["loss"] for x in logged if "loss" in x) / 2, abs=1e-4)
    assert (output / "table.md").read_text() == table + "\n"
    assert "failed: refused, seed 1: align_steps 1: 4 world tokens" in table
    # The same again trains nothing but what failed; a run of other settings is another one.
    assert [run.name for run in unfinished(runs, output)] == ["refused", "refused"]
    before = (runs[0].folder / "metrics.jsonl").stat().st_mtime_ns
    assert [", seed 0: " in line or ", seed 1: " in line for line in caplog.messages].count(True) == 4
    caplog.clear()
    assert run_sweep(runs[:2], cache, output)[0].splitlines()[:3] == table.splitlines()[:3]
    assert (runs[0].folder / "metrics.jsonl").stat().st_mtime_ns == before
    assert "seed" not in caplog.text
    # What a run that did not end left behind is no part of the next.
    (tmp_path / "more").mkdir()
    (other,) = make_runs(base, [{}], [0], tmp_path / "more")
    other.folder.mkdir(parents=True)
    (other.folder / "metrics.jsonl").write_text('{"phase": "train", "loss": 9.0}\n')
    run_sweep([other], cache, tmp_path / "more")
    (again,) = read_results(tmp_path / "more")
    assert {k: v for k, v in again.items() if k != "seconds"} == {
        k: v for k, v in lines[0].items() if k != "seconds"
    }


def test_a_line_has_the_words_of_training_and_of_dev(base: Config, cache: Path, tmp_path: Path) -> None:
    (run,) = make_runs(base, [{"relation_loss_weight": 1.0, "statement_steps": 1}], [0], tmp_path)
    run_sweep([run], cache, tmp_path)
    (line,) = read_results(tmp_path)
    logged = [json.loads(text) for text in (run.folder / "metrics.jsonl").read_text().splitlines()]
    last = {key: value for own in logged if own["phase"] == "train" for key, value in own.items()}
    assert line["last_words"] == {key: round(last[key], 5) for key in ("relation_loss", "dev_relation_loss")}
    assert line["last_words"]["dev_relation_loss"] > 0


@pytest.mark.parametrize(
    "error", [NotFinite("step 3: the loss is nan"), OutOfMemory("step 1: out of memory")]
)
def test_a_run_that_fails_in_a_step_costs_no_other(
    base: Config, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    train_step = Trainer.train_step

    def failing(self: Trainer, *arguments: Any) -> Any:
        if self.config.projection == "linear":
            raise error
        return train_step(self, *arguments)

    monkeypatch.setattr(Trainer, "train_step", failing)
    table, _ = run_sweep(make_runs(base, [{"projection": "linear"}, {}], [0], tmp_path), cache, tmp_path)
    assert f"failed: projection linear, seed 0: {error}" in table
    assert [line.get("failed") for line in read_results(tmp_path)] == [str(error), None]


# ---- a sweep that is stopped


def lines_of(output: Path) -> list[dict[str, Any]]:
    """The lines of results.jsonl by run, without what the clock says, and where its statements were."""
    results = read_results(output)
    lines = [{k: v for k, v in line.items() if k not in ("seconds", "key")} for line in results]
    return sorted(lines, key=lambda line: (line["name"], line["seed"]))


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """(seed, step) of each optimizer step that is taken from here on."""
    taken: list[tuple[int, int]] = []
    train_step = Trainer.train_step

    def counted(self: Trainer, *arguments: Any) -> dict[str, float]:
        figures = train_step(self, *arguments)
        taken.append((self.config.seed, self.step))
        return figures

    monkeypatch.setattr(Trainer, "train_step", counted)
    return taken


@pytest.fixture
def long(base: Config) -> Config:
    """Five steps that save after the fourth and the last."""
    return replace(base, max_steps=5, num_epochs=10, save_steps=4)


@pytest.fixture
def whole(long: Config, cache: Path, shared: Path) -> Path:
    """A sweep of two seeds that nobody stopped."""
    if not (shared / "whole").exists():
        run_sweep(make_runs(long, [{}], [0, 1], shared / "whole"), cache, shared / "whole")
    return shared / "whole"


FIRST, SECOND = [(0, step) for step in range(1, 6)], [(1, step) for step in range(1, 6)]


@pytest.mark.parametrize(
    ("moment", "before", "ended", "started"),
    [
        ("start", [], 0, 0),
        ("load", [], 0, 0),
        ("first step", FIRST[:1], 0, 1),
        ("step", FIRST[:3], 0, 1),
        ("last step", FIRST, 1, 0),
        ("measure", FIRST, 1, 0),
        ("second run", FIRST + SECOND[:2], 1, 1),
    ],
)
def test_a_sweep_that_was_stopped_goes_on_to_the_lines_of_one_that_was_not(
    long: Config,
    cache: Path,
    whole: Path,
    tmp_path: Path,
    steps: list[tuple[int, int]],
    moment: str,
    before: list[tuple[int, int]],
    ended: int,
    started: int,
) -> None:
    output, stop = tmp_path / "sweep", StopRequest()
    runs = make_runs(long, [{}], [0, 1], output)
    load = (trainer.Trainer, "__init__")
    hooks = {"start": load, "load": load, "measure": (sweep, "measure")}
    place: tuple[Any, str] = hooks.get(moment, (trainer.Trainer, "train_step"))
    asks = {"first step": 0, "step": 2, "last step": 4, "second run": 6}.get(moment, 0)
    calls, real = [], getattr(*place)

    def asking(*arguments: Any) -> Any:
        if len(calls) == asks:
            stop.ask("test")
        calls.append(moment)
        return real(*arguments)

    if moment == "start":
        stop.ask("test")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(*place, asking)
        _, left = run_sweep(runs, cache, output, stop=stop)
    assert (steps, bool(calls)) == (before, moment != "start")
    assert (left, [run.started for run in left].count(True)) == (runs[ended:], started)
    assert summary(runs, output, ALL, "", left) == (
        f"stopped as asked: {ended} of 2 runs have ended; the same command goes on with {started} from where they are, "
        f"and starts {2 - ended - started}"
    )
    plan = list(plan_sweep(runs, cache, output))[:-1]
    goes_on = [f"goes on      unchanged, seed {before[-1][0]}: after step {before[-1][1]}"] if started else []
    assert plan == [f"runs         2, of which {ended} are done", *goes_on]

    table, left = run_sweep(runs, cache, output)
    assert (left, steps) == ([], FIRST + SECOND)
    assert lines_of(output) == lines_of(whole)
    assert table == (whole / "table.md").read_text().rstrip("\n")
    for run in runs:
        assert metrics(run.folder) == metrics(whole / "runs" / run.folder.name)
        assert not (run.folder / "metrics.aside.jsonl").exists()
        assert [path.name for path in run.folder.glob("*checkpoint-*")] == ["checkpoint-5"]
    # Once more: nothing is left to do.
    run_sweep(runs, cache, output)
    assert steps == FIRST + SECOND


def test_a_run_that_ended_without_its_line_is_measured_and_not_trained_again(
    long: Config, cache: Path, whole: Path, tmp_path: Path, steps: list[tuple[int, int]]
) -> None:
    runs, results = make_runs(long, [{}], [0, 1], tmp_path), tmp_path / "results.jsonl"
    run_sweep(runs, cache, tmp_path)
    results.write_text(results.read_text().splitlines(keepends=True)[1])
    steps.clear()
    run_sweep(runs, cache, tmp_path)
    assert (lines_of(tmp_path), steps) == (lines_of(whole), [])


def stopped_at(run: sweep.Run, cache: Path, output: Path, step: int) -> None:
    """Runs a sweep of one, which is asked to stop in a step."""
    stop = StopRequest()
    train_step = Trainer.train_step

    def asking(self: Trainer, *arguments: Any) -> dict[str, float]:
        if self.step == step - 1:
            stop.ask("test")
        return train_step(self, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "train_step", asking)
        assert run_sweep([run], cache, output, stop=stop)[1] == [run]


def no_key(folder: Path) -> None:
    """A folder of before there were keys."""
    (folder / "key").unlink()


def no_checkpoint(folder: Path) -> None:
    """A run that was killed before it saved anything."""
    shutil.rmtree(folder / "checkpoint-3")


@pytest.mark.parametrize("changed", [{"learning_rate": 0.5}, {"projection": "linear"}, no_key, no_checkpoint])
def test_other_settings_and_what_saved_nothing_start_anew(
    long: Config,
    cache: Path,
    whole: Path,
    tmp_path: Path,
    steps: list[tuple[int, int]],
    changed: dict[str, Any] | Callable[[Path], None],
) -> None:
    output = tmp_path / "sweep"
    base = replace(long, **changed) if isinstance(changed, dict) else long
    (run,) = make_runs(base, [{}], [0], output)
    stopped_at(run, cache, output, 3)
    assert run.started
    if not isinstance(changed, dict):
        changed(run.folder)
    (run,) = make_runs(long, [{}], [0], output)  # of the same name, and folder
    assert not run.started
    assert [line for line in plan_sweep([run], cache, output) if "goes on" in line] == []
    steps.clear()
    run_sweep([run], cache, output)
    assert steps == FIRST
    assert lines_of(output) == lines_of(whole)[:1]
    assert sorted(path.name for path in run.folder.iterdir()) == [
        *(".lock", "checkpoint-5", "key", "metrics.jsonl")
    ]


@pytest.mark.usefixtures("log_shown")
def test_a_damaged_checkpoint_is_set_aside_for_an_older_one_and_fails_the_run_if_there_is_none(
    long: Config, cache: Path, whole: Path, tmp_path: Path, steps: list[tuple[int, int]], capsys: Any
) -> None:
    output = tmp_path / "sweep"
    (run,) = make_runs(long, [{}], [0], output)
    stopped_at(run, cache, output, 2)
    shutil.copytree(run.folder / "checkpoint-2", tmp_path / "older")
    stopped_at(run, cache, output, 3)
    content = bytearray((run.folder / "checkpoint-3" / "trainer.pt").read_bytes())
    content[len(content) // 2] ^= 4
    (run.folder / "checkpoint-3" / "trainer.pt").write_bytes(content)
    steps.clear()

    _, left = run_sweep([run], cache, output)
    (line,) = read_results(output)
    assert (left, steps) == ([], [])
    assert f"{run.folder}: no valid checkpoint in it:" in line["failed"]
    assert "checkpoint-3/trainer.pt is damaged" in line["failed"]
    assert line["failed"].endswith(f"; remove {run.folder} to start the run anew")
    with pytest.raises(ValueError, match="no valid checkpoint in it"):
        list(plan_sweep([run], cache, output))

    os.rename(tmp_path / "older", run.folder / "checkpoint-2")
    assert list(plan_sweep([run], cache, output))[1] == "goes on      unchanged, seed 0: after step 2"
    capsys.readouterr()
    run_sweep([run], cache, output)
    assert "skipped: " in capsys.readouterr().out
    assert steps == FIRST[2:]
    assert lines_of(output)[1:] == lines_of(whole)[:1]
    assert (run.folder / "damaged-checkpoint-3").is_dir()
    assert len((run.folder / "metrics.aside.jsonl").read_text().splitlines()) == 1


def test_a_run_does_not_go_on_with_other_data(
    long: Config, cache: Path, tmp_path: Path, steps: list[tuple[int, int]]
) -> None:
    (run,) = make_runs(long, [{}], [0], tmp_path / "sweep")
    stopped_at(run, cache, tmp_path / "sweep", 3)
    train = Path(long.annotations) / "train.jsonl"
    train.write_text(train.read_text().replace("red ball", "old ball"))
    steps.clear()
    run_sweep([run], cache, tmp_path / "sweep")
    (line,) = read_results(tmp_path / "sweep")
    assert "was trained on other statements or captions" in line["failed"]
    assert line["failed"].endswith(f"; remove {run.folder} to start the run anew")
    assert steps == []


def test_a_line_that_is_not_whole_is_named(tmp_path: Path) -> None:
    assert read_results(tmp_path) == []
    (tmp_path / "results.jsonl").write_text('{"key": 1}\n')
    (tmp_path / "results-2-of-3.jsonl").write_text('{"key": 1}\n{"key"')
    words = r"results-2-of-3\.jsonl has a line that is not whole .* remove that line"
    with pytest.raises(ValueError, match=words):
        read_results(tmp_path)


def line(name: str, seed: int, world: int, left: int | None, loss: float = 0.5) -> dict[str, object]:
    correct = {"world": world, "baseline": 50, "zero": 49, "shuffled": 48}
    own = {"name": name, "seed": seed, "key": f"{name}-{seed}", "n": 100, "correct": correct}
    return own | {"left_chance_at": left, "last_loss": loss}


def test_the_ranking_pools_seeds_and_shows_their_spread() -> None:
    lines = [
        *(line("poor", 0, 51, None, 0.69), line("poor", 1, 49, None, 0.70)),
        *(line("good", 0, 90, 40, 0.2), line("good", 1, 60, None, 0.6)),
        {"name": "broken", "seed": 0, "key": "b", "failed": "why"},
    ]
    assert rank(lines).splitlines()[2:] == [
        "| good | 75.0% (68.6%–80.5%) | 60.0%–90.0% | 50.0% | 49.0% | 48.0% | 0.400 | 40 (1 of 2) |",
        "| poor | 50.0% (43.1%–56.9%) | 49.0%–51.0% | 50.0% | 49.0% | 48.0% | 0.695 | never (0 of 2) |",
        "",
        "failed: broken, seed 0: why",
    ]
    assert "failed" not in rank([*lines, line("broken", 0, 1, None) | {"key": "b"}])


def test_a_dry_run_says_what_would_train_and_refuses_what_could_not(
    base: Config, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = make_runs(base, [{}, {"projection": "linear"}], [0, 1], tmp_path / "sweep")
    assert list(plan_sweep(runs, cache, tmp_path / "sweep")) == [
        "runs         4, of which 0 are done",
        "trains       unchanged (seeds 0, 1): 2 steps, 8,512 parameters",
        "trains       projection linear (seeds 0, 1): 2 steps, 4,352 parameters",
    ]
    (bad,) = make_runs(base, [{"align_steps": 2, "world_patch": 4}], [0], tmp_path / "sweep")
    with pytest.raises(
        ValueError, match=r"run 'align_steps 2, world_patch 4': align_steps 2: 4 world tokens"
    ):
        list(plan_sweep([bad], cache, tmp_path / "sweep"))
    monkeypatch.setattr("theworld.utils.files.free_bytes", lambda path: 0)
    with pytest.raises(ValueError, match=r"are needed and 0 are free; make room or move --output$"):
        list(plan_sweep(runs, cache, tmp_path / "sweep"))
    assert not (tmp_path / "sweep").exists()


class Held:
    """The tool in a process that leads a group, held after so many steps of the runs in some folders until it is asked
    to stop."""

    def __init__(self, output: Path, given: Sequence[object], folders: Sequence[Path], hold: int) -> None:
        self.output = output
        for suffix in ("out", "err"):
            Path(f"{output}.{suffix}").unlink(missing_ok=True)
        self.process = fork(held_sweep, list(map(str, given)), str(output), hold)
        assert self.process.pid is not None
        self.pid = self.process.pid
        try:
            while not all(folder.with_name(f"{folder.name}.held-{hold}").exists() for folder in folders):
                assert self.process.is_alive(), self.texts()
                time.sleep(0.01)
        except BaseException:
            self.kill()
            raise

    def __enter__(self) -> "Held":
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.is_alive():
            self.kill()

    def texts(self) -> list[str]:
        """What it printed, and its errors."""
        return [Path(f"{self.output}.{suffix}").read_text() for suffix in ("out", "err")]

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):  # it has ended by itself
            os.killpg(self.pid, signal.SIGKILL)
        self.process.join(60)

    def ends(self) -> tuple[int | None, str, str]:
        """Its exit status, what it printed, and its errors."""
        self.process.join(60)
        if self.process.is_alive():
            self.kill()
        out, errors = self.texts()
        return self.process.exitcode, out, errors


def test_parts_are_stopped_and_killed_and_the_last_shows_the_table_of_a_sweep_that_was_not(
    long: Config, cache: Path, whole: Path, tmp_path: Path
) -> None:
    settings, output = tmp_path / "settings.json", tmp_path / "sweep"
    settings.write_text(json.dumps(long.to_dict()))
    given = ("--config", settings, "--cache", cache, "--output", output, "--seeds", 0, 1, 2)
    folders = [output / "runs" / f"unchanged-{seed}" for seed in range(3)]

    def start(part: int, folder: Path, hold: int) -> Held:
        return Held(tmp_path / f"held-{part}", (*given, "--part", f"{part}/2"), [folder], hold)

    with start(1, folders[0], 1) as first, start(2, folders[1], 1) as second:
        stops = ((first, signal.SIGTERM, "0 of 2", 1), (second, signal.SIGUSR1, "0 of 1", 0))
        for held, number, ended, rest in stops:
            os.killpg(held.pid, number)
            status, out, errors = held.ends()
            assert status == STATUS, errors
            assert out.splitlines()[-1] == (
                f"stopped as asked: {ended} runs have ended; the same command goes on with 1 from where they are, and "
                f"starts {rest}"
            )
            assert f"sweep: {number.name}: saving after this step" in errors
    assert [sorted(path.name for path in f.glob("checkpoint-*")) for f in folders[:2]] == [
        ["checkpoint-2"]
    ] * 2

    with start(1, folders[0], 4) as first, start(2, folders[1], 4) as second:
        first.kill()
        second.kill()
    runs = make_runs(long, [{}], [0, 1, 2], output)
    assert list(plan_sweep(runs, cache, output, Part(0, 2)))[:3] == [
        "runs         3, of which 0 are done",
        "part         1 of 2 trains 2 of 3 runs not yet done",
        "goes on      unchanged, seed 0: after step 4",
    ]
    done = tool("sweep", *given, "--part", "1/2")
    assert done.stdout.splitlines()[-1] == (
        "part 1 of 2 is done; 1 of 3 runs are still missing: those of other parts. Whichever part ends last shows the "
        "table"
    )
    done = tool("sweep", *given, "--part", "2/2")
    assert lines_of(output)[:2] == lines_of(whole)
    assert done.stdout.endswith((output / "table.md").read_text())
    assert [metrics(f) for f in folders[:2]] == [metrics(whole / "runs" / f.name) for f in folders[:2]]
    assert sorted(path.name for path in output.glob("results*")) == [
        "results-1-of-2.jsonl",
        "results-2-of-2.jsonl",
    ]
    # A later call finds everything done, whatever its parts are.
    table = (output / "table.md").read_text()
    assert tool("sweep", *given, "--part", "3/7").stdout == table
    wrong = tool("sweep", *given, "--grid", "colour=1", check=False)
    assert (wrong.returncode, "wanted key=a,b,c" in wrong.stderr) == (1, True)


def test_an_interrupted_sweep_says_one_line(long: Config, cache: Path, tmp_path: Path) -> None:
    settings, output = tmp_path / "settings.json", tmp_path / "sweep"
    settings.write_text(json.dumps(long.to_dict()))
    given = ("--config", settings, "--cache", cache, "--output", output, "--seeds", 0)
    with Held(tmp_path / "held", given, [output / "runs" / "unchanged-0"], 1) as held:
        os.killpg(held.pid, signal.SIGINT)
        status, _, errors = held.ends()
    assert (status, errors.splitlines()[-1]) == (130, "sweep: interrupted")


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0)])
def test_parts_in_any_order_make_the_table_of_a_single_sweep(
    base: Config, cache: Path, tmp_path: Path, order: tuple[int, ...]
) -> None:
    changes = [{"max_steps": 1}, {"name": "refused", "world_patch": 4, "align_steps": 1}]
    runs = {name: make_runs(base, changes, [0, 1], tmp_path / name) for name in ("whole", "parts")}
    table, _ = run_sweep(runs["whole"], cache, tmp_path / "whole")
    for number, index in enumerate(order):
        output, part = tmp_path / "parts", Part(index, 3)
        found, left = run_sweep(runs["parts"], cache, output, part)
        own = [run.key for n, run in enumerate(runs["parts"]) if n % 3 == index]
        lines = (output / f"results-{index + 1}-of-3.jsonl").read_text().splitlines()
        assert ([json.loads(line)["key"] for line in lines], left) == (own, [])
        shown = summary(runs["parts"], output, part, found, left)
        assert (shown == found) == (number == 2)
    assert sorted(found.splitlines()) == sorted(table.splitlines())
    assert (output / "table.md").read_text() == f"{found}\n"


@pytest.mark.parametrize("path", ["configs/sweep.json"])
def test_the_runs_that_are_shipped_are_runs(path: str, tmp_path: Path) -> None:
    runs = make_runs(Config(), read_changes(ROOT / path), [0, 1, 2], tmp_path)
    assert len(runs) == 33
    assert len({run.key for run in runs}) == 33
    assert runs[0].config == replace(
        Config(), output_dir=runs[0].config.output_dir, log_to_tensorboard=False, save_total_limit=1,
        eval_steps=runs[0].config.eval_steps,
    )  # fmt: skip
