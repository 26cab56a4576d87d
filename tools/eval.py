# PYTHON_ARGCOMPLETE_OK
"""Phase 3: what a trained projection is worth, beside its controls.

    python tools/eval.py --model_name checkpoints/vsr --cache cache/ --split test --output results.jsonl

Writes one JSON record a statement; every figure it prints follows from those.
Exit status: 0 done, 1 failed, 2 wrong usage, 130 interrupted.
"""

import json
import sys
from pathlib import Path

from theworld.arguments import ArgumentParser, add_config_arguments, add_dry_run
from theworld.console import quiet_libraries, rehearse, status_of
from theworld.metrics import SYSTEMS, summarise, table, write_jsonl

KEYS = "dataset_name annotations num_workers dtype device max_image_pixels eval_batch_size".split()


def main() -> int:
    """Parses arguments, scores, writes the records, prints the table; returns the exit status."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument(
        "--model_name", type=Path, required=True, help="a checkpoint, or a folder of checkpoints"
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--cache", type=Path, help="cache folder")
    source.add_argument(
        "--image-dir", "--image_dir", type=Path, help="photographs, encoded on the spot: no cache"
    )
    parser.add_argument("--split", default="test", help="train, dev or test (default: test)")
    parser.add_argument("--output", type=Path, default=Path("results.jsonl"), help="default: results.jsonl")
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS), help="default: all")
    add_config_arguments(parser, KEYS, of_checkpoint=True)
    add_dry_run(parser)
    arguments = parser.parse_args()
    # After the arguments: torch takes seconds to load, and --help should not.
    from theworld.checkpoint import find_model
    from theworld.dry_run import evaluation
    from theworld.places import check_output
    from theworld.score import score

    quiet_libraries()
    overrides = {key: value for key, value in vars(arguments).items() if key in KEYS}
    if arguments.dry_run:
        plan = (arguments.cache, arguments.image_dir, arguments.split, arguments.systems, arguments.output)
        return rehearse("eval", lambda: evaluation(arguments.model_name, *plan, overrides))
    try:
        check_output(arguments.output)
        checkpoint = find_model(arguments.model_name)
        rows = score(
            checkpoint, arguments.cache, arguments.image_dir, arguments.split, arguments.systems, overrides
        )
        write_jsonl(rows, arguments.output)
    except (ValueError, OSError) as error:
        print(f"eval: {error}", file=sys.stderr)
        return 1
    summary = summarise(rows)
    arguments.output.with_suffix(".summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    print(table(summary))
    print(f"\nrecords: {arguments.output}; summary: {arguments.output.with_suffix('.summary.json')}")
    return 0


if __name__ == "__main__":
    sys.exit(status_of("eval", main))
