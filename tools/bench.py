"""Measures every phase, beside what a user would otherwise run and beside what the machine can do.

    python tools/bench.py --shapes small
    python tools/bench.py --shapes real --share 0.1 --parts encode train variants --output bench.json

Models have random weights and are made on the spot. Figures are added to the output file as they come. The last line is
one JSON object with the speed-ups.
"""

import json
import shlex
import sys
from dataclasses import replace
from pathlib import Path

from theworld.arguments import ArgumentParser


def main() -> int:
    """Parses arguments, measures, prints the table and the result line; returns the exit status."""
    from theworld.bench import PARTS, run_parts
    from theworld.bench_models import SHAPES
    from theworld.bench_results import Results
    from theworld.bench_setup import Workbench
    from theworld.bench_training import VARIANTS
    from theworld.console import quiet_libraries
    from theworld.weights import resolve_device

    parser = ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--shapes", choices=SHAPES, default="small", help="sizes (default: small)")
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=list(PARTS), help="default: all")
    parser.add_argument(
        "--variants", nargs="*", choices=VARIANTS, default=list(VARIANTS), help="default: all"
    )
    parser.add_argument("--output", type=Path, default=Path("checkpoints/bench.json"), help="figures")
    parser.add_argument(
        "--folder", type=Path, default=Path("checkpoints/bench"), help="models, data and caches; used again"
    )
    parser.add_argument("--share", type=float, help="of VSR's images to stand in (default: by --shapes)")
    parser.add_argument("--annotations", type=Path, help="VSR's own folder (default: stand-ins)")
    parser.add_argument("--image_folder", type=Path, help="their photographs (default: stand-ins)")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default: auto)")
    parser.add_argument("--changes", type=json.loads, default={}, help="of the settings, JSON (default: {})")
    parser.add_argument("--random_cache", action="store_true", help="read random numbers, extract nothing")
    parser.add_argument("--sizes", type=json.loads, default={}, help="other sizes of --shapes, JSON")
    arguments = parser.parse_args()
    quiet_libraries()
    sizes = arguments.sizes | ({} if arguments.share is None else {"share": arguments.share})
    shapes = replace(SHAPES[arguments.shapes], **sizes)
    try:
        results = Results(arguments.output, shlex.join(["python", "tools/bench.py", *sys.argv[1:]]))
    except ValueError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    bench = Workbench(
        shapes,
        arguments.folder.resolve(),
        results,
        resolve_device(arguments.device),
        arguments.annotations and arguments.annotations.resolve(),
        arguments.image_folder and arguments.image_folder.resolve(),
        tuple(arguments.variants),
        arguments.changes,
        arguments.random_cache,
    )
    summary = run_parts(bench, arguments.parts)
    print(f"\n{results.table()}\n\nfigures: {arguments.output}")
    print(json.dumps(summary))
    return 0


if __name__ == "__main__":
    sys.exit(main())
