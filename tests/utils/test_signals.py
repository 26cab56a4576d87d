"""A run that is asked to stop saves and ends, and the resumed one is bitwise the one that was never asked."""

import os
import random
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from constants import ROOT
from runs import Run, metrics, resumed, same_run
from torture import Tally

from theworld.config.config import Config, save_config
from theworld.training.trainer import Trainer
from theworld.utils.signals import STATUS, StopRequest

ROW = ("training", "SIGTERM and SIGUSR1 at random steps: saves, ends, resumes bitwise")


@pytest.fixture
def cache(session_cache: Path) -> Path:
    return session_cache


def long_run(config: Config, folder: Path, reads: str, ranks: int, steps: int) -> Config:
    """A run of so many steps; `reads`: the cache alone, or photographs too, which threads read meanwhile."""
    changes: dict[str, object] = {"align_steps": 3}
    if reads == "photographs":
        changes = {"freeze_gemma_vision": False}
    elif reads == "cache, sharded":
        changes = {"freeze_gemma_language": False}
    return replace(
        config,
        max_steps=steps - (3 if reads == "cache" else 0),
        num_epochs=1000,
        statement_loss_weight=0.3,
        gradient_accumulation_steps=2 // ranks,
        save_steps=7,
        eval_steps=5,
        save_total_limit=2,
        num_workers=2 if reads == "photographs" else 0,
        output_dir=str(folder),
        **changes,
    )


@pytest.mark.torture(*ROW)
@pytest.mark.parametrize(
    ("reads", "ranks"),
    [("cache", 1), ("photographs", 1), ("cache", 2), ("photographs", 2), ("cache, sharded", 2)],
)
def test_stopped_at_random_steps(
    reads: str, ranks: int, config: Config, cache: Path, tmp_path: Path, tally: Tally
) -> None:
    steps = tally.number(60, sample=24)
    whole = long_run(config, tmp_path / "whole", reads, ranks, steps)
    variables = {"ACCELERATE_USE_FSDP": "true"} if reads == "cache, sharded" else {}
    assert Run(whole, cache, ranks, **variables).wait() == {0}
    chance = random.Random(ranks)
    kinds = [
        (number, target) for number in (signal.SIGTERM, signal.SIGUSR1) for target in ("process", "group")
    ]
    stops = kinds * tally.number(20, sample=1)
    chance.shuffle(stops)
    chains = 0
    while stops:
        config = long_run(config, tmp_path / f"stopped-{chains}", reads, ranks, steps)
        chains += 1
        while stops:
            run = Run(resumed(config), cache, ranks, **variables)
            # At most as far as to be stopped before the end, and anywhere in a step.
            if not run.reach(run.lines() + chance.randint(1, 6)):
                break
            time.sleep(chance.uniform(0, 0.02))
            number, target = stops[-1]
            if target == "group":
                os.killpg(run.pid, number)
            else:
                os.kill(chance.choice(run.processes).pid or 0, number)
            statuses = run.wait()
            if statuses == {0}:  # it was at its end
                break
            assert statuses == {STATUS}, run.log.read_text()
            assert f"stopped as asked: {run.folder}/checkpoint-" in run.log.read_text()
            stops.pop()
            tally(stops=1)
        if not (run.folder / f"checkpoint-{steps}").exists():
            assert Run(resumed(config), cache, ranks, **variables).wait() == {0}
        same = same_run(tmp_path / "whole", run.folder, steps)
        tally(runs=1, bitwise="yes" if same else "NO")
        assert same


HEARD = """
import atexit, os, signal, sys, time
from theworld.utils.signals import StopRequest
kind, number = sys.argv[1], int(sys.argv[2])
with StopRequest() as stop:
    if kind == "early":
        os.kill(os.getpid(), number)
    with stop.working():
        if kind == "between":
            with stop.working():
                pass
        os.kill(os.getpid(), number)
        assert stop.asked
        if kind == "doubled":
            os.kill(os.getpid(), number)
        if kind == "again":
            time.sleep(2.1)
            os.kill(os.getpid(), number)
    if kind == "ended":
        stop.end()
if kind == "ended":
    atexit.register(os.kill, os.getpid(), number)
    os.kill(os.getpid(), number)
print(stop.reason)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
@pytest.mark.parametrize("kind", ["once", "doubled", "again", "early", "between", "ended"])
def test_what_a_signal_does(kind: str, number: signal.Signals) -> None:
    done = subprocess.run(
        [sys.executable, "-c", HEARD, kind, str(int(number))],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    statuses = {"again": 128 + number, "early": STATUS}
    assert done.returncode == statuses.get(kind, 0)
    assert done.stdout == ("" if kind in statuses else f"{number.name}\n")
    said = {
        "again": f"{number.name} again: ended at once",
        "early": f"{number.name} while no step was under way: there is nothing to save",
    }
    assert said.get(kind, f"{number.name}: saving after this step") in done.stderr


def test_handlers_are_gone_afterwards_and_ctrl_c_is_left_alone() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)]
    with StopRequest():
        assert signal.getsignal(signal.SIGTERM) != before[0]
        assert signal.getsignal(signal.SIGINT) == before[2]
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)] == before


def test_a_process_of_several_stops_when_its_launcher_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    stop = StopRequest()
    assert not stop.asked
    monkeypatch.setattr(os, "getppid", lambda: 1)
    assert stop.asked
    assert stop.reason == "its launcher is gone"
    monkeypatch.setenv("WORLD_SIZE", "1")
    alone = StopRequest()
    monkeypatch.setattr(os, "getppid", lambda: 2)
    assert not alone.asked


def test_an_evaluation_that_was_due_is_made_up_for_once(
    config: Config, cache: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    config = replace(config, max_steps=6, num_epochs=100, eval_steps=2, save_steps=6)
    whole = Trainer(config, cache).run()
    config = replace(config, output_dir=str(tmp_path / "stopped"))
    trainer = Trainer(config, cache)
    step = trainer.train_step

    def asked_at_four(*given: object) -> dict[str, float]:
        if trainer.step == 3:
            trainer.stop.ask("test")
        return step(*given)  # type: ignore[arg-type]

    trainer.train_step = asked_at_four  # type: ignore[method-assign]
    assert trainer.run().name == "checkpoint-4"
    assert trainer.stopped
    assert [line["step"] for line in metrics(tmp_path / "stopped") if "dev_loss" in line] == [2]
    # A run that goes on, evaluates and is killed; and another one: nothing stands twice.
    again = replace(config, resume_from=str(tmp_path / "stopped"))
    killed = Trainer(again, cache)
    killed.train_step = lambda *_: 1 / 0  # type: ignore[method-assign]
    with pytest.raises(ZeroDivisionError):
        killed.run()
    assert [line["step"] for line in metrics(tmp_path / "stopped") if "dev_loss" in line] == [2, 4]
    caplog.clear()
    last = Trainer(again, cache)
    last.run()
    assert "1 lines of metrics.jsonl about steps that are taken again are now in metrics.aside.jsonl" in (
        caplog.text
    )
    assert not last.stopped
    assert same_run(whole.parent, tmp_path / "stopped", 6)


def test_no_thread_reads_on_when_a_run_has_ended(
    config: Config, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A program that ends while HDF5 is at work in another thread may wait for it for ever."""
    trainer, reading = Trainer(config, cache), threading.Event()
    before, real = set(threading.enumerate()), trainer.data.latents.reader.read_row

    def read_row(*arguments: object) -> object:
        if threading.current_thread() is not threading.main_thread():  # in the middle of a row
            reading.set()
            time.sleep(0.3)
        return real(*arguments)  # type: ignore[arg-type]

    def fail(*_: object) -> None:
        assert reading.wait(30)
        raise RuntimeError("unforeseen")

    monkeypatch.setattr(trainer.data.latents.reader, "read_row", read_row)
    trainer.train_step = fail  # type: ignore[method-assign, assignment]
    with pytest.raises(RuntimeError, match="unforeseen"):
        trainer.run()
    assert [thread for thread in threading.enumerate() if thread not in before] == []


def launcher(settings: Path, cache: Path) -> subprocess.Popen[str]:
    """torchrun with two processes that train."""
    arguments = [
        "--standalone",
        "--nproc_per_node=2",
        "tools/train.py",
        "--config",
        str(settings),
        "--cache",
        str(cache),
    ]
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", *arguments],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


@pytest.mark.heavy  # the rows above are its sample
@pytest.mark.torture("training", "torchrun itself is asked to stop, or dies and leaves its processes")
@pytest.mark.parametrize(
    ("number", "target"),
    [
        (signal.SIGTERM, "process"),
        (signal.SIGTERM, "group"),
        (signal.SIGUSR1, "process"),
        (signal.SIGUSR1, "group"),
        (signal.SIGKILL, "process"),
    ],
)
def test_torchrun_is_signalled(
    number: signal.Signals, target: str, config: Config, cache: Path, tmp_path: Path, tally: Tally
) -> None:
    whole = long_run(config, tmp_path / "whole", "cache", 2, 100)
    assert Run(whole, cache, 2).wait() == {0}
    config = long_run(config, tmp_path / "stopped", "cache", 2, 100)
    save_config(config, tmp_path / "stopped.json")
    agent = launcher(tmp_path / "stopped.json", cache)
    lines = tmp_path / "stopped/metrics.jsonl"
    while not lines.exists() or lines.read_bytes().count(b"\n") < 10:
        assert agent.poll() is None
        time.sleep(0.01)
    (os.killpg if target == "group" else os.kill)(agent.pid, number)
    out, _ = agent.communicate(timeout=100)  # to the end of what its processes print
    assert agent.returncode != 0
    assert "stopped as asked" in out, out
    done = Run(resumed(config), cache, 2)
    assert done.wait() == {0}, done.log.read_text()
    same = same_run(tmp_path / "whole", tmp_path / "stopped", 100)
    tally(stops=1, bitwise="yes" if same else "NO")
    assert same


def test_a_closed_terminal_is_a_request_but_not_for_what_nohup_started() -> None:
    before = signal.getsignal(signal.SIGHUP)
    try:
        for handler, asked in ((signal.SIG_DFL, True), (signal.SIG_IGN, False)):
            signal.signal(signal.SIGHUP, handler)
            with StopRequest() as stop, stop.working():
                os.kill(os.getpid(), signal.SIGHUP)
                assert stop.asked is asked
            assert signal.getsignal(signal.SIGHUP) == handler
    finally:
        signal.signal(signal.SIGHUP, before)
