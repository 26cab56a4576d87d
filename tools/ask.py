# PYTHON_ARGCOMPLETE_OK
"""Is a statement true of a photograph? P(true) with world tokens, without them, and with latents that say nothing.

    python tools/ask.py --model checkpoints/vsr --image photo.jpg --statement "The cat is left of the laptop."
    python tools/ask.py --model checkpoints/vsr --serve

The second line serves a page of the same on this machine, until Ctrl-C.
Exit status: 0 done, 1 failed, 2 wrong usage, 130 interrupted.
"""

import itertools
import json
import sys
from pathlib import Path

from theworld.arguments import ArgumentParser, add_config_arguments, add_dry_run
from theworld.console import quiet_libraries, rehearse, status_of

KEYS = "dtype device max_image_pixels".split()
SYSTEMS = ("world", "baseline", "zero")  # as in theworld.asking, which takes seconds to load


def main() -> int:
    """Parses arguments, asks or serves, prints; returns the exit status."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument(
        "--model", required=True, help="a checkpoint, a folder of checkpoints, or user/name on the hub"
    )
    parser.add_argument("--image", type=Path, help="a photograph")
    parser.add_argument("--statement", nargs="+", action="extend", default=[], help="one or more, in quotes")
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS), help="default: all")
    parser.add_argument("--json", action="store_true", help="print one JSON object (default: a table)")
    parser.add_argument("--serve", action="store_true", help="serve a web page instead of --image")
    parser.add_argument("--host", default="127.0.0.1", help="of the page (default: 127.0.0.1: for here only)")
    parser.add_argument("--port", type=int, default=8642, help="of the page; 0: a free one (default: 8642)")
    add_config_arguments(parser, KEYS, of_checkpoint=True)
    add_dry_run(parser)
    arguments = parser.parse_args()
    if arguments.serve and (arguments.image or arguments.statement or arguments.json):
        parser.error("--serve asks for all else on its page; leave out --image, --statement and --json")
    if not arguments.serve and not (arguments.image and arguments.statement):
        parser.error("--image and --statement are required, or --serve")
    if not 0 <= arguments.port <= 65535:
        parser.error(f"--port is {arguments.port}; give 0 to 65535")
    # After the arguments: torch takes seconds to load, and --help should not.
    from theworld.serve import plan_page, serve
    from theworld.tryout import answers, load_for_asking, plan, table

    quiet_libraries()
    overrides = {key: value for key, value in vars(arguments).items() if key in KEYS}
    name, systems = arguments.model, list(dict.fromkeys(arguments.systems))
    image, statements, place = arguments.image, arguments.statement, (arguments.host, arguments.port)
    if arguments.dry_run:
        page = plan_page(*place) if arguments.serve else ()
        return rehearse(
            "ask", lambda: itertools.chain(plan(name, image, statements, systems, overrides), page)
        )
    try:
        if arguments.serve:
            serve(name, systems, overrides, *place)
            return 0
        rows = answers(load_for_asking(name, systems, overrides), image, statements, systems)
    except (ValueError, OSError) as error:
        print(f"ask: {error}", file=sys.stderr)
        return 1
    said = {"model": name, "image": str(image), "answers": rows}
    print(json.dumps(said, ensure_ascii=False) if arguments.json else table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(status_of("ask", main))
