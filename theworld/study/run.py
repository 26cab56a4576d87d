"""A study from photographs to verdict: extraction, runs, evaluation, comparison, page."""

import logging
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from theworld.study.plan import plan_study
from theworld.study.protocol import Study, runs_of
from theworld.study.results import write_results
from theworld.study.runner import extract_missing, in_processes, is_done, run_part, waiting
from theworld.study.sizes import equal_sizes
from theworld.utils.distributed import Part
from theworld.utils.signals import STATUS, StopRequest

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Ended:
    """How a start of a study ended."""

    text: str  # to show
    stopped: bool = False
    failed: dict[str, str] = field(default_factory=dict)  # run -> why


def run_study(
    study: Study,
    cache: Path,
    output: Path,
    part: Part,
    processes: int,
    stop: StopRequest,
    command: Sequence[str],
) -> Ended:
    """Extract what is missing, train and evaluate this part's runs, and write the results if all runs are done.

    `command`: the words of the command line, for `processes`, each of which runs the command for a part of this part.
    """
    study.fix(output)
    if not extract_missing(study, cache, part, stop):
        return Ended(f"stopped as asked: {goes_on(command)}", stopped=True)
    runs = runs_of(equal_sizes(study), output)
    logger.info("\n".join(plan_study(study, runs, cache, output, part, processes)))
    if processes > 1 and len(waiting(runs, part)) > 1:
        status = in_processes(processes, part, without_sharing(command), stop)
        failed = (
            {} if status in (0, STATUS) else {"a process": f"ended with status {status}; its lines say why"}
        )
    else:
        failed = run_part(runs, cache, part, stop)
    left = [run for run in runs if not is_done(run)]
    if not left:
        return Ended(write_results(study, runs, output))
    own = [run for run in left if part.owns(run.number)]
    if failed:
        return Ended("\n".join(f"{name} failed: {why}" for name, why in failed.items()), stop.asked, failed)
    if own:
        done = len(runs) - len(left)
        return Ended(
            f"stopped as asked: {done} of {len(runs)} runs are done; {goes_on(command)}", stopped=True
        )
    return Ended(
        f"part {part.index + 1} of {part.count} is done; {len(left)} of {len(runs)} runs are still missing: those of "
        "other parts. Whichever part ends last writes the results"
    )


def without_sharing(words: Sequence[str]) -> list[str]:
    """Return a command line without --part and --processes and their values."""
    kept, skip = list[str](), False
    for word in words:
        if skip:
            skip = False
        elif word in ("--part", "--processes"):
            skip = True
        elif not word.startswith(("--part=", "--processes=")):
            kept.append(word)
    return kept


def goes_on(words: Sequence[str]) -> str:
    """Return the command that goes on with a study, in words."""
    return f"the same command goes on: {shlex.join(['python', *words])}"
