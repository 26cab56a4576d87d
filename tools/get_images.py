# PYTHON_ARGCOMPLETE_OK
"""Download the photographs that VSR names, or copy them from a COCO data set on this machine.

    python tools/get_images.py --output images/
    python tools/get_images.py --output images/ --coco coco/train2017.zip --coco coco/val2017.zip

The same command continues after any interruption. Downloads go through the proxy of the environment (HTTPS_PROXY,
NO_PROXY), with the certificates of REQUESTS_CA_BUNDLE if that is set.
Exit status: 0 all photographs are there, 1 something failed, 2 wrong usage, 130 interrupted.
"""

import sys
from pathlib import Path

from theworld.utils.starting import starting

with starting():
    from theworld.utils.commands import SETTINGS
    from theworld.utils.console import loading, rehearse, run_tool


def main() -> int:
    """Parse the flags, get the missing photographs, and print a summary; return the exit status."""
    from theworld.config.cli import (
        ArgumentParser,
        add_config_arguments,
        add_dry_run,
        config_from_arguments,
        path,
    )

    parser = ArgumentParser(description=__doc__)
    text = "Folder for the photographs. (default: images)"
    parser.add_argument("--output", type=path, default=Path("images"), metavar="FOLDER", help=text)
    text = (
        "Copy from this COCO folder or zip file instead of downloading; may be repeated. (default: download)"
    )
    parser.add_argument("--coco", type=path, action="append", metavar="FOLDER_OR_ZIP", help=text)
    text = "Host to download from; may be repeated. (default: images.cocodataset.org)"
    parser.add_argument("--allowed_host", action="append", metavar="HOST", help=text)
    text = "Number of simultaneous downloads or copies. (default: 8)"
    parser.add_argument("--num_workers", type=int, default=8, metavar="INTEGER", help=text)
    add_dry_run(parser)
    add_config_arguments(parser, SETTINGS["get_images"])
    arguments = parser.parse_args()
    if arguments.num_workers < 1:
        parser.error(f"--num_workers is {arguments.num_workers}; give 1 or more")
    with loading("get_images"):
        from theworld.data.download import COCO_HOST, get_images, plan_images

    hosts = arguments.allowed_host or [COCO_HOST]
    options = (arguments.output, arguments.coco or [], hosts, arguments.num_workers)
    if arguments.dry_run:
        return rehearse(lambda: plan_images(config_from_arguments(arguments), *options))
    summary = get_images(config_from_arguments(arguments), *options)
    print(summary.report(arguments.output))
    return 1 if summary.failures else 0


if __name__ == "__main__":
    hint = "interrupted; the same command goes on from here"
    sys.exit(run_tool("get_images", main, interrupted=hint))
