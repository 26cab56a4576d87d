"""Several processes do what one does: the same steps, losses and weights, one set of files."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from commands import launch, really_launch
from runs import metrics
from safetensors.torch import load_file
from torch import Tensor

from theworld.config.config import Config
from theworld.training.trainer import Trainer
from theworld.utils.distributed import Processes


def test_alone_a_process_is_the_main_one_and_adds_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    alone = Processes("cpu")
    assert (alone.rank, alone.count, alone.is_main_process, alone.device.type) == (0, 1, True, "cpu")
    values = [torch.ones(2, 3), torch.zeros(1)]
    assert all(torch.equal(a, b) for a, b in zip(alone.sum(values), values, strict=True))
    alone.barrier()


def test_sums_go_in_messages_of_bounded_size(monkeypatch: pytest.MonkeyPatch) -> None:
    processes = Processes("cpu")
    processes.count = 2
    sent: list[Tensor] = []
    monkeypatch.setattr("theworld.utils.distributed.MESSAGE", 6)
    monkeypatch.setattr("accelerate.utils.reduce", lambda flat, how: sent.append(flat) or 2 * flat)
    values = [torch.full((n,), float(n)) for n in (2, 4, 1, 9, 3)]
    assert [t.tolist() for t in processes.sum(values)] == [(2 * v).tolist() for v in values]
    assert [len(message) for message in sent] == [6, 1, 9, 3]


def test_two_processes_train_and_evaluate_as_one(config: Config, cache: Path, tmp_path: Path) -> None:
    config = replace(config, align_steps=2, statement_loss_weight=0.3, max_steps=4, log_to_tensorboard=True)
    one = Trainer(config, cache).run()
    shared = replace(config, gradient_accumulation_steps=1, output_dir=str(tmp_path / "two"))
    done = really_launch(shared, cache, tmp_path / "two.json")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("trains: projection") == 1
    assert done.stdout.count("done: ") == 1
    assert "6 optimizer steps of 2 x 1 x 2 (processes) statements" in done.stdout
    found, wanted = metrics(tmp_path / "two"), metrics(one.parent)
    assert [line["step"] for line in found] == [line["step"] for line in wanted]
    assert "dev_statement_loss" in wanted[-1]
    for a, b in zip(found, wanted, strict=True):
        assert a.pop("phase") == b.pop("phase")
        assert a == pytest.approx(b, abs=1e-5, rel=1e-5)
    names = sorted(p.name for p in (tmp_path / "two").iterdir())
    assert names == sorted(p.name for p in one.parent.iterdir())
    two = load_file(tmp_path / "two" / one.name / "projection.safetensors")
    for name, weight in load_file(one / "projection.safetensors").items():
        torch.testing.assert_close(two[name], weight, atol=1e-5, rtol=1e-4)

    # The same checkpoint goes on in another number of processes as long as a step stays the same.
    halfway = str(tmp_path / "two" / "checkpoint-4")
    resumed = replace(config, resume_from=halfway, output_dir=str(tmp_path / "again"))
    again = load_file(Trainer(resumed, cache).run() / "projection.safetensors")
    for name, weight in two.items():
        torch.testing.assert_close(again[name], weight, atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match="was trained with 4 statements a step, now there are 2"):
        Trainer(replace(resumed, gradient_accumulation_steps=1, output_dir=str(tmp_path / "other")), cache)


def test_a_loss_that_is_not_finite_stops_all_of_them(config: Config, cache: Path, tmp_path: Path) -> None:
    config = replace(config, gradient_accumulation_steps=1, learning_rate=1e30, max_grad_norm=1e30)
    done = launch(config, cache, tmp_path / "run.json")
    assert done.returncode != 0
    assert done.stderr.count("Lower --learning_rate, or resume") == 2, done.stderr
