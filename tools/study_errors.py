# PYTHON_ARGCOMPLETE_OK
"""Measure how often a study is wrong: simulate studies with a known effect and put them through the study's own tests.

    python tools/study_errors.py
    python tools/study_errors.py --annotations vsr/ --output checkpoints/study_errors.json

Exit status: 0 done, 1 could not start or false alarms beyond 5 %, 2 wrong usage, 130 interrupted.
"""

import shlex
import sys
from pathlib import Path

from theworld.utils.console import loading, rehearse, run_tool


def main() -> int:
    """Parse the flags, simulate, write the figures and print the tables; return the exit status."""
    from theworld.config.cli import ArgumentParser, add_dry_run, path

    parser = ArgumentParser(description=__doc__)
    text = (
        "Folder of annotations whose statements and images are simulated. (default: drawn with VSR's counts)"
    )
    parser.add_argument("--annotations", type=path, metavar="PATH", help=text)
    text = "Name of the annotations: vsr_random or vsr_zeroshot. (default: vsr_random)"
    parser.add_argument("--dataset_name", default="vsr_random", metavar="TEXT", help=text)
    text = "Split of the annotations. (default: test)"
    parser.add_argument("--split", default="test", metavar="NAME", help=text)
    text = "Number of drawn images with two statements each. (default: VSR's statements and images)"
    parser.add_argument("--images", type=int, metavar="NUMBER", help=text)
    text = "Number of studies that are simulated for each row. (default: 2000)"
    parser.add_argument("--studies", type=int, default=2000, metavar="NUMBER", help=text)
    output = Path("checkpoints/study_errors.json")
    text = f"File for the figures. (default: {output})"
    parser.add_argument("--output", type=path, default=output, metavar="FILE", help=text)
    add_dry_run(parser)
    arguments = parser.parse_args()
    if arguments.studies < 1:
        parser.error(f"--studies is {arguments.studies}; wanted 1 or more")
    if arguments.images is not None and (arguments.images < 2 or arguments.annotations):
        parser.error(f"--images is {arguments.images}; wanted 2 or more, and no --annotations beside it")
    with loading("study_errors"):
        from benchmark.error_rates import Structure, measure_all, plan, tables, too_often

        from theworld.evaluation.records import publish_json
        from theworld.utils.files import check_output

    check_output(arguments.output)
    structure = Structure.pairs(arguments.images) if arguments.images else Structure.drawn()
    if arguments.annotations:
        structure = Structure.read(arguments.annotations, arguments.split, arguments.dataset_name)
    if arguments.dry_run:
        return rehearse(lambda: plan(structure, arguments.studies, arguments.output))
    figures = measure_all(structure, arguments.studies)
    figures["command"] = shlex.join(["python", "tools/study_errors.py", *sys.argv[1:]])
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    publish_json(figures, arguments.output)
    print(f"{tables(figures)}\n\nfigures: {arguments.output}")
    wrong = too_often(figures)
    for line in wrong:
        print(f"more than 5 % false alarms: {line}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(run_tool("study_errors", main))
