# PYTHON_ARGCOMPLETE_OK
"""Phase 1: encode every photograph that VSR names, once, into a sharded cache.

    python tools/extract_latents.py --config configs/vsr_training.json --image_folder images/ --cache cache/

Run the same command again to go on after any stop. `accelerate launch tools/extract_latents.py ...` shares the work
among the GPUs of a machine; independent tasks share it with `--part 1/8` to `--part 8/8`. Instead of extracting,
`--verify` only reads, `--repair` makes damaged shards again, `--audit N` encodes N random images again and compares.
Exit status: 0 done or sound, 1 failed or damaged, 2 wrong usage or (--verify) nothing can be said, 130 interrupted.
"""

import signal
import sys
from pathlib import Path

from theworld.arguments import ArgumentParser, add_config_arguments, add_dry_run, config_from_arguments
from theworld.console import quiet_libraries, rehearse
from theworld.parts import part_of

KEYS = (
    "cosmos_model_name model_name dataset_name annotations image_folder max_image_pixels latent_size latent_dtype "
    "encode_batch_size shard_size dtype device compile num_workers num_world_steps rollout_prompt rollout_frames "
    "rollout_steps rollout_guidance rollout_seed"
).split()


def main() -> int:
    """Parses arguments, runs phase 1 or its verification, prints; returns the exit status."""
    parser = ArgumentParser(description=__doc__)
    add_config_arguments(parser, KEYS)
    parser.add_argument("--cache", type=Path, default=Path("cache"), help="cache folder (default: cache)")
    parser.add_argument("--gemma_vision", action="store_true", help="cache Gemma's own vision features too")
    parser.add_argument("--allow_missing", action="store_true", help="go on without unreadable photographs")
    parser.add_argument("--part", type=part_of, metavar="I/N", help="only the I-th of N parts (default: all)")
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--verify", action="store_true", help="only read: 0 sound, 1 damaged, 2 unknown")
    instead.add_argument("--repair", action="store_true", help="make again what is damaged")
    instead.add_argument("--audit", type=int, metavar="N", help="encode N images again (default: none)")
    add_dry_run(parser)
    arguments = parser.parse_args()
    if (arguments.part or arguments.dry_run) and (arguments.repair or arguments.audit is not None):
        parser.error("--part and --dry_run are for extracting; --verify shows what --repair would make again")
    # After the arguments: torch takes seconds to load, and --help should not.
    from theworld.audit import audit
    from theworld.dry_run import extraction
    from theworld.extract import extract, verify
    from theworld.repair import repair, report

    quiet_libraries()
    options = (arguments.cache, arguments.gemma_vision, arguments.allow_missing, arguments.part)
    if arguments.dry_run and not arguments.verify:
        return rehearse("extract_latents", lambda: extraction(config_from_arguments(arguments), *options))
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: ends the reading processes too
    try:
        if arguments.verify:
            return report(verify(arguments.cache), arguments.cache, sys.argv)
        config = config_from_arguments(arguments)
        if arguments.repair:
            return repair(config, arguments.cache)
        if arguments.audit is not None:
            return audit(config, arguments.cache, arguments.audit)
        complete = extract(config, *options)
    except KeyboardInterrupt:
        print("\nextract_latents: interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    except (ValueError, OSError) as error:
        print(f"extract_latents: {error}", file=sys.stderr)
        return 1
    if complete:
        print(f"done: {arguments.cache}. Next: python tools/train.py --cache {arguments.cache}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
