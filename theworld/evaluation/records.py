"""Records: one line of JSON for each statement, from which every metric follows.

    {"index": 7, "image": "000000000142.jpg", "statement": "The cat ...", "relation": "left of",
     "category": "projective", "label": 1, "dataset": "vsr_random", "split": "test",
     "image_seen_in_train": false, "statement_in_train": false,
     "systems": {"world": {"logit_0": 0.5, "logit_1": 2.5, "logsumexp": 2.75, "p_true": 0.88, "outside": 0.11,
                           "correct": true}, ...}}

`systems` holds the answer under each condition (see `theworld.evaluation.conditions`). `p_true` is the probability of
"1" among the two answers, `logsumexp` is over the whole vocabulary, and `outside` is the other-token probability: that
of all tokens but "0" and "1". The keys of the file are older than the words of the code, and stay.
"""

import math
from collections.abc import Sequence, Set
from pathlib import Path
from typing import Any

import numpy as np

from theworld.config.config import SPLIT_ALIASES
from theworld.data.vsr import OWN, Statement, check_groups, meta_category
from theworld.models.inference import p_true
from theworld.utils.files import companion, hash_file, publish_bytes
from theworld.utils.jsonc import json_bytes, json_lines, read_json_with_comments
from theworld.utils.text import flaw

ONE_A_LINE = "one record of tools/eval.py a line"

Row = dict[str, Any]


def records(
    statements: Sequence[Statement],
    logits: dict[str, np.ndarray],
    seen_images: Set[str],
    in_train: Set[tuple[str, str]] = frozenset(),
    dataset: str = "",
    split: str = "",
) -> list[Row]:
    """Return one record for each statement.

    `dataset` is as `dataset_label` returns it, and recorded as the release that published results are of. `logits`
    holds for each condition what `predict` returns. `seen_images` are the images of the training set, and
    `in_train` its statements as (image, caption). Raises ValueError for logits that are not finite.
    """
    rows = []
    for i, statement in enumerate(statements):
        answers = {}
        for condition, values in logits.items():
            zero, one, logsumexp = (float(x) for x in values[i])
            if not all(map(math.isfinite, (zero, one, logsumexp))):
                raise ValueError(
                    f"{condition}: statement {statement.index} ({statement.image}) has logits {zero}, {one} and a "
                    f"logsumexp of {logsumexp}; wanted finite numbers"
                )
            answers[condition] = _answer(zero, one, logsumexp, statement.label)
        rows.append(
            {
                "index": statement.index,
                "image": statement.image,
                "statement": statement.caption,
                "relation": statement.relation,
                "category": meta_category(statement.relation),
                "label": statement.label,
                "dataset": dataset,
                "release": "" if dataset == OWN else dataset,
                "split": split,
                "image_seen_in_train": statement.image in seen_images,
                "statement_in_train": (statement.image, statement.caption) in in_train,
                **_optional(statement),
                "systems": answers,
            }
        )
    return rows


def _optional(statement: Statement) -> Row:
    """Return the fields that a record has only where its statement says more than whether it is true."""
    found: Row = {"question": True} if statement.is_question else {}
    if statement.group:
        found["group"] = statement.group
    if statement.sets:
        found["sets"] = dict(statement.sets)
    return found


def _answer(zero: float, one: float, logsumexp: float, label: int) -> Row:
    """Return the answer to one statement under one condition. Equal logits count as the answer "0", false."""
    other_token_probability = 1 - math.exp(min(zero - logsumexp, 0)) - math.exp(min(one - logsumexp, 0))
    return {
        "logit_0": zero,
        "logit_1": one,
        "logsumexp": logsumexp,
        "p_true": p_true(zero, one),
        "outside": max(0.0, other_token_probability),
        "correct": (one > zero) == (label == 1),
    }


def write_jsonl(rows: Sequence[Row], path: str | Path) -> None:
    """Write one record a line, replacing the file as a whole or not at all."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    publish_bytes(Path(path), b"".join(json_bytes(row) + b"\n" for row in rows), overwrite=True)


def publish_json(value: Row, path: Path) -> None:
    """Write indented JSON, replacing the file as a whole or not at all."""
    publish_bytes(path, json_bytes(value, indent=2) + b"\n", overwrite=True)


def read_jsonl(path: str | Path) -> list[Row]:
    """Return the records of a file.

    Raises ValueError naming file, line and field for a line that is not a record, an answer that does not follow from
    its logits, a line with other conditions than the first, a statement that is there twice, a group that is no choice,
    and an empty file.
    """
    rows: list[Row] = []
    places: list[str] = []
    lines: dict[tuple[Any, ...], str] = {}
    for where, row in json_lines(Path(path), ONE_A_LINE):
        _check(row, where)
        row["split"] = SPLIT_ALIASES.get(row["split"], row["split"])
        if rows and list(row["systems"]) != list(rows[0]["systems"]):
            own, first = ", ".join(row["systems"]), ", ".join(rows[0]["systems"])
            raise ValueError(f"{where}: has the conditions {own}; line 1 has {first}")
        earlier = lines.setdefault((row["dataset"], row["split"], row["index"]), where)
        if earlier != where:
            line = earlier.rpartition(":")[2]
            raise ValueError(f"{where}: is statement {row['index']}, as line {line} is; remove one")
        rows.append(row)
        places.append(where)
    if not rows:
        raise ValueError(f"{path}: has no statements; wanted {ONE_A_LINE}")
    check_groups(
        [(row.get("group", ""), row["image"], row["label"], row.get("sets", {})) for row in rows], places
    )
    return rows


_FIELDS: dict[str, type] = {
    **dict.fromkeys(("image", "statement", "relation", "category", "dataset", "split"), str),
    **dict.fromkeys(("image_seen_in_train", "statement_in_train"), bool),
    **dict.fromkeys(("index", "label"), int),
}


def _check(row: Any, where: str) -> None:
    """Raise ValueError unless `row` is a record."""
    if not isinstance(row, dict) or not isinstance(row.get("systems"), dict) or not row["systems"]:
        raise ValueError(f"{where}: has no answers under 'systems'; wanted {ONE_A_LINE}")
    for field, wanted in _FIELDS.items():
        if type(row.get(field)) is not wanted:
            raise ValueError(f"{where}: {field} is {row.get(field)!r}; wanted {wanted.__name__}")
        if wanted is str and (found := flaw(row[field])):
            raise ValueError(f"{where}: {field} is {row[field]!r}, which holds {found}; remove it")
    if not isinstance(row.get("release", ""), str):  # not in older records
        raise ValueError(f"{where}: release is {row['release']!r}; wanted str")
    if not isinstance(row.get("group", ""), str):
        raise ValueError(f"{where}: group is {row['group']!r}; wanted str")
    sets = row.get("sets", {})
    if not isinstance(sets, dict) or not all(isinstance(name, str) for name in sets.values()):
        raise ValueError(f"{where}: sets is {sets!r}; wanted an object of texts")
    if type(row.get("question", True)) is not bool:
        raise ValueError(f"{where}: question is {row['question']!r}; wanted bool")
    if row["label"] not in (0, 1):
        raise ValueError(f"{where}: label is {row['label']}; wanted 0 or 1")
    for condition, found in row["systems"].items():
        answer: Row = found if isinstance(found, dict) else {}
        numbers: list[Any] = [answer.get(key) for key in ("logit_0", "logit_1", "logsumexp")]
        if not all(type(x) in (int, float) and math.isfinite(x) for x in numbers):
            raise ValueError(
                f"{where}: {condition} has logit_0, logit_1, logsumexp {numbers}; wanted three finite numbers"
            )
        zero, one, logsumexp = map(float, numbers)
        for key, value in _answer(zero, one, logsumexp, row["label"]).items():
            if type(answer.get(key)) not in (int, float, bool) or abs(answer[key] - value) > 1e-9:
                raise ValueError(
                    f"{where}: {condition} has {key} {answer.get(key)!r}; its logits and label give {value!r}"
                )


# ---- provenance

_OF_RESULTS = set(
    "command records_sha256 date dataset split annotations statements_in_split image_folder cache checkpoints "
    "versions".split()
)
_OF_CHECKPOINT = set(
    "checkpoint step seed model_name model_revision dtype device trained_on parts trained_parameters projection "
    "fingerprint fingerprint_sha256".split()
)


def read_results(path: Path) -> tuple[list[Row], dict[str, Any] | None]:
    """Return the records of `path` and the provenance beside them (see `read_source`): the one reader of results.

    Raises ValueError for records that are not as they were written, as far as there is a provenance, and as
    `read_jsonl` does.
    """
    source = read_source(path)
    return read_jsonl(path), source


def read_source(path: Path) -> dict[str, Any] | None:
    """Return the provenance beside the records of `path`, or None without any.

    Raises ValueError if it belongs to other records or lacks a field.
    """
    meta = companion(path, ".meta.json", ".jsonl")
    if not meta.is_file():
        return None
    source = read_json_with_comments(meta)
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
