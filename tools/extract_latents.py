# PYTHON_ARGCOMPLETE_OK
"""Phase 1: encode every photograph of the data set once, into a sharded cache.

    python tools/extract_latents.py --config configs/vsr_training.json --image_folder images/ --cache cache/

The same command continues after any interruption, and mends a damaged cache: it extracts again what is damaged, and
moves the damaged files to quarantine/. `accelerate launch tools/extract_latents.py ...` divides the work among the GPUs
of a machine; `--part 1/8` to `--part 8/8` divide it among independent jobs.
Instead of extracting, --verify reads the cache and checks it, and --audit N encodes N random photographs again and
compares them with the cache.
Exit status: 0 done or sound, 1 failed or damaged, 2 wrong usage or (--verify) unknown, 130 interrupted.
"""

import signal
import sys
from typing import Any

from theworld.utils.starting import start_server, starting

with starting():
    from theworld.utils.commands import SETTINGS, following
    from theworld.utils.console import loading, rehearse, run_tool

KEYS = SETTINGS["extract_latents"]


def main() -> int:
    """Parse the flags, run phase 1 or a check of the cache, and print the outcome; return the exit status."""
    from theworld.config.cli import (
        ArgumentParser,
        add_cache,
        add_config_arguments,
        add_dry_run,
        config_from_arguments,
    )

    def part(text: str) -> Any:
        from theworld.utils.distributed import part_of  # here: it loads torch, and --help should not

        return part_of(text)

    parser = ArgumentParser(description=__doc__)
    add_cache(parser)
    text = "Also cache the vision features of Gemma, which training then need not compute. (default: false)"
    parser.add_argument("--gemma_vision", action="store_true", help=text)
    text = "Leave out photographs that are missing or cannot be read. (default: false)"
    parser.add_argument("--allow_missing", action="store_true", help=text)
    text = "Extract only the I-th of N parts, such as 3/8. (default: everything)"
    parser.add_argument("--part", type=part, metavar="I/N", help=text)
    instead = parser.add_mutually_exclusive_group()
    text = "Only read the cache and check it; exit status 0 if sound, 1 if damaged, 2 if unknown."
    instead.add_argument("--verify", action="store_true", help=text)
    text = "Encode N random photographs again and compare. (default: none)"
    instead.add_argument("--audit", type=int, metavar="N", help=text)
    add_dry_run(parser)
    add_config_arguments(parser, KEYS)
    arguments = parser.parse_args()
    if (arguments.part or arguments.dry_run) and arguments.audit is not None:
        parser.error("--part and --dry_run are for extracting; --audit reads all of a cache")
    with loading("extract_latents"):
        if not (arguments.dry_run or arguments.verify or arguments.audit is not None):
            start_server()
        if arguments.dry_run:
            from theworld.cli.dry_run import extraction
        from theworld.data.vsr import splits_there
        from theworld.extraction.audit import audit
        from theworld.extraction.extract import extract, verify
        from theworld.store.format import LATENTS, extraction_command
        from theworld.store.verify import DAMAGED, SOUND, status

    options = (arguments.cache, arguments.gemma_vision, arguments.allow_missing, arguments.part)
    if arguments.dry_run and not arguments.verify:
        return rehearse(lambda: extraction(config_from_arguments(arguments), *options))
    # SIGTERM as Ctrl-C, which ends the reading processes too
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if arguments.verify:
        problems = verify(arguments.cache)
        print("\n".join(map(str, problems)) or f"{arguments.cache}: sound")
        if status(problems) == DAMAGED:
            print(f"mend it with: {extraction_command(arguments.cache / LATENTS)}")
        return status(problems)
    config = config_from_arguments(arguments)
    if arguments.audit is not None:
        audits = audit(config, arguments.cache, arguments.audit)
        print("\n".join(map(str, audits)))
        return SOUND if all(one.holds for one in audits) else DAMAGED
    if extract(config, *options):
        splits = splits_there(config.annotations, config.dataset_name)
        evaluated = [] if "dev" in splits else ["--no-do_eval"]
        next_step = following("train", *evaluated, "--cache", arguments.cache)
        print(f"done: {arguments.cache}." + (f" Next: {next_step}" if "train" in splits else ""))
    return 0


if __name__ == "__main__":
    hint = "interrupted; the same command goes on from here"
    sys.exit(run_tool("extract_latents", main, interrupted=hint))
