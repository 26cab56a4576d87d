"""A step whose numbers are not finite updates nothing on any process; one that does not fit says what would."""

import itertools
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import Run
from torture import Tally

from theworld.config.config import Config
from theworld.extraction.batches import Microbatch
from theworld.extraction.features import CachedFeatures
from theworld.models.packing import Batch
from theworld.models.serialization import list_checkpoints
from theworld.models.theworld import TheWorld
from theworld.training.memory import (
    Memory,
    NotFinite,
    OutOfMemory,
    Plan,
    is_out_of_memory,
    named,
    settings_that_fit,
)
from theworld.training.trainer import Trainer

FSDP = {"ACCELERATE_USE_FSDP": "true"}


@pytest.fixture
def cache(session_cache: Path) -> Path:
    return session_cache


# ---- numbers


def spoil(where: str, value: float) -> None:
    """In the third step of this process something becomes `value`: a loss, a gradient, or what is read of b.png."""
    steps, seen = iter(range(1000)), {"step": 0}
    train_step = Trainer.train_step

    def counted(trainer: Trainer, microbatches: list[Microbatch] | None = None) -> dict[str, float]:
        seen["step"] = next(steps) + 1
        return train_step(trainer, microbatches)

    Trainer.train_step = counted  # type: ignore[method-assign]
    if where in ("latents", "vision"):
        call = CachedFeatures.__call__

        def rows(self: CachedFeatures, images: list[str]) -> torch.Tensor:
            found = call(self, images)
            if (self.array.name == "latents") == (where == "latents"):
                found[[image == "b.png" for image in images], ..., 0] = value
            return found

        CachedFeatures.__call__ = rows  # type: ignore[method-assign]
    elif where == "loss":
        losses = TheWorld.losses

        def spoiled(self: TheWorld, *arguments: Any, **options: Any) -> dict[str, torch.Tensor]:
            found = losses(self, *arguments, **options)
            return found | {"total": found["total"] * value} if seen["step"] == 3 else found

        TheWorld.losses = spoiled  # type: ignore[method-assign]
    else:
        losses = TheWorld.losses

        def hooked(self: TheWorld, *arguments: Any, **options: Any) -> dict[str, torch.Tensor]:
            if seen["step"] == 3:
                next(iter(self.projection.parameters())).register_hook(lambda gradient: gradient * value)
            return losses(self, *arguments, **options)

        TheWorld.losses = hooked  # type: ignore[method-assign]


def cases() -> list[Any]:
    """Every place, value and kind of run; of those in several processes one is in the fast set."""
    places, values = ["loss", "gradient", "latents", "vision"], [float("nan"), float("inf")]
    every = itertools.product(places, values, ["alone", "two processes", "sharded"])
    fast = {("latents", float("inf"), kind) for kind in ("two processes", "sharded")}
    return [
        pytest.param(*one, marks=[] if one[2] == "alone" or one in fast else pytest.mark.heavy)
        for one in every
    ]


@pytest.mark.torture(
    "training", "NaN or infinity in a loss, gradient or latent: no update on any process, and named"
)
@pytest.mark.parametrize(("where", "value", "kind"), cases())
def test_what_is_not_finite_stops_all_processes_before_an_update(
    where: str, value: float, kind: str, config: Config, cache: Path, tmp_path: Path, tally: Tally
) -> None:
    ranks = 1 if kind == "alone" else 2
    config = replace(
        config, gradient_accumulation_steps=2 // ranks, save_steps=1, max_steps=8, num_epochs=100
    )
    if kind == "sharded":
        config = replace(config, freeze_gemma_language=False)
    run = Run(
        config, cache, ranks, prepare=partial(spoil, where, value), **(FSDP if kind == "sharded" else {})
    )
    assert run.wait() == {1}, run.log.read_text()
    log = run.log.read_text()
    said = re.findall(
        r"step (\d+): the (loss|gradient norm) is (nan|inf) \(learning rate [\d.e-]+; images ([abc]\.png(?:, )?)+"
        r"; gradient norm (?:nan|inf|[\d.e+-]+)(; (latents|vision features) of b\.png are not finite)?\); nothing was "
        r"updated",
        log,
    )
    assert len(said) == ranks, log
    steps = {int(found[0]) for found in said}
    assert len(steps) == 1
    stopped = steps.pop()
    assert stopped == 3 or where in ("latents", "vision")
    if where in ("latents", "vision"):
        assert {found[5] for found in said} >= {"latents" if where == "latents" else "vision features"}
    # All checkpoints before it are there, none of it, and metrics.jsonl has no line of it.
    assert [path.name for path in list_checkpoints(run.folder)][-1:] == [f"checkpoint-{stopped - 1}"][
        : stopped - 1
    ]
    if run.lines():
        lines = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
        assert max(line["step"] for line in lines) == stopped - 1
        assert "NaN" not in (run.folder / "metrics.jsonl").read_text()
    tally(runs=1, updates=0)


def test_nothing_is_updated_by_a_bit(config: Config, cache: Path) -> None:
    trainer = Trainer(config, cache)
    trainer.train_step()
    before = {name: p.detach().clone() for name, p in trainer.model.trainable().items()}
    moments = [state["exp_avg"].clone() for state in trainer.optimizer.state.values()]
    first = next(iter(trainer.model.trainable().values()))
    first.register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(NotFinite, match=r"step 2: the gradient norm is (nan|inf)"):
        trainer.train_step()
    assert all(torch.equal(p, before[name]) for name, p in trainer.model.trainable().items())
    found = [state["exp_avg"] for state in trainer.optimizer.state.values()]
    assert all(torch.equal(a, b) for a, b in zip(found, moments, strict=True))


def test_answers_on_dev_that_are_not_finite_stop_the_run(
    config: Config, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = Trainer(config, cache)
    answers = torch.full((1, 2), float("nan")).numpy()
    monkeypatch.setattr("theworld.training.trainer.predict", lambda *_, **__: {"world": answers})
    with pytest.raises(NotFinite, match=r"step 0: answers on dev are not finite \(images a\.png\)"):
        trainer.evaluate_dev()


def test_the_first_few_images_are_named() -> None:
    names = [f"{n}.png" for n in range(10)]
    assert named(names) == "0.png, 1.png, 2.png, 3.png, 4.png, 5.png, 6.png, 7.png and 2 more"
    assert named(names[:2]) == "0.png, 1.png"


# ---- memory


@contextmanager
def small_memory(tokens: int, checkpointed: int) -> Iterator[None]:
    """A machine where passes of more tokens do not fit, with gradient checkpointing of more than `checkpointed`."""
    losses = TheWorld.losses

    def limited(self: TheWorld, batch: Batch, *arguments: Any, **options: Any) -> dict[str, torch.Tensor]:
        limit = checkpointed if self.config.use_gradient_checkpointing else tokens
        if batch.token_ids.numel() > limit:
            torch.empty(2**56, dtype=torch.uint8)  # what really says so
        return losses(self, batch, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TheWorld, "losses", limited)
        yield


def largest_pass(config: Config, cache: Path) -> int:
    """Tokens of the largest pass of all steps."""
    trainer = Trainer(replace(config, output_dir=config.output_dir + "-asked"), cache)
    passes = [one for step in range(trainer.num_steps) for one in trainer.microbatches(step)]
    return max(one.batch.token_ids.numel() for one in passes if one.batch is not None)


@pytest.mark.torture("training", "out of memory: the pass is named, and what is proposed runs through")
def test_what_is_proposed_when_memory_runs_out_then_fits(config: Config, cache: Path, tally: Tally) -> None:
    config = replace(config, batch_size=4, gradient_accumulation_steps=1, save_steps=1)
    half = largest_pass(replace(config, batch_size=2, gradient_accumulation_steps=2), cache)
    assert half < largest_pass(config, cache)
    with small_memory(half, 10**6):
        with pytest.raises(OutOfMemory) as caught:
            Trainer(config, cache).run()
        said = re.fullmatch(
            r"step (\d+): out of memory in a micro-batch of 4 statements about \d images, (\d+) tokens "
            r"\([abc, .png]+\): this process had [\d.]+ GiB at most, cpu has [\d.]+ GiB for it\. The same training in "
            r"settings that would fit, by the estimate: (--batch_size 2 --gradient_accumulation_steps 2), or "
            r"(--use_gradient_checkpointing); .*",
            str(caught.value),
        )
        assert said is not None, caught.value
        assert int(said[2]) > half
        there = list_checkpoints(Path(config.output_dir))
        cure = (
            f"go on from {there[-1]} with --resume_from {config.output_dir}"
            if there
            else "no checkpoint was saved yet"
        )
        assert str(caught.value).endswith(cure)
        start = config.output_dir if there else None
        for proposed in (
            {"batch_size": 2, "gradient_accumulation_steps": 2},
            {"use_gradient_checkpointing": True},
        ):
            trainer = Trainer(replace(config, resume_from=start, **proposed), cache)
            assert trainer.run().name == f"checkpoint-{trainer.num_steps}"
            tally(proposals_that_ran_through=1)
            for path in [p for p in list_checkpoints(Path(config.output_dir)) if p not in there]:
                path.rename(path.with_name(f"of-{len(proposed)}-{path.name}"))


@pytest.mark.parametrize(
    ("room", "found"),
    [
        # 100 held and a pass of 12, 2 a statement. What did not fit needs what there was, so 12 count as 50 here.
        (150.0, ["--batch_size 4 --gradient_accumulation_steps 3", "--use_gradient_checkpointing"]),
        (112.0, ["--batch_size 3 --gradient_accumulation_steps 4", "--use_gradient_checkpointing"]),
        # Less than the estimate itself: 0.95 x 109 is 103.55, and a statement takes 2 or, checkpointed, 0.5.
        (109.0, ["--batch_size 1 --gradient_accumulation_steps 12", "--use_gradient_checkpointing"]),
        (106.4, ["--batch_size 2 --gradient_accumulation_steps 6 --use_gradient_checkpointing"]),
        (105.0, []),
    ],
)
def test_passes_that_fit_are_as_large_as_they_can_be(
    room: float, found: list[str], config: Config, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = Plan(replace(config, batch_size=6, gradient_accumulation_steps=2), cache)

    def estimate(one: Config, start: int) -> Memory:
        assert one.batch_size * one.gradient_accumulation_steps == 12
        kept = one.batch_size * (0.5 if one.use_gradient_checkpointing else 2.0)
        return Memory(frozen=60.0, trained=40.0, activations=kept, available=0.0)

    monkeypatch.setattr(plan, "estimate", estimate)
    assert settings_that_fit(plan, 0, room) == found


def test_a_machine_that_is_too_small_for_any_pass_is_told_so(config: Config, cache: Path) -> None:
    config = replace(config, batch_size=1, gradient_accumulation_steps=4, use_gradient_checkpointing=True)
    with (
        small_memory(0, 0),
        pytest.raises(OutOfMemory, match="By the estimate no way to divide this step would fit"),
    ):
        Trainer(config, cache).run()


@pytest.mark.parametrize(
    ("error", "is_one"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), True),
        (MemoryError(), True),
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory"),
            True,
        ),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_what_says_that_memory_is_out(error: Exception, is_one: bool) -> None:
    assert is_out_of_memory(error) is is_one


def test_another_error_of_a_step_stays_what_it_is(
    config: Config, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("mat1 and mat2")

    monkeypatch.setattr(TheWorld, "losses", broken)
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        Trainer(config, cache).train_step()
