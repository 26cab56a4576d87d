"""Where results come from: what stands beside a file of records, so that they can be made again."""

import json
import shlex
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import theworld
from theworld.cache import LATENTS, VISION
from theworld.checkpoint import INDEX, checkpoint_step
from theworld.files import canonical_sha256, hash_file
from theworld.held_out import HeldOut
from theworld.metrics import Row, publish_json, write_jsonl, write_summary
from theworld.model import TheWorld
from theworld.store import StoreReader
from theworld.weights import count_parameters, model_id

_LONG = ("latents_mean", "latents_std")  # of a fingerprint: numbers a channel
_OF_RESULTS = set(
    "command records_sha256 date dataset split annotations statements_in_split image_folder cache checkpoints "
    "versions".split()
)
_OF_CHECKPOINT = set(
    "checkpoint step seed model_name model_revision dtype device trained_on parts trained_parameters projection "
    "fingerprint fingerprint_sha256".split()
)
LIBRARIES = ("torch", "transformers", "numpy", "scipy", "scikit-learn")


def of_checkpoint(model: TheWorld, path: Path, trained_on: str) -> dict[str, Any]:
    """Of one scored checkpoint."""
    fingerprint = model.fingerprint
    return {
        "checkpoint": str(path),
        "step": checkpoint_step(path) if (path / INDEX).is_file() else None,
        "seed": model.config.seed,
        "model_name": model_id(model.gemma.name),
        "model_revision": model.gemma.revision,
        "dtype": str(model.gemma.dtype).removeprefix("torch."),
        "device": str(model.gemma.device),
        "trained_on": trained_on,
        "parts": list(model.gemma.changed),  # of Gemma, that are not as they were published
        "trained_parameters": count_parameters(model.projection)[0],
        "projection": model.projection.shape.to_dict(),
        "fingerprint": {k: v for k, v in fingerprint.items() if k not in _LONG},
        "fingerprint_sha256": canonical_sha256(fingerprint),
    }


def of_results(
    data: HeldOut, cache: Path | None, image_folder: Path | None, checkpoints: dict[str, Any]
) -> dict[str, Any]:
    """Of a whole file of records."""
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "dataset": data.dataset,
        "split": data.split,
        "annotations": data.annotations,
        "statements_in_split": len(data.statements),
        "image_folder": str(image_folder) if image_folder else data.image_folder,
        "cache": _cache(cache) if cache else None,
        "checkpoints": checkpoints,
        "versions": {"theworld": theworld.__version__, **{name: version(name) for name in LIBRARIES}},
    }


def _cache(cache: Path) -> dict[str, Any]:
    """The fingerprints of what is in a cache."""
    found: dict[str, Any] = {"folder": str(cache)}
    for name in (LATENTS, VISION):
        if (cache / name).exists():
            fingerprint = StoreReader(cache / name).fingerprint
            shown = {k: v for k, v in fingerprint.items() if k not in _LONG}
            found[name] = {"sha256": canonical_sha256(fingerprint), "fingerprint": shown}
    return found


def write_results(rows: Sequence[Row], source: dict[str, Any], path: Path, command: Sequence[str]) -> Row:
    """Writes records, where they come from (.meta.json, with the hash of the records and the command that made them)
    and the summary (.summary.json), and returns the summary."""
    write_jsonl(rows, path)
    meta = {"command": shlex.join(command), "records_sha256": hash_file(path)[1], **source}
    publish_json(meta, path.with_suffix(".meta.json"))
    return write_summary(rows, path)


def read_source(path: Path) -> dict[str, Any] | None:
    """What stands beside the records of `path`; None if nothing does. ValueError if it is of other records or lacks
    something."""
    meta = path.with_suffix(".meta.json")
    if not meta.is_file():
        return None
    source = json.loads(meta.read_text())
    kinds = [
        (source, _OF_RESULTS),
        *((one, _OF_CHECKPOINT) for one in source.get("checkpoints", {}).values()),
    ]
    lacking = sorted({field for found, fields in kinds for field in fields - found.keys()})
    if lacking:
        raise ValueError(f"{meta} has no {', '.join(lacking)}; score again, or move it away")
    have = hash_file(path)[1]
    if source["records_sha256"] != have:
        raise ValueError(
            f"{meta} is of records with SHA-256 {source['records_sha256']}, {path} has {have}; "
            "score again, or move one of them away"
        )
    return source


# ---- names and places


def short_names(folders: Sequence[Path], checkpoints: Sequence[Path]) -> list[str]:
    """The shortest tails of the folders' paths, as they were given, that tell them apart, or [""] for a single one.
    ValueError if two of them lead to the same checkpoint."""
    if len(folders) == 1:
        return [""]
    found = [checkpoint.resolve() for checkpoint in checkpoints]
    for path in found:
        if found.count(path) > 1:
            raise ValueError(f"{path} is named twice; name each checkpoint once")
    parts = [folder.resolve().parts for folder in folders]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(path[-length:]).replace(":", "_") for path in parts]
        if len(set(names)) == len(names):
            return names
    raise AssertionError("different paths have different parts")


def default_output(given: Sequence[Path], checkpoints: Sequence[Path], dataset: str, split: str) -> Path:
    """Where the results of one checkpoint go: into evaluation/ of its run, with the checkpoint in their name. A model
    that lies by itself, such as a download, has them in its own folder. ValueError for several."""
    if len(checkpoints) > 1:
        raise ValueError("several models belong to no single run; name an --output, such as comparison.jsonl")
    run = checkpoints[0].parent if (checkpoints[0] / INDEX).is_file() else given[0]
    return run / "evaluation" / f"{checkpoints[0].name}-{dataset.replace(' ', '-')}-{split}.jsonl"
