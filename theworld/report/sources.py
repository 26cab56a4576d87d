"""Where the figures of a page come from: data sets, checkpoints, fingerprints, versions and commands."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from theworld.data.vsr import RELEASES, split_words
from theworld.evaluation.metrics import summarise
from theworld.evaluation.records import read_results
from theworld.evaluation.verdict import verdict
from theworld.report.accuracy import size_words
from theworld.report.page import Table
from theworld.utils.commands import command
from theworld.utils.files import companion
from theworld.utils.text import counted

SMALLEST_GEMMA_WIDTH = 640  # hidden size of the smallest Gemma 3 that was published (270M)
Source = dict[str, Any] | None  # of theworld.evaluation.records.read_results


def data_words(data: Sequence[tuple[str, str]], source: Source) -> str:
    """Return the data sets and splits in words: "the test split of VSR random"."""
    folder = Path(source["annotations"]).name if source and source["annotations"] else ""
    return " and ".join(split_words(dataset, split, folder) for dataset, split in data)


def toy_warning(data: Sequence[tuple[str, str]], source: Source) -> str:
    """Return a warning about models that are smaller than any published Gemma 3, or "" for all others."""
    shapes = [one["projection"] for one in source["checkpoints"].values()] if source else []
    widths = [shape["width"] for shape in shapes if shape.get("width", math.inf) < SMALLEST_GEMMA_WIDTH]
    if not widths:
        return ""
    own = any(dataset not in RELEASES for dataset, _ in data)
    return (
        f"Toy model: the hidden size of this Gemma is {min(widths)}, that of the smallest published Gemma 3 is "
        f"{SMALLEST_GEMMA_WIDTH}.{' The statements are no release of Visual Spatial Reasoning.' if own else ''} The "
        "result says nothing about published models."
    )


def other_records(path: Path) -> dict[str, str]:
    """Return the verdict of other records, or the reason why they cannot be read."""
    try:
        summary = summarise(read_results(path)[0])
    except ValueError as error:
        return {"name": path.name, "scope": "", "verdict": str(error)}
    scope = f"{data_words(summary['data'], None)}, {size_words(summary)}"
    found = verdict(summary)
    said = found.notes[0] if "choices" in summary and found.notes else ""
    return {"name": path.name, "scope": scope, "verdict": f"{said} {found.sentence}".strip()}


def source_section(
    results: Path, source: Source, run: Path, output: Path, score_command: str
) -> dict[str, Any]:
    """Return checkpoints, fingerprints and versions, and the commands that make records, metrics and page again."""
    commands = {
        "metrics_command": command("eval", "--from", results),
        "page_command": command("report", run, "--results", results, "--output", output),
    }
    if source is None:
        meta = companion(results, ".meta.json", ".jsonl")
        lack = f"{meta} is not there, so the checkpoint and the cache behind these records are unknown."
        return commands | {"lack": lack, "records_command": score_command}
    data = split_words(source["dataset"], source["split"])
    data += f", {counted(source['statements_in_split'], 'statement')}"
    return commands | {
        "lack": "",
        "records_command": source["command"],
        "scored": [
            ("scored on", source["date"]),
            ("statements", f"{data}, from {source['annotations'] or 'the hub'}"),
            ("records, SHA-256", source["records_sha256"]),
            ("versions", ", ".join(f"{k} {v}" for k, v in source["versions"].items())),
        ],
        "checkpoints": [(name, _checkpoint(one)) for name, one in source["checkpoints"].items()],
        **_fingerprints(source),
    }


def _checkpoint(one: dict[str, Any]) -> list[tuple[str, str]]:
    parts = ", ".join(one["parts"])
    return [
        ("folder", one["checkpoint"]),
        ("optimizer steps", "unknown" if one["step"] is None else f"{one['step']:,}"),
        ("seed", str(one["seed"])),
        ("trained on", one["trained_on"]),
        ("modified parts of Gemma", parts or "none: Gemma as it was published"),
        ("trained parameters", f"{one['trained_parameters']:,}"),
        ("Gemma", f"{one['model_name']}, {one['model_revision'] or 'a local folder'}"),
        ("computed", f"in {one['dtype']} on {one['device']}"),
        ("projection", json.dumps(one["projection"])),
        ("fingerprint of its latents, SHA-256", one["fingerprint_sha256"]),
    ]


def _fingerprints(source: dict[str, Any]) -> dict[str, Any]:
    """Return the cache's folder and hashes, and all fields of the fingerprints."""
    if source["cache"] is None:
        cache = []
        fingerprints = {name or "latents": one["fingerprint"] for name, one in source["checkpoints"].items()}
    else:
        stores = {name: one for name, one in source["cache"].items() if name != "folder"}
        cache = [("folder", source["cache"]["folder"])]
        cache += [(f"{name}, SHA-256", one["sha256"]) for name, one in stores.items()]
        fingerprints = {name: one["fingerprint"] for name, one in stores.items()}
    tables = []
    for name, fields in fingerprints.items():
        rows = [[key, json.dumps(value)] for key, value in sorted(fields.items())]
        tables.append((name, Table(f"Fingerprint of {name}", ["field", "value"], rows)))
    return {"cache": cache, "fingerprints": tables}
