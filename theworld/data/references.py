"""Published results, each with its setting and its source, from references.json.

Its `sources` have an address (null where none is known) and the day as of which they are quoted, its `figures` the
accuracy in percent on a split of a data set:

    statements   number of statements that it was measured on; null: not stated
    setting      zero-shot, fine-tuned, or frozen (a model whose features alone are used); null: not stated
    answers      likelihood (the more probable of the two answers) or generated (text); null: not stated
    notes        what a reader has to know, as keys of `notes`
"""

import functools
import json
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

WAYS = {"likelihood": "by likelihood", "generated": "generated", None: ""}


@dataclass(frozen=True)
class Source:
    """A publication, or what stands for one."""

    words: str
    address: str | None
    as_of: str  # the day, as 2026-11-28

    def __str__(self) -> str:
        address = f"{self.address}, " if self.address else ""
        return f"{self.words} ({address}as of {self.as_of})"


@dataclass(frozen=True)
class Reference:
    """The published accuracy of a system, as a share, on a split of a data set."""

    system: str
    dataset: str  # as `theworld.data.vsr.dataset_label` returns it
    split: str
    accuracy: float
    statements: int | None
    setting: str | None
    answers: str | None
    source: Source
    notes: tuple[str, ...]

    @property
    def name(self) -> str:
        """Return the system with its setting: "PaliGemma 2 3B, fine-tuned"."""
        return f"{self.system}, {self.setting}" if self.setting else self.system

    @property
    def measured(self) -> str:
        """Return in words how it was measured, as far as that is stated: "1,222 statements, by likelihood"."""
        number = f"{self.statements:,} statements" if self.statements else ""
        return ", ".join(filter(None, (number, WAYS[self.answers])))


@functools.cache
def references() -> tuple[Reference, ...]:
    """Return all published results, in the order of the file."""
    data: dict[str, Any] = json.loads(
        (files("theworld.data") / "references.json").read_text(encoding="utf-8")
    )
    sources = {key: Source(**source) for key, source in data["sources"].items()}
    return tuple(
        Reference(
            **figure
            | {
                "accuracy": figure["accuracy"] / 100,
                "source": sources[figure["source"]],
                "notes": tuple(data["notes"][key] for key in figure["notes"]),
            }
        )
        for figure in data["figures"]
    )


def quoted(dataset: str, split: str) -> list[Reference]:
    """Return the published results on a split of a data set."""
    return [one for one in references() if (one.dataset, one.split) == (dataset, split)]


def footnotes(found: list[Reference]) -> list[str]:
    """Return the different notes of these results, in order; a result names them by their numbers, from 1."""
    return list(dict.fromkeys(note for one in found for note in one.notes))


def marks(one: Reference, notes: list[str]) -> str:
    """Return the numbers of a result's footnotes: "[1]", or "" for none."""
    return "".join(f"[{notes.index(note) + 1}]" for note in one.notes)
