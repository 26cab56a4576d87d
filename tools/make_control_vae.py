# PYTHON_ARGCOMPLETE_OK
"""Train the encoder of the positive control (`make study-control`): a small VAE that knows what hard scenes look like.

    python tools/make_control_vae.py --output checkpoints/control-vae
    python tools/draw_scenes.py --hard --output checkpoints/control-scenes

It takes the place of the video model in a study that has an effect to find. It is no video model, and such a study says
nothing about one.
Exit status: 0 done, 1 failed, 2 wrong usage, 130 interrupted.
"""

import shlex
import sys

from theworld.utils.starting import starting

with starting():
    from theworld.utils.console import loading, rehearse, run_tool

HELP = {
    "seed": "Random seed of the scenes and of their order.",
    "num_scenes": "Number of scenes that are drawn to learn from; one in 32 is held out.",
    "steps": "Number of optimizer steps.",
    "batch_size": "Number of scenes in an optimizer step.",
    "learning_rate": "Peak learning rate, per optimizer step.",
    "workers": "Number of processes that draw scenes.",
}


def main() -> int:
    """Parse the flags, draw, train, write, and print the folder; return the exit status."""
    from demo_models.settings import ControlSettings, add_settings

    from theworld.config.cli import ArgumentParser, add_dry_run, path

    parser = ArgumentParser(description=__doc__)
    text = "Folder to write the VAE into, for --cosmos_model_name of tools/study.py."
    parser.add_argument("--output", type=path, required=True, metavar="FOLDER", help=text)
    add_settings(parser, ControlSettings, HELP)
    add_dry_run(parser)
    options = vars(parser.parse_args())
    output, dry_run = options.pop("output"), options.pop("dry_run")
    with loading("make_control_vae"):
        from demo_models.control_vae import make_control_vae, plan_control_vae

    settings = ControlSettings(**options)
    if dry_run:
        return rehearse(lambda: plan_control_vae(output, settings))
    make_control_vae(output, settings, shlex.join(["python", "tools/make_control_vae.py", *sys.argv[1:]]))
    print(f"wrote {output}")
    return 0


if __name__ == "__main__":
    sys.exit(run_tool("make_control_vae", main))
