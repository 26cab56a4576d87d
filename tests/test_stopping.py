"""A run that is asked to stop saves and ends, and the resumed one is bitwise the one that was never asked."""

import os
import random
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
from runs import Run, resumed, same_run
from torture import Tally

from theworld.config import Config
from theworld.stopping import STATUS

STEPS = 60
ROW = ("training", "SIGTERM and SIGUSR1 at random steps: saves, ends, resumes bitwise")


@pytest.fixture
def cache(session_cache: Path) -> Path:
    return session_cache


def long_run(config: Config, folder: Path, reads: str, ranks: int) -> Config:
    """A run of STEPS steps with everything in it; `reads`: the cache alone, or photographs too, which threads read."""
    changes: dict[str, object] = {"align_steps": 3} if reads == "cache" else {"freeze_gemma_vision": False}
    return replace(
        config,
        max_steps=STEPS - (3 if reads == "cache" else 0),
        num_epochs=100,
        statement_loss_weight=0.3,
        gradient_accumulation_steps=2 // ranks,
        save_steps=7,
        eval_steps=5,
        save_total_limit=2,
        num_workers=0 if reads == "cache" else 2,
        output_dir=str(folder),
        **changes,
    )


@pytest.mark.torture(*ROW)
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("reads", ["cache", "photographs"])
def test_stopped_at_random_steps(
    reads: str, ranks: int, config: Config, cache: Path, tmp_path: Path, tally: Tally
) -> None:
    whole = long_run(config, tmp_path / "whole", reads, ranks)
    assert Run(whole, cache, ranks).wait() == {0}
    chance = random.Random(ranks)
    kinds = [
        (number, target) for number in (signal.SIGTERM, signal.SIGUSR1) for target in ("process", "group")
    ]
    stops = kinds * tally.number(20, sample=1)
    chance.shuffle(stops)
    chains = 0
    while stops:
        config = long_run(config, tmp_path / f"stopped-{chains}", reads, ranks)
        chains += 1
        while stops:
            run = Run(resumed(config), cache, ranks)
            # At most as far as to be stopped before the end, and anywhere in a step.
            if not run.reach(run.lines() + chance.randint(1, 8)):
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
        if not (run.folder / f"checkpoint-{STEPS}").exists():
            assert Run(resumed(config), cache, ranks).wait() == {0}
        same = same_run(tmp_path / "whole", run.folder, STEPS)
        tally(runs=1, bitwise="yes" if same else "NO")
        assert same
