# PYTHON_ARGCOMPLETE_OK
"""Phase 2: train the projection from the cache. By default Gemma is frozen; the VAE is never loaded.

    python tools/train.py --config configs/vsr_training.json --cache cache/

To continue a stopped run, add --resume_from with its folder (the newest checkpoint is taken) or a checkpoint folder.
On several GPUs: accelerate launch --multi_gpu --num_processes 2 tools/train.py ... An optimizer step then has twice as
many statements. SIGTERM and SIGUSR1 end the run after the current step, with a checkpoint. On a Slurm cluster, use
tools/slurm/train.sh.
Exit status: 0 done, 1 failed, 2 wrong usage, 75 stopped by a signal (continue with --resume_from), 130 interrupted.
"""

import itertools
import sys

from theworld.utils.starting import starting

with starting():
    from theworld.utils.commands import again, command, flags
    from theworld.utils.console import loading, rehearse, run_tool


def main() -> int:
    """Parse the flags, train, and print the last checkpoint; return the exit status."""
    from theworld.config.cli import (
        ArgumentParser,
        add_cache,
        add_config_arguments,
        add_dry_run,
        config_from_arguments,
    )

    parser = ArgumentParser(description=__doc__)
    add_cache(parser)
    add_dry_run(parser)
    text = (
        "Take changed settings and data that --resume_from refuses, as they change what is learnt; checkpoints record "
        "what was before and what is since."
    )
    parser.add_argument("--allow_changed", action="store_true", help=text)
    add_config_arguments(parser)
    arguments = parser.parse_args()
    config = config_from_arguments(arguments)
    with loading("train"):
        from theworld.utils.device import start_compilers

        if not arguments.dry_run:
            start_compilers(config.compile, config.device)
        from theworld.data.vsr import splits_there
        from theworld.hub.publish import plan_uploads
        from theworld.training.checkpoint import settings_to_resume
        from theworld.training.memory import Plan
        from theworld.training.trainer import Trainer
        from theworld.utils.signals import STATUS, StopRequest

    if config.resume_from is not None:  # what is not given is as it was
        config = config_from_arguments(arguments, settings_to_resume(config.resume_from))
    allow_changed = arguments.allow_changed
    if arguments.dry_run:
        plan = Plan(config, arguments.cache, allow_changed)  # in all processes: they wait for each other
        return rehearse(lambda: itertools.chain(plan.lines, plan_uploads(config)))
    with StopRequest() as stop:
        trainer = Trainer(config, arguments.cache, stop, allow_changed)
        checkpoint = trainer.run()
        stop.end()
    if trainer.processes.is_main_process and trainer.stopped:
        resumed = ("--resume_from", config.output_dir)
        launched = f"the same command with {flags(*resumed)}"
        how = again(*resumed) if trainer.processes.count == 1 else launched
        print(f"stopped as asked: {checkpoint}. Go on with: {how}")
    elif trainer.processes.is_main_process:
        splits = splits_there(config.annotations, config.dataset_name)
        split = [] if "test" in splits else ["--split", splits[-1]]
        next_step = command("eval", "--model", checkpoint, "--cache", arguments.cache, *split)
        print(f"{'finished before' if trainer.plan.finished else 'done'}: {checkpoint}. Next: {next_step}")
    return STATUS if trainer.stopped else 0


if __name__ == "__main__":
    hint = "interrupted; the same command with --resume_from and the run's folder goes on from its last checkpoint"
    sys.exit(run_tool("train", main, interrupted=hint))
