# PYTHON_ARGCOMPLETE_OK
"""Is everything there? Libraries, GPU, models and licences, statements, photographs, cache: one page, with cures.

    python tools/doctor.py --config configs/vsr_training.json --image_folder images/ --cache cache/

It loads no model and writes nothing, so it has no --dry_run; the other tools do, for their own run.
Exit status: 0 nothing stands in the way, 1 something does, 2 wrong usage, 130 interrupted.
"""

import shlex
import sys
from pathlib import Path

from theworld.arguments import ArgumentParser, add_config_arguments, config_from_arguments
from theworld.console import quiet_libraries, status_of

# Settings of extraction, and those that training takes besides.
EXTRACTION = (
    "model_name cosmos_model_name dataset_name annotations image_folder max_image_pixels latent_size latent_dtype "
    "dtype device"
).split()
TRAINING = (
    "world_mode world_patch batch_size use_gradient_checkpointing compile fp8 output_dir resume_from"
).split()


def main() -> int:
    """Parses arguments, looks everything over, prints the page; returns the exit status."""
    parser = ArgumentParser(description=__doc__)
    add_config_arguments(parser, [*EXTRACTION, *TRAINING])
    parser.add_argument("--cache", type=Path, default=Path("cache"), help="cache folder (default: cache)")
    arguments = parser.parse_args()
    # After the arguments: torch takes seconds to load, and --help should not.
    from theworld.doctor import FAULT, look_over

    quiet_libraries()
    try:
        config = config_from_arguments(arguments)
    except (ValueError, OSError) as error:
        print(f"doctor: {error}", file=sys.stderr)
        return 1
    given = [(key, value) for key, value in vars(arguments).items() if key in ["config", *EXTRACTION]]
    flags = " ".join(f"--{key} {shlex.quote(str(value))}" for key, value in given if value is not None)
    findings = look_over(config, arguments.cache, flags)
    print("\n".join(map(str, findings)))
    faults = sum(finding.state == FAULT for finding in findings)
    print(f"\n{faults} in the way" if faults else "\nnothing in the way")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(status_of("doctor", main))
