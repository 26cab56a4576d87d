# PYTHON_ARGCOMPLETE_OK
"""Gets the photographs that VSR names, and no others: from where they are published, or from a COCO that you have.

    python tools/get_images.py --output images/
    python tools/get_images.py --output images/ --coco coco/train2017.zip --coco coco/val2017.zip

Run the same command again to go on after any stop.
Exit status: 0 all are there, 1 something failed, 2 wrong usage, 130 interrupted.
"""

import sys
from pathlib import Path

from theworld.arguments import ArgumentParser, add_config_arguments, add_dry_run, config_from_arguments
from theworld.console import quiet_libraries, rehearse
from theworld.fetch import COCO_HOST


def main() -> int:
    """Parses arguments, gets what is missing, prints; returns the exit status."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("images"), help="folder (default: images)")
    parser.add_argument(
        "--coco",
        type=Path,
        action="append",
        metavar="FOLDER_OR_ZIP",
        help="take from this COCO and download nothing; may be repeated (default: download)",
    )
    parser.add_argument(
        "--allowed_host",
        action="append",
        metavar="HOST",
        help=f"download from this host; may be repeated (default: {COCO_HOST})",
    )
    parser.add_argument("--num_workers", type=int, default=8, help="at the same time (default: 8)")
    add_config_arguments(parser, ["dataset_name", "annotations", "max_image_pixels"])
    add_dry_run(parser)
    arguments = parser.parse_args()
    if arguments.num_workers < 1:
        parser.error(f"--num_workers is {arguments.num_workers}; give 1 or more")
    # After the arguments: torch takes seconds to load, and --help should not.
    from theworld.gather import get_images, plan_images

    quiet_libraries()
    hosts = arguments.allowed_host or [COCO_HOST]
    options = (arguments.output, arguments.coco or [], hosts, arguments.num_workers)
    if arguments.dry_run:
        return rehearse("get_images", lambda: plan_images(config_from_arguments(arguments), *options))
    try:
        gathered = get_images(config_from_arguments(arguments), *options)
    except KeyboardInterrupt:
        print("\nget_images: interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    except (ValueError, OSError) as error:
        print(f"get_images: {error}", file=sys.stderr)
        return 1
    print(gathered.report(arguments.output))
    return 1 if gathered.failures else 0


if __name__ == "__main__":
    sys.exit(main())
