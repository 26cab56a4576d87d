"""How long a run of a study takes, from what was measured of a run of its kind (`rates.json`; see
`theworld.study.rates`)."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from theworld.config.config import Config
from theworld.data.vsr import load_statements
from theworld.evaluation.predict import possible_conditions
from theworld.evaluation.records import publish_json
from theworld.models.gemma import is_multimodal
from theworld.study.protocol import SPLITS, Run, conditions_of
from theworld.training.memory import Plan
from theworld.training.sweep import OWN, QUIET
from theworld.utils.files import canonical_sha256, check_keys, parse_json

RATES = "rates.json"
KINDS = {"arm": str, "device": str, "start": float, "steps": dict, "save": float, "answer": float}
NEWER = {"evaluation": float, "compiling": float}  # older files have none
# Settings that make no difference to what a run takes, beside those that the study decides.
LIKE = {*OWN, *QUIET, "world_encoder", "control_seed", "projection_hidden"}


@dataclass(frozen=True)
class Rates:
    """What one kind of run takes, in seconds."""

    arm: str  # that was measured
    device: str
    # until the first step, and what the first steps of each phase take more than those after them
    start: float
    steps: Mapping[str, float]  # one step, by phase
    save: float  # a checkpoint
    answer: float  # one statement under one condition
    # of all splits, beside the answers: statements, records, summaries; 0 in older files
    evaluation: float = 0.0
    compiling: float = 0.0  # that the first run of a process takes more

    @property
    def is_whole(self) -> bool:
        """Whether all parts of a run were measured, which older files have not."""
        return self.evaluation > 0

    def seconds(self, run: Run, plan: Plan, num_statements: int) -> float:
        """Return what a run takes by its plan, where so many statements are evaluated; without compiling."""
        training = sum(self.steps[phase.name] * (phase.stop - phase.start) for phase in plan.phases)
        saves = -(-plan.num_steps // run.config.save_steps) * self.save
        sees = is_multimodal(run.config.model_name)
        answers = num_statements * len(possible_conditions(conditions_of(run), sees, run.config))
        return self.start + training + saves + self.answer * answers + self.evaluation

    def words(self) -> str:
        """Return the rates as a line."""
        steps = "".join(f"{1000 * one:,.0f} ms a step of {name!r}, " for name, one in self.steps.items())
        compiling = f", {self.compiling:.0f} s to compile, once in a process" if self.compiling else ""
        return (
            f"{self.arm}: {steps}{1000 * self.answer:,.1f} ms an answer, {self.start:.1f} s to start, "
            f"{self.evaluation:.1f} s to record and summarise{compiling}"
        )


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
    for fields in found.values():
        is_older = isinstance(fields, dict) and not NEWER.keys() & fields.keys()
        check_keys(fields, KINDS if is_older else KINDS | NEWER, path)
    return {kind: Rates(**fields) for kind, fields in found.items()}


def write_rates(rates: Mapping[str, Rates], output: Path) -> None:
    """Write the rates of a study, by kind of run."""
    publish_json({kind: asdict(one) for kind, one in rates.items()}, output / RATES)


def num_evaluated(config: Config) -> int:
    """Return the number of statements that a run is evaluated on."""
    return sum(len(load_statements(config.annotations, split, config.dataset_name)) for split in SPLITS)


def predicted_seconds(run: Run, plan: Plan) -> float | None:
    """Return what a run takes by the rates of its study, or None if those of its kind were not measured."""
    rates = read_rates(run.study_folder).get(kind_of(run.config))
    return None if rates is None else rates.seconds(run, plan, num_evaluated(run.config))


def compiling_seconds(runs: Sequence[Run], output: Path) -> float:
    """Return what the first runs of a process take more than the rates of their kinds say, as they compile: at most,
    since kinds share code."""
    kinds = {kind_of(run.config) for run in runs}
    return sum(one.compiling for kind, one in read_rates(output).items() if kind in kinds)
