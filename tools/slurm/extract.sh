#!/bin/bash
# Phase 1 as a job array: each task encodes its part of the photographs, none talks to another, and the one that
# finishes last completes the cache. From the project's folder:
#
#     sbatch tools/slurm/extract.sh
#     sbatch --array=3,5 tools/slurm/extract.sh        # parts that failed or ran out of time: they go on
#
# Edit what follows for your cluster. --array has to be 1 to PARTS.
#SBATCH --job-name=theworld-extract
#SBATCH --array=1-8
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --time=02:00:00
#SBATCH --output=extract-%A_%a.log

PARTS=${PARTS:-8}
CONFIG=${CONFIG:-configs/vsr_training.json}
IMAGES=${IMAGES:-images}
CACHE=${CACHE:-cache}
PYTHON=${PYTHON:-.venv/bin/python}
# More flags of tools/extract_latents.py go behind the script's name: sbatch tools/slurm/extract.sh --allow_missing

if ((SLURM_ARRAY_TASK_ID > PARTS)); then
    echo "task $SLURM_ARRAY_TASK_ID of $PARTS parts: make --array 1-$PARTS, or PARTS larger" >&2
    exit 2
fi
exec "$PYTHON" tools/extract_latents.py --config "$CONFIG" --image_folder "$IMAGES" --cache "$CACHE" --gemma_vision \
    --part "$SLURM_ARRAY_TASK_ID/$PARTS" "$@"
