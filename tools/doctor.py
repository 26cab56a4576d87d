# PYTHON_ARGCOMPLETE_OK
"""Check everything that a run needs: libraries, GPU, models and licences, statements, photographs and the cache.

    python tools/doctor.py --config configs/vsr_training.json --image_folder images/ --cache cache/

Prints one line for each check, with a hint for each fault. Loads no model and writes nothing, so there is no --dry_run;
the other tools have one for their own run.
Exit status: 0 nothing stands in the way of a run, 1 something does, 2 wrong usage, 130 interrupted.
"""

import sys

from theworld.utils.starting import starting

with starting():
    from theworld.utils.console import loading, run_tool

# Settings of extraction, and those that training has in addition.
EXTRACTION = (
    "model_name world_encoder control_seed cosmos_model_name dataset_name annotations image_folder follow_links "
    "max_image_pixels "
    "latent_size latent_dtype encode_batch_size shard_size dtype device"
).split()
TRAINING = (
    "world_mode world_patch batch_size use_gradient_checkpointing compile fp8 output_dir resume_from"
).split()


def main() -> int:
    """Parse the flags, check, and print the findings; return the exit status."""
    from theworld.config.cli import ArgumentParser, add_cache, add_config_arguments, config_from_arguments

    parser = ArgumentParser(description=__doc__)
    add_cache(parser)
    add_config_arguments(parser, [*EXTRACTION, *TRAINING])
    arguments = parser.parse_args()
    config = config_from_arguments(arguments)
    with loading("doctor"):
        from theworld.cli.doctor import FAULT, look_over

    findings = look_over(config, arguments.cache)
    print("\n".join(map(str, findings)))
    faults = sum(finding.state == FAULT for finding in findings)
    print(f"\n{faults} in the way" if faults else "\nnothing in the way")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(run_tool("doctor", main, prints=True))
