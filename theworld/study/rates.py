"""What the runs of a study take, measured on one of each kind before the first of them starts.

A rehearsal does all that a run does, with fewer steps and fewer answers: it starts, takes a few steps of each phase,
saves a checkpoint, and evaluates it on all statements, of which a few are answered and the others get made-up answers.
So what is fixed for a run (plan, records, summaries) is measured whole, and what is not, by the step and the answer.

Arms that differ in the world encoder alone take as long, so one of them is measured for all. What was measured is kept
in the study's folder (`rates.json`), where a dry run finds it, until runs that are done say more.
"""

import logging
import tempfile
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from time import perf_counter

import numpy as np

from theworld.data.vsr import Statement
from theworld.evaluation.predict import predict
from theworld.extraction.batches import FeatureSource, prefetch
from theworld.models.gemma import KeptGemma
from theworld.models.theworld import TheWorld
from theworld.study.prediction import Rates, kind_of, read_rates, write_rates
from theworld.study.protocol import WITH_WORLD, Run
from theworld.study.runner import cache_of, evaluate, is_done
from theworld.training.memory import NotFinite, OutOfMemory
from theworld.training.schedule import Phase
from theworld.training.trainer import Trainer
from theworld.utils.device import memory_of, resolve_device, wants_compile
from theworld.utils.signals import StopRequest

logger = logging.getLogger(__name__)

NUM_STEPS, NUM_BATCHES = 20, 4  # that are timed: steps of each phase, batches of an evaluation
MOST_SECONDS = 10.0  # of the steps of a phase, whatever their number
UNTIMED = 2  # steps before them, which compile code and fill caches


def measure_missing(runs: Sequence[Run], cache: Path, output: Path) -> None:
    """Measure a run of each kind of which none is done and none was measured on this device, and keep the rates.

    Rates of older files, which leave out an evaluation's records and summaries, are measured again. A run that fails is
    left out, with its error in the log: the run itself is going to fail likewise.
    """
    device = memory_of(resolve_device(runs[0].config.device)).name
    rates = {kind: one for kind, one in read_rates(output).items() if one.device == device and one.is_whole}
    done = {kind_of(run.config) for run in runs if is_done(run)}
    first = {kind_of(run.config): run for run in reversed(runs)}
    for kind, run in reversed(first.items()):
        if kind in done or kind in rates:
            continue
        try:
            rates[kind] = measure(run, cache, device)
        except (ValueError, OSError, NotFinite, OutOfMemory) as error:
            logger.warning("%s was not measured: %s", run.name, error)
            continue
        logger.info("measured: %s", rates[kind].words())
        write_rates(rates, output)


def measure(run: Run, cache: Path, device: str) -> Rates:
    """Rehearse a run and return what it takes. Nothing of it is kept.

    Where code is compiled, the rehearsal is repeated: the second one takes what all runs of a process take but the
    first, and what the first one took more is what compiling and loading Gemma take.
    """
    compiled = wants_compile(run.config.compile, resolve_device(run.config.device))
    took, kept = list[float](), KeptGemma()
    with tempfile.TemporaryDirectory(prefix="theworld-") as folder:
        for number in range(1 + compiled):
            began = perf_counter()
            config = replace(run.config, output_dir=f"{folder}/{number}")
            found = _rehearse(replace(run, config=config), cache_of(config, cache), device, kept)
            took.append(perf_counter() - began)
    return replace(found, compiling=max(0.0, took[0] - took[-1]))


def _rehearse(run: Run, cache: Path, device: str, kept: KeptGemma) -> Rates:
    """Return what a run takes, by timing its start, a few steps of each phase, a checkpoint and an evaluation."""
    began = perf_counter()
    trainer = Trainer(run.config, cache, kept=kept)
    start, steps = perf_counter() - began, dict[str, float]()
    for phase in trainer.phases:
        steps[phase.name], more = _step_seconds(trainer, phase)
        start += more
    trainer.output_dir.mkdir(parents=True, exist_ok=True)
    began = perf_counter()
    checkpoint = trainer.save()
    save = perf_counter() - began
    if trainer.lock is not None:
        trainer.lock.release()
    gemma, sampled = trainer.model.gemma, _SampledAnswers()
    del trainer  # its optimizer and its projection
    began = perf_counter()
    evaluate(run, checkpoint, cache, gemma, StopRequest(), sampled)
    evaluation = perf_counter() - began - sampled.seconds
    return Rates(run.arm.name, device, start, steps, save, sampled.rate, evaluation)


def _step_seconds(trainer: Trainer, phase: Phase) -> tuple[float, float]:
    """Return the seconds of a step of a phase, put together ahead as in a run: the mean of NUM_STEPS, or of as many as
    MOST_SECONDS hold. Return with it what the steps before those took more."""
    trainer.step = phase.start
    last = min(phase.stop, phase.start + UNTIMED + NUM_STEPS)
    untimed = min(UNTIMED, last - phase.start - 1)
    coming = (trainer.microbatches(step) for step in range(phase.start, last))
    began, seconds, taken, before = perf_counter(), 0.0, 0, 0.0
    with closing(prefetch(coming, gate=trainer.packing)) as packed, closing(trainer.steps(packed)) as steps:
        for number, _ in enumerate(steps, 1):
            taken += 1
            seconds = perf_counter() - began
            if number > untimed and seconds > MOST_SECONDS:
                break
            if number == untimed:
                before = seconds
                began, taken = perf_counter(), 0
    step = seconds / taken
    return step, max(0.0, before - untimed * step)


class _SampledAnswers:
    """Answers a few of the statements that it is asked, as `predict`, and makes up the others.

    `seconds` is all that it took, and `rate` the seconds of an answer under the conditions of most runs.
    """

    def __init__(self) -> None:
        self.seconds, self.timed, self.answers = 0.0, 0.0, 0

    @property
    def rate(self) -> float:
        """The seconds of an answer to a statement under a condition."""
        return self.timed / self.answers

    def __call__(
        self,
        model: TheWorld,
        statements: Sequence[Statement],
        latents: FeatureSource,
        vision: FeatureSource | None,
        conditions: Sequence[str],
        batch_size: int,
        quiet: bool = True,
    ) -> dict[str, np.ndarray]:
        began = perf_counter()
        first = _sample(statements, batch_size)
        predict(model, first, latents, vision, conditions, batch_size)  # compiles code and fills caches
        sample = _sample(statements, NUM_BATCHES * batch_size)
        usual = [condition for condition in conditions if condition in WITH_WORLD]  # the others are quicker
        start = perf_counter()
        predict(model, sample, latents, vision, usual, batch_size)
        end = perf_counter()
        self.timed += end - start
        self.answers += len(sample) * len(usual)
        self.seconds += end - began
        random = np.random.default_rng(0)
        logsumexp = np.array([0, 0, 10])  # larger than the two logits
        return {name: random.normal(size=(len(statements), 3)) + logsumexp for name in conditions}


def _sample(statements: Sequence[Statement], count: int) -> list[Statement]:
    """Return about so many statements: all that there are about the first images, and about two images at least."""
    by_image: dict[str, list[Statement]] = {}
    for statement in statements:
        by_image.setdefault(statement.image, []).append(statement)
    taken: list[Statement] = []
    for number, own in enumerate(by_image.values()):
        if number >= 2 and len(taken) >= count:
            break
        taken += own
    return taken
