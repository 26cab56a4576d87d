"""The verdict of an evaluation in a sentence: whether the world tokens help, from a summary of metrics alone.

One condition is better than another if both tests say so: the exact McNemar test with p below 0.05, and a 95 % interval
of the difference, by cluster bootstrap over images, that lies above 0. World tokens help if they are better than plain
Gemma, than zero latents and than another image's latents; if the checkpoint's own Gemma was trained, also than that
Gemma without world tokens.
"""

from dataclasses import dataclass
from typing import Any

from theworld.evaluation.comparison import LEAST_P, NO_INTERVAL
from theworld.evaluation.conditions import checkpoint_of, checkpoints_in, condition_type, find_condition
from theworld.evaluation.metrics import FEW, find_pair, reverse
from theworld.utils.text import counted

ALPHA = 0.05
HELPS, NOT_THE_WORLD, UNCONTROLLED = "helps", "not the world", "without controls"
NO_EVIDENCE, HURTS, UNTESTED = "no evidence", "hurts", "not tested"
# Every evaluation needs the first two controls; the third exists only for a checkpoint whose own Gemma was trained.
CONTROLS = {"shuffled": "another image's latents", "zero": "zero latents"}
TRAINED_GEMMA = {"without": "the trained Gemma's answers without world tokens"}
NO_GAIN = " do not reproduce the gain"
OPENINGS = {
    HELPS: "World tokens help, and the controls do not reproduce the gain",
    NOT_THE_WORLD: "World tokens raise the accuracy, but a control reproduces the gain",
    UNCONTROLLED: "World tokens raise the accuracy, but a control was not evaluated",
    NO_EVIDENCE: "No evidence that world tokens help",
    HURTS: "World tokens hurt",
    UNTESTED: "Not tested",
}


@dataclass(frozen=True)
class Verdict:
    """One of the cases above, the sentence, and notes that a reader needs beside it."""

    kind: str
    sentence: str
    notes: tuple[str, ...] = ()


def verdict(summary: dict[str, Any]) -> Verdict:
    """Return the verdict on all checkpoints of a summary."""
    verdicts = {m: verdict_on(summary, m) for m in checkpoints_in(list(summary["systems"]))}
    notes = tuple(_notes(summary))
    if len(verdicts) == 1:
        (only,) = verdicts.values()
        return Verdict(only.kind, only.sentence, (*only.notes, *notes))
    notes = (*(f"{m}: {v.sentence}" for m, v in verdicts.items()), *notes)
    kinds = {v.kind for v in verdicts.values()}
    if len(kinds) > 1:
        found = ", ".join(f"{m} {v.kind}" for m, v in verdicts.items())
        return Verdict("mixed", f"The {len(verdicts)} checkpoints do not agree: {found}.", notes)
    (kind,) = kinds
    gain = summary["checkpoints"].get("gain")
    size = ""
    if gain:
        values = gain["each"].values()
        size = (
            f": {points(gain['mean'])} over plain Gemma on average "
            f"(standard deviation {100 * gain['sd']:.1f}, from {points(min(values))} to {points(max(values))})"
        )
    return Verdict(kind, f"{OPENINGS[kind]}, in each of {len(verdicts)} checkpoints{size}.", notes)


def verdict_on(summary: dict[str, Any], checkpoint: str) -> Verdict:
    """Return the verdict on one checkpoint, "" for the only one."""
    names, pairs = list(summary["systems"]), summary["pairs"]
    world, baseline = (find_condition(names, checkpoint, c) for c in ("world", "baseline"))
    if world is None or baseline is None:
        missing = "world" if world is None else "baseline"
        return Verdict(
            UNTESTED, f"Whether world tokens help is not tested: {missing} is not among the conditions."
        )
    gain = find_pair(pairs, world, baseline)
    assert gain is not None
    figures = (
        f"{share(summary, world)} against {share(summary, baseline)} of plain Gemma, "
        f"{points(gain['difference'])} ({_interval(gain)})"
    )
    if better(reverse(gain)):
        return Verdict(HURTS, f"World tokens hurt: {figures}.")
    if not better(gain):
        return Verdict(NO_EVIDENCE, f"No evidence that world tokens help: {figures}.")
    controls = {
        c: s for c in CONTROLS | TRAINED_GEMMA if (s := find_condition(names, checkpoint, c)) is not None
    }
    said = {c: _control(summary, c, s, world, baseline) for c, s in controls.items()}
    beaten = [c for c, s in controls.items() if better(find_pair(pairs, world, s))]
    unbeaten = [c for c in controls if c not in beaten]
    if unbeaten:
        return Verdict(
            NOT_THE_WORLD,
            f"World tokens raise the accuracy, {figures}, but {' and '.join(said[c] for c in unbeaten)}.",
            tuple(f"{said[c][0].upper()}{said[c][1:]}." for c in beaten),
        )
    if lacking := [words for c, words in CONTROLS.items() if c not in controls]:
        return Verdict(
            UNCONTROLLED,
            f"World tokens raise the accuracy, {figures}; whether that is due to their content is open: "
            f"{' and '.join(lacking)} were not evaluated.",
        )
    without_gain = [said[c].removesuffix(NO_GAIN) for c in beaten if said[c].endswith(NO_GAIN)]
    ends = [" and ".join(without_gain) + NO_GAIN] * bool(without_gain)
    ends += [said[c] for c in beaten if not said[c].endswith(NO_GAIN)]
    return Verdict(HELPS, f"World tokens help: {figures}; {', '.join(ends)}.")


def better(pair: dict[str, Any] | None) -> bool:
    """Return whether the first condition of a pair is shown to be better, by both tests. False without an interval."""
    return pair is not None and pair["p_value"] < ALPHA and pair["low"] is not None and pair["low"] > 0


def _control(summary: dict[str, Any], control: str, condition: str, world: str, baseline: str) -> str:
    """Return how much of the gain a control reproduces, in words."""
    words = f"{(CONTROLS | TRAINED_GEMMA)[control]} ({share(summary, condition)})"
    over_baseline = find_pair(summary["pairs"], condition, baseline)
    world_over_control = find_pair(summary["pairs"], world, condition)
    assert over_baseline is not None
    assert world_over_control is not None
    if not better(world_over_control):
        test = (
            f"{points(world_over_control['difference'])} with world tokens, {_interval(world_over_control)}"
        )
        if better(over_baseline):
            return f"{words} help as much ({test})"
        return f"{words} are not shown to do less ({test})"
    if better(over_baseline):
        return f"{words} keep {points(over_baseline['difference'])} of it"
    return words + NO_GAIN


def _notes(summary: dict[str, Any]) -> list[str]:
    """Return what else a reader has to know."""
    notes = _choice_notes(summary)
    unseen = summary["gain_by_seen"].get("False", [])
    if unseen and "True" in summary["gain_by_seen"]:
        gains = [
            f"{checkpoint_of(p['first'])} {points(p['difference'])} ({_interval(p)})".strip() for p in unseen
        ]
        where = f"On the {counted(unseen[0]['n'], 'statement')} about images that are not in the training set"
        notes.append(f"{where}: {'; '.join(gains)}.")
    if summary["statements_in_train"]:
        notes.append(
            f"{summary['statements_in_train']:,} of the {summary['statements']:,} statements are in the training set: "
            "these are not results on held-out statements."
        )
    majority = summary["majority_class"]
    if any(condition_type(c) == "world" and s["accuracy"] <= majority for c, s in summary["systems"].items()):
        notes.append(
            "With world tokens the accuracy is not above that of always giving the more frequent answer "
            f"({100 * majority:.1f} %)."
        )
    other = [c for c, s in summary["systems"].items() if s["outside_mean"] > 0.5]
    if other:
        notes.append(
            f"The mean other-token probability is above one half ({', '.join(other)}): '0' and '1' have the smaller "
            "part of the probability."
        )
    if summary["statements"] < FEW:
        are = "is" if summary["statements"] == 1 else "are"
        notes.append(f"{counted(summary['statements'], 'statement')} {are} few: the intervals are wide.")
    return notes


def _choice_notes(summary: dict[str, Any]) -> list[str]:
    """Return what the choices say of world tokens against plain Gemma, a line for each checkpoint."""
    choices = summary.get("choices")
    if choices is None:
        return []
    names, notes = list(choices["systems"]), []
    for checkpoint in checkpoints_in(names):
        world, baseline = (find_condition(names, checkpoint, c) for c in ("world", "baseline"))
        gain = find_pair(choices["pairs"], world, baseline) if world and baseline else None
        if gain is None:
            continue
        assert world is not None
        assert baseline is not None
        notes.append(
            f"{checkpoint + ': a' if checkpoint else 'A'}s {counted(choices['groups'], 'choice')} (chance "
            f"{100 * choices['chance']:.1f} %): {share(choices, world)} against {share(choices, baseline)} of plain "
            f"Gemma, {points(gain['difference'])} ({_interval(gain)})."
        )
    return notes


def points(difference: float) -> str:
    """Return a difference of two shares in percentage points, with its sign."""
    return f"{100 * difference:+.1f} points".replace("-", "−")


def p_words(p: float, digits: int = 2) -> str:
    """Return a p value with so many significant digits, as "p = 0.031"; one too small for a float is not called 0."""
    return f"p = {p:.{digits}g}" if p >= LEAST_P else f"p < {LEAST_P:.0e}"


def share(summary: dict[str, Any], condition: str) -> str:
    """Return the accuracy under a condition in percent."""
    return f"{100 * summary['systems'][condition]['accuracy']:.1f} %"


def _interval(pair: dict[str, Any]) -> str:
    if pair["low"] is None:
        interval = NO_INTERVAL
    else:
        interval = f"95 % interval {100 * pair['low']:+.1f} to {100 * pair['high']:+.1f}".replace("-", "−")
    return f"{interval}, exact McNemar {p_words(pair['p_value'])}"
