# PYTHON_ARGCOMPLETE_OK
"""Get a benchmark of spatial relations from the hub, as a folder of statements and photographs for tools/eval.py.

    python tools/get_benchmark.py whatsup_a
    python tools/eval.py --model checkpoints/theworld-vsr --annotations whatsup_a --image_folder whatsup_a/images

The same command continues after any interruption. README.md in the folder has licences and citation.
Exit status: 0 the benchmark is complete, 1 something failed, 2 wrong usage, 130 interrupted.
"""

import sys
from pathlib import Path

from theworld.utils.starting import starting

with starting():
    from theworld.utils.commands import PLACEHOLDER, command
    from theworld.utils.console import loading, rehearse, run_tool


def main() -> int:
    """Parse the flags, get the benchmark, and print a summary; return the exit status."""
    from theworld.config.cli import ArgumentParser, add_dry_run, path
    from theworld.data.benchmarks import BENCHMARKS, IMAGES, get_benchmark, plan_benchmark
    from theworld.utils.text import counted

    parser = ArgumentParser(description=__doc__)
    listed = "; ".join(f"{name} ({one.title}; {one.rows:,} items)" for name, one in BENCHMARKS.items())
    parser.add_argument("name", choices=BENCHMARKS, metavar="NAME", help=f"Benchmark: {listed}.")
    text = "Folder for the benchmark. (default: NAME in the working folder)"
    parser.add_argument("--output", type=path, metavar="FOLDER", help=text)
    text = "Folder with the files of its data set, as on the hub. (default: download them)"
    parser.add_argument("--source", type=path, metavar="FOLDER", help=text)
    add_dry_run(parser)
    arguments = parser.parse_args()
    benchmark = BENCHMARKS[arguments.name]
    output = arguments.output or Path(arguments.name)
    if arguments.dry_run:
        return rehearse(lambda: plan_benchmark(benchmark, output, arguments.source))
    with loading("get_benchmark"):
        record = get_benchmark(benchmark, output, arguments.source)
    print(f"{benchmark.title}\n{benchmark.licence} Citation: {output / 'README.md'}")
    print(
        f"{counted(record['items'], 'item')}, {counted(record['statements'], 'statement')}, "
        f"{counted(len(record['photographs']), 'photograph')} "
        f"in {output}"
    )
    folders = ("--annotations", output, "--image_folder", output / IMAGES)
    print(f"score a model with: {command('eval', '--model', PLACEHOLDER, *folders)}")
    return 0


if __name__ == "__main__":
    hint = "interrupted; the same command goes on from here"
    sys.exit(run_tool("get_benchmark", main, interrupted=hint))
