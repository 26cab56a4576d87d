"""TensorBoard and W&B: what they get, when, and what is refused before any model loads."""

import json
import struct
import sys
import time
import types
from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from commands import forked

from theworld.config.config import Config, save_config
from theworld.training.logging import Trackers, check_trackers
from theworld.training.trainer import Trainer

CANARY = "hf_canary0123456789canary"
OFFLINE = {"WANDB_MODE": "offline", "WANDB__SERVICE_WAIT": "200"}  # seconds until its process has started
needs_wandb = pytest.mark.skipif(find_spec("wandb") is None, reason="wandb is not installed")


class StubRun:
    def __init__(self, settings: dict[str, Any], name: str) -> None:
        self.settings, self.id = settings, name
        self.lines: list[dict[str, float]] = []
        self.finished = False

    def log(self, figures: dict[str, float], step: int) -> None:
        self.lines.append({"step": step, **figures})

    def finish(self) -> None:
        self.finished = True


class StubWandb(types.ModuleType):
    """As much of wandb as this project calls."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.errors = types.SimpleNamespace(Error=type("Error", (Exception,), {}))
        self.runs: list[StubRun] = []
        self.logged_in = True

    def login(self) -> bool:
        if not self.logged_in:
            raise self.errors.Error("No API key configured.")
        return True

    def init(self, **settings: Any) -> StubRun:
        self.runs.append(StubRun(settings, settings["id"] or f"id{len(self.runs)}"))
        return self.runs[-1]


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> Iterator[StubWandb]:
    stub = StubWandb()
    monkeypatch.setitem(sys.modules, "wandb", stub)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("WANDB_API_KEY", CANARY)
    return stub


def metrics(folder: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("epoch", "phase")} for line in lines]


def test_wandb_gets_the_lines_of_the_metrics_file_and_the_settings(
    cache: Path, config: Config, wandb: StubWandb
) -> None:
    logged = replace(config, log_to_wandb=True, wandb_project="p", wandb_run_name="r")
    Trainer(logged, cache).run()
    (run,) = wandb.runs
    assert run.lines == metrics(config.output_dir)
    assert run.finished
    own = {key: run.settings[key] for key in ("project", "name", "id", "resume", "dir")}
    assert own == {"project": "p", "name": "r", "id": None, "resume": "allow", "dir": config.output_dir}
    assert run.settings["config"]["learning_rate"] == config.learning_rate
    assert run.settings["config"]["model_name"] == "gemma"
    assert CANARY not in repr(run.settings)


def test_a_resumed_run_goes_on_in_its_own_wandb_run_and_a_new_one_does_not(
    cache: Path, config: Config, wandb: StubWandb, tmp_path: Path
) -> None:
    logged = replace(config, log_to_wandb=True)
    checkpoint = Trainer(logged, cache).run()
    longer = replace(logged, max_steps=6, num_epochs=9, resume_from=config.output_dir)
    Trainer(longer, cache, allow_changed=True).run()
    Trainer(replace(logged, output_dir=str(tmp_path / "other")), cache).run()
    assert [run.id for run in wandb.runs] == ["id0", "id0", "id2"]
    assert [line["step"] for line in wandb.runs[1].lines] == [5, 6, 6]
    assert not list(checkpoint.glob("*wandb*"))


def test_a_missing_wandb_is_named_before_any_model_loads(
    cache: Path, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setattr("theworld.training.trainer.load_model", None)
    with pytest.raises(ValueError, match=r"log_to_wandb is true, but .*wandb.*; run `pip install wandb`"):
        Trainer(replace(config, log_to_wandb=True), cache)


def test_a_missing_login_is_named_before_any_model_loads(
    cache: Path, config: Config, wandb: StubWandb, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb.logged_in = False
    monkeypatch.setattr("theworld.training.trainer.load_model", None)
    with pytest.raises(ValueError, match=r"No API key configured\. Set WANDB_API_KEY or run `wandb login`"):
        Trainer(replace(config, log_to_wandb=True), cache)
    monkeypatch.setenv("WANDB_MODE", "offline")
    check_trackers(replace(config, log_to_wandb=True))


def test_only_the_main_process_logs(
    cache: Path, config: Config, wandb: StubWandb, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("theworld.utils.distributed.Processes.is_main_process", False)
    Trainer(replace(config, log_to_wandb=True, log_to_tensorboard=True), cache).run()
    assert wandb.runs == []
    assert not (Path(config.output_dir) / "logs").exists()


def test_without_wandb_nothing_of_it_is_imported(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    check_trackers(config)


def test_tensorboard_gets_every_figure(config: Config, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trackers = Trackers(replace(config, log_to_tensorboard=True), {}, tmp_path, resumed=False)
    trackers.log({"loss": 0.5, "accuracy": 0.25}, 3)
    trackers.log({"loss": 0.125}, 4)
    trackers.close()
    events = EventAccumulator(str(tmp_path / "logs")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(3, 0.5), (4, 0.125)]
    assert [(e.step, e.value) for e in events.Scalars("accuracy")] == [(3, 0.25)]


def test_wandb_itself_takes_a_run_without_a_network(
    cache: Path, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    for key, value in OFFLINE.items():
        monkeypatch.setenv(key, value)
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("HF_TOKEN", CANARY)
    Trainer(replace(config, log_to_wandb=True), cache).run()
    folder = Path(config.output_dir)
    name = (folder / "wandb_id.txt").read_text().strip()
    (log,) = folder.glob(f"wandb/offline-run-*/run-{name}.wandb")
    records_of_run(log)
    content = log.read_bytes()
    assert b"dev_accuracy" in content
    assert b"learning_rate" in content
    assert CANARY.encode() not in content


# ---- the real client, which sends nothing when it is told to stay offline


def records_of_run(path: Path) -> list[Any]:
    """The records of the .wandb file of a run that has ended: its own process writes the last ones afterwards."""
    end = time.monotonic() + 120
    while True:
        records = list(recorded(path))
        if records and records[-1].HasField("exit"):
            return records
        assert time.monotonic() < end, records
        time.sleep(0.05)


def recorded(path: Path) -> Iterator[Any]:
    """The whole records of a .wandb file: messages in LevelDB's log format behind a header of seven bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, whole = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:  # the end of a block, too short for another header
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        if at + 7 + length > len(data):  # it is being written
            return
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole in one piece, or its last
            yield Record.FromString(whole)
            whole = b""


@needs_wandb
def test_the_real_wandb_keeps_a_run_and_its_resumption_offline(
    config: Config, session_cache: Path, tmp_path: Path
) -> None:
    config = replace(config, log_to_wandb=True, wandb_project="rooms", wandb_run_name="first")
    environment = OFFLINE | {"WANDB_API_KEY": CANARY[3:] * 2, "HF_TOKEN": CANARY}
    environment |= {"WANDB_ERROR_REPORTING": "false", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    for steps, resume in ((4, None), (6, config.output_dir)):
        save_config(
            replace(config, max_steps=steps, num_epochs=9, resume_from=resume), tmp_path / "settings.json"
        )
        arguments = [
            "--config",
            str(tmp_path / "settings.json"),
            "--cache",
            str(session_cache),
            "--allow_changed",
        ]
        done = forked("train", arguments, [environment], 200)
        assert done.returncode == 0, done.stderr
        assert CANARY[3:] not in done.stdout + done.stderr
    first, second = sorted(Path(config.output_dir).glob("wandb/offline-run-*/run-*.wandb"))
    assert first.name == second.name  # the same run, for `wandb sync`
    found: list[dict[str, Any]] = []
    for path, last in ((first, 4), (second, 6)):
        records = records_of_run(path)
        (run,) = [record.run for record in records if record.HasField("run")]
        assert (run.project, run.display_name) == ("rooms", "first")
        settings = {item.key: json.loads(item.value_json) for item in run.config.update}
        assert settings["learning_rate"] == 1e-3
        assert settings["max_steps"] == last
        for record in records:
            if record.HasField("history"):
                items = record.history.item
                values = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in items}
                found.append(
                    {key: value for key, value in values.items() if key[0] != "_"} | {"step": values["_step"]}
                )
    merged: dict[int, dict[str, Any]] = {}
    for line in metrics(config.output_dir):
        merged.setdefault(line["step"], {}).update(line)
    assert found == list(merged.values())
    for path in Path(config.output_dir).rglob("*"):
        assert not path.is_file() or CANARY[3:].encode() not in path.read_bytes(), path


def test_a_step_that_compiles_after_the_second_is_logged(
    config: Config, session_cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = Trainer(replace(config, max_steps=4, num_epochs=100), session_cache)
    graphs = iter([0, 2, 2, 3, 3, 3, 3, 4])  # before and after each step
    monkeypatch.setattr("theworld.training.trainer.num_compiled_graphs", lambda: next(graphs))
    for _ in range(4):
        trainer.train_step()
    found = [record.getMessage() for record in caplog.records if "compiled" in record.getMessage()]
    assert found == [
        "step 4: compiled 1 graphs anew, which takes seconds and should not happen after two steps; "
        "TORCH_LOGS=recompiles says why"
    ]
