# PYTHON_ARGCOMPLETE_OK
"""Ask a trained model whether statements are true of a photograph: with world tokens, without, and with zero latents.

    python tools/ask.py --model checkpoints/theworld-vsr --image photo.jpg --statement "The cat is left of the laptop."
    python tools/ask.py --model checkpoints/theworld-vsr --serve

The first command prints the probability that each statement is true. The second serves a web page on this machine where
photographs and statements can be entered, until Ctrl-C.
Exit status: 0 done, 1 failed, 2 wrong usage, 130 interrupted.
"""

import argparse
import itertools
import json
import sys
from pathlib import Path
from typing import Any

from theworld.utils.starting import starting

with starting():
    from theworld.utils.commands import SETTINGS
    from theworld.utils.console import ExplainedError, loading, rehearse, run_tool

KEYS = SETTINGS["ask"]
CONDITIONS = ("world", "baseline", "zero")  # as in theworld.models.inference, which takes seconds to load


def main() -> int:
    """Parse the flags, answer or serve, and print the answers; return the exit status."""
    from theworld.config.cli import (
        ArgumentParser,
        add_config_arguments,
        add_dry_run,
        add_gemma,
        checkpoint_overrides,
        expanded,
    )

    parser = ArgumentParser(description=__doc__)
    text = "Checkpoint, run of which the newest checkpoint is taken, or user/name on the hub."
    parser.add_argument("--model", type=expanded, required=True, metavar="NAME", help=text)
    text = "Photograph that the statements are about. (default: none)"
    parser.add_argument("--image", metavar="FILE", help=text)
    text = "Statements about the photograph, each in quotes. (default: none)"
    parser.add_argument("--statement", nargs="+", action="extend", default=[], metavar="TEXT", help=text)
    text = "Conditions under which the model answers. (default: all)"
    parser.add_argument(
        *("--conditions", "--systems"), nargs="+", choices=CONDITIONS, default=list(CONDITIONS), help=text
    )
    text = "Print one JSON object. (default: a table)"
    parser.add_argument("--json", action="store_true", help=text)
    text = "Serve a web page where photographs and statements are entered. (default: false)"
    parser.add_argument("--serve", action="store_true", help=text)
    text = "Address of the page. (default: 127.0.0.1, which only this machine can reach)"
    parser.add_argument("--host", default="127.0.0.1", metavar="ADDRESS", help=text)
    text = "Port of the page; 0: any free port. (default: 8642)"
    parser.add_argument("--port", type=int, default=8642, metavar="INTEGER", help=text)
    add_gemma(parser)
    add_dry_run(parser)
    add_config_arguments(parser, KEYS, source="the checkpoint")
    arguments = parser.parse_args()
    if arguments.serve and (arguments.image or arguments.statement or arguments.json):
        parser.error("--serve asks for all else on its page; leave out --image, --statement and --json")
    if not arguments.serve and not (arguments.image and arguments.statement):
        parser.error("--image and --statement are required, or --serve")
    if not 0 <= arguments.port <= 65535:
        parser.error(f"--port is {arguments.port}; give 0 to 65535")
    arguments.conditions = list(dict.fromkeys(arguments.conditions))
    overrides = checkpoint_overrides(arguments, KEYS)
    try:
        if arguments.dry_run:
            return dry_run(arguments, overrides)
        return serve(arguments, overrides) if arguments.serve else ask(arguments, overrides)
    except ModuleNotFoundError as error:
        package = str(error.name).partition(".")[0]
        if package not in ("starlette", "uvicorn"):
            raise
        raise ExplainedError(f"--serve needs {package}: pip install 'theworld[serve]'") from None


# The functions import what they need themselves: torch takes seconds to load, and --help should not.


def ask(arguments: argparse.Namespace, overrides: dict[str, Any]) -> int:
    """Print the answers about one photograph."""
    with loading("ask"):
        from theworld.serving.ask import answers, check_question, load_for_asking, table

    check_question(arguments.image, arguments.statement)  # before the model loads
    model = load_for_asking(arguments.model, arguments.conditions, overrides)
    rows = answers(model, arguments.image, arguments.statement, arguments.conditions)
    result = {"model": arguments.model, "image": str(Path(arguments.image)), "answers": rows}
    print(json.dumps(result) if arguments.json else table(rows))
    return 0


def serve(arguments: argparse.Namespace, overrides: dict[str, Any]) -> int:
    """Serve the page until a signal ends it."""
    from theworld.serving.server import Limits, Questions, Server, announcement, listen, page_files

    # The address is taken before the model loads, which takes minutes. A browser that is early waits.
    with listen(arguments.host, arguments.port) as listener:
        with loading("ask"):
            from theworld.serving.ask import LABELS, answers, load_for_asking, recorded_names

        conditions = arguments.conditions
        model = load_for_asking(arguments.model, conditions, overrides)
        limits = Limits(max_pixels=model.config.max_image_pixels)
        labels = [(name, LABELS[name]) for name in recorded_names(model, conditions)]
        questions = Questions(lambda pixels, texts: answers(model, pixels, texts, conditions), limits)
        server = Server(listener, arguments.host, questions, page_files(arguments.model, labels, limits))
        print(*announcement(listener, arguments.host), sep="\n", flush=True)
        server.run()
    return 0


def dry_run(arguments: argparse.Namespace, overrides: dict[str, Any]) -> int:
    """Print what would be done; return the exit status."""
    with loading("ask"):
        if arguments.serve:
            from theworld.serving.server import plan_page
        from theworld.serving.ask import plan
        from theworld.utils.console import line

    parts = plan(arguments.model, arguments.image, arguments.statement, arguments.conditions, overrides)
    page = plan_page(arguments.host, arguments.port) if arguments.serve else ()
    return rehearse(lambda: itertools.starmap(line, itertools.chain(parts, page)))


if __name__ == "__main__":
    sys.exit(run_tool("ask", main, prints=True))
