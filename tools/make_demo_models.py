# PYTHON_ARGCOMPLETE_OK
"""Makes the embedded models of the demo from nothing.

    python tools/make_demo_models.py --output theworld/embedded --seed 0 --device cuda

Exit status: 0 done, 1 failed, 2 wrong usage, 130 interrupted.
"""

import shlex
import sys
from dataclasses import fields
from pathlib import Path

from theworld.arguments import ArgumentParser, add_dry_run
from theworld.console import rehearse, status_of
from theworld.pretrain_settings import PretrainSettings

HELP = {
    "seed": "of the scenes, the first weights and the order of lessons",
    "device": "cpu, cuda or cuda:N",
    "num_scenes": "scenes drawn to learn from",
    "gemma_steps": "steps of the small Gemma",
    "vae_steps": "steps of the small VAE",
    "batch_size": "statements a step of the Gemma",
    "vae_batch_size": "pictures a step of the VAE",
    "learning_rate": "highest learning rate of the Gemma",
    "vae_learning_rate": "highest learning rate of the VAE",
    "workers": "processes that draw scenes",
}


def main() -> int:
    """Parses arguments, draws, teaches, writes; returns the exit status."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="folder to write gemma/ and vae/ into")
    for field in fields(PretrainSettings):
        text = f"{HELP[field.name]} (default: {field.default})"
        parser.add_argument(f"--{field.name}", type=type(field.default), default=field.default, help=text)
    add_dry_run(parser)
    options = vars(parser.parse_args())
    output, dry_run = options.pop("output"), options.pop("dry_run")
    command = shlex.join(["python", "tools/make_demo_models.py", *sys.argv[1:]])
    # After the arguments: torch takes seconds to load, and --help should not.
    from theworld.pretrain import make_models, plan_models

    settings = PretrainSettings(**options)
    if dry_run:
        return rehearse("make_demo_models", lambda: plan_models(output, settings))
    try:
        make_models(output, settings, command)
    except (ValueError, OSError) as error:
        print(f"make_demo_models: {error}", file=sys.stderr)
        return 1
    print(f"wrote {output / 'gemma'}, {output / 'vae'} and {output / 'training.json'}")
    return 0


if __name__ == "__main__":
    sys.exit(status_of("make_demo_models", main))
