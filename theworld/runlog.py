"""metrics.jsonl, the figures of a run: one line a time, each step once however often the run was stopped."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from theworld.files import publish_bytes

METRICS, ASIDE = "metrics.jsonl", "metrics.aside.jsonl"


def append(folder: Path, line: dict[str, Any]) -> None:
    """Adds a line."""
    with open(folder / METRICS, "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def sync(folder: Path) -> None:
    """Makes all lines durable: before the checkpoint that they lead to."""
    if (folder / METRICS).exists():
        with open(folder / METRICS, "rb") as file:
            os.fsync(file.fileno())


def set_aside(folder: Path, keep: Callable[[dict[str, Any]], bool]) -> int:
    """Moves the lines that `keep` does not want, and those that are no whole lines, to the end of ASIDE: those of steps
    that a run is about to take again. Returns how many."""
    path = folder / METRICS
    if not path.exists():
        return 0
    kept, moved = bytearray(), bytearray()
    data = path.read_bytes()
    for raw in data.splitlines(keepends=True):
        wanted = kept if _is_wanted(raw, keep) else moved
        wanted += raw if raw.endswith(b"\n") else raw + b"\n"
    if moved:
        with open(folder / ASIDE, "ab") as file:  # first, so that a stop in between loses nothing
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
