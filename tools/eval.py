# PYTHON_ARGCOMPLETE_OK
"""Phase 3: what trained projections are worth, beside their controls.

    python tools/eval.py --model_name checkpoints/vsr --cache cache/ --split test
    python tools/eval.py --from checkpoints/vsr/evaluation/checkpoint-1440-vsr_random-test.jsonl

Writes one JSON record a statement; every figure it prints follows from those, and --from computes them again.
Exit status: 0 done, 1 failed, 2 wrong usage, 130 interrupted.
"""

import sys
from pathlib import Path

from theworld.arguments import ArgumentParser, add_config_arguments, add_dry_run
from theworld.console import quiet_libraries, rehearse, status_of
from theworld.metrics import SYSTEMS, read_jsonl, write_summary
from theworld.tables import table

KEYS = "dataset_name annotations image_folder num_workers dtype device max_image_pixels eval_batch_size"


def main() -> int:
    """Parses arguments, scores, writes the records, prints the table; returns the exit status."""
    parser = ArgumentParser(description=__doc__)
    several = "a checkpoint, or a folder of checkpoints; several are compared on the same statements"
    parser.add_argument("--model_name", type=Path, nargs="+", dest="models", help=several)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--cache", type=Path, help="cache folder")
    photographs = "photographs, encoded on the spot: no cache"
    source.add_argument("--image-dir", "--image_dir", type=Path, help=photographs)
    source.add_argument(
        "--from", type=Path, dest="records", help="records of an earlier call: no model loads"
    )
    parser.add_argument("--split", default="test", help="train, dev or test (default: test)")
    parser.add_argument("--output", type=Path, help="default: a file in evaluation/ of the model's run")
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS), help="default: all")
    parser.add_argument("--train_annotations", help="where the training statements lie, if they moved")
    allowed = "score VSR zeroshot with a model of random, or the reverse, although they share statements"
    parser.add_argument("--allow_trained_statements", action="store_true", dest="allow_trained", help=allowed)
    add_config_arguments(parser, KEYS.split(), of_checkpoint=True)
    add_dry_run(parser)
    arguments = vars(parser.parse_args())
    overrides = {key: arguments.pop(key) for key in KEYS.split() if key in arguments}
    records, arguments["image_folder"] = arguments.pop("records"), arguments.pop("image_dir")
    dry_run = arguments.pop("dry_run")
    if bool(records) == bool(arguments["models"]) or (records and arguments["output"]):
        parser.error("give --model_name, or --from without --model_name and --output")
    try:
        if records and not dry_run:
            output, summary = records, write_summary(read_jsonl(records), records)
        else:
            # After the arguments: torch takes seconds to load, and --help should not.
            from theworld.dry_run import evaluation, recomputation
            from theworld.score import score_to_file

            quiet_libraries()
            if dry_run and records:
                return rehearse("eval", lambda: recomputation(records))
            if dry_run:
                return rehearse("eval", lambda: evaluation(**arguments, overrides=overrides))
            output, summary = score_to_file(**arguments, overrides=overrides, command=["python", *sys.argv])
    except (ValueError, OSError) as error:
        print(f"eval: {error}", file=sys.stderr)
        return 1
    print(table(summary))
    print(f"\nrecords: {output}; summary: {output.with_suffix('.summary.json')}")
    return 0


if __name__ == "__main__":
    sys.exit(status_of("eval", main))
