#!/bin/bash
# Phase 2 as a job that goes on until it is done: two minutes before its time is up it is told to stop, saves, and
# puts itself back into the queue; whenever it starts it goes on from the newest checkpoint. From the project's folder:
#
#     sbatch tools/slurm/train.sh
#
# Edit what follows for your cluster; --signal has to leave time for a step and a save.
#SBATCH --job-name=theworld-train
#SBATCH --nodes=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --time=04:00:00
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=train-%j.log

GPUS=${GPUS:-1}
CONFIG=${CONFIG:-configs/vsr_training.json}
CACHE=${CACHE:-cache}
OUTPUT=${OUTPUT:-checkpoints/theworld-vsr}
PYTHON=${PYTHON:-.venv/bin/python}
MAX_RESTARTS=${MAX_RESTARTS:-50}
# More flags of tools/train.py go behind the script's name: sbatch tools/slurm/train.sh --batch_size 4

# torchrun, which `accelerate launch` runs too, passes SIGTERM on to its processes and kills them after 30 seconds
# unless told otherwise. It dies of SIGUSR1: so that one is for this script alone (the B: above).
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=110
launch=("$PYTHON")
if ((GPUS > 1)); then
    launch=("$PYTHON" -m torch.distributed.run --standalone --nproc_per_node="$GPUS")
fi
resume=()
if compgen -G "$OUTPUT/checkpoint-*" >/dev/null; then
    resume=(--resume_from "$OUTPUT")
fi

source tools/slurm/requeue.sh || exit 1

until_time_is_up "${launch[@]}" tools/train.py --config "$CONFIG" --cache "$CACHE" --output_dir "$OUTPUT" \
    "${resume[@]}" "$@"

# tools/train.py ends with 75 when it was stopped; torchrun makes 1 of that, as of everything.
if [[ -n $time_is_up && $status -ne 0 ]]; then
    requeue train.sh
fi
exit "$status"
