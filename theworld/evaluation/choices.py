"""Choices: groups of statements about one photograph of which one is true, scored by the largest P(true).

A choice is answered right where the true option has the largest P(true). Options are ranked by the logit of "1" less
that of "0", as P(true) ranks them, also where it rounds to 0 or 1. A tie of the true option with another counts as a
wrong answer, so a model that gives all options the same probability gets nothing right.

A benchmark may define sets of choices, such as What'sUp's pairs (left and right of the same two objects) and sets (all
four positions): a set is right where all of its choices are.
"""

from collections.abc import Sequence

from theworld.evaluation.records import Row


def choices_of(rows: Sequence[Row]) -> list[Row]:
    """Return the choices among records: one row a group, with the answers under each condition as `systems`.

    It has image, dataset, split, group, sets and options (their number) besides.
    """
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        if row.get("group"):
            groups.setdefault((row["dataset"], row["split"], row["group"]), []).append(row)
    return [
        {
            "image": own[0]["image"],
            "dataset": dataset,
            "split": split,
            "group": group,
            "sets": own[0].get("sets", {}),
            "options": len(own),
            "systems": {condition: _answer(own, condition) for condition in own[0]["systems"]},
        }
        for (dataset, split, group), own in groups.items()
    ]


def _answer(options: Sequence[Row], condition: str) -> Row:
    """Return whether a choice is answered right under a condition, and whether only a tie makes it wrong."""
    answers = [(row["label"], row["systems"][condition]) for row in options]
    margins = [(label, answer["logit_1"] - answer["logit_0"]) for label, answer in answers]
    (true,) = [margin for label, margin in margins if label == 1]
    largest_other = max(margin for label, margin in margins if label == 0)
    return {"correct": true > largest_other, "tie": true == largest_other}


def sets_of(choices: Sequence[Row]) -> dict[str, list[list[Row]]]:
    """Return the sets that the choices belong to, by their kind: the choices of each set."""
    found: dict[str, dict[tuple[str, str, str], list[Row]]] = {}
    for choice in choices:
        for kind, name in choice["sets"].items():
            key = (choice["dataset"], choice["split"], name)
            found.setdefault(kind, {}).setdefault(key, []).append(choice)
    return {kind: list(own.values()) for kind, own in found.items()}
