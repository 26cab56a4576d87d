"""A sweep: which runs, what each leaves, none twice, and the ranking."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from test_tools import tool

from theworld.config import Config
from theworld.extract import extract
from theworld.sweep import (
    grid,
    make_runs,
    name_of,
    plan_sweep,
    rank,
    read_changes,
    read_results,
    run_sweep,
    still_to_do,
)
from theworld.train import NotFinite, OutOfMemory, Trainer


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
        ([{"name": "a b"}, {"name": "a-b"}], "two runs are named 'a b'"),
    ],
)
def test_runs_that_cannot_be_are_refused(
    base: Config, tmp_path: Path, changes: list[dict[str, object]], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make_runs(base, changes, [0], tmp_path)


def test_a_list_of_runs_is_read_and_anything_else_refused(tmp_path: Path) -> None:
    path = tmp_path / "runs.json"
    path.write_text('{"runs": [{"world_patch": 2}, {}]}  // two')
    assert read_changes(path) == [{"world_patch": 2}, {}]
    for text in ('{"runs": 3}', '{"runs": [3]}', '{"others": []}'):
        path.write_text(text)
        with pytest.raises(ValueError, match=r'wanted {"runs": \[{"projection"'):
            read_changes(path)


def test_a_sweep_trains_each_run_once_and_counts_what_evaluation_counts(
    base: Config, cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "sweep"
    changes = [{}, {"name": "refused", "world_patch": 4, "align_steps": 1}]
    runs = make_runs(base, changes, [0, 1], output)
    table = run_sweep(runs, cache, output)
    lines = read_results(output / "results.jsonl")
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
    assert [run.name for run in still_to_do(runs, lines)] == ["refused", "refused"]
    before = (runs[0].folder / "metrics.jsonl").stat().st_mtime_ns
    capsys.readouterr()
    assert run_sweep(runs[:2], cache, output).splitlines()[:3] == table.splitlines()[:3]
    assert (runs[0].folder / "metrics.jsonl").stat().st_mtime_ns == before
    assert "seed" not in capsys.readouterr().out
    # What a run that did not end left behind is no part of the next.
    (tmp_path / "more").mkdir()
    (other,) = make_runs(base, [{}], [0], tmp_path / "more")
    other.folder.mkdir(parents=True)
    (other.folder / "metrics.jsonl").write_text('{"phase": "train", "loss": 9.0}\n')
    run_sweep([other], cache, tmp_path / "more")
    (again,) = read_results(tmp_path / "more" / "results.jsonl")
    assert {k: v for k, v in again.items() if k != "seconds"} == {
        k: v for k, v in lines[0].items() if k != "seconds"
    }


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
    table = run_sweep(make_runs(base, [{"projection": "linear"}, {}], [0], tmp_path), cache, tmp_path)
    assert f"failed: projection linear, seed 0: {error}" in table
    assert [line.get("failed") for line in read_results(tmp_path / "results.jsonl")] == [str(error), None]


def test_a_line_that_is_not_whole_is_named(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    assert read_results(path) == []
    path.write_text('{"key": 1}\n{"key"')
    with pytest.raises(ValueError, match=r"results\.jsonl has a line that is not whole .* remove that line"):
        read_results(path)


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
    base: Config, cache: Path, tmp_path: Path
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
    assert not (tmp_path / "sweep").exists()


def test_the_tool_sweeps_in_two_processes_and_shows_a_table(
    base: Config, cache: Path, tmp_path: Path
) -> None:
    settings = tmp_path / "settings.json"
    settings.write_text(json.dumps(base.to_dict()))
    given = ("--config", settings, "--cache", cache, "--output", tmp_path / "sweep", "--seeds", 0)
    given = (*given, "--grid", "learning_rate=0.001,0.002", "--processes", 2)
    assert "runs         2, of which 0 are done" in tool("sweep", *given, "--dry_run").stdout
    done = tool("sweep", *given)
    assert "| learning_rate 0.002 | " in done.stdout
    assert "runs         2, of which 2 are done" in tool("sweep", *given, "--dry_run").stdout
    wrong = tool("sweep", *given[:-4], "--grid", "colour=1", check=False)
    assert (wrong.returncode, "wanted key=a,b,c" in wrong.stderr) == (1, True)


@pytest.mark.parametrize("path", ["configs/sweep.json"])
def test_the_runs_that_are_shipped_are_runs(path: str, tmp_path: Path) -> None:
    runs = make_runs(Config(), read_changes(Path(__file__).parent.parent / path), [0, 1, 2], tmp_path)
    assert len(runs) == 33
    assert len({run.key for run in runs}) == 33
    assert runs[0].config == replace(
        Config(), output_dir=runs[0].config.output_dir, log_to_tensorboard=False, save_total_limit=None,
        eval_steps=runs[0].config.eval_steps, save_steps=runs[0].config.save_steps,
    )  # fmt: skip
