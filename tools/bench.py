# PYTHON_ARGCOMPLETE_OK
"""Measure every phase, beside the usual way to do it and beside the limits of the machine.

    python tools/bench.py --shapes small
    python tools/bench.py --shapes real --share 0.1 --parts encode train variants --output bench.json

The models have random weights. Figures are added to the output file as they come. At the real shapes the table is
followed by a verdict, one line for each figure that has an aim; the last line is one JSON object with the speed-ups.
Exit status: 0 done (a failed part is in the figures), 1 could not start, 2 wrong usage, 130 interrupted.
"""

import json
import shlex
import sys
from pathlib import Path

from theworld.utils.starting import starting

with starting():
    from theworld.utils.console import loading, rehearse, run_tool


def main() -> int:
    """Parse the flags, measure, and print the table and the result line; return the exit status."""
    from benchmark.choices import PART_NAMES, SHAPE_NAMES, VARIANTS, json_object

    from theworld.config.cli import ArgumentParser, add_dry_run, path

    parser = ArgumentParser(description=__doc__)
    text = "Sizes of the models and the data. (default: small)"
    parser.add_argument("--shapes", choices=SHAPE_NAMES, default="small", help=text)
    text = "Parts to measure. (default: all)"
    parser.add_argument("--parts", nargs="*", choices=PART_NAMES, default=list(PART_NAMES), help=text)
    text = "Variants of training to measure. (default: all)"
    parser.add_argument("--variants", nargs="*", choices=VARIANTS, default=list(VARIANTS), help=text)
    output, folder = Path("checkpoints/bench.json"), Path("checkpoints/bench")
    text = f"File for the figures. (default: {output})"
    parser.add_argument("--output", type=path, default=output, metavar="FILE", help=text)
    text = f"Folder for models, data and caches, which are used again. (default: {folder})"
    parser.add_argument("--folder", type=path, default=folder, metavar="FOLDER", help=text)
    text = "Share of VSR's images that the generated data stands for, above 0 and at most 1. (default: by --shapes)"
    parser.add_argument("--share", type=float, metavar="NUMBER", help=text)
    text = "Folder of VSR's annotations. (default: generated statements)"
    parser.add_argument("--annotations", type=path, metavar="PATH", help=text)
    text = "Folder of the photographs of --annotations. (default: generated photographs)"
    parser.add_argument("--image_folder", "--image_dir", type=path, metavar="PATH", help=text)
    text = "Device to compute on: auto, cpu, cuda or cuda:N; auto: CUDA if there is one. (default: auto)"
    parser.add_argument("--device", default="auto", metavar="TEXT", help=text)
    text = "Settings to change, as a JSON object. (default: {})"
    parser.add_argument("--changes", type=json_object, default={}, metavar="JSON", help=text)
    text = "Train from random numbers and extract nothing. (default: false)"
    parser.add_argument("--random_cache", action="store_true", help=text)
    text = "Sizes to change from those of --shapes, as a JSON object. (default: {})"
    parser.add_argument("--sizes", type=json_object, default={}, metavar="JSON", help=text)
    add_dry_run(parser)
    arguments = parser.parse_args()
    with loading("bench"):
        from benchmark.bench import open_bench, plan_parts, run_parts
        from benchmark.verdict import verdict

    command, options = shlex.join(["python", "tools/bench.py", *sys.argv[1:]]), vars(arguments)
    if arguments.dry_run:
        return rehearse(lambda: plan_parts(open_bench(options, command), arguments.parts))
    bench = open_bench(options, command)
    summary = run_parts(bench, arguments.parts)
    print(f"\n{bench.results.table()}\n")
    if bench.shapes.name == "real":  # what the aims are of
        print("\n".join(verdict(bench.results.content["parts"])))
    print(f"\nfigures: {arguments.output}")
    print(json.dumps(summary))
    return 0


if __name__ == "__main__":
    sys.exit(run_tool("bench", main))
