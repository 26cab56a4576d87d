"""The section of examples: statements with their photographs, which are made small and written into the page."""

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from theworld.data.images import ImageError, read_image
from theworld.evaluation.conditions import CONDITION_TYPES, checkpoints_in, find_condition
from theworld.evaluation.records import Row
from theworld.report.accuracy import name_of
from theworld.report.sources import Source
from theworld.report.text import probability
from theworld.utils.commands import PLACEHOLDER, command

NUM_PHOTOGRAPHS = 6  # of each kind
MAX_PHOTOGRAPH_SIDE = 480  # pixels


def folder_of_photographs(given: Path | None, source: Source) -> tuple[Path | None, str]:
    """Return the folder of the photographs, or None and the reason. Raises ValueError if `given` does not exist."""
    if given is not None:
        if not given.is_dir():
            raise ValueError(f"--image_folder {given}: no such folder")
        return given, ""
    named = source and source["image_folder"]
    if not named:
        return None, "The folder of the photographs is not known; name it."
    if not Path(named).is_dir():
        return None, f"The photographs were in {named}, which is not there; name their folder."
    return Path(named), ""


def examples_section(
    rows: Sequence[Row], run: Path, image_folder: Path | None, source: Source
) -> dict[str, Any]:
    """Return the most confident errors, and the statements that world tokens helped and harmed most."""
    folder, lack = folder_of_photographs(image_folder, source)
    links = bool(source and source.get("follow_links"))  # not in older files
    names = list(rows[0]["systems"])
    model = checkpoints_in(names)[0]
    world, baseline = (find_condition(names, model, kind) for kind in ("world", "baseline"))
    if world is None:
        return {"condition": ""}

    def confidence(row: Row, condition: str) -> float:
        """Return the probability of the right answer."""
        p = row["systems"][condition]["p_true"]
        return p if row["label"] else 1 - p

    def gain(row: Row) -> float:
        return confidence(row, world) - confidence(row, baseline) if baseline else 0.0

    def right(row: Row, condition: str) -> bool:
        return bool(row["systems"][condition]["correct"])

    wrong = [row for row in rows if not right(row, world)]
    kinds = [
        ("Most confident errors with world tokens", sorted(wrong, key=lambda row: confidence(row, world)))
    ]
    if baseline:
        helped = [row for row in rows if right(row, world) and not right(row, baseline)]
        harmed = [row for row in wrong if right(row, baseline)]
        helped.sort(key=gain, reverse=True)
        kinds.append(("Most helped: right with world tokens, wrong without", helped))
        kinds.append(("Most harmed: wrong with world tokens, right without", sorted(harmed, key=gain)))
    shown = [s for kind in CONDITION_TYPES if (s := find_condition(names, model, kind))]
    return {
        "condition": name_of(world),
        "lack": lack,
        "command": command("report", run, "--image_folder", PLACEHOLDER),
        "groups": [
            (title, len(found), [_card(row, shown, folder, links) for row in _one_an_image(found)])
            for title, found in kinds
        ],
    }


def _one_an_image(rows: Sequence[Row]) -> list[Row]:
    """Return the first rows about different images."""
    first = {row["image"]: row for row in reversed(rows)}
    return list(first.values())[::-1][:NUM_PHOTOGRAPHS]


def _card(row: Row, conditions: Sequence[str], folder: Path | None, links: bool) -> dict[str, Any]:
    answers = [(name_of(c), row["systems"][c]["p_true"], row["systems"][c]["correct"]) for c in conditions]
    return {
        "row": row,
        "picture": _photograph(folder, row["image"], links),
        "answers": [(name, probability(p), "right" if right else "wrong") for name, p, right in answers],
    }


def _photograph(folder: Path | None, name: str, follow_links: bool) -> dict[str, Any]:
    """Return a photograph, made small, as the attributes of an <img>, or the reason why it cannot be shown."""
    if folder is None:
        return {"lack": "photograph not at hand"}
    try:
        image = Image.fromarray(read_image(folder, name, follow_links=follow_links))
    except (ImageError, OSError) as error:
        return {"lack": str(error)}
    image.thumbnail((MAX_PHOTOGRAPH_SIDE, MAX_PHOTOGRAPH_SIDE))
    data = io.BytesIO()
    image.save(data, "JPEG", quality=82, optimize=True)
    return embedded("jpeg", data.getvalue(), image)


def embedded(kind: str, data: bytes, image: Image.Image) -> dict[str, Any]:
    source = f"data:image/{kind};base64,{base64.b64encode(data).decode('ascii')}"
    return {"lack": "", "src": source, "width": image.width, "height": image.height}
