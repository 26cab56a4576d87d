"""Captions of photographs, on which the next-token loss can be computed instead of on true statements."""

import random
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from theworld.config.fields import shown
from theworld.data.vsr import Statement
from theworld.utils.jsonc import json_lines, parsed_json
from theworld.utils.text import decoded, is_filled

Captions = Mapping[str, Sequence[str]]  # captions by the path of their image, in the order of the file
WANTED = 'COCO\'s captions_*.json, or a .jsonl of lines {"image": "a.jpg", "caption": "A dog on a bed."}'


def load_captions(path: str | Path, images: Collection[str]) -> dict[str, tuple[str, ...]]:
    """Return the captions of these photographs; a photograph without any has no key.

    Raises FileNotFoundError, and ValueError for another format, for a bad caption and if no photograph has a caption.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"captions: no file {path}; wanted {WANTED}")
    pairs = _coco(path) if path.suffix == ".json" else _lines(path)
    found: dict[str, list[str]] = {}
    wanted, other = set(images), ""
    for where, image, caption in pairs:
        if not is_filled(image):
            raise ValueError(f"{where}: the image is {shown(image)}; give its path as in the annotations")
        if not is_filled(caption):
            raise ValueError(f"{where}: caption is {shown(caption)}; give text that is not empty")
        if image in wanted:
            found.setdefault(image, []).append(caption)
        else:
            other = image
    if not found:
        example = f" (such as {other})" if other else ""
        raise ValueError(
            f"captions: {path} has none of the {len(wanted)} training photographs (such as {min(wanted)}){example}; "
            "give a file that names photographs as in the annotations"
        )
    return {image: tuple(own) for image, own in found.items()}


def _lines(path: Path) -> list[tuple[str, Any, Any]]:
    """Return for each line of a .jsonl file its place (file:line), its image and its caption."""
    if path.suffix != ".jsonl":
        raise ValueError(f"captions: {path}; wanted {WANTED}")
    return [(where, *_fields(row, ("image", "caption"), where)) for where, row in json_lines(path)]


def _coco(path: Path) -> list[tuple[str, Any, Any]]:
    """Return the same for COCO's format: images with id and file_name, annotations with image_id and caption."""
    data = parsed_json(decoded(path.read_bytes(), path), str(path), WANTED)
    images, annotations = _fields(data, ("images", "annotations"), str(path))
    for name, rows in (("images", images), ("annotations", annotations)):
        if not isinstance(rows, list):
            raise ValueError(f"{path}: {name} is {shown(rows)}; wanted a list, as in {WANTED}")
    names: dict[Any, str] = {}
    for index, row in enumerate(images):
        where = f"{path}: images[{index}]"
        number, name = _fields(row, ("id", "file_name"), where)
        names[_number(number, f"{where}: id")] = name
    found = []
    for index, row in enumerate(annotations):
        where = f"{path}: annotations[{index}]"
        number, caption = _fields(row, ("image_id", "caption"), where)
        if _number(number, f"{where}: image_id") not in names:
            raise ValueError(f"{where}: image_id {number} is not the id of an image in this file")
        found.append((where, names[number], caption))
    return found


def _fields(row: Any, names: Sequence[str], where: str) -> list[Any]:
    if not isinstance(row, dict) or any(name not in row for name in names):
        raise ValueError(f"{where}: is {shown(row)}; wanted an object with {' and '.join(names)}")
    return [row[name] for name in names]


def _number(value: Any, where: str) -> int:
    if type(value) is not int:
        raise ValueError(f"{where} is {shown(value)}; wanted an integer")
    return value


def pick_captions(
    captions: Captions, statements: Sequence[Statement], seed: int, step: int
) -> dict[str, str]:
    """Return one caption for each photograph of the statements that has any.

    It is a pure function of the arguments, so that a resumed run uses the same captions.
    """
    images = sorted({s.image for s in statements if s.image in captions})
    return {image: random.Random(f"{seed}/{step}/{image}").choice(captions[image]) for image in images}


def captions_note(captions: Captions, images: Collection[str]) -> str:
    """Return a line with the number of captions and of the photographs that have any."""
    own = [captions[image] for image in images if image in captions]
    return f"captions: {sum(map(len, own)):,} for {len(own):,} of {len(images):,} training photographs"
