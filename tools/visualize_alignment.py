# PYTHON_ARGCOMPLETE_OK
"""Draw where world tokens lie beside Gemma's image tokens and text tokens, before and after training.

    python tools/visualize_alignment.py --model checkpoints/theworld-vsr --cache cache/ --output alignment.png

Writes a picture, and its figures into a JSON file of the same name. The cache must hold Gemma's vision features.
Exit status: 0 done, 1 failed, 2 wrong usage, 130 interrupted.
"""

import json
import sys
from pathlib import Path

from theworld.utils.commands import SETTINGS
from theworld.utils.console import loading, rehearse, run_tool

KEYS = SETTINGS["visualize_alignment"]


def main() -> int:
    """Parse the flags, measure, draw, and print the figures; return the exit status."""
    from theworld.config.cli import (
        ArgumentParser,
        add_cache,
        add_config_arguments,
        add_dry_run,
        add_split,
        path,
    )

    parser = ArgumentParser(description=__doc__)
    text = "Checkpoint, or run of which the newest checkpoint is taken."
    parser.add_argument("--model", "--model_name", type=path, required=True, metavar="FOLDER", help=text)
    add_cache(parser)
    add_split(parser)
    text = "Number of images whose tokens are compared. (default: 100)"
    parser.add_argument("--num_samples", type=int, default=100, metavar="INTEGER", help=text)
    text = "Picture, a .png file. (default: alignment.png)"
    parser.add_argument("--output", type=path, default=Path("alignment.png"), metavar="FILE", help=text)
    add_dry_run(parser)
    add_config_arguments(parser, KEYS, of_checkpoint=True)
    arguments = parser.parse_args()
    if arguments.output.suffix != ".png":
        parser.error(
            f"--output {arguments.output}: wanted a .png file; its figures go into a .json beside it"
        )
    with loading("visualize_alignment"):
        from theworld.cli.dry_run import alignment
        from theworld.evaluation.alignment import align, draw, report
        from theworld.models.serialization import SavedModel
        from theworld.utils.files import check_output, companion

    overrides = {key: value for key, value in vars(arguments).items() if key in KEYS}
    source = (arguments.cache, arguments.split, arguments.num_samples)
    if arguments.dry_run:
        return rehearse(lambda: alignment(arguments.model, *source, arguments.output, overrides))
    check_output(arguments.output)
    measured, result = align(SavedModel.open_folder(arguments.model), *source, overrides)
    draw(measured, result, arguments.output)
    figures = companion(arguments.output, ".json", ".png")
    figures.write_text(json.dumps(result, indent=2) + "\n")
    print(report(result))
    print(f"\npicture: {arguments.output}; figures: {figures}")
    return 0


if __name__ == "__main__":
    sys.exit(run_tool("visualize_alignment", main))
