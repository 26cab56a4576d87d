"""From the records of a study's runs to the answers of its arms, statement by statement and seed by seed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from theworld.evaluation.records import Row, read_jsonl
from theworld.evaluation.score import read_source
from theworld.study.protocol import Run, Study
from theworld.study.runner import records_of

SAME = (
    "index",
    "image",
    "statement",
    "label",
    "dataset",
    "split",
)  # of a statement, in the records of all runs


@dataclass(frozen=True)
class Answers:
    """The answers of all arms to the statements of a split, with world tokens."""

    split: str
    rows: Sequence[
        Row
    ]  # of the first run: what is known of each statement, and the answers without world tokens
    p_true: Mapping[
        str, np.ndarray
    ]  # arm -> float64[seeds, statements], the probability of "true" among two answers
    correct: Mapping[str, np.ndarray]  # arm -> bool[seeds, statements]

    @property
    def labels(self) -> np.ndarray:
        """int64[statements], 1 for true."""
        return np.array([row["label"] for row in self.rows])

    @property
    def images(self) -> list[str]:
        """The photograph of each statement."""
        return [row["image"] for row in self.rows]

    @property
    def seen(self) -> np.ndarray:
        """bool[statements]: whether the photograph is one of training."""
        return np.array([row["image_seen_in_train"] for row in self.rows])


def read_answers(study: Study, runs: Sequence[Run], split: str) -> Answers:
    """Return the answers of the runs of a study, all of which are done.

    Raises ValueError naming the file for records that were changed since they were written, or that are of other
    statements than those of the first run.
    """
    found: dict[str, list[list[Row]]] = {arm.name: [] for arm in study.arms}
    for run in runs:
        path = records_of(run, split)
        read_source(path)
        found[run.arm.name].append(read_jsonl(path))
        _check_same(found[study.arms[0].name][0], found[run.arm.name][-1], path)
    first = found[study.arms[0].name][0]
    return Answers(split, first, _of(found, "p_true", float), _of(found, "correct", bool))


def _of(found: Mapping[str, list[list[Row]]], key: str, kind: type) -> dict[str, np.ndarray]:
    """Return a value of each answer with world tokens, [seeds, statements] by arm."""
    return {
        arm: np.array([[row["systems"]["world"][key] for row in rows] for rows in seeds], kind)
        for arm, seeds in found.items()
    }


def _check_same(first: Sequence[Row], rows: Sequence[Row], path: Path) -> None:
    if len(first) != len(rows):
        raise ValueError(
            f"{path}: {len(rows):,} statements, where the first run has {len(first):,}; remove the file"
        )
    for number, (one, other) in enumerate(zip(first, rows, strict=True), 1):
        for key in SAME:
            if one[key] != other[key]:
                raise ValueError(
                    f"{path}:{number}: {key} is {other[key]!r}, where the first run has {one[key]!r}; remove the file, "
                    "and the same command scores again"
                )


def write_results(study: Study, runs: Sequence[Run], output: Path) -> str:
    """Write the results of a study whose runs are all done, and return its verdict in words."""
    answers: Any = {split: read_answers(study, runs, split) for split in ("dev", "test")}
    return "\n".join(f"{arm}: {own.mean():.1%}" for arm, own in answers["test"].correct.items())
