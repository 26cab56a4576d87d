# PYTHON_ARGCOMPLETE_OK
"""Phase 3: evaluate trained projections, beside their controls.

    python tools/eval.py --model checkpoints/theworld-vsr --cache cache/ --split test
    python tools/eval.py --model checkpoints/theworld-vsr --image_folder images/
    python tools/eval.py --from checkpoints/theworld-vsr/evaluation/checkpoint-1440-vsr_random-test.jsonl

The second command encodes the photographs as it goes and needs no cache. A JSON record is written for each statement;
all printed figures are computed from the records, and --from computes them again.
Exit status: 0 done, 1 failed, 2 wrong usage, 130 interrupted.
"""

import sys
from pathlib import Path

from theworld.utils.starting import starting

with starting():
    from theworld.utils.commands import SETTINGS
    from theworld.utils.console import loading, rehearse, run_tool
    from theworld.utils.files import check_output, companion

KEYS = SETTINGS["eval"]


def main() -> int:
    """Parse the flags, evaluate, write the records, and print the table; return the exit status."""
    from theworld.config.cli import (
        ArgumentParser,
        add_config_arguments,
        add_dry_run,
        add_gemma,
        add_split,
        checkpoint_overrides,
        path,
    )
    from theworld.evaluation.conditions import CONDITIONS

    parser = ArgumentParser(description=__doc__)
    text = "Checkpoint, or run of which the newest checkpoint is taken; several are compared on the same statements."
    parser.add_argument(
        "--model", "--model_name", type=path, nargs="+", dest="models", metavar="FOLDER", help=text
    )
    text = "Cache folder; without it the photographs of --image_folder are encoded. (default: none)"
    parser.add_argument("--cache", type=path, metavar="FOLDER", help=text)
    text = "Records of an earlier evaluation, whose figures are computed again. (default: none)"
    parser.add_argument("--from", type=path, dest="records", metavar="FILE", help=text)
    add_split(parser)
    text = "File for the records. (default: a file in the folder evaluation of the run)"
    parser.add_argument("--output", type=path, metavar="FILE", help=text)
    text = "Conditions under which the model answers. (default: all)"
    parser.add_argument(
        *("--conditions", "--systems"), nargs="+", choices=CONDITIONS, default=list(CONDITIONS), help=text
    )
    text = "Folder of the training statements, if it has moved. (default: the one of the checkpoint)"
    parser.add_argument("--train_annotations", type=path, metavar="PATH", help=text)
    text = "Evaluate on one release of VSR a model trained on the other, although they share statements."
    parser.add_argument("--allow_trained_statements", action="store_true", dest="allow_trained", help=text)
    add_gemma(parser)
    add_dry_run(parser)
    add_config_arguments(parser, KEYS, source="the checkpoint")
    parsed = parser.parse_args()
    overrides = checkpoint_overrides(parsed, KEYS)
    arguments = {key: value for key, value in vars(parsed).items() if key not in (*KEYS, "gemma")}
    records, dry_run = arguments.pop("records"), arguments.pop("dry_run")
    folder = overrides.get("image_folder")
    if records and (arguments["models"] or arguments["cache"] or folder or arguments["output"]):
        parser.error("--from needs no --model, --cache, --image_folder or --output")
    if not records and not (arguments["models"] and (arguments["cache"] or folder)):
        parser.error("give --model with --cache or --image_folder, or give --from")
    arguments["image_folder"] = None
    if folder and not arguments["cache"]:
        arguments["image_folder"] = Path(overrides.pop("image_folder"))
    if arguments["train_annotations"]:
        arguments["train_annotations"] = str(arguments["train_annotations"])

    with loading("eval"):
        from theworld.utils.device import start_compilers

        if not (dry_run or records):
            start_compilers(None, overrides.get("device", "auto"))
        from theworld.evaluation.metrics import write_summary
        from theworld.evaluation.records import read_results
        from theworld.evaluation.tables import table

    if records and not dry_run:
        check_output(companion(records, ".summary.json", ".jsonl"), "--from")
        output, summary = records, write_summary(read_results(records)[0], records)
    else:
        with loading("eval"):
            from theworld.cli.dry_run import evaluation, recomputation
            from theworld.evaluation.score import score_to_file

        if dry_run:
            plan = recomputation(records) if records else evaluation(**arguments, overrides=overrides)
            return rehearse(lambda: plan)
        output, summary = score_to_file(**arguments, overrides=overrides, command=["python", *sys.argv])
    print(table(summary))
    print(f"\nrecords: {output}; summary: {companion(output, '.summary.json', '.jsonl')}")
    return 0


if __name__ == "__main__":
    sys.exit(run_tool("eval", main))
