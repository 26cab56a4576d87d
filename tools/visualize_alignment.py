# PYTHON_ARGCOMPLETE_OK
"""Where world tokens lie beside Gemma's own image tokens and text, before training and after.

    python tools/visualize_alignment.py --model_name checkpoints/vsr --cache cache/ --output alignment.png

Writes a picture, and its figures into a JSON file beside it.
Exit status: 0 done, 1 failed, 2 wrong usage, 130 interrupted.
"""

import json
import sys
from pathlib import Path

from theworld.arguments import ArgumentParser, add_config_arguments, add_dry_run
from theworld.console import quiet_libraries, rehearse, status_of

KEYS = "dataset_name annotations dtype device".split()


def main() -> int:
    """Parses arguments, measures, draws, prints the figures; returns the exit status."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument(
        "--model_name", "--model", type=Path, required=True, help="a checkpoint, or a folder of checkpoints"
    )
    parser.add_argument(
        "--cache", type=Path, required=True, help="cache folder, with Gemma's vision features"
    )
    parser.add_argument("--split", default="test", help="train, dev or test (default: test)")
    parser.add_argument("--num_samples", "--num-samples", type=int, default=100, help="images (default: 100)")
    parser.add_argument("--output", type=Path, default=Path("alignment.png"), help="default: alignment.png")
    add_config_arguments(parser, KEYS, of_checkpoint=True)
    add_dry_run(parser)
    arguments = parser.parse_args()
    if arguments.output.suffix != ".png":
        parser.error(
            f"--output {arguments.output}: wanted a .png file; its figures go into a .json beside it"
        )
    # After the arguments: torch takes seconds to load, and --help should not.
    from theworld.align import align
    from theworld.align_picture import draw
    from theworld.align_report import report
    from theworld.checkpoint import find_checkpoint
    from theworld.dry_run import alignment
    from theworld.places import check_output

    quiet_libraries()
    figures = arguments.output.with_suffix(".json")
    overrides = {key: value for key, value in vars(arguments).items() if key in KEYS}
    source = (arguments.cache, arguments.split, arguments.num_samples)
    if arguments.dry_run:
        plan = (arguments.model_name, *source, arguments.output, overrides)
        return rehearse("visualize_alignment", lambda: alignment(*plan))
    try:
        check_output(arguments.output)
        measured, result = align(find_checkpoint(arguments.model_name), *source, overrides)
        draw(measured, result, arguments.output)
        figures.write_text(json.dumps(result, indent=2) + "\n")
    except (ValueError, OSError) as error:
        print(f"visualize_alignment: {error}", file=sys.stderr)
        return 1
    print(report(result))
    print(f"\npicture: {arguments.output}; figures: {figures}")
    return 0


if __name__ == "__main__":
    sys.exit(status_of("visualize_alignment", main))
