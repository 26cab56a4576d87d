# PYTHON_ARGCOMPLETE_OK
"""Train the embedded models of the demo, a small Gemma and a small VAE, on drawn scenes.

    python tools/make_demo_models.py --output theworld/embedded --seed 0 --device cuda

Exit status: 0 done, 1 failed, 2 wrong usage, 130 interrupted.
"""

import shlex
import sys

from theworld.utils.starting import starting

with starting():
    from theworld.utils.console import loading, rehearse, run_tool

HELP = {
    "seed": "Random seed of the scenes, the first weights and the order of lessons.",
    "device": "Device to compute on: cpu, cuda or cuda:N.",
    "num_scenes": "Number of scenes that are drawn to learn from.",
    "gemma_steps": "Number of optimizer steps of the small Gemma.",
    "vae_steps": "Number of optimizer steps of the small VAE.",
    "batch_size": "Number of statements in an optimizer step of the Gemma.",
    "vae_batch_size": "Number of scenes in an optimizer step of the VAE.",
    "learning_rate": "Peak learning rate of the Gemma, per optimizer step.",
    "vae_learning_rate": "Peak learning rate of the VAE, per optimizer step.",
    "workers": "Number of processes that draw scenes.",
}


def main() -> int:
    """Parse the flags, draw, train, write, and print the folders; return the exit status."""
    from demo_models.settings import PretrainSettings, add_settings

    from theworld.config.cli import ArgumentParser, add_dry_run, path

    parser = ArgumentParser(description=__doc__)
    text = "Folder to write gemma/ and vae/ into."
    parser.add_argument("--output", type=path, required=True, metavar="FOLDER", help=text)
    add_settings(parser, PretrainSettings, HELP)
    add_dry_run(parser)
    options = vars(parser.parse_args())
    output, dry_run = options.pop("output"), options.pop("dry_run")
    with loading("make_demo_models"):
        from demo_models.pretrain import make_models, plan_models

    settings = PretrainSettings(**options)
    if dry_run:
        return rehearse(lambda: plan_models(output, settings))
    make_models(output, settings, shlex.join(["python", "tools/make_demo_models.py", *sys.argv[1:]]))
    print(f"wrote {output / 'gemma'}, {output / 'vae'} and {output / 'training.json'}")
    return 0


if __name__ == "__main__":
    sys.exit(run_tool("make_demo_models", main))
