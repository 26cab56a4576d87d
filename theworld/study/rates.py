"""What the runs of a study take, as a few of their own steps say before the first of them starts.

Arms that differ in the world encoder alone take as long, so one of them is measured for all. What was measured is kept
in the study's folder (`rates.json`), where a dry run finds it, until runs that are done say more.
"""

import logging
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from time import perf_counter

from theworld.config.config import Config
from theworld.data.vsr import Statement, load_statements
from theworld.evaluation.predict import possible_conditions, predict
from theworld.evaluation.records import publish_json
from theworld.extraction.batches import prefetch
from theworld.models.gemma import is_multimodal
from theworld.study.protocol import Run
from theworld.study.runner import WITH_WORLD, cache_of, conditions_of, is_done
from theworld.training.memory import NotFinite, OutOfMemory, Plan
from theworld.training.schedule import Phase
from theworld.training.sweep import OWN, QUIET
from theworld.training.trainer import Trainer
from theworld.utils.device import memory_of, resolve_device, wants_compile
from theworld.utils.files import canonical_sha256, check_keys, parse_json

logger = logging.getLogger(__name__)

RATES = "rates.json"
NUM_STEPS, NUM_BATCHES = 20, 4  # that are timed: steps of each phase, batches of an evaluation
MOST_SECONDS = 10.0  # of the steps of a phase, whatever their number
UNTIMED = 2  # steps before them, which compile code and fill caches
# Settings that make no difference to what a run takes, beside those that the study decides.
LIKE = {*OWN, *QUIET, "world_encoder", "control_seed", "projection_hidden"}


@dataclass(frozen=True)
class Rates:
    """What one kind of run takes, in seconds."""

    arm: str  # that was measured
    device: str
    start: float  # until the first step
    steps: Mapping[str, float]  # one step, by phase
    save: float  # a checkpoint
    answer: float  # one statement under one condition

    def seconds(self, run: Run, plan: Plan, num_statements: int) -> float:
        """Return what a run takes by its plan, where so many statements are evaluated."""
        training = sum(self.steps[phase.name] * (phase.stop - phase.start) for phase in plan.phases)
        saves = -(-plan.num_steps // run.config.save_steps) * self.save
        sees = is_multimodal(run.config.model_name)
        answers = num_statements * len(possible_conditions(conditions_of(run), sees, run.config))
        return self.start + training + saves + self.answer * answers

    def words(self) -> str:
        """Return the rates as a line."""
        steps = "".join(f"{1000 * one:,.0f} ms a step of {name!r}, " for name, one in self.steps.items())
        return f"{self.arm}: {steps}{1000 * self.answer:,.1f} ms an answer, {self.start:.0f} s to start"


def kind_of(config: Config) -> str:
    """Return a key that runs share which take as long."""
    return canonical_sha256({key: value for key, value in config.to_dict().items() if key not in LIKE})


def read_rates(output: Path) -> dict[str, Rates]:
    """Return the rates that were measured for a study, by kind of run; none if nothing was. Raises StoreError for a
    damaged file."""
    path = output / RATES
    if not path.exists():
        return {}
    found = parse_json(path.read_bytes(), path)
    kinds = {"arm": str, "device": str, "start": float, "steps": dict, "save": float, "answer": float}
    for fields in found.values():
        check_keys(fields, kinds, path)
    return {kind: Rates(**fields) for kind, fields in found.items()}


def measure_missing(runs: Sequence[Run], cache: Path, output: Path) -> None:
    """Measure a run of each kind of which none is done and none was measured on this device, and keep the rates.

    A run that fails is left out, with its error in the log: the run itself is going to fail likewise.
    """
    device = memory_of(resolve_device(runs[0].config.device)).name
    rates = {kind: one for kind, one in read_rates(output).items() if one.device == device}
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
        publish_json({kind: asdict(one) for kind, one in rates.items()}, output / RATES)


def measure(run: Run, cache: Path, device: str) -> Rates:
    """Time the start, a few steps of each phase, a checkpoint and a few batches of evaluation of a run.

    Nothing of it is kept. Where code is compiled, all is done twice and timed the second time, as for all runs but the
    first.
    """
    compiled = wants_compile(run.config.compile, resolve_device(run.config.device))
    with tempfile.TemporaryDirectory(prefix="theworld-") as folder:
        for number in range(1 + compiled):
            config = replace(run.config, output_dir=f"{folder}/{number}")
            found = _measured(run, config, cache_of(config, cache), device)
    return found


def _measured(run: Run, config: Config, cache: Path, device: str) -> Rates:
    began = perf_counter()
    trainer = Trainer(config, cache)
    start = perf_counter() - began
    steps: dict[str, float] = {phase.name: _step_seconds(trainer, phase) for phase in trainer.phases}
    trainer.output_dir.mkdir(parents=True, exist_ok=True)
    began = perf_counter()
    trainer.save()
    save = perf_counter() - began
    answer = _answer_seconds(trainer)
    if trainer.lock is not None:
        trainer.lock.release()
    return Rates(run.arm.name, device, start, steps, save, answer)


def _step_seconds(trainer: Trainer, phase: Phase) -> float:
    """Return the seconds of a step of a phase, put together ahead as in a run: the mean of NUM_STEPS, or of as many as
    MOST_SECONDS hold."""
    trainer.step = phase.start
    last = min(phase.stop, phase.start + UNTIMED + NUM_STEPS)
    untimed = min(UNTIMED, last - phase.start - 1)
    coming = (trainer.microbatches(step) for step in range(phase.start, last))
    began, seconds, taken = perf_counter(), 0.0, 0
    with closing(prefetch(coming, gate=trainer.packing)) as packed, closing(trainer.steps(packed)) as steps:
        for number, _ in enumerate(steps, 1):
            taken += 1
            seconds = perf_counter() - began
            if number > untimed and seconds > MOST_SECONDS:
                break
            if number == untimed:
                began, taken = perf_counter(), 0
    return seconds / taken


def _answer_seconds(trainer: Trainer) -> float:
    """Return the seconds of an answer to a statement of test under a condition that every run is asked."""
    config, model = trainer.config, trainer.model
    conditions = possible_conditions(WITH_WORLD, model.gemma.is_multimodal, config)
    size = config.eval_statements
    test = load_statements(config.annotations, "test", config.dataset_name)
    statements = _sample(test, NUM_BATCHES * size)
    asked = (trainer.data.latents, trainer.data.vision, conditions, size)
    predict(model, _sample(test, size), *asked)
    began = perf_counter()
    predict(model, statements, *asked)
    return (perf_counter() - began) / (len(statements) * len(conditions))


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
