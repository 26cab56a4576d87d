"""Checkpoints are there whole or not at all, whatever happens, and one that is not as it was saved is refused."""

import errno
import gc
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from constants import ROOT
from jobs import flip
from runs import Run, metrics, resumed, same_run, same_state
from torture import Tally

from theworld.config.config import Config
from theworld.evaluation.score import held_out
from theworld.models.serialization import (
    CheckpointError,
    SavedModel,
    fingerprint_of,
    list_checkpoints,
    numbered,
)
from theworld.models.theworld import TheWorld
from theworld.training import checkpoint as resume
from theworld.training.checkpoint import clean_up, latest_valid_checkpoint, read_checkpoint
from theworld.training.trainer import Trainer

FILES = [
    "checkpoint.json",
    "config.json",
    "projection.safetensors",
    "trainer.json",
    "trainer.pt",
    "world.json",
]


@pytest.fixture
def cache(session_cache: Path) -> Path:
    return session_cache


@pytest.fixture
def saved(config: Config, cache: Path) -> Path:
    """The last checkpoint of a run of four steps."""
    return Trainer(config, cache).run()


def often(config: Config, folder: Path, steps: int, keep: int) -> Config:
    """A run that saves after every step."""
    changes = {"max_steps": steps, "num_epochs": 1000, "save_steps": 1, "save_total_limit": keep}
    return replace(config, output_dir=str(folder), eval_steps=5, **changes)  # type: ignore[arg-type]


# ---- kills


def slow_disk() -> None:
    """Each sync takes a moment, as on a real disk, so that most of a run's time is spent in saving."""
    real = os.fsync

    def fsync(handle: int) -> None:
        time.sleep(0.003)
        real(handle)

    os.fsync = fsync  # type: ignore[assignment]


@pytest.mark.torture(
    "training", "SIGKILL while a checkpoint is written, and damage: the newest valid one is found"
)
def test_killed_while_writing(config: Config, cache: Path, tmp_path: Path, tally: Tally) -> None:
    steps, kills, chance, chains = tally.number(40, sample=12), 0, random.Random(0), 0
    assert Run(often(config, tmp_path / "whole", steps, 3), cache).wait() == {0}
    while kills < tally.number(50, sample=4):
        config = often(config, tmp_path / f"killed-{chains}", steps, 3)
        chains += 1
        while True:
            run = Run(resumed(config), cache, prepare=slow_disk)
            if not run.reach(run.lines() + chance.randint(2, 4)):
                break
            mine = f".checkpoint-*.{run.pid}.tmp"
            while not list(run.folder.glob(mine)) and run.processes[0].is_alive():
                pass
            time.sleep(chance.uniform(0, 0.02))
            os.kill(run.pid, signal.SIGKILL)
            if run.wait() == {0}:
                break
            during = len(list(run.folder.glob(mine)))
            kills += during
            found, there = latest_valid_checkpoint(run.folder), numbered(run.folder)
            assert (found.path, found.skipped) == (there[-1], {})
            tally(kills=during, without_a_valid_one=0)
            if len(there) > 1 and chance.random() < 0.3:
                name = chance.choice(FILES)
                flip(
                    there[-1] / name, chance.randrange((there[-1] / name).stat().st_size), chance.randrange(8)
                )
                found = latest_valid_checkpoint(run.folder)
                assert found.path == there[-2]
                assert list(found.skipped) == [there[-1]]
                assert str(there[-1]) in found.skipped[there[-1]]
                tally(damaged_and_named=1)
        log = run.log.read_text()
        assert log.count("skipped: ") == log.count(f" is now {run.folder}/damaged-checkpoint-")
        assert same_run(tmp_path / "whole", run.folder, steps)
        tally(resumed_to_the_same_bits="yes")


def kill_at(number: int) -> None:
    """The process kills itself at its `number`-th call that syncs or changes a folder."""
    count = iter(range(10_000))

    def counted(real: Any, *arguments: Any, **options: Any) -> Any:
        if next(count) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*arguments, **options)

    for module, name in ((os, "fsync"), (os, "rename"), (os, "unlink"), (os, "rmdir"), (os, "mkdir")):
        setattr(module, name, partial(counted, getattr(module, name)))


@pytest.mark.torture(
    "training", "SIGKILL at each change of a folder, one checkpoint kept: one is always valid"
)
def test_killed_at_each_call_with_one_checkpoint_kept(
    config: Config, cache: Path, tmp_path: Path, tally: Tally
) -> None:
    config = often(config, tmp_path / "whole", 4, 1)
    assert Run(config, cache).wait() == {0}
    numbers = list(range(60)) if tally.full else random.Random(1).sample(range(60), 4)
    for number in numbers:
        folder = tmp_path / str(number)
        config = often(config, folder, 4, 1)
        run = Run(config, cache, prepare=partial(kill_at, number))
        statuses = run.wait()
        assert statuses <= {-signal.SIGKILL, 0}
        if run.lines() > 1:  # the second step is taken when the first is saved
            assert latest_valid_checkpoint(folder).path == numbered(folder)[-1]
        tally(kills=int(statuses != {0}), without_a_valid_one=0)
        if statuses != {0}:
            assert Run(resumed(config), cache).wait() == {0}
        assert [path.name for path in list_checkpoints(folder)] == ["checkpoint-4"]
        assert same_run(tmp_path / "whole", folder, 4)


def test_lines_of_steps_that_are_taken_again_are_moved_aside(
    config: Config, cache: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = replace(config, max_steps=5, num_epochs=100, save_steps=2)
    trainer = Trainer(config, cache)
    trainer.run()
    folder = trainer.output_dir
    shutil.copytree(folder, tmp_path / "whole")
    shutil.rmtree(folder / "checkpoint-5")
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 6, "lo')  # killed in the middle of a line
    Trainer(replace(config, resume_from=str(folder)), cache).run()
    # The line of step 5, that of dev after it, and the torn one.
    assert "3 lines of metrics.jsonl about steps that are taken again are now in" in caplog.text
    aside = (folder / "metrics.aside.jsonl").read_text().splitlines()
    assert [line[:10] for line in aside] == ['{"step": 5', '{"step": 5', '{"step": 6']
    assert metrics(folder) == metrics(tmp_path / "whole")


def test_what_killed_saves_leave_is_deleted_only_if_it_is_surely_ours_and_old(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "theworld")
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    here, day = socket.gethostname(), 25 * 3600
    ages = {
        f".checkpoint-1.{here}.{gone.pid}.tmp": 61,  # of a process here that is gone
        f".checkpoint-2.{here}.{gone.pid}.tmp": 0,  # the same, a moment ago
        f".checkpoint-3.{here}.{os.getpid()}.tmp": 3600,  # of one that lives
        f".checkpoint-4.elsewhere.{gone.pid}.tmp": 3600,
        f".checkpoint-5.elsewhere.{gone.pid}.tmp": day,
        ".checkpoint-x.tmp": day,  # not a name of ours
    }
    for name, age in ages.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "trainer.pt").write_bytes(b"")
        for path in (tmp_path / name / "trainer.pt", tmp_path / name):
            os.utime(path, (time.time() - age,) * 2)
    clean_up(tmp_path)
    lines = [message for _, _, message in caplog.record_tuples]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*ages][1:4] + [*ages][5:])
    assert [line.split()[0] == "deleted" for line in lines] == [True, False, False, False, True]


# ---- damage


@pytest.mark.torture("training", "a flipped bit or a cut in any file of a checkpoint is refused")
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_refused(name: str, saved: Path, tally: Tally) -> None:
    chance, content = random.Random(0), (saved / name).read_bytes()
    other = "" if name == "checkpoint.json" else name
    for _ in range(tally.number(200, sample=10)):
        flip(saved / name, chance.randrange(len(content)), chance.randrange(8))
        with pytest.raises(CheckpointError, match=f"{saved}.*{other}"):
            read_checkpoint(saved)
        (saved / name).write_bytes(content[: chance.randrange(len(content))])
        with pytest.raises(CheckpointError, match=f"{saved}.*{other}"):
            read_checkpoint(saved)
        tally(refused=2, passed_over=0)
        (saved / name).write_bytes(content)
    (saved / name).unlink()
    with pytest.raises(CheckpointError, match=f"{name} is missing"):
        read_checkpoint(saved)


class Gift:
    """What a pickle runs when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def forge(checkpoint: Path, state: Any) -> None:
    """Another trainer.pt, with the hash that it has."""
    torch.save(state, checkpoint / "trainer.pt")
    index = json.loads((checkpoint / "checkpoint.json").read_text())
    index["files"]["trainer.pt"] = fingerprint_of(checkpoint / "trainer.pt")
    (checkpoint / "checkpoint.json").write_text(json.dumps(index) + "\n")


@pytest.mark.torture("training", "an optimizer state that does not fit is refused, under a right hash too")
@pytest.mark.parametrize("kind", ["code", "shape", "value", "parameter", "groups", "moment", "no optimizer"])
def test_a_state_that_does_not_fit_is_refused(
    kind: str, saved: Path, config: Config, cache: Path, tmp_path: Path, tally: Tally
) -> None:
    state = torch.load(saved / "trainer.pt", weights_only=True)
    first = state["optimizer"]["state"][0]
    if kind == "code":
        state["gift"] = Gift(tmp_path / "ran")
    elif kind == "shape":
        first["exp_avg"] = first["exp_avg"][:1]
    elif kind == "value":
        first["exp_avg_sq"][0] = float("nan")
    elif kind == "parameter":
        state["optimizer"]["state"][99] = first
    elif kind == "groups":
        state["optimizer"]["param_groups"][0]["params"].append(99)
    elif kind == "moment":
        del first["exp_avg"]
    else:
        del state["optimizer"]
    forge(saved, state)
    with pytest.raises(CheckpointError, match=str(saved)):
        Trainer(replace(config, resume_from=str(saved)), cache)
    assert not (tmp_path / "ran").exists()
    tally(refused=1)


def test_each_file_is_read_and_hashed_once_in_a_resume(
    saved: Path, config: Config, cache: Path, opened: Callable[[Path], dict[str, int]]
) -> None:
    Trainer(replace(config, resume_from=str(saved.parent)), cache)
    # trainer.pt is hashed, then mapped. The library that loads the weights opens their file by itself.
    assert opened(saved) == dict.fromkeys(FILES, 1) | {"trainer.pt": 2}


def test_a_resumed_run_keeps_nothing_of_the_saved_state(saved: Path, config: Config, cache: Path) -> None:
    trainer = Trainer(replace(config, resume_from=str(saved)), cache)
    assert trainer.plan.resumed is not None
    assert trainer.plan.resumed.optimizer is None
    gc.collect()
    assert str(saved / "trainer.pt") not in Path("/proc/self/maps").read_text()  # it was mapped
    assert trainer.optimizer.state_dict()["state"][0]["step"] == 4


def as_version_1(checkpoint: Path) -> None:
    """Make a checkpoint as version 1 has it: with a random state, and the same files otherwise."""
    state = torch.load(checkpoint / "trainer.pt", weights_only=True)
    torch.save(state | {"rng": torch.get_rng_state()}, checkpoint / "trainer.pt")
    index = json.loads((checkpoint / "checkpoint.json").read_text()) | {"format": 1}
    index["files"]["trainer.pt"] = fingerprint_of(checkpoint / "trainer.pt")
    (checkpoint / "checkpoint.json").write_text(json.dumps(index, indent=2) + "\n")


def test_a_checkpoint_of_version_1_is_resumed_to_the_same_bits(
    saved: Path, config: Config, cache: Path, tmp_path: Path
) -> None:
    halfway = saved.with_name("checkpoint-2")
    as_version_1(halfway)
    again = Trainer(
        replace(config, resume_from=str(halfway), output_dir=str(tmp_path / "again")), cache
    ).run()
    for name in ("projection.safetensors", "world.json"):
        assert (again / name).read_bytes() == (saved / name).read_bytes()
    states = [torch.load(path / "trainer.pt", weights_only=True) for path in (again, saved)]
    assert same_state(*states)
    assert states[0].keys() == {"optimizer"}


def test_init_from_is_recorded_as_the_checkpoint_that_it_meant_at_the_start(
    saved: Path, config: Config, cache: Path, tmp_path: Path
) -> None:
    run = saved.parent
    stage = replace(config, init_from=str(run), output_dir=str(tmp_path / "second"))
    second = Trainer(stage, cache).run()
    assert SavedModel.read(second).config().init_from == str(saved)
    shutil.copytree(saved, run / "checkpoint-9")  # the first stage has gone on
    data = held_out({"": SavedModel.open_folder(second)}, "test", {})
    assert data.trained_on[""].count("before that on") == 1
    longer = replace(stage, max_steps=5, num_epochs=100, resume_from=stage.output_dir)
    for given in (str(run), str(saved), None):
        again = Trainer(replace(longer, init_from=given), cache, allow_changed=True)
        assert again.config.init_from == str(saved)
    with pytest.raises(
        CheckpointError,
        match=rf"init_from is {run}/checkpoint-9, but the run of .* started from {saved}; leave",
    ):
        Trainer(replace(longer, init_from=str(run / "checkpoint-9")), cache)


def test_a_step_that_is_not_that_of_the_figures_is_refused(saved: Path) -> None:
    index = json.loads((saved / "checkpoint.json").read_text())
    (saved / "checkpoint.json").write_text(json.dumps(index | {"step": 5}) + "\n")
    with pytest.raises(CheckpointError, match=r"checkpoint\.json says step 5, trainer\.json 4"):
        read_checkpoint(saved)


def test_damaged_weights_are_refused_wherever_a_model_is_loaded(saved: Path) -> None:
    flip(saved / "projection.safetensors")
    with pytest.raises(CheckpointError, match=r"projection\.safetensors is damaged: \d+ bytes with SHA-256"):
        TheWorld.from_pretrained(saved)


def test_of_a_run_the_newest_valid_checkpoint_is_loaded(
    saved: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert SavedModel.open(saved.parent).folder == saved
    flip(saved / "projection.safetensors")
    assert SavedModel.open(saved.parent).folder == saved.with_name("checkpoint-2")
    assert f"skipped: {saved}/projection.safetensors is damaged" in caplog.text
    half = TheWorld.from_pretrained(saved.parent)
    assert torch.equal(
        half.projection.brackets,
        TheWorld.from_pretrained(saved.with_name("checkpoint-2")).projection.brackets,
    )
    with pytest.raises(CheckpointError, match=r"checkpoint-4/projection\.safetensors is damaged"):
        SavedModel.open(saved)  # named, so no other is taken
    flip(saved.with_name("checkpoint-2") / "world.json")
    with pytest.raises(CheckpointError, match=f"^{saved.parent}: no valid checkpoint in it"):
        SavedModel.open(saved.parent)


def test_a_run_skips_damaged_checkpoints_by_name_and_sets_them_aside(
    saved: Path,
    config: Config,
    cache: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    run = saved.parent
    flip(saved / "trainer.pt")
    # named, so no other is taken
    with pytest.raises(CheckpointError, match=r"checkpoint-4/trainer\.pt is damaged"):
        Trainer(replace(config, resume_from=str(saved)), cache)
    content = {path.name: path.read_bytes() for path in saved.iterdir()}
    caplog.set_level("INFO")
    again = Trainer(replace(config, resume_from=str(run)), cache)
    assert saved.is_dir()  # until it runs
    assert again.run().name == "checkpoint-4"
    out = caplog.text
    assert f"skipped: {saved}/trainer.pt is damaged: " in out
    assert f"resumed after step 2, from {run}/checkpoint-2" in out
    assert f"checkpoint-4 is now {run}/damaged-checkpoint-4" in out
    assert {p.name: p.read_bytes() for p in (run / "damaged-checkpoint-4").iterdir()} == content
    for path in list_checkpoints(run):
        flip(path / "projection.safetensors")
    with pytest.raises(CheckpointError, match=r"no valid checkpoint in it:\n  .*-4/.*\n  .*-2/"):
        Trainer(replace(config, resume_from=str(run)), cache)


# ---- disks


def failing(real: Any, number: int, code: int) -> Any:
    """A function whose `number`-th call, from 0, fails."""
    count = iter(range(10_000))

    def faulty(*arguments: Any, **options: Any) -> Any:
        if next(count) == number:
            raise OSError(code, os.strerror(code), str(arguments[0]))
        return real(*arguments, **options)

    return faulty


def error_of(trainer: Trainer) -> OSError | None:
    """What a save ends with."""
    try:
        trainer.save()
    except OSError as error:
        return error
    return None


@pytest.mark.torture("training", "a save that fails (no space, errors) names path and bytes; older ones stay")
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize("call", ["fsync", "rename", "mkdir"])
def test_a_save_that_fails_leaves_what_was_saved(
    call: str, code: int, config: Config, cache: Path, monkeypatch: pytest.MonkeyPatch, tally: Tally
) -> None:
    config = replace(config, save_total_limit=1)
    trainer = Trainer(config, cache)
    trainer.train_step()
    before = {path: path.read_bytes() for path in trainer.save().iterdir()}
    trainer.train_step()
    for number in range(100):  # the first call of its kind fails, then the second, as often as there are any
        with monkeypatch.context() as patch:
            patch.setattr(os, call, failing(getattr(os, call), number, code))
            error = error_of(trainer)
        if (trainer.output_dir / "checkpoint-2").exists():  # complete: what failed, if anything, came after
            break
        assert error is not None
        assert error.errno == code
        assert f"checkpoint-1 is as it was: '{trainer.output_dir}/checkpoint-2'" in str(error)
        assert "bytes needed, " in str(error)
        assert {path: path.read_bytes() for path in before} == before
        assert [path.name for path in trainer.output_dir.iterdir() if path.is_dir()] == ["checkpoint-1"]
        tally(faults=1, lost=0)
    assert latest_valid_checkpoint(trainer.output_dir).progress["step"] == 2
    assert latest_valid_checkpoint(trainer.output_dir).skipped == {}


PROGRAM = """
import gc; gc.disable()  # most of its time goes into imports
import contextlib, subprocess, sys
from pathlib import Path
import torch
from theworld.config.config import load_config
from theworld.training.trainer import Trainer
settings, cache, disk = sys.argv[1:]
torch.set_num_threads(1)
disk = Path(disk)
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=20m", "none", str(disk)], check=True)
trainer = Trainer(load_config(settings), cache)
trainer.train_step()
subprocess.run(["mount", "-o", "remount,size=20k", "none", str(disk)], check=True)
full, size = 0, 20
while True:
    try:
        trainer.save()
        break
    except OSError as error:
        text = str(error)
        assert "No space left" in text or "bytes needed" in text, text
        assert "bytes needed" in text and "this checkpoint was not written" in text and "checkpoint-1" in text, text
        assert [path.name for path in disk.iterdir()] == [".lock"], list(disk.iterdir())
        full, size = full + 1, size + 8
        subprocess.run(["mount", "-o", f"remount,size={size}k", "none", str(disk)], check=True)
from theworld.training.checkpoint import latest_valid_checkpoint
assert latest_valid_checkpoint(disk).progress["step"] == 1
print(full)
"""


@pytest.mark.torture("training", "a disk that is really full, somewhat later each time")
def test_a_full_disk(config: Config, cache: Path, tmp_path: Path, tally: Tally) -> None:
    mount = ["unshare", "--user", "--map-root-user", "--mount"]
    if shutil.which("unshare") is None or subprocess.run([*mount, "true"], capture_output=True).returncode:
        pytest.skip("no mounts in a namespace of one's own here")
    from theworld.config.config import save_config

    disk = tmp_path / "disk"
    disk.mkdir()
    save_config(replace(config, output_dir=str(disk)), tmp_path / "settings.json")
    done = subprocess.run(
        [*mount, sys.executable, "-c", PROGRAM, str(tmp_path / "settings.json"), str(cache), str(disk)],
        env=os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    full = int(done.stdout.splitlines()[-1])
    assert full > 5
    tally(full_disks=full)


def test_rotation_leaves_no_half_of_a_checkpoint_under_its_name(
    config: Config, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = Trainer(replace(config, save_total_limit=1), cache)
    trainer.train_step()
    trainer.save()
    trainer.train_step()

    def stopped(path: Path) -> None:
        assert (trainer.output_dir / "checkpoint-2").is_dir()  # the new one is complete
        raise KeyboardInterrupt

    real = shutil.rmtree
    monkeypatch.setattr(
        shutil, "rmtree", lambda path, **given: real(path, **given) if given else stopped(path)
    )
    with pytest.raises(KeyboardInterrupt):
        trainer.save()
    assert [path.name for path in numbered(trainer.output_dir)] == ["checkpoint-2"]
    assert resume.latest_valid_checkpoint(trainer.output_dir).progress["step"] == 2
