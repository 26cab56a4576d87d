"""The figures of a run: metrics.jsonl, and on request TensorBoard and Weights & Biases.

metrics.jsonl has the figures of each step once, however often the run was stopped.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from theworld.config.config import Config
from theworld.utils.files import naming, publish_bytes
from theworld.utils.hub import check_secret

METRICS, ASIDE = "metrics.jsonl", "metrics.aside.jsonl"


def append(folder: Path, line: dict[str, Any]) -> None:
    """Append a line to metrics.jsonl."""
    with naming(folder / METRICS), open(folder / METRICS, "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def sync(folder: Path) -> None:
    """Make all lines durable, before the checkpoint after them is saved."""
    if (folder / METRICS).exists():
        with open(folder / METRICS, "rb") as file:
            os.fsync(file.fileno())


def set_aside(folder: Path, keep: Callable[[dict[str, Any]], bool]) -> int:
    """Move lines that `keep` refuses, and incomplete ones, to the end of ASIDE, and return their number.

    They are about steps that a run is about to take again.
    """
    path = folder / METRICS
    if not path.exists():
        return 0
    kept, moved = bytearray(), bytearray()
    data = path.read_bytes()
    for raw in data.splitlines(keepends=True):
        target = kept if _is_wanted(raw, keep) else moved
        target += raw if raw.endswith(b"\n") else raw + b"\n"
    if moved:
        # first, so that a stop in between loses nothing
        with (
            naming(folder / ASIDE),
            open(folder / ASIDE, "ab") as file,
        ):
            file.write(moved)
            file.flush()
            os.fsync(file.fileno())
    if kept != data:
        publish_bytes(path, bytes(kept), overwrite=True)
    return moved.count(b"\n")


def _is_wanted(raw: bytes, keep: Callable[[dict[str, Any]], bool]) -> bool:
    try:
        line = json.loads(raw)
    except ValueError:
        return False
    return isinstance(line, dict) and isinstance(line.get("step"), int) and keep(line)


RUN_ID = "wandb_id.txt"  # in the output folder: a resumed run continues its W&B run


def check_trackers(config: Config) -> None:
    """Raise ValueError with a hint if W&B is requested and cannot be used. Imports W&B only if it is requested."""
    if not config.log_to_wandb:
        return
    try:
        import wandb  # optional, so not at the top
    except ImportError as error:
        raise ValueError(f"log_to_wandb is true, but {error}; run `pip install wandb`") from None
    if os.environ.get("WANDB_MODE", "online") != "online":
        return
    check_secret(
        "WANDB_API_KEY", os.environ.get("WANDB_API_KEY", "").strip(), "export WANDB_API_KEY=... again"
    )
    try:
        wandb.login()
    except wandb.errors.Error as error:
        raise ValueError(
            f"log_to_wandb: {error} Set WANDB_API_KEY or run `wandb login`; WANDB_MODE=offline needs neither"
        ) from None


class Trackers:
    """TensorBoard and W&B, as the settings request, in the main process of a run."""

    def __init__(
        self, config: Config, settings: dict[str, Any], output_dir: Path, resumed: bool, step: int = 0
    ) -> None:
        """Start the trackers of a run that goes on after `step`.

        W&B shows `settings`. TensorBoard drops what an earlier start logged about later steps. Raises ValueError if W&B
        does not start.
        """
        logs = output_dir / "logs"
        purge = step + 1 if logs.exists() else None
        self.writer = SummaryWriter(str(logs), purge_step=purge) if config.log_to_tensorboard else None
        self.run = _wandb_run(config, settings, output_dir, resumed) if config.log_to_wandb else None

    def log(self, figures: dict[str, float], step: int) -> None:
        """Log figures of one step, the same as in metrics.jsonl. A step may have several calls."""
        if self.writer is not None:
            for key, value in figures.items():
                self.writer.add_scalar(key, value, step)
        if self.run is not None:
            self.run.log(figures, step=step)

    def close(self) -> None:
        """Wait until everything is written or sent."""
        if self.writer is not None:
            self.writer.close()
        if self.run is not None:
            self.run.finish()


def _wandb_run(config: Config, settings: dict[str, Any], output_dir: Path, resumed: bool) -> Any:
    import wandb

    path = output_dir / RUN_ID
    # A new run in a folder that was used before is another W&B run.
    name = path.read_text().strip() if resumed and path.exists() else None
    try:
        run = wandb.init(
            project=config.wandb_project,
            name=config.run_name,
            id=name,  # None: W&B makes one up
            resume="allow",
            config=settings,
            dir=str(output_dir),
        )
    except wandb.errors.Error as error:
        raise ValueError(f"log_to_wandb: {error}; WANDB_MODE=offline needs no connection") from None
    path.write_text(run.id + "\n")
    return run
