# PYTHON_ARGCOMPLETE_OK
"""Train many small runs from one cache and rank them on the dev split, each beside its controls.

    python tools/sweep.py --config configs/demo.json --cache cache/ --output sweep/ --runs configs/sweep.json
    python tools/sweep.py --config configs/demo.json --cache cache/ --output sweep/ --grid learning_rate=0.001,0.003

configs/sweep.json shows how runs are written: settings that override those of --config and of the flags.
SIGTERM and SIGUSR1 let each run under way finish its step and save, and start no other run. After that, and after a
kill, the same command continues from the checkpoints (--save_steps); a finished run is not repeated.
Exit status: 0 done (a failed run is in the table), 1 could not start or continue, 2 wrong usage, 75 stopped by a signal
(continue with the same command), 130 interrupted.
"""

import sys
from pathlib import Path

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
    text = "Number of runs that are trained at the same time. (default: 1)"
    parser.add_argument("--processes", type=int, default=1, metavar="INTEGER", help=text)
    add_dry_run(parser)
    add_config_arguments(parser)
    arguments = parser.parse_args()
    with loading("sweep"):
        from theworld.training.sweep import grid, make_runs, plan_sweep, read_changes, run_sweep, said_of_stop
        from theworld.utils.signals import STATUS, StopRequest

    changes = read_changes(arguments.runs) if arguments.runs else []
    changes += grid(arguments.grid) if arguments.grid or not arguments.runs else []
    runs = make_runs(config_from_arguments(arguments), changes, arguments.seeds, arguments.output)
    if arguments.dry_run:
        return rehearse(lambda: plan_sweep(runs, arguments.cache, arguments.output))
    with StopRequest("sweep") as stop, stop.working():
        table, left = run_sweep(runs, arguments.cache, arguments.output, arguments.processes, stop)
        stop.end()
    print(said_of_stop(runs, left) if left else table)
    return STATUS if left else 0


if __name__ == "__main__":
    sys.exit(run_tool("sweep", main))
