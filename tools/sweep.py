# PYTHON_ARGCOMPLETE_OK
"""Train many small runs from one cache and rank them on the dev split, each beside its controls.

    python tools/sweep.py --config configs/demo.json --cache cache/ --output sweep/ --runs configs/sweep.json
    python tools/sweep.py --config configs/demo.json --cache cache/ --output sweep/ --grid learning_rate=0.001,0.003

configs/sweep.json shows how runs are written: settings that override those of --config and of the flags. Independent
jobs share a sweep, on any number of machines: `--part 1/8` to `--part 8/8` train a part of the runs each, and the one
that ends last shows the table. On one machine, several parts train several runs at a time:

    for i in 1 2 3 4; do python tools/sweep.py ... --part $i/4 & done; wait

SIGTERM and SIGUSR1 let the run under way finish its step and save, and start no other run. After that, and after a
kill, the same command continues from the checkpoints (--save_steps); a finished run is not repeated.
Exit status: 0 done (a failed run is in the table), 1 could not start or continue, 2 wrong usage, 75 stopped by a signal
(continue with the same command), 130 interrupted.
"""

import sys
from pathlib import Path

from theworld.utils.starting import starting

with starting():
    from theworld.utils.console import loading, rehearse, run_tool


def main() -> int:
    """Parse the flags, train the runs, and print the table; return the exit status."""
    from theworld.config.cli import (
        ArgumentParser,
        add_cache,
        add_config_arguments,
        add_dry_run,
        config_from_arguments,
        path,
    )
    from theworld.utils.distributed import part_of

    parser = ArgumentParser(description=__doc__)
    add_cache(parser)
    text = "Folder of the sweep, with a folder for each run. (default: checkpoints/sweep)"
    parser.add_argument("--output", type=path, default=Path("checkpoints/sweep"), metavar="FOLDER", help=text)
    text = 'JSON file of runs: {"runs": [{"KEY": VALUE}, ...]}. (default: none)'
    parser.add_argument("--runs", type=path, metavar="FILE", help=text)
    text = "Values of settings, all combinations of which are runs. (default: none)"
    parser.add_argument("--grid", nargs="+", default=[], metavar="KEY=A,B", help=text)
    text = "Random seeds; each run is trained once with each. (default: 0 1 2)"
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="INTEGER", help=text)
    text = "Train only the I-th of N parts of the runs, such as 3/8. (default: all runs)"
    parser.add_argument("--part", type=part_of, default="1/1", metavar="I/N", help=text)
    add_dry_run(parser)
    add_config_arguments(parser)
    arguments = parser.parse_args()
    with loading("sweep"):
        from theworld.training.sweep import grid, make_runs, plan_sweep, read_changes, run_sweep, summary
        from theworld.utils.signals import STATUS, StopRequest

    changes = read_changes(arguments.runs) if arguments.runs else []
    changes += grid(arguments.grid) if arguments.grid or not arguments.runs else []
    runs = make_runs(config_from_arguments(arguments), changes, arguments.seeds, arguments.output)
    options = (runs, arguments.cache, arguments.output, arguments.part)
    if arguments.dry_run:
        return rehearse(lambda: plan_sweep(*options))
    with StopRequest("sweep") as stop, stop.working():
        table, left = run_sweep(*options, stop)
        stop.end()
    print(summary(runs, arguments.output, arguments.part, table, left))
    return STATUS if left else 0


if __name__ == "__main__":
    sys.exit(run_tool("sweep", main))
