# PYTHON_ARGCOMPLETE_OK
"""Measures every phase, beside what a user would otherwise run and beside what the machine can do.

    python tools/bench.py --shapes small
    python tools/bench.py --shapes real --share 0.1 --parts encode train variants --output bench.json

Models have random weights and are made on the spot. Figures are added to the output file as they come. The last line is
one JSON object with the speed-ups.
Exit status: 0 done (a part that failed is in the figures), 1 could not start, 2 wrong usage, 130 interrupted.
"""

import json
import shlex
import sys
from pathlib import Path

from theworld.arguments import ArgumentParser, add_dry_run
from theworld.bench_choices import PART_NAMES, SHAPE_NAMES, VARIANTS, json_object
from theworld.console import quiet_libraries, rehearse, status_of


def main() -> int:
    """Parses arguments, measures, prints the table and the result line; returns the exit status."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument(
        "--shapes", choices=SHAPE_NAMES, default="small", help="sizes of models and data (default: small)"
    )
    parser.add_argument(
        "--parts",
        nargs="*",
        choices=PART_NAMES,
        default=list(PART_NAMES),
        help="what to measure (default: all)",
    )
    parser.add_argument(
        "--variants", nargs="*", choices=VARIANTS, default=list(VARIANTS), help="kinds of runs (default: all)"
    )
    output = Path("checkpoints/bench.json")
    parser.add_argument("--output", type=Path, default=output, help=f"figures (default: {output})")
    folder = Path("checkpoints/bench")
    text = f"models, data and caches; used again (default: {folder})"
    parser.add_argument("--folder", type=Path, default=folder, help=text)
    parser.add_argument("--share", type=float, help="of VSR's images to stand in (default: by --shapes)")
    parser.add_argument("--annotations", type=Path, help="VSR's own folder (default: stand-ins)")
    parser.add_argument("--image_folder", type=Path, help="their photographs (default: stand-ins)")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default: auto)")
    parser.add_argument("--changes", type=json_object, default={}, help="of the settings, JSON (default: {})")
    parser.add_argument("--random_cache", action="store_true", help="read random numbers, extract nothing")
    parser.add_argument("--sizes", type=json_object, default={}, help="other sizes, JSON (default: {})")
    add_dry_run(parser)
    arguments = parser.parse_args()
    # After the arguments: torch takes seconds to load, and --help should not.
    from theworld.bench import open_bench, plan_parts, run_parts

    quiet_libraries()
    command, options = shlex.join(["python", "tools/bench.py", *sys.argv[1:]]), vars(arguments)
    if arguments.dry_run:
        return rehearse("bench", lambda: plan_parts(open_bench(options, command), arguments.parts))
    try:
        bench = open_bench(options, command)
        summary = run_parts(bench, arguments.parts)
    except (ValueError, OSError) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    print(f"\n{bench.results.table()}\n\nfigures: {arguments.output}")
    print(json.dumps(summary))
    return 0


if __name__ == "__main__":
    sys.exit(status_of("bench", main))
