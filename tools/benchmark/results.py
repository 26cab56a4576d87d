"""Figures of a measurement: printed when they are measured, saved in one JSON file, and shown as a table.

The file: {"machine": {...}, "parts": {part: {"date", "command", "rows": {name: {figure: value}}, "failed": {...}}}}.
It is replaced after every figure, so whatever ends a run loses nothing; a later run with other parts adds to it.
"""

import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

Row = dict[str, Any]
# Columns of the table; every other figure of a row stands behind them as name=value.
COLUMNS = ("rate", "low", "high", "unit", "mfu", "memory_gib")


def spread(rates: Sequence[float]) -> Row:
    """Return the median, lowest and highest of repeated measurements."""
    return {"rate": statistics.median(rates), "low": min(rates), "high": max(rates), "repeats": len(rates)}


def machine() -> Row:
    """Return a description of the machine, without its name or address."""
    found: Row = {
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "python": platform.python_version(),
    }
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found["gpu"] = properties.name
        found["gpu_memory_gib"] = round(properties.total_memory / 2**30, 1)
        found["cuda"] = torch.version.cuda
    import diffusers
    import transformers

    libraries = {"torch": torch, "transformers": transformers, "diffusers": diffusers}
    return found | {name: module.__version__ for name, module in libraries.items()}


def _cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


class Results:
    """The figures of one file, to which a run adds."""

    def __init__(self, path: Path, command: str) -> None:
        """Raise ValueError if `path` exists and holds something else, or the figures of another machine."""
        self.path, self.command = path, command
        self.content: dict[str, Any] = {"machine": machine(), "parts": {}}
        if path.exists():
            before = json.loads(path.read_text())
            if before.get("machine") != self.content["machine"]:
                raise ValueError(f"{path} holds figures of another machine; choose another --output")
            self.content = before

    def begin(self, part: str) -> None:
        """Start a part: remove its figures of an earlier run."""
        date = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime())
        self.content["parts"][part] = {"date": date, "command": self.command, "rows": {}, "failed": {}}
        print(f"\n{part}", flush=True)

    def add(self, part: str, name: str, figures: Row) -> None:
        """Print and save one row of a part."""
        row = {key: _rounded(value) for key, value in figures.items() if value is not None}
        self.content["parts"][part]["rows"][name] = row
        print(f"  {name:28} {_line(row)}", flush=True)
        self.save()

    @contextmanager
    def attempt(self, part: str, name: str) -> Iterator[None]:
        """Record and print an error inside the block, so that it costs only this row."""
        try:
            yield
        except Exception as error:  # noqa: BLE001  any fault (memory, numbers, a library) is a result here
            message = f"{type(error).__name__}: {error}".replace("\n", " ")[:500]
            self.content["parts"][part]["failed"][name] = message
            print(f"  {name:28} failed: {message}", file=sys.stderr, flush=True)
            self.save()

    def rate(self, part: str, name: str) -> float | None:
        """Return the rate of a row, None if it was not measured."""
        row = self.content["parts"].get(part, {}).get("rows", {}).get(name, {})
        return row.get("rate")

    def share(self, part: str, name: str, row: Row) -> float | None:
        """Return the share of the chip's rate in a row of longer work, from the rate and share of another row; None if
        that was not measured."""
        other = self.content["parts"].get(part, {}).get("rows", {}).get(name, {})
        return row["rate"] / other["rate"] * other["mfu"] if "mfu" in other else None

    def ratio(self, part: str, name: str, other: str) -> float | None:
        """Return how many times faster one row is than another, by their medians."""
        own, base = self.rate(part, name), self.rate(part, other)
        return round(own / base, 3) if own and base else None

    def save(self) -> None:
        """Replace the file as a whole."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_name(f"{self.path.name}.{os.getpid()}.tmp")
        temporary.write_text(json.dumps(self.content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(temporary, self.path)

    def table(self) -> str:
        """Return all parts as text, one row a line."""
        lines = [", ".join(f"{key} {value}" for key, value in self.content["machine"].items())]
        head = f"{'':28} {'median':>9}  {'lowest - highest':>19} {'unit':13} {'MFU':>6} {'GiB':>6}"
        for part, found in self.content["parts"].items():
            lines += ["", f"{part:28}{head[28:]}"]
            lines += [f"  {name:26} {_cells(row)}".rstrip() for name, row in found["rows"].items()]
            lines += [f"  {name:26} failed: {message[:90]}" for name, message in found["failed"].items()]
        return "\n".join(lines)


def _rounded(value: Any) -> Any:
    """Return a value with four significant figures, more than these measurements have."""
    if isinstance(value, dict):
        return {key: _rounded(inner) for key, inner in value.items()}
    return float(f"{value:.4g}") if isinstance(value, float) else value


def _number(value: Any) -> str:
    return f"{value:,.4g}" if isinstance(value, float) and abs(value) < 1e4 else f"{value:,.0f}"


def _cells(row: Row) -> str:
    cells = f"{_number(row['rate']) if 'rate' in row else '':>9}  "
    cells += f"{_number(row['low']) + ' - ' + _number(row['high']) if 'low' in row else '':>19} "
    mfu = f"{row['mfu']:.1%}" if "mfu" in row else ""
    memory = f"{row['memory_gib']:.1f}" if "memory_gib" in row else ""
    return f"{cells}{row.get('unit', ''):13} {mfu:>6} {memory:>6}  {_others(row)}"


def _others(row: Row) -> str:
    others = {key: value for key, value in row.items() if key not in (*COLUMNS, "repeats")}
    return "  ".join(f"{key} {_shown(value)}" for key, value in others.items())


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return "(" + ", ".join(f"{key} {_shown(inner)}" for key, inner in value.items()) + ")"
    return _number(value) if isinstance(value, int | float) and not isinstance(value, bool) else str(value)


def _line(row: Row) -> str:
    return " ".join(_cells(row).split())
