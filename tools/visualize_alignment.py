# PYTHON_ARGCOMPLETE_OK
"""Draw where world tokens lie beside Gemma's image tokens and text tokens, before and after training.

    python tools/visualize_alignment.py --model checkpoints/theworld-vsr --cache cache/ --output alignment.png
    python tools/visualize_alignment.py --model checkpoints/theworld-vsr --image_folder images/ --num_samples 100

Writes a picture, and its figures into a JSON file of the same name. The cache must hold Gemma's vision features; the
second command needs none and encodes the photographs.
Exit status: 0 done, 1 failed, 2 wrong usage, 130 interrupted.
"""

import sys
from pathlib import Path

from theworld.utils.starting import starting

with starting():
    from theworld.utils.commands import SETTINGS
    from theworld.utils.console import loading, rehearse, run_tool

KEYS = SETTINGS["visualize_alignment"]
DEFAULT_CACHE = Path("cache")


def main() -> int:
    """Parse the flags, measure, draw, and print the figures; return the exit status."""
    from theworld.config.cli import (
        ArgumentParser,
        add_config_arguments,
        add_dry_run,
        add_gemma,
        add_split,
        checkpoint_overrides,
        path,
    )

    parser = ArgumentParser(description=__doc__)
    text = "Checkpoint, or run of which the newest checkpoint is taken."
    parser.add_argument("--model", "--model_name", type=path, required=True, metavar="FOLDER", help=text)
    text = (
        "Cache folder; without it the photographs of image_folder are encoded. (default: the folder cache, if there is "
        "a cache in it and --image_folder is not given)"
    )
    parser.add_argument("--cache", type=path, metavar="FOLDER", help=text)
    add_split(parser)
    text = "Number of images whose tokens are compared. (default: 100)"
    parser.add_argument("--num_samples", type=int, default=100, metavar="INTEGER", help=text)
    text = "Picture, a .png file. (default: alignment.png)"
    parser.add_argument("--output", type=path, default=Path("alignment.png"), metavar="FILE", help=text)
    add_gemma(parser)
    add_dry_run(parser)
    add_config_arguments(parser, KEYS, source="the checkpoint")
    arguments = parser.parse_args()
    if arguments.output.suffix != ".png":
        parser.error(
            f"--output {arguments.output}: wanted a .png file; its figures go into a .json beside it"
        )
    with loading("visualize_alignment"):
        from theworld.cli.dry_run import alignment
        from theworld.evaluation.alignment import align, draw, report
        from theworld.evaluation.records import publish_json
        from theworld.models.serialization import SavedModel
        from theworld.store.format import stores_of
        from theworld.utils.files import check_output, companion

    overrides = checkpoint_overrides(arguments, KEYS)
    if arguments.cache is None and "image_folder" not in overrides and stores_of(DEFAULT_CACHE):
        arguments.cache = DEFAULT_CACHE
    source = (arguments.cache, arguments.split, arguments.num_samples)
    if arguments.dry_run:
        return rehearse(lambda: alignment(arguments.model, *source, arguments.output, overrides))
    figures = companion(arguments.output, ".json", ".png")
    for file in (figures, arguments.output):
        check_output(file)
    measured, result = align(SavedModel.open_folder(arguments.model), *source, overrides)
    draw(measured, result, arguments.output)
    publish_json(result, figures)
    print(report(result))
    print(f"\npicture: {arguments.output}; figures: {figures}")
    return 0


if __name__ == "__main__":
    sys.exit(run_tool("visualize_alignment", main))
