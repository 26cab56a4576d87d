#!/bin/bash
# A study as a job array: each task extracts its part of what the cache lacks, waits for the other parts of that, then
# trains and evaluates its part of the runs; the one that ends last writes the results. Two minutes before its time is
# up a task is told to stop, saves, and puts itself back into the queue; it goes on from the newest checkpoint. From the
# project's folder:
#
#     sbatch tools/slurm/study.sh
#     sbatch --array=3,5 tools/slurm/study.sh          # parts that failed: they go on
#
# Edit what follows for your cluster. --array has to be 1 to PARTS; --signal has to leave time for a step and a save.
#SBATCH --job-name=theworld-study
#SBATCH --array=1-8
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --time=04:00:00
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=study-%A_%a.log

PARTS=${PARTS:-8}
CONFIG=${CONFIG:-configs/vsr_study.json}
CACHE=${CACHE:-cache}
OUTPUT=${OUTPUT:-studies/vsr}
IMAGES=${IMAGES:-data/images}
PYTHON=${PYTHON:-.venv/bin/python}
MAX_RESTARTS=${MAX_RESTARTS:-50}
# More flags of tools/study.py go behind the script's name: sbatch tools/slurm/study.sh --seeds 0 1

if ((SLURM_ARRAY_TASK_ID > PARTS)); then
    echo "task $SLURM_ARRAY_TASK_ID of $PARTS parts: make --array 1-$PARTS, or PARTS larger" >&2
    exit 2
fi
source tools/slurm/requeue.sh || exit 1

until_time_is_up "$PYTHON" tools/study.py --config "$CONFIG" --cache "$CACHE" --output "$OUTPUT" \
    --image_folder "$IMAGES" --part "$SLURM_ARRAY_TASK_ID/$PARTS" "$@"

if [[ -n $time_is_up && $status -eq 75 ]]; then # stopped, with runs left
    requeue study.sh
fi
exit "$status"
