# PYTHON_ARGCOMPLETE_OK
"""A page to look at: the evaluation of a run with its verdict, in one HTML file that needs no network.

    python tools/report.py checkpoints/vsr

Exit status: 0 done, 1 failed, 2 wrong usage, 130 interrupted.
"""

import sys
from pathlib import Path

from theworld.arguments import ArgumentParser, add_dry_run
from theworld.console import quiet_libraries, rehearse, status_of


def main() -> int:
    """Parses arguments, writes the page; returns the exit status."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="a run such as checkpoints/vsr, or one of its checkpoints")
    parser.add_argument("--results", type=Path, help="records of tools/eval.py (default: the run's newest)")
    parser.add_argument(
        "--image-dir", "--image_dir", type=Path, help="photographs (default: where they were)"
    )
    parser.add_argument("--output", type=Path, help="default: RUN/report.html")
    add_dry_run(parser)
    arguments = parser.parse_args()
    # After the arguments: torch takes seconds to load, and --help should not.
    from theworld.report import plan_report, write_report

    quiet_libraries()
    chosen = (arguments.run, arguments.output, arguments.results, arguments.image_dir)
    if arguments.dry_run:
        return rehearse("report", lambda: plan_report(*chosen))
    try:
        path = write_report(*chosen)
    except (ValueError, OSError) as error:
        print(f"report: {error}", file=sys.stderr)
        return 1
    print(f"page: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(status_of("report", main))
