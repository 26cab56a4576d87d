# PYTHON_ARGCOMPLETE_OK
"""Does the video model help, and not just training, pixels or noise? Train every arm with every seed, and compare.

    python tools/study.py --config configs/vsr_study.json --image_folder images/ --cache cache/ --output studies/vsr
    python tools/study.py --config configs/vsr_study.json --output studies/vsr --dry_run

From photographs to verdict: extracts what the cache lacks, trains each arm with each seed, evaluates the last
checkpoints on dev and test under all conditions, compares the arms, and writes study.json, study.csv, study.tex and
study.html. --config names a file as configs/vsr_study.json, which fixes arms, seeds and the comparison that decides;
configs/study_patch.json and its like ask about settings.

Independent jobs share a study, on any number of machines: `--part 1/8` to `--part 8/8` train a part of the runs each,
and the one that ends last draws the page. `--processes 2` trains two runs at a time on one machine. `--benchmarks`
scores all runs on other benchmarks at the end, and draws transfer.html.

SIGTERM and SIGUSR1 let the run under way finish its step and save, and start no other run. After that, and after a
kill, the same command goes on; a finished run is not repeated.
Exit status: 0 done, 1 could not start or a run failed, 2 wrong usage, 75 stopped by a signal (continue with the same
command), 130 interrupted.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

from theworld.utils.starting import starting

with starting():
    from theworld.utils.commands import SETTINGS
    from theworld.utils.console import loading, rehearse, run_tool

KEYS = SETTINGS["study"]


def main() -> int:
    """Parse the flags, run the study, and print its verdict; return the exit status."""
    from theworld.config.cli import ArgumentParser, add_cache, add_config_arguments, add_dry_run, path
    from theworld.utils.distributed import part_of

    parser = ArgumentParser(description=__doc__)
    text = "File of the study: arms, seeds and the comparison that decides. (default: configs/vsr_study.json)"
    parser.add_argument(
        "--config", type=path, default=Path("configs/vsr_study.json"), metavar="FILE", help=text
    )
    add_cache(parser)
    text = "Folder of the study, with a folder for each run. (default: studies/vsr)"
    parser.add_argument("--output", type=path, default=Path("studies/vsr"), metavar="FOLDER", help=text)
    text = "Arms to compare. (default: all of the file)"
    parser.add_argument("--arms", nargs="+", metavar="NAME", help=text)
    text = "Random seeds; each arm is trained once with each. (default: those of the file)"
    parser.add_argument("--seeds", type=int, nargs="+", metavar="INTEGER", help=text)
    text = "Train only the I-th of N parts of the runs, such as 3/8. (default: all runs)"
    parser.add_argument("--part", type=part_of, default="1/1", metavar="I/N", help=text)
    text = "Number of runs that are trained at a time on this machine. (default: 1)"
    parser.add_argument("--processes", type=int, default=1, metavar="INTEGER", help=text)
    text = "Folders of tools/get_benchmark.py on which every run is scored when all are done. (default: none)"
    parser.add_argument("--benchmarks", type=path, nargs="+", default=[], metavar="FOLDER", help=text)
    add_dry_run(parser)
    add_config_arguments(parser, KEYS, source="the study")
    arguments = parser.parse_args()
    if arguments.processes < 1:
        parser.error(f"--processes is {arguments.processes}; wanted 1 or more")
    overrides = {key: getattr(arguments, key) for key in KEYS if key in vars(arguments)}
    with loading("study"):
        from theworld.cli.dry_run import extraction
        from theworld.study.plan import plan_study
        from theworld.study.protocol import arm_config, read_study, runs_of
        from theworld.study.run import run_study
        from theworld.study.runner import by_cache, lacking, quiet_runs
        from theworld.study.sizes import equal_sizes
        from theworld.study.transfer import check_benchmarks, plan_transfer, score_benchmarks
        from theworld.utils.signals import STATUS, StopRequest
    quiet_runs()

    study = read_study(arguments.config, overrides, arguments.arms, arguments.seeds)
    runs_of(study, arguments.output)  # before anything runs: is every setting of every arm allowed?
    check_benchmarks(arguments.benchmarks, study.base.follow_links)
    places = (arguments.cache, arguments.output, arguments.part, arguments.processes)

    def plan() -> Iterator[str]:
        study.check(arguments.output)
        part, complete = arguments.part if arguments.part.count > 1 else None, True
        for cache, some in by_cache(study, arguments.cache).items():
            configs, vision = lacking(some, cache)
            complete = complete and not (configs or vision)
            for number, config in enumerate(configs or [arm_config(some, some.arms[0])] * vision):
                yield from extraction(config, cache, vision and number == 0, False, part)
        if complete:
            yield from plan_study(study, runs_of(equal_sizes(study), arguments.output), *places)
        yield from plan_transfer(study, arguments.benchmarks)

    if arguments.dry_run:
        return rehearse(plan)
    with StopRequest("study") as stop:
        outcome = run_study(study, *places, stop)
        print(outcome.text)
        if not outcome.stopped:  # a request to stop ends it at once: records that were written stay
            transfer = score_benchmarks(study, arguments.benchmarks, arguments.output, arguments.part)
            if transfer is not None:
                print(transfer)
        stop.end()
    return STATUS if outcome.stopped else int(bool(outcome.failed))


if __name__ == "__main__":
    sys.exit(run_tool("study", main))
