"""A study from photographs to verdict: extraction, runs, evaluation, comparison, page."""

import logging
from dataclasses import dataclass, field
from pathlib import Path

from theworld.study.plan import plan_study
from theworld.study.protocol import Study, runs_of
from theworld.study.rates import measure_missing
from theworld.study.results import write_results
from theworld.study.runner import extract_missing, in_processes, is_done, run_part, waiting
from theworld.study.sizes import equal_sizes
from theworld.utils.commands import again
from theworld.utils.distributed import Part
from theworld.utils.signals import StopRequest

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
) -> Ended:
    """Extract what is missing, train and evaluate this part's runs, `processes` at a time, and write the results if all
    runs are done. Raises what `Study.fix`, `extract` and `plan_study` do."""
    study.fix(output)
    extract_missing(study, cache, part)  # a request to stop ends it at once: what was published stays
    runs = runs_of(equal_sizes(study), output)
    if part.index == 0:
        measure_missing(runs, cache, output)
    logger.info("\n".join(plan_study(study, runs, cache, output, part, processes)))
    with stop.working():
        if processes > 1 and len(waiting(runs, part)) > 1:
            whole = in_processes(processes, runs, cache, part, stop)
            failed = {} if whole else {"a run": "its line above says why"}
        else:
            failed = run_part(runs, cache, part, stop)
    left = [run for run in runs if not is_done(run)]
    if not left:
        page = f"\n\npage: {output / 'study.html'}" if len(study.arms) > 1 else ""
        return Ended(write_results(study, runs, output) + page)
    own = [run for run in left if part.owns(run.number)]
    if failed:
        return Ended("\n".join(f"{name} failed: {why}" for name, why in failed.items()), stop.asked, failed)
    if own:
        done = len(runs) - len(left)
        return Ended(
            f"stopped as asked: {done} of {len(runs)} runs are done; go on with: {again()}", stopped=True
        )
    return Ended(
        f"part {part.index + 1} of {part.count} is done; {len(left)} of {len(runs)} runs are still missing: those of "
        "other parts. Whichever part ends last writes the results"
    )
