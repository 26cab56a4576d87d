"""What a study will take, and what it will be able to show, before anything runs."""

import statistics
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from theworld.data.vsr import load_statements
from theworld.evaluation.comparison import ALPHA, Images
from theworld.evaluation.power import Assumptions, plan_power
from theworld.evaluation.records import read_results
from theworld.evaluation.study_verdict import LEAST_SEEDS, point_words
from theworld.models.serialization import numbered
from theworld.study.prediction import compiling_seconds, kind_of, num_evaluated, read_rates
from theworld.study.protocol import Run, Study
from theworld.study.runner import ALL, cache_of, is_done, read_done, records_of, waiting
from theworld.training.memory import CHECKPOINT_BYTES, Memory, Plan
from theworld.utils.console import duration, line
from theworld.utils.distributed import Part
from theworld.utils.files import check_folder, check_room
from theworld.utils.text import byte_size, counted


def plan_study(
    study: Study, runs: Sequence[Run], cache: Path, output: Path, part: Part = ALL, processes: int = 1
) -> Iterator[str]:
    """Yield what the study would do, in lines; the cache has to be there.

    Raises ValueError for the first arm that could not start, and for another study in the folder.
    """
    check_folder(output, "--output")
    study.check(output)
    left = waiting(runs, ALL)
    yield line(
        "study",
        f"{size_of(study)}: {counted(len(runs), 'run')}, {len(runs) - len(left)} done",
    )
    if part.count > 1:
        own = f"{len(waiting(runs, part)):,} of {counted(len(left), 'run')} not yet done"
        yield line("part", f"{part.index + 1} of {part.count} trains {own}")
    yield line("decides", decides(study))
    size, plans = 0, dict[str, Plan]()
    first = {run.arm.name: run for run in reversed(runs)}
    for name, run in reversed(first.items()):
        plan = plans[name] = _plan(run, cache)
        _check_sharing(plan.memory, processes)
        size += CHECKPOINT_BYTES * plan.facts.trainable * len(study.seeds) * len(study.train_shares)
        yield line(
            "arm",
            f"{name}: {plan.facts.trainable:,} parameters, {counted(plan.num_steps, 'step')}; {plan.memory}",
        )
    free = check_room(output, size, "--output")
    yield line("disk", f"about {byte_size(size)} of {byte_size(free)} free in {output}")
    yield line("time", time_needed(runs, left, plans, output))
    if (compiling := compiling_seconds(left, output)) >= 1:
        yield line(
            "", f"and up to {duration(compiling)} in each process, whose first run compiles code for all"
        )
    for number, text in enumerate(detectable(study, runs)):
        yield line("" if number else "detects", text)
    for run in left:
        if numbered(run.folder):
            yield line("goes on", f"{run.name}: from its newest checkpoint")


def _plan(run: Run, cache: Path) -> Plan:
    """Return the plan of a run as it starts. Raises ValueError naming the arm."""
    try:
        config = replace(run.config, output_dir=str(run.folder / "none"))
        return Plan(config, cache_of(run.config, cache), flag="--output")
    except ValueError as error:
        raise ValueError(f"arm {run.arm.name!r}: {error}") from None


def detectable(study: Study, runs: Sequence[Run]) -> Iterator[str]:
    """Yield lines that say which difference the study will be able to detect, from its own runs where two seeds of the
    arms that decide are done, else from an assumption, which is shown."""
    base = study.base
    test = load_statements(base.annotations, "test", base.dataset_name)
    counts = list(Counter(statement.image for statement in test).values())
    alpha = study.primary.alpha if study.primary else ALPHA / max(1, num_pairs(study))
    yield from plan_power(counts, len(study.seeds), _assumptions(study, runs), alpha)


def _assumptions(study: Study, runs: Sequence[Run]) -> Assumptions:
    if study.primary is None:
        return Assumptions()
    first, second = study.primary.arm, study.primary.against[0]
    arms = {
        name: {
            run.config.seed: run for run in runs if (run.arm.name, run.share) == (name, 1) and is_done(run)
        }
        for name in (first, second)
    }
    seeds = sorted(arms[first].keys() & arms[second].keys())
    if len(seeds) < 2:
        return Assumptions()
    rows = {
        name: [read_results(records_of(own[seed], "test"))[0] for seed in seeds] for name, own in arms.items()
    }
    right = {
        name: np.array([[row["systems"]["world"]["correct"] for row in one] for one in found]).astype(int)
        for name, found in rows.items()
    }
    difference = right[first] - right[second]
    if not difference.any():
        return Assumptions()
    images = Images.of([row["image"] for row in rows[first][0]])
    if len(images.counts) < 2:
        return Assumptions()
    return Assumptions.from_pilot(
        difference, images, f"from {len(seeds)} seeds of {first} and {second} that are done"
    )


def num_pairs(study: Study) -> int:
    """Return the number of comparisons of a study that explores, for which each is corrected."""
    others = len(study.arms) - 1
    return others if study.baseline else len(study.arms) * others // 2


def _check_sharing(memory: Memory, processes: int) -> None:
    """Raise ValueError if that many runs do not fit on one device."""
    if processes > 1 and processes * memory.total > memory.available:
        fit = max(1, int(memory.available // memory.total))
        raise ValueError(
            f"--processes is {processes}: a run takes about {byte_size(memory.total)} of "
            f"{byte_size(memory.available)}; give --processes {fit}"
        )


def size_of(study: Study) -> str:
    """Return the number of arms, of seeds and, where there are several, of shares of the training statements."""
    shares = f" x {len(study.train_shares)} shares" if len(study.train_shares) > 1 else ""
    return f"{counted(len(study.arms), 'arm')} x {counted(len(study.seeds), 'seed')}{shares}"


def decides(study: Study) -> str:
    """Return the comparison that decides, in words."""
    primary = study.primary
    if primary is None:
        pairs = f"each arm with {study.baseline}" if study.baseline else "every two arms"
        number = f"{num_pairs(study)}, corrected"
        return f"nothing: a study without `primary` explores. It compares {pairs} on test: {number}"
    few = len(study.seeds) < LEAST_SEEDS
    each = "each of " if len(primary.against) > 1 else ""
    return (
        f"{primary.arm} against {each}{', '.join(primary.against)} on test, at {primary.alpha:.0%} two-sided; "
        f"a difference within {point_words(primary.margin)} counts as equal"
        + (f"; it takes {LEAST_SEEDS} seeds for a verdict, and has {len(study.seeds)}" if few else "")
    )


def time_needed(runs: Sequence[Run], left: Sequence[Run], plans: Mapping[str, Plan], output: Path) -> str:
    """Return how long the runs that are left take: each as those of its arm and share that are done, else as its rates
    say, else as the other runs in the mean."""
    if not left:
        return "all runs are done"
    done = seconds_by_kind([run for run in runs if is_done(run)])
    rates = read_rates(output)
    num_statements = num_evaluated(left[0].config)
    known: list[float] = []
    sources: dict[str, None] = {}
    for run in left:
        measured = rates.get(kind_of(run.config))
        if (run.arm.name, run.share) in done:
            known.append(statistics.fmean(done[run.arm.name, run.share]))
            sources["runs that are done"] = None
        elif measured is not None:
            known.append(measured.seconds(run, plans[run.arm.name], num_statements))
            sources[f"steps and answers that were timed on {measured.device}"] = None
    if not known and not done:
        return (
            "not known before anything has run: a start without --dry_run, of parts that of the first, measures some "
            "steps of each kind of arm and says it here"
        )
    if len(known) < len(left):
        sources["the mean of the others"] = None
        other = statistics.fmean(known or [one for own in done.values() for one in own])
        known += [other] * (len(left) - len(known))
    each = f"{len(left)} runs, one after the other, {duration(statistics.fmean(known))} each"
    total = f"about {duration(sum(known))} of one device for {each if len(left) > 1 else '1 run'}"
    return f"{total}; from {', and from '.join(sources)}"


def seconds_by_kind(done: Sequence[Run]) -> dict[tuple[str, float], list[float]]:
    """Return the seconds of the runs that are done, by the name of their arm and their share of the statements."""
    found: dict[tuple[str, float], list[float]] = {}
    for run in done:
        found.setdefault((run.arm.name, run.share), []).append(read_done(run)["seconds"])
    return found
