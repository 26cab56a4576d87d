"""Visual Spatial Reasoning (Liu, Emerson, Collier, TACL 2023): its statements.

A statement ("The cat is left of the laptop.") is true or false of one photograph. There are two releases, random and
zeroshot, each with the splits train, dev (also called validation) and test: one JSON object a line. Your own data has
the same files, with the fields image, statement and label on each line. A line may have a question that is answered by
yes (1) or no (0) in place of the statement. Lines with the same `group` are the options of one choice: exactly one of
them is true. `sets` names sets of groups, which count as right where all of their groups do: {"pair": "7 left"}.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from huggingface_hub import try_to_load_from_cache

from theworld.config.config import SPLIT_ALIASES, Config, split_name
from theworld.config.fields import shown
from theworld.utils.errors import reason_of
from theworld.utils.hub import Fault, ask_hub, check_download_folder
from theworld.utils.jsonc import json_lines
from theworld.utils.text import flaw, is_filled, is_text

# dataset_name -> the release's folder name; the hub's is cambridgeltl/vsr_<release>.
RELEASES = {"vsr": "random", "vsr_random": "random", "vsr_zeroshot": "zeroshot"}
# split -> the names that its file can have.
FILE_NAMES = {"train": ("train",), "dev": ("dev", "validation"), "test": ("test",)}

# Meta-category -> its relations. The paper's table has "among" under topological too; here it is unallocated.
_TABLE = {
    "adjacency": "adjacent to, against, ahead of, alongside, at the back of, at the edge of, "
    "at the left side of, at the right side of, at the side of, attached to",
    "directional": "across, across from, along, around, away from, deep down, down, down from, from, into, "
    "off, past, through, to, toward, up",
    "orientation": "facing, facing away from, parallel to, perpendicular to",
    "projective": "above, behind, below, beneath, beside, in front of, in the middle of, left of, on top of, "
    "over, right of, under",
    "proximity": "by, close to, far away from, far from, near",
    "topological": "at, between, connected to, consists of, contains, detached from, has as a part, in, "
    "inside, on, out of, outside, part of, surrounding, touching, with, within",
    "unallocated": "after, among, beyond, enclosed by, next to, opposite to",
}
META_CATEGORIES = tuple(_TABLE)
RELATIONS: dict[str, str] = {
    name: category for category, names in _TABLE.items() for name in names.split(", ")
}


NO_RELATION = "(none)"  # the relation of statements in data without that field


@dataclass(frozen=True)
class Statement:
    """One line of an annotation file."""

    image: str  # path of the photograph below the image folder, with /
    caption: str
    label: int  # 1: true of the photograph, 0: false
    relation: str
    index: int  # position among the statements of its file, counted from 0, as on the hub: blank lines do not count
    image_link: str = ""  # URL at which the photograph was published
    is_question: bool = False  # the caption is a question, to which 1 answers yes and 0 no
    # name of the choice that it is one option of: statements about one photograph, one of them true
    group: str = ""
    sets: tuple[tuple[str, str], ...] = ()  # (kind, name) of each set of choices that its group belongs to
    # name of the photograph in the data set that it was taken from, if that is another
    source_image: str = ""


def meta_category(relation: str) -> str:
    """Return the paper's meta-category of a relation; "unknown" for one that it does not list ("congruent")."""
    return RELATIONS.get(relation, "unknown")


def relation_span(caption: str, relation: str) -> tuple[int, int] | None:
    """Return start and end of the relation's words in the stripped caption, as whole words in any case.

    None if they are not there exactly once; in VSR they are, in every statement.
    """
    found = list(re.finditer(rf"(?<!\w){re.escape(relation.strip())}(?!\w)", caption.strip(), re.IGNORECASE))
    return found[0].span() if len(found) == 1 else None


def relation_note(statements: Iterable[Statement]) -> str:
    """Return a line with the number of true statements that contain their relation. Raises ValueError if none does."""
    true = [s for s in statements if s.label == 1]
    lost = [s for s in true if relation_span(s.caption, s.relation) is None]
    if len(lost) == len(true):
        example = f", such as {lost[0].caption!r} with {lost[0].relation!r}" if lost else ""
        raise ValueError(
            f"relation_loss_weight: none of {len(true)} true statements contains the words of its field relation "
            f"exactly once{example}; write the field as it stands in the statement, or use statement_loss_weight"
        )
    note = f"relation words: in {len(true) - len(lost):,} of {len(true):,} true statements"
    if lost:
        note += f"; not exactly once in the others, such as {lost[0].caption!r} with {lost[0].relation!r}"
    return note


def load_statements(annotations: str | Path | None, split: str, dataset_name: str = "vsr") -> list[Statement]:
    """Return the statements of a split, in the order of its file.

    `annotations` is a folder with train.jsonl, dev.jsonl (or validation.jsonl) and test.jsonl, a folder with random/
    and zeroshot/ that hold them, the file of the split itself, or None for dataset_name on the hub. Raises ValueError
    for an unknown split or dataset name and for a bad line (naming file, line, field, value and the allowed values),
    FileNotFoundError, and OSError if the hub cannot be reached.
    """
    split = split_name(split)
    if dataset_name not in RELEASES:
        raise ValueError(f"dataset_name is {dataset_name!r}; allowed: {', '.join(RELEASES)}")
    if annotations is None:
        return load_hub_statements(f"cambridgeltl/vsr_{RELEASES[dataset_name]}", split)
    return _read_statements(_split_file(Path(annotations), split, dataset_name))


def load_all(annotations: str | Path | None, dataset_name: str = "vsr") -> dict[str, list[Statement]]:
    """Return the statements of every split that exists: all three of VSR, at least one of your own folder.

    Raises the errors of `load_statements`.
    """
    splits = ("train", "dev", "test")
    if annotations is None or Path(annotations).is_file():
        return {split: load_statements(annotations, split, dataset_name) for split in splits}
    found: dict[str, list[Statement]] = {}
    for split in splits:
        try:
            path = _split_file(Path(annotations), split, dataset_name)
        except FileNotFoundError:
            continue
        found[split] = _read_statements(path)
    if not found:
        _split_file(Path(annotations), "train", dataset_name)  # raises and names what is missing
    return found


def splits_there(annotations: str | Path | None, dataset_name: str = "vsr") -> list[str]:
    """Return the splits that `load_all` would read, without reading them."""
    splits = ["train", "dev", "test"]
    if annotations is None or Path(annotations).is_file():
        return splits
    found = []
    for split in splits:
        with contextlib.suppress(FileNotFoundError):
            _split_file(Path(annotations), split, dataset_name)
            found.append(split)
    return found


def _split_file(path: Path, split: str, dataset_name: str) -> Path:
    """Return the file that holds a split."""
    names = [f"{name}.jsonl" for name in FILE_NAMES[split]]
    if path.is_file():
        if path.name not in names:
            raise ValueError(
                f"{path} is not a file of the split {split}, which is named {' or '.join(names)}"
            )
        return path
    if not path.is_dir():
        raise FileNotFoundError(f"annotations: no file or folder {path}")
    release = RELEASES[dataset_name]
    if path.name in RELEASES.values() and path.name != release:
        raise ValueError(
            f"{path} holds {path.name}, and dataset_name is {dataset_name}; set it to vsr_{path.name}"
        )
    folder = path / release if (path / release).is_dir() else path
    found = [folder / name for name in names if (folder / name).is_file()]
    if not found:
        raise FileNotFoundError(f"annotations: no {' or '.join(names)} in {folder}")
    if len(found) > 1:
        raise ValueError(f"{folder} has both {' and '.join(names)}, which are one split; keep one")
    return found[0]


def load_hub_statements(repository: str, split: str) -> list[Statement]:
    """Return the statements of a split of a data set on the hub, or of a local folder, through `datasets`."""
    from datasets import load_dataset

    # Named files: by itself `datasets` would guess the splits and call dev "validation".
    file = f"{split_name(split)}.jsonl"
    try:
        if not Path(repository).is_dir():
            held = _held_offline(repository, file)
            if held is not None:
                return _read_statements(held)
        rows = load_dataset(repository, data_files={"rows": file}, split="rows")
    except OSError as error:
        hint = "check the network, or set annotations to a folder with the JSONL files"
        raise OSError(f"cannot load {file} of {repository}: {reason_of(error)}; {hint}") from error
    return statements_of((f"{repository}/{file}:{number}", row) for number, row in enumerate(rows, 1))


def _held_offline(repository: str, file: str) -> Path | None:
    """Return a file of a data set that was downloaded before, if the hub cannot be asked; None if it can.

    `datasets` itself would ask for half a minute. Raises OSError without an answer and without a download.
    """
    try:
        ask_hub(repository, file, "dataset")
    except OSError:
        held = try_to_load_from_cache(repository, file, repo_type="dataset")
        if not isinstance(held, str):
            raise
        return Path(held)
    check_download_folder(repository)
    return None


def _read_statements(path: Path) -> list[Statement]:
    found = statements_of(json_lines(path))
    if not found:
        raise ValueError(f"{path}: holds no statements")
    return found


def statements_of(rows: Iterable[tuple[str, Any]]) -> list[Statement]:
    """Return rows as statements, each row given with its place: its file and line. Raises ValueError for a bad row."""
    found, places = [], []
    for index, (where, row) in enumerate(rows):
        found.append(_statement(row, index, where))
        places.append(where)
    check_groups([(s.group, s.image, s.label, s.sets) for s in found], places)
    return found


def check_groups(options: Sequence[tuple[str, str, int, Any]], places: Sequence[str]) -> None:
    """Raise ValueError unless each group has several options, one of them true, all with one photograph and its sets.

    An option is (group, image, label, sets); a group "" is none. `places` are the file and line of each.
    """
    groups: dict[str, list[int]] = {}
    for i, (group, *_) in enumerate(options):
        if group:
            groups.setdefault(group, []).append(i)
    for group, own in groups.items():
        _, image, _, sets = options[own[0]]
        first = places[own[0]]
        for i in own:
            if options[i][1] != image:
                raise ValueError(
                    f"{places[i]}: image is {shown(options[i][1])}, and group {shown(group)} is about {shown(image)} "
                    f"({first}); give a group one photograph"
                )
            if options[i][3] != sets:
                raise ValueError(
                    f"{places[i]}: sets is {shown(dict(options[i][3]))}, and group {shown(group)} has "
                    f"{shown(dict(sets))} ({first}); give all of its lines the same"
                )
        if len(own) == 1:
            raise ValueError(
                f"{first}: group {shown(group)} has this line alone; give it two or more, or none a group"
            )
        true = [i for i in own if options[i][2] == 1]
        if len(true) != 1:
            where = places[true[1]] if true else first
            lines = f" ({', '.join(places[i] for i in true)})" if true else ""
            raise ValueError(
                f"{where}: group {shown(group)} has label 1 on {len(true)} of its {len(own)} lines{lines}; give it on "
                "exactly one"
            )


def _statement(row: Any, index: int, where: str) -> Statement:
    """Return a checked row as a statement; other fields of VSR are allowed and not read. `where`: its file and line."""
    if not isinstance(row, Mapping):
        raise ValueError(f"{where}: is {shown(row)}; wanted one JSON object a line")
    text = _text_field(row, where)
    if text != "caption":  # your own data, which has no relations
        given = {field: value for field, value in row.items() if (field, value) != ("relation", None)}
        row = {"relation": NO_RELATION, **given, "caption": row[text]}
    for field, wanted, is_right in _FIELDS:
        name = text if field == "caption" else field
        if field not in row and field not in _OPTIONAL:
            raise ValueError(f"{where}: has no field {name}; give {wanted}")
        if not is_right(row.get(field)):
            found = flaw(row[field]) if isinstance(row[field], str) else ""
            reason = f" (it holds {found})" if found else ""
            raise ValueError(f"{where}: {name} is {shown(row[field])}; give {wanted}{reason}")
    group, sets = row.get("group") or "", _given_sets(row.get("sets"))
    if sets and not group:
        raise ValueError(f"{where}: has sets and no field group; give the group whose sets these are")
    return Statement(
        row["image"],
        row["caption"],
        row["label"],
        row["relation"],
        index,
        row.get("image_link") or "",
        is_question=text == "question",
        group=group,
        sets=sets,
        source_image=row.get("source_image") or "",
    )


def _text_field(row: Mapping[str, Any], where: str) -> str:
    """Return the name of the field with the text: caption, statement or question.

    The hub's loader gives every row the fields of all others, as None. Raises ValueError for a question beside another.
    """
    there = [name for name in ("question", "statement", "caption") if row.get(name) is not None]
    if there[:1] == ["question"] and there[1:]:
        raise ValueError(f"{where}: has both {' and '.join(there)}; keep one of them")
    if there[:1] == ["question"]:
        return "question"
    return "statement" if "statement" in row and "caption" not in there else "caption"


def _given_sets(sets: Mapping[str, str] | None) -> tuple[tuple[str, str], ...]:
    """Return sets as they were given, without kinds that have none, which the hub's loader adds."""
    return tuple(sorted((kind, name) for kind, name in (sets or {}).items() if name is not None))


def _is_safe_path(value: object) -> bool:
    """Return whether a value is a relative path in its shortest form, with / between folders and without `..`."""
    return is_filled(value) and "\\" not in str(value) and not {"", ".", ".."} & {*str(value).split("/")}


def _is_set(item: tuple[object, object]) -> bool:
    kind, name = item
    return is_filled(kind) and (name is None or is_filled(name))


# field, what it must hold, its check
_FIELDS: tuple[tuple[str, str, Callable[[object], bool]], ...] = (
    ("image", "a path below the image folder, such as 000000000142.jpg", _is_safe_path),
    ("caption", "text that is not empty", is_filled),
    ("label", "the integer 0 (false) or 1 (true)", lambda label: type(label) is int and label in (0, 1)),
    ("relation", "text that is not empty", is_filled),
    ("image_link", "text, or nothing", lambda link: link is None or is_text(link)),
    ("source_image", "text, or nothing", lambda name: name is None or is_text(name)),
    ("group", "text that is not empty, or nothing", lambda group: group is None or is_filled(group)),
    (
        "sets",
        'an object such as {"pair": "7 left"}, or nothing',
        lambda sets: sets is None or (isinstance(sets, Mapping) and all(map(_is_set, sets.items()))),
    ),
)
_OPTIONAL = ("image_link", "group", "sets", "source_image")


def training_statements(statements: Sequence[Statement], config: Config) -> list[Statement]:
    """Return the statements of train that a run of these settings uses, in their order: the first `num_samples`, and of
    these the share `train_share`, drawn by its seed. What a seed draws for a smaller share is part of a larger one."""
    statements = list(statements[: config.num_samples])
    if config.train_share is None:
        return statements
    count = max(1, round(config.train_share * len(statements)))
    drawn = np.random.default_rng([config.seed, 0, 1]).permutation(len(statements))[:count]
    return [statements[i] for i in sorted(drawn.tolist())]


def images_of(statements: Iterable[Statement]) -> list[str]:
    """Return the photographs of the statements, each once, sorted."""
    return sorted({statement.image for statement in statements})


def seen_images(test: Iterable[Statement], train: Iterable[Statement]) -> set[str]:
    """Return the photographs of `test` that are also in `train`."""
    return {statement.image for statement in test} & {statement.image for statement in train}


# `statements_sha256` of each split as published.
PUBLISHED_SHA256 = {
    ("vsr_random", "train"): "df98cf639068035178480aa54b63947b936f3fa5c6857a275705c161720e9b12",
    ("vsr_random", "dev"): "649c159aab7b241b385d77fa9ced19beac162628d18752e57d1c3827e45117aa",
    ("vsr_random", "test"): "2c6570dab7a0d479c71a8b44109839f596012abc68d804d523b7d51817f28627",
    ("vsr_zeroshot", "train"): "e03e487790ce97d09b880f97535b1df64b5eca9cb5c4dd10bfc507f838a952e8",
    ("vsr_zeroshot", "dev"): "c166e861df96ba65c8228b30dc1fa99819aa88b2ce3329578cc496be3ff52edb",
    ("vsr_zeroshot", "test"): "a08e465a7056861f3c4cee53bbc5cf05666a3719ac3e9ce4c33f0d0ab7e18e28",
}
OWN = "own data"


def split_words(dataset: str, split: str, folder: str = "") -> str:
    """Return the split of a data set as records name both, in words: "the test split of VSR random".

    `folder`: the name of the folder of custom data, if it is known.
    """
    name = "custom data" if dataset == OWN else dataset.replace("vsr_", "VSR ") or "unnamed data"
    if dataset == OWN and folder:
        name += f" ({folder})"
    return f"the {split} split of {name}" if split else name


def statements_sha256(statements: Iterable[tuple[str, str, int]]) -> str:
    """Return the SHA-256 of statements as (image, caption, label), in any order and image folder."""
    rows = sorted([PurePosixPath(image).name, caption.strip(), label] for image, caption, label in statements)
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def release_of(statements: Iterable[tuple[str, str, int]], split: str) -> str:
    """Return "vsr_random" or "vsr_zeroshot" if these are the statements of that release's split, else ""."""
    sha256, split = statements_sha256(statements), SPLIT_ALIASES.get(split, split)
    return next(
        (name for (name, own), wanted in PUBLISHED_SHA256.items() if (own, wanted) == (split, sha256)), ""
    )


def dataset_label(
    annotations: str | Path | None, dataset_name: str, split: str, statements: Sequence[Statement]
) -> str:
    """Return "vsr_random" or "vsr_zeroshot" for statements of that release, else "own data"."""
    if annotations is None:
        return f"vsr_{RELEASES[dataset_name]}"
    return release_of(((s.image, s.caption, s.label) for s in statements), split) or OWN


def statements_at_hand(annotations: str | None, dataset_name: str) -> dict[str, list[Statement]] | None:
    """Return the statements of every split, as `load_all` does; None if they have to be downloaded first.

    Raises the errors of `load_all`, and Fault if they cannot be downloaded.
    """
    if annotations is not None:
        return load_all(annotations, dataset_name)
    repository = f"cambridgeltl/vsr_{RELEASES[dataset_name]}"
    found: dict[str, list[Statement]] = {}
    for split in ("train", "dev", "test"):
        held = try_to_load_from_cache(repository, f"{split}.jsonl", repo_type="dataset")
        if not isinstance(held, str):
            try:
                ask_hub(repository, f"{split}.jsonl", "dataset")
            except OSError as error:  # also huggingface_hub's own errors
                message = f"{repository}: {str(error).splitlines()[0]}"
                hint = "check the network; or give --annotations, a folder with its JSONL files"
                raise Fault(message, hint) from None
            return None
        found[split] = load_statements(held, split, dataset_name)
    return found


class NotDownloaded(Exception):
    """Statements that have to be downloaded first; the argument is the name of their data set."""


def split_at_hand(annotations: str | None, split: str, dataset_name: str) -> list[Statement]:
    """Return the statements as `load_statements` does, but download nothing: raise NotDownloaded instead."""
    if annotations is not None:
        return load_statements(annotations, split, dataset_name)
    splits = statements_at_hand(None, dataset_name)
    if splits is None:
        raise NotDownloaded(dataset_name)
    return splits[split_name(split)]
