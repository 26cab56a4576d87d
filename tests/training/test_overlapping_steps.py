"""On a GPU a step is launched while the one before is computed; here with the optimizer of a GPU, on a CPU."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import metrics, same_run

import theworld.training.trainer as module
from theworld.config.config import Config
from theworld.training.memory import NotFinite
from theworld.training.trainer import LaunchedStep, Trainer


@pytest.fixture(autouse=True)
def fused_optimizer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the optimizer decide by itself whether a step is finite, as on a GPU."""
    made = module.make_optimizer

    def fused(*arguments: Any) -> torch.optim.AdamW:
        own = made(*arguments)
        return torch.optim.AdamW([group | {"fused": True} for group in own.param_groups], fused=True)

    monkeypatch.setattr(module, "make_optimizer", fused)


def overlapping(config: Config, cache: Path, log: list[str] | None = None) -> Trainer:
    """A trainer that launches ahead, and writes into `log` which step it launches and finishes."""
    trainer = Trainer(config, cache)
    trainer.fused = True
    launch, finish = trainer._launch, trainer._finish

    def launching(microbatches: Any, step: int) -> LaunchedStep:
        if log is not None:
            log.append(f"launch {step + 1}")
        return launch(microbatches, step)

    def finishing(launched: LaunchedStep, followed: bool = False) -> dict[str, float]:
        if log is not None:
            log.append(f"finish {launched.step + 1}")
        return finish(launched, followed)

    trainer._launch, trainer._finish = launching, finishing  # type: ignore[method-assign]
    return trainer


def test_a_run_is_that_of_steps_one_by_one(config: Config, session_cache: Path, tmp_path: Path) -> None:
    config = replace(config, max_steps=9, num_epochs=100, eval_steps=4, save_steps=6, logging_steps=1)
    config = replace(config, align_steps=2)
    log: list[str] = []
    runs = []
    for name in ("overlapping", "one by one"):
        own = replace(config, output_dir=str(tmp_path / name))
        trainer = overlapping(own, session_cache, log if name == "overlapping" else None)
        if name == "one by one":
            trainer.steps = lambda coming, own=trainer: (own.train_step(one) for one in coming)  # type: ignore[assignment, misc]
        runs.append(trainer.run().parent)
    assert same_run(*runs, 11)
    assert [line["step"] for line in metrics(runs[0]) if "loss" in line] == list(range(1, 12))
    # An evaluation follows steps 4 and 8, a checkpoint step 6, both step 11, the last.
    pauses, expected = (4, 6, 8, 11), ["launch 1"]
    for step in range(1, 12):
        ahead = [] if step in pauses else [f"launch {step + 1}"]
        behind = [f"launch {step + 1}"] if step in pauses[:-1] else []
        expected += [*ahead, f"finish {step}", *behind]
    assert log == expected


def test_a_stop_waits_for_the_step_under_way(config: Config, session_cache: Path, tmp_path: Path) -> None:
    config = replace(config, max_steps=9, num_epochs=100, eval_steps=100, save_steps=100)
    whole = overlapping(config, session_cache).run()
    config = replace(config, output_dir=str(tmp_path / "stopped"))
    trainer = overlapping(config, session_cache)
    launch = trainer._launch

    def asked_at_three(microbatches: Any, step: int) -> LaunchedStep:
        if step == 2:
            trainer.stop.ask("test")
        return launch(microbatches, step)

    trainer._launch = asked_at_three  # type: ignore[method-assign]
    assert trainer.run().name == "checkpoint-4"  # the third told of it when the fourth was launched
    again = overlapping(replace(config, resume_from=str(tmp_path / "stopped")), session_cache)
    again.run()
    assert same_run(whole.parent, tmp_path / "stopped", 9)


def test_after_a_step_that_is_not_finite_nothing_is_updated(config: Config, session_cache: Path) -> None:
    config = replace(config, max_steps=9, num_epochs=100, eval_steps=100, save_steps=100)
    trainer = overlapping(config, session_cache)
    first = next(iter(trainer.model.trainable().values()))
    steps = trainer.steps(trainer.microbatches(step) for step in range(9))
    next(steps)
    next(steps)  # the third is launched
    before = {name: p.detach().clone() for name, p in trainer.model.trainable().items()}
    hook = first.register_hook(lambda gradient: gradient * float("inf"))
    next(steps)
    hook.remove()
    with pytest.raises(NotFinite, match=r"step 4: the gradient norm is (nan|inf)"):
        next(steps)  # launches the fifth, which is finite
    assert trainer.step == 3
    assert all(torch.equal(p, before[name]) for name, p in trainer.model.trainable().items())
    trainer.train_step()
    assert not torch.equal(first, before[next(iter(before))])
