"""Makes the embedded models of the demo from nothing.

python tools/make_demo_models.py --output theworld/embedded --seed 0 --device cuda
"""

import argparse
import shlex
import sys
from dataclasses import fields
from pathlib import Path

from theworld.pretrain import PretrainSettings, make_models

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


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, help="folder to write gemma/ and vae/ into")
    for field in fields(PretrainSettings):
        text = f"{HELP[field.name]} (default: {field.default})"
        parser.add_argument(f"--{field.name}", type=type(field.default), default=field.default, help=text)
    options = vars(parser.parse_args(arguments))
    output = options.pop("output")
    given = sys.argv[1:] if arguments is None else arguments
    make_models(
        output, PretrainSettings(**options), shlex.join(["python", "tools/make_demo_models.py", *given])
    )
    print(f"wrote {output / 'gemma'}, {output / 'vae'} and {output / 'training.json'}")


if __name__ == "__main__":
    main()
