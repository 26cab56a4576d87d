"""The conditions of an evaluation: what a model is given beside a statement.

    world      the photograph and its world tokens
    baseline   the photograph alone, which is exactly the published Gemma
    zero       the photograph and world tokens of the mean latent (zero when normalised), which has no information
    shuffled   the photograph and world tokens of another image
    text       neither photograph nor world tokens
    without    the photograph alone, for a checkpoint whose own Gemma was trained

Where several checkpoints are evaluated together, the checkpoint's name stands before the condition, as in
"run-1:world", except for conditions in which all of them answer alike.
"""

from collections.abc import Sequence

CONDITIONS = ("world", "baseline", "zero", "shuffled", "text")  # those that can be asked for
CONDITION_TYPES = (*CONDITIONS, "without")
LABELS = {
    "world": "world tokens",
    "baseline": "plain Gemma",
    "zero": "zero latents",
    "shuffled": "another image's latents",
    "text": "text only",
    "without": "trained Gemma alone",
}


def condition_type(condition: str) -> str:
    """Return one of CONDITION_TYPES: "world" for "run-1:world"."""
    return condition.rpartition(":")[2]


def checkpoint_of(condition: str) -> str:
    """Return the name of the checkpoint: "run-1" for "run-1:world"; "" if the condition names none."""
    return condition.rpartition(":")[0]


def checkpoints_in(conditions: Sequence[str]) -> list[str]:
    """Return the names of the checkpoints that the conditions name, in order; [""] if they name none."""
    return list(dict.fromkeys(checkpoint_of(c) for c in conditions if checkpoint_of(c))) or [""]


def find_condition(conditions: Sequence[str], checkpoint: str, wanted_type: str) -> str | None:
    """Return the condition of that type, a checkpoint's own or the shared one; None if it was not evaluated."""
    return next((c for c in (f"{checkpoint}:{wanted_type}", wanted_type) if c in conditions), None)
