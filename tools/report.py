# PYTHON_ARGCOMPLETE_OK
"""Write the report of a run: its training, evaluation and verdict, in one HTML file that needs no network.

    python tools/report.py checkpoints/theworld-vsr
    python tools/report.py studies/vsr                   # the figures and the page of a study, again from its records

Exit status: 0 done, 1 failed, 2 wrong usage, 130 interrupted.
"""

import sys
from collections.abc import Iterator

from theworld.utils.starting import starting

with starting():
    from theworld.utils.console import loading, rehearse, run_tool


def main() -> int:
    """Parse the flags, write the page, and print its path; return the exit status."""
    from theworld.config.cli import ArgumentParser, add_dry_run, path

    parser = ArgumentParser(description=__doc__, usage="%(prog)s RUN [FLAG ...]")
    text = "Run such as checkpoints/theworld-vsr, one of its checkpoints, or a study such as studies/vsr."
    parser.add_argument("run", type=path, metavar="RUN", help=text)
    text = "Records that tools/eval.py wrote. (default: the newest of a test split)"
    parser.add_argument("--results", type=path, metavar="FILE", help=text)
    text = "Folder of the photographs. (default: the one of the evaluation)"
    parser.add_argument("--image_folder", "--image-dir", "--image_dir", type=path, metavar="PATH", help=text)
    text = "File for the page. (default: report.html in the run)"
    parser.add_argument("--output", type=path, metavar="FILE", help=text)
    add_dry_run(parser)
    arguments = parser.parse_args()
    with loading("report"):
        from theworld.report.report import plan_report, write_report
        from theworld.study.protocol import PROTOCOL
        from theworld.study.results import draw_again, plan_again, study_in
        from theworld.study.transfer import draw_transfer, scored_on

    if (arguments.run / PROTOCOL).is_file():
        if given := [
            f"--{name}" for name in ("results", "image_folder", "output") if getattr(arguments, name)
        ]:
            parser.error(
                f"{', '.join(given)}: of a run; {arguments.run} is a study, which has no such choice"
            )

        def plan() -> Iterator[str]:
            yield from plan_again(arguments.run)
            if names := scored_on(study_in(arguments.run)[1]):
                yield f"writes       transfer.json and transfer.html, of {', '.join(names)}"

        if arguments.dry_run:
            return rehearse(plan)
        print(f"{draw_again(arguments.run)}\n\npage: {arguments.run / 'study.html'}")
        transfer = draw_transfer(*study_in(arguments.run), arguments.run)
        if transfer is not None:
            print(transfer)
        return 0
    chosen = (arguments.run, arguments.output, arguments.results, arguments.image_folder)
    if arguments.dry_run:
        return rehearse(lambda: plan_report(*chosen))
    print(f"page: {write_report(*chosen)}")
    return 0


if __name__ == "__main__":
    sys.exit(run_tool("report", main))
