#!/bin/bash
# A sweep as a job array: each task trains its part of the runs, none talks to another, and the one that ends last makes
# the table. Two minutes before its time is up a task is told to stop, saves, and puts itself back into the queue; it
# goes on from the newest checkpoint. From the project's folder:
#
#     sbatch tools/slurm/sweep.sh
#     sbatch --array=3,5 tools/slurm/sweep.sh          # parts that failed: they go on
#
# Edit what follows for your cluster. --array has to be 1 to PARTS; --signal has to leave time for a step and a save.
#SBATCH --job-name=theworld-sweep
#SBATCH --array=1-8
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --time=04:00:00
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=sweep-%A_%a.log

PARTS=${PARTS:-8}
CONFIG=${CONFIG:-configs/vsr_training.json}
CACHE=${CACHE:-cache}
OUTPUT=${OUTPUT:-checkpoints/sweep}
RUNS=${RUNS:-configs/sweep.json}
PYTHON=${PYTHON:-.venv/bin/python}
MAX_RESTARTS=${MAX_RESTARTS:-50}
# More flags of tools/sweep.py go behind the script's name: sbatch tools/slurm/sweep.sh --seeds 0 1

if ((SLURM_ARRAY_TASK_ID > PARTS)); then
    echo "task $SLURM_ARRAY_TASK_ID of $PARTS parts: make --array 1-$PARTS, or PARTS larger" >&2
    exit 2
fi
source tools/slurm/requeue.sh || exit 1

until_time_is_up "$PYTHON" tools/sweep.py --config "$CONFIG" --cache "$CACHE" --output "$OUTPUT" --runs "$RUNS" \
    --part "$SLURM_ARRAY_TASK_ID/$PARTS" "$@"

if [[ -n $time_is_up && $status -eq 75 ]]; then # stopped, with runs left
    requeue sweep.sh
fi
exit "$status"
