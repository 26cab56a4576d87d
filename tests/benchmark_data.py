"""Data sets with the schemas of the benchmarks' own on the hub, and as many rows, with tiny photographs."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image
from pyarrow.parquet import write_table

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
WHATSUP = pa.schema([("image_options", IMAGE), ("caption_options", pa.list_(pa.string()))])
BLINK = pa.schema(
    [(name, pa.string()) for name in ("idx", "question", "sub_task")]
    + [
        ("image_1", IMAGE),
        ("choices", pa.list_(pa.string())),
        ("answer", pa.string()),
        ("prompt", pa.string()),
    ]
)
CV_BENCH = pa.schema(
    [
        ("idx", pa.int64()),
        ("type", pa.string()),
        ("task", pa.string()),
        ("image", IMAGE),
        ("question", pa.string()),
    ]
    + [("choices", pa.list_(pa.string()))]
    + [(name, pa.string()) for name in ("answer", "prompt", "source", "source_filename")]
)
QUESTION = (
    "Considering the relative positions of the {0} and the {1} in the image provided, where is the {0} located with "
    "respect to the {1}?"
)


def picture(number: int, kind: str = "PNG", name: str | None = None) -> dict[str, Any]:
    """Return a tiny photograph of its own as the hub's data sets hold one."""
    data = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (8, 12, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(data, kind)
    return {"bytes": data.getvalue(), "path": name}


def whatsup_a(items: int = 412) -> list[dict[str, Any]]:
    """Return rows of What'sUp A: sets of four photographs, each of which another caption is right of."""
    rows = []
    for i in range(items):
        thing = f"mug {i // 4}"
        captions = [f"A {thing} {r} a table" for r in ("on", "under", "to the left of", "to the right of")]
        right = captions.pop(i % 4)
        rows.append({"image_options": picture(i), "caption_options": [right, *captions]})
    return rows


def blink(items: int = 143) -> list[dict[str, Any]]:
    """Return rows of BLINK's Spatial_Relation; "yes" is right of every third."""
    return [
        {
            "idx": f"val_Spatial_Relation_{i + 1}",
            "question": f"Is the car beneath the cat {i}?",
            "image_1": picture(i, "JPEG"),
            "choices": ["yes", "no"],
            "answer": "(B)" if i % 3 else "(A)",
        }
        for i in range(items)
    ]


def cv_bench(items: int = 650) -> list[dict[str, Any]]:
    """Return rows of CV-Bench 2D, every other of the task Count; two rows are about each photograph."""
    rows: list[dict[str, Any]] = []
    for i in range(items):
        question = QUESTION.format("rug (annotated by the red box)", f"pillow {i}")
        own = {"idx": 2 * i, "type": "2D", "task": "Relation", "image": picture(i // 2), "question": question}
        own |= {"choices": ["left", "right"] if i % 2 else ["above", "below"], "answer": "(B)"}
        rows += [
            own | {"source": "COCO", "source_filename": f"{i // 2:012d}.jpg"},
            {"task": "Count", "choices": []},
        ]
    return rows


def write_files(
    folder: Path, pattern: str, rows: Sequence[dict[str, Any]], schema: pa.Schema, parts: int = 1
) -> Path:
    """Write rows as the parquet files that a pattern such as "data/x-*.parquet" names, and return the folder."""
    size = -(-len(rows) // parts)
    for part in range(parts):
        path = folder / pattern.replace("*", f"{part:05d}-of-{parts:05d}" if "-*" in pattern else "")
        path.parent.mkdir(parents=True, exist_ok=True)
        table = pa.Table.from_pylist(list(rows[part * size : (part + 1) * size]), schema)
        write_table(table, path)
    (folder / "README.md").write_text("A data set.\n")
    return folder
