# PYTHON_ARGCOMPLETE_OK
"""Phase 2: train the projection from the cache; Gemma stays frozen and the VAE never loads.

    python tools/train.py --config configs/vsr_training.json --cache cache/

Go on after a stop with --resume_from OUTPUT_DIR (its newest checkpoint) or a checkpoint folder. Several GPUs:
accelerate launch --multi_gpu --num_processes 2 tools/train.py ... (a step then has twice as many statements).
SIGTERM or SIGUSR1: the step under way is finished and saved, then the run ends. On a cluster: tools/slurm/train.sh.
Exit status: 0 done, 1 failed, 2 wrong usage, 75 stopped as asked (go on with --resume_from), 130 interrupted.
"""

import sys
from pathlib import Path

from theworld.arguments import ArgumentParser, add_config_arguments, add_dry_run, config_from_arguments


def main() -> int:
    """Parses arguments, trains, prints; returns the exit status."""
    parser = ArgumentParser(description=__doc__)
    add_config_arguments(parser)
    parser.add_argument("--cache", type=Path, default=Path("cache"), help="cache folder (default: cache)")
    add_dry_run(parser)
    arguments = parser.parse_args()
    # After the arguments: torch takes seconds to load, and --help should not.
    from theworld.console import quiet_libraries, rehearse
    from theworld.preflight import Plan
    from theworld.stopping import STATUS, StopRequest
    from theworld.train import NotFinite, OutOfMemory, Trainer

    quiet_libraries()
    try:
        config = config_from_arguments(arguments)
        if arguments.dry_run:
            lines = Plan(config, arguments.cache).lines  # in all processes: they wait for each other
            return rehearse("train", lambda: lines)
        with StopRequest() as stop:
            trainer = Trainer(config, arguments.cache, stop)
            checkpoint = trainer.run()
            stop.end()
    except KeyboardInterrupt:
        print("\ntrain: interrupted; go on with --resume_from and the same --output_dir", file=sys.stderr)
        return 130
    except (ValueError, OSError, NotFinite, OutOfMemory) as error:
        print(f"train: {error}", file=sys.stderr)
        return 1
    if trainer.stopped:
        if trainer.processes.is_main:
            print(f"stopped as asked: {checkpoint}. Go on with --resume_from {config.output_dir}")
        return STATUS
    if trainer.processes.is_main:
        next_step = f"python tools/eval.py --model_name {checkpoint} --cache {arguments.cache}"
        print(f"done: {checkpoint}. Next: {next_step}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
