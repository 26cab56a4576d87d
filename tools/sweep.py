# PYTHON_ARGCOMPLETE_OK
"""Trains many small runs from one cache and ranks them on dev, with the controls of each: what moves the loss?

    python tools/sweep.py --config configs/demo.json --cache cache/ --output sweep/ --runs configs/sweep.json
    python tools/sweep.py --config configs/demo.json --cache cache/ --output sweep/ --grid learning_rate=0.001,0.003

configs/sweep.json shows how runs are written: settings that go on top of the file's and the flags'. SIGTERM or SIGUSR1:
each run under way finishes its step and saves, and no other starts. The same command goes on after that, and after a
kill, from the checkpoints (--save_steps); a run that has ended is not repeated.
Exit status: 0 done (a run that failed is in the table), 1 could not start or go on, 2 wrong usage, 75 stopped as asked
(go on with the same command), 130 interrupted.
"""

import sys
from pathlib import Path

from theworld.arguments import ArgumentParser, add_config_arguments, add_dry_run, config_from_arguments
from theworld.console import quiet_libraries, rehearse, status_of


def main() -> int:
    """Parses arguments, trains, prints the table; returns the exit status."""
    parser = ArgumentParser(description=__doc__)
    add_config_arguments(parser)
    parser.add_argument("--cache", type=Path, default=Path("cache"), help="cache folder (default: cache)")
    parser.add_argument("--output", type=Path, default=Path("checkpoints/sweep"), help="folder of the sweep")
    parser.add_argument("--runs", type=Path, metavar="FILE", help='JSON: {"runs": [{key: value}, ...]}')
    parser.add_argument("--grid", nargs="+", default=[], metavar="KEY=A,B", help="all combinations of these")
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[0, 1, 2], help="of each run (default: 0 1 2)"
    )
    parser.add_argument("--processes", type=int, default=1, help="runs at a time (default: 1)")
    add_dry_run(parser)
    arguments = parser.parse_args()
    # After the arguments: torch takes seconds to load, and --help should not.
    from theworld.stopping import STATUS, StopRequest
    from theworld.sweep import grid, make_runs, plan_sweep, read_changes, run_sweep, said_of_stop

    quiet_libraries()
    try:
        changes = read_changes(arguments.runs) if arguments.runs else []
        changes += grid(arguments.grid) if arguments.grid or not arguments.runs else []
        runs = make_runs(config_from_arguments(arguments), changes, arguments.seeds, arguments.output)
        if arguments.dry_run:
            return rehearse("sweep", lambda: plan_sweep(runs, arguments.cache, arguments.output))
        with StopRequest("sweep") as stop, stop.working():
            table, left = run_sweep(runs, arguments.cache, arguments.output, arguments.processes, stop)
            stop.end()
    except (ValueError, OSError) as error:
        print(f"sweep: {error}", file=sys.stderr)
        return 1
    print(said_of_stop(runs, left) if left else table)
    return STATUS if left else 0


if __name__ == "__main__":
    sys.exit(status_of("sweep", main))
