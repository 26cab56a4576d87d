# PYTHON_ARGCOMPLETE_OK
"""Is everything there? Libraries, GPU, models and licences, statements, photographs, cache: one page, with cures.

    python tools/doctor.py --config configs/vsr_training.json --image_folder images/ --cache cache/

It loads no model and writes nothing, so it has no --dry_run; the other tools do, for their own run.
Exit status: 0 nothing stands in the way, 1 something does, 2 wrong usage, 130 interrupted.
"""

import sys
from pathlib import Path

from theworld.arguments import ArgumentParser, add_config_arguments, config_from_arguments

KEYS = (
    "model_name cosmos_model_name dataset_name annotations image_folder max_image_pixels latent_size latent_dtype "
    "device"
).split()


def main() -> int:
    """Parses arguments, looks everything over, prints the page; returns the exit status."""
    parser = ArgumentParser(description=__doc__.split("\n\n")[0])
    add_config_arguments(parser, KEYS)
    parser.add_argument("--cache", type=Path, default=Path("cache"), help="cache folder (default: cache)")
    arguments = parser.parse_args()
    # After the arguments: torch takes seconds to load, and --help should not.
    from theworld.console import quiet_libraries
    from theworld.doctor import FAULT, look_over

    quiet_libraries()
    try:
        config = config_from_arguments(arguments)
    except (ValueError, OSError) as error:
        print(f"doctor: {error}", file=sys.stderr)
        return 1
    findings = look_over(config, arguments.cache)
    print("\n".join(map(str, findings)))
    faults = sum(finding.state == FAULT for finding in findings)
    print(f"\n{faults} in the way" if faults else "\nnothing in the way")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
