"""Many small runs from one cache, ranked on dev: which settings move the loss off chance, and do the controls agree.

runs/<name>-<seed>/       a training run's own folder; its `key` says which settings may go on in it
results.jsonl             a line for each run that has ended, from which everything that is shown follows
results-<I>-of-<N>.jsonl  the lines of the runs that part I of N trained
table.md                  the ranking

Parts share the runs: run n belongs to part n modulo the number of parts. Each writes to its own runs and lines only, so
parts may run at the same time, on any machines that share the folder; whichever ends last makes the table of all runs.
"""

import itertools
import json
import logging
import re
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from theworld.config.config import FIELDS, Config
from theworld.config.fields import nearest_name
from theworld.evaluation.metrics import accuracy
from theworld.evaluation.predict import label_loss, predict
from theworld.models.serialization import CheckpointError, numbered
from theworld.training.checkpoint import latest_valid_checkpoint
from theworld.training.memory import NotFinite, OutOfMemory, Plan
from theworld.training.monitor import below_chance_from, chance_loss
from theworld.training.trainer import Trainer
from theworld.utils.distributed import Part
from theworld.utils.files import canonical_sha256, check_folder, holds, publish_bytes
from theworld.utils.jsonc import read_json_with_comments
from theworld.utils.locks import OutputLock, check_unlocked, empty_folder
from theworld.utils.signals import StopRequest
from theworld.utils.text import counted

logger = logging.getLogger(__name__)

ASKED = ("world", "baseline", "zero", "shuffled")  # with world tokens, and the controls
WORDS = [f"{of}{words}_loss" for words in ("statement", "relation") for of in ("", "dev_")]
LINES = 5  # of metrics.jsonl, which a loss that has left chance is averaged over
NEVER = 10**9  # steps
LONGEST = 200  # characters of a run's name in that of its folder; file systems take 255 bytes
ALL = Part()  # the part that has all runs
KEY = "key"  # the file with the key of the run whose folder it is
# What a sweep decides for its runs; they make no difference to what is learnt.
OWN = ("output_dir", "seed", "do_eval", "eval_steps", "save_steps", "save_total_limit", "resume_from")
QUIET = {"log_to_tensorboard": False, "log_to_wandb": False, "push_to_hub": False}
Changes = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """One training run of a sweep."""

    name: str  # of its settings, without the seed
    config: Config  # as it trains
    key: str  # what it learns from, and how: equal keys are equal runs

    @property
    def folder(self) -> Path:
        """The folder of this run alone."""
        return Path(self.config.output_dir)

    @property
    def started(self) -> bool:
        """Whether there are checkpoints of this very run, from which it goes on."""
        return holds(self.folder / KEY, self.key.encode()) and bool(numbered(self.folder))


# ---- which runs


def read_changes(path: Path) -> list[Changes]:
    """Return the settings of each run of a file. Raises ValueError for anything else."""
    found = read_json_with_comments(path).get("runs")
    if not isinstance(found, list) or not all(isinstance(own, dict) for own in found):
        raise ValueError(f'{path}: wanted {{"runs": [{{"projection": "conv"}}, ...]}}')
    return found


def grid(options: Sequence[str]) -> list[Changes]:
    """Return all combinations of `key=a,b,c`. Raises ValueError for an unknown key or a value that is not allowed."""
    values: dict[str, list[Any]] = {}
    for option in options:
        key, equals, rest = option.partition("=")
        if key not in FIELDS or not equals:
            nearest = nearest_name(key, list(FIELDS))
            raise ValueError(
                f"--grid {option}: wanted key=a,b,c with the key of a setting; the nearest is {nearest}"
            )
        values[key] = [_parsed(key, text) for text in rest.split(",")]
    return [dict(zip(values, chosen, strict=True)) for chosen in itertools.product(*values.values())]


def _parsed(key: str, text: str) -> Any:
    try:
        return FIELDS[key].parse(text)
    except ValueError:
        raise ValueError(f"--grid {key}: {text!r} is no value of that setting") from None


def name_of(changes: Changes) -> str:
    """Return a run's name in words: its own "name", or the settings that are changed."""
    said = ", ".join(f"{key} {value}" for key, value in changes.items() if key != "name")
    return str(changes.get("name", said or "unchanged"))


def make_runs(base: Config, changes: Sequence[Changes], seeds: Sequence[int], output: Path) -> list[Run]:
    """Return a run for each of the changes and seeds.

    Raises ValueError that names the run for a refused setting, and for two runs of one name.
    """
    runs = []
    for own in changes:
        name = name_of(own)
        given = {key: value for key, value in own.items() if key != "name"}
        unknown = [key for key in given if key not in FIELDS or key in OWN]
        if unknown:
            raise ValueError(f"run {name!r}: {unknown[0]} is no setting, or one that the sweep decides")
        for seed in seeds:
            folder = output / "runs" / f"{short_name(name)}-{seed}"
            decided = {"output_dir": str(folder), "seed": seed, "do_eval": True, "resume_from": None}
            kept = {"eval_steps": NEVER, "save_total_limit": 1}
            try:
                config = replace(base, **{**given, **decided, **kept, **QUIET})
            except (ValueError, TypeError) as error:
                raise ValueError(f"run {name!r}: {error}") from None
            relevant = {k: v for k, v in config.to_dict().items() if k not in OWN}
            runs.append(Run(name, config, canonical_sha256(relevant | {"seed": seed})))
    owners: dict[Path, str] = {}
    for run in runs:
        if run.folder in owners:
            names = " and ".join(map(repr, dict.fromkeys((owners[run.folder], run.name))))
            raise ValueError(
                f"two runs, named {names}, have the folder {run.folder}; give each a name of its own"
            )
        owners[run.folder] = run.name
    return runs


def short_name(name: str) -> str:
    """Return the name of a run as part of a folder's name: ASCII, and no longer than a file system takes."""
    text = re.sub(r"[^A-Za-z0-9.]+", "-", name).strip("-")
    if text.strip(".") and len(text) <= LONGEST:
        return text
    digest = canonical_sha256(name)[:8]
    return f"{text[: LONGEST - 9].strip('-.')}-{digest}".strip("-")


# ---- one run


def train_one(run: Run, stop: StopRequest, cache: Path) -> dict[str, Any] | None:
    """Train a run, from its newest valid checkpoint if it has any, evaluate it on dev, and return its line of
    results.jsonl.

    The line of a failed run states why. Returns None if the run was stopped before its last step. `seconds` are those
    of the start that ended the run, without earlier starts that were stopped or killed. Raises InUse if another process
    trains the run.
    """
    if stop.asked:
        return None
    with OutputLock(run.folder, "--output"):
        return _train_alone(run, stop, cache)


def _train_alone(run: Run, stop: StopRequest, cache: Path) -> dict[str, Any] | None:
    """Do what `train_one` does, in a process that is the only one to write to the folder of the run."""
    start = time.perf_counter()
    line: dict[str, Any] = {"name": run.name, "seed": run.config.seed, "key": run.key}
    config = replace(run.config, resume_from=str(run.folder)) if run.started else run.config
    if config.resume_from is None:
        empty_folder(run.folder)  # our own, of other settings, or of a run that saved nothing
    try:
        trainer = Trainer(config, cache, stop)
        if stop.asked:
            return None
        publish_bytes(run.folder / KEY, run.key.encode())
        trainer.run()
        if trainer.stopped:
            return None
        line |= measure(trainer)
    except (ValueError, NotFinite, OutOfMemory) as error:
        hint = f"; remove {run.folder} to start the run anew" if isinstance(error, CheckpointError) else ""
        line |= {"failed": f"{error}{hint if config.resume_from else ''}"}
    return line | {"seconds": round(time.perf_counter() - start, 1)}


def measure(trainer: Trainer) -> dict[str, Any]:
    """Return the figures of a trained model and its controls on dev, and when the loss fell below chance."""
    config, dev = trainer.config, trainer.data.dev
    fetch = (trainer.data.latents, trainer.data.vision)
    logits = predict(trainer.model, dev, *fetch, ASKED, batch_size=config.eval_statements)
    labels = np.array([s.label for s in dev])
    right = {name: (values[:, 1] > values[:, 0]) == (labels == 1) for name, values in logits.items()}
    text = (Path(config.output_dir) / "metrics.jsonl").read_text(encoding="utf-8")
    logged = [line for line in map(json.loads, text.splitlines()) if line["phase"] == "train"]
    lines = [line for line in logged if "loss" in line]
    newest = {key: value for line in logged for key, value in line.items()}
    losses, chance = [line["loss"] for line in lines], chance_loss([s.label for s in trainer.data.train])
    left = below_chance_from(losses, chance, LINES)
    return {
        "steps": trainer.step,
        "statements_per_step": trainer.global_batch_size,
        "n": len(dev),
        "correct": {name: int(own.sum()) for name, own in right.items()},
        "dev_loss": {name: round(label_loss(values, labels), 5) for name, values in logits.items()},
        "last_loss": round(statistics.fmean(losses[-LINES:]), 5),
        "left_chance_at": None if left is None else lines[left - 1]["step"],
        "last_words": {key: round(newest[key], 5) for key in WORDS if key in newest},
    }


# ---- all of them


def read_results(output: Path) -> list[dict[str, Any]]:
    """Return the lines of a sweep so far, of all parts. Raises ValueError for a line that is not whole."""
    lines: list[dict[str, Any]] = []
    for path in sorted(output.glob("results*.jsonl")):
        try:
            lines += [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} has a line that is not whole ({error}); remove that line") from None
    return lines


def results_file(output: Path, part: Part) -> Path:
    """Return the file to which a part appends the lines of its runs."""
    own = "" if part.count == 1 else f"-{part.index + 1}-of-{part.count}"
    return output / f"results{own}.jsonl"


def unfinished(runs: Sequence[Run], output: Path) -> list[Run]:
    """Return the runs without a line, or with that of a failure only, which are tried again."""
    done = {line["key"] for line in read_results(output) if "failed" not in line}
    return [run for run in runs if run.key not in done]


def waiting_runs(runs: Sequence[Run], output: Path, part: Part) -> list[Run]:
    """Return the runs of this part that still have to be trained."""
    own = [run for number, run in enumerate(runs) if part.owns(number)]
    return unfinished(own, output)


def plan_sweep(runs: Sequence[Run], cache: Path, output: Path, part: Part = ALL) -> Iterator[str]:
    """Yield what `run_sweep` would do, in lines. Raises ValueError for the first run that could not start."""
    check_folder(output, "--output")
    left, waiting = unfinished(runs, output), waiting_runs(runs, output, part)
    yield f"runs         {len(runs)}, of which {len(runs) - len(left)} are done"
    if part.count > 1:
        share = f"{len(waiting):,} of {counted(len(left), 'run')} not yet done"
        yield f"part         {part.index + 1} of {part.count} trains {share}"
    for run in waiting:
        check_unlocked(run.folder, "--output")
        if run.started:
            step = latest_valid_checkpoint(run.folder).progress["step"]
            yield f"goes on      {run.name}, seed {run.config.seed}: after step {step:,}"
    for name in dict.fromkeys(run.name for run in waiting):
        own = [run for run in waiting if run.name == name]
        try:
            plan = Plan(
                replace(own[0].config, output_dir=str(own[0].folder / "none")), cache, flag="--output"
            )
        except ValueError as error:
            raise ValueError(f"run {name!r}: {error}") from None
        trains = plan.facts.trainable
        seeds = ", ".join(str(run.config.seed) for run in own)
        yield f"trains       {name} (seeds {seeds}): {plan.num_steps:,} steps, {trains:,} parameters"


def run_sweep(
    runs: Sequence[Run], cache: Path, output: Path, part: Part = ALL, stop: StopRequest | None = None
) -> tuple[str, list[Run]]:
    """Train the runs of a part that have no line yet, one after the other.

    Returns the table of all runs that have ended, and this part's runs that have not: none, unless `stop` was asked.
    """
    check_folder(output, "--output")
    output.mkdir(parents=True, exist_ok=True)
    waiting, stop = waiting_runs(runs, output, part), stop or StopRequest()
    left = list(waiting)
    for run in waiting:
        line = train_one(run, stop, cache)
        if line is None:
            continue
        left.remove(run)
        with open(results_file(output, part), "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        logger.info("%s, seed %s: %s", line["name"], line["seed"], line.get("failed") or _figures(line))
    keys = {run.key for run in runs}
    table = rank([line for line in read_results(output) if line["key"] in keys])
    publish_bytes(output / "table.md", f"{table}\n".encode(), overwrite=True)
    return table, left


def summary(runs: Sequence[Run], output: Path, part: Part, table: str, left: Sequence[Run]) -> str:
    """Return what to show at the end: the table, or why it is not complete; `left`: the part's runs without a line."""
    if left:
        own = sum(part.owns(number) for number in range(len(runs)))
        started = sum(run.started for run in left)
        return (
            f"stopped as asked: {own - len(left)} of {own} runs have ended; the same command goes on with {started} "
            f"from where they are, and starts {len(left) - started}"
        )
    ended = {line["key"] for line in read_results(output)}
    missing = sum(run.key not in ended for run in runs)
    if missing:
        return (
            f"part {part.index + 1} of {part.count} is done; {missing} of {len(runs)} runs are still missing: those "
            "of other parts. Whichever part ends last shows the table"
        )
    return table


def _figures(line: dict[str, Any]) -> str:
    return f"dev {line['correct']['world'] / line['n']:.1%}, loss {line['last_loss']:.3f}, {line['seconds']:.0f} s"


# ---- the ranking


def rank(lines: Sequence[dict[str, Any]]) -> str:
    """Return a Markdown table, best first.

    Accuracies are pooled over seeds, with Wilson's 95 % interval: it counts statements, not seeds, whose own spread is
    shown beside it.
    """
    results: dict[str, dict[str, Any]] = {}
    for line in lines:  # a run that failed may have been tried again
        if "failed" not in line or "failed" in results.get(line["key"], line):
            results[line["key"]] = line
    ended = list(results.values())
    names = list(dict.fromkeys(line["name"] for line in ended))
    groups = {name: [x for x in ended if x["name"] == name and "failed" not in x] for name in names}
    order = sorted(
        (name for name in names if groups[name]), key=lambda name: -_pooled(groups[name], "world")["accuracy"]
    )
    head = "| settings | dev, world tokens | by seed | none | zero | another's | last loss | left chance at step |"
    rows = [head, "|---|---|---|---|---|---|---|---|", *(_row(name, groups[name]) for name in order)]
    failed = [line for line in ended if "failed" in line]
    return "\n".join([*rows, *(f"\nfailed: {x['name']}, seed {x['seed']}: {x['failed']}" for x in failed)])


def _pooled(group: Sequence[dict[str, Any]], system: str) -> dict[str, Any]:
    right = sum(line["correct"][system] for line in group)
    total = sum(line["n"] for line in group)
    return accuracy([True] * right + [False] * (total - right))


def _row(name: str, group: Sequence[dict[str, Any]]) -> str:
    world = _pooled(group, "world")
    seeds = sorted(line["correct"]["world"] / line["n"] for line in group)
    others = " | ".join(f"{_pooled(group, s)['accuracy']:.1%}" for s in ("baseline", "zero", "shuffled"))
    left = sorted(line["left_chance_at"] for line in group if line["left_chance_at"] is not None)
    when = (
        f"{', '.join(map(str, left))} ({len(left)} of {len(group)})" if left else f"never (0 of {len(group)})"
    )
    loss = statistics.fmean(line["last_loss"] for line in group)
    cell = " ".join(name.split()).replace("|", "\\|")
    return (
        f"| {cell} | {world['accuracy']:.1%} ({world['low']:.1%}–{world['high']:.1%}) "
        f"| {seeds[0]:.1%}–{seeds[-1]:.1%} | {others} | {loss:.3f} | {when} |"
    )
