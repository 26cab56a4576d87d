"""One process of a measurement: take optimizer steps of a run, save nothing, and print the rate and the memory.

python -m torch.distributed.run --nproc_per_node=2 -m benchmark.steps settings.json cache/ 8
"""

import json
import statistics
import sys
import time

import torch
from benchmark.setup import stepper

from theworld.config.config import load_config
from theworld.training.trainer import Trainer
from theworld.utils.console import quiet_libraries


def main(settings: str, cache: str, steps: str) -> None:
    """Time `steps` steps after three others. The main process prints one JSON object."""
    quiet_libraries()
    trainer = Trainer(load_config(settings), cache)
    step = stepper(trainer)
    seconds = []
    for _ in range(3 + int(steps)):
        start = time.perf_counter()
        step()  # waits for the device
        seconds.append(time.perf_counter() - start)
    row = {"rate": trainer.global_batch_size / statistics.median(seconds[3:]), "unit": "statements/s"}
    row |= {
        "lowest": trainer.global_batch_size / max(seconds[3:]),
        "highest": trainer.global_batch_size / min(seconds[3:]),
    }
    row |= {"sharded": trainer.sharded, "estimated_gib": trainer.plan.memory.total / 2**30}
    if torch.cuda.is_available():
        row["memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
    if trainer.processes.is_main_process:
        print(json.dumps(row))


if __name__ == "__main__":
    main(*sys.argv[1:])
