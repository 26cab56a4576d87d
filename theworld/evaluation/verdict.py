"""What the figures say about the world tokens, in a sentence: a pure function of a summary of metrics.

Better means both: exact McNemar below 0.05 and an interval over images above 0. That world tokens help takes more:
they have to be better than zero latents and than another image's latents too, or it is not the world that helps; and
where Gemma itself was trained, better than that Gemma without them.
"""

from dataclasses import dataclass
from typing import Any

from theworld.evaluation.metrics import FEW, kind_of, model_of, models_in, pair_of, system_of

ALPHA = 0.05
HELPS, NOT_THE_WORLD, UNCONTROLLED = "helps", "not the world", "without controls"
NO_EVIDENCE, HURTS, UNTESTED = "no evidence", "hurts", "not tested"
CONTROLS = {"shuffled": "another image's latents", "zero": "zero latents"}
OWN = {
    "without": "its own Gemma's answers without them"
}  # a control where a checkpoint has a Gemma of its own
LOSE = " lose it"


@dataclass(frozen=True)
class Verdict:
    """Which of the cases above, the sentence, and what has to be said beside it."""

    kind: str
    sentence: str
    notes: tuple[str, ...] = ()


def verdict(summary: dict[str, Any]) -> Verdict:
    """The verdict on all checkpoints of a summary."""
    models = models_in(list(summary["systems"]))
    each = {m: verdict_on(summary, m) for m in models}
    notes = tuple(_notes(summary))
    if len(each) == 1:
        one = next(iter(each.values()))
        return Verdict(one.kind, one.sentence, (*one.notes, *notes))
    own = tuple(f"{m}: {v.sentence}" for m, v in each.items())
    kinds = {v.kind for v in each.values()}
    if len(kinds) > 1:
        found = ", ".join(f"{m} {v.kind}" for m, v in each.items())
        return Verdict("mixed", f"The {len(each)} checkpoints do not agree: {found}.", (*own, *notes))
    kind = kinds.pop()
    opening = {
        HELPS: "World tokens help, and the controls do less",
        NOT_THE_WORLD: "World tokens raise the accuracy, but it is not shown to be the world that does",
        UNCONTROLLED: "World tokens raise the accuracy, but controls were not scored",
        NO_EVIDENCE: "No evidence that world tokens help",
        HURTS: "World tokens hurt",
        UNTESTED: "Not tested",
    }[kind]
    gain = summary["checkpoints"].get("gain")
    size = ""
    if gain:
        values = gain["each"].values()
        size = (
            f": {points(gain['mean'])} over plain Gemma on average "
            f"(standard deviation {100 * gain['sd']:.1f}, from {points(min(values))} to {points(max(values))})"
        )
    return Verdict(kind, f"{opening}, in each of {len(each)} checkpoints{size}.", (*own, *notes))


def verdict_on(summary: dict[str, Any], model: str) -> Verdict:
    """The verdict on one checkpoint ("" where there is but one)."""
    names = list(summary["systems"])
    world, baseline = (system_of(names, model, kind) for kind in ("world", "baseline"))
    if world is None or baseline is None:
        missing = "world" if world is None else "baseline"
        return Verdict(UNTESTED, f"Whether world tokens help is not tested: {missing} was not scored.")
    gain = pair_of(summary["pairs"], world, baseline)
    assert gain is not None
    figures = (
        f"{share(summary, world)} against {share(summary, baseline)} of plain Gemma, "
        f"{points(gain['difference'])} ({_interval(gain)})"
    )
    if better(_turned(gain)):
        return Verdict(HURTS, f"World tokens hurt: {figures}.")
    if not better(gain):
        return Verdict(NO_EVIDENCE, f"No evidence that world tokens help: {figures}.")
    controls = {c: s for c in CONTROLS | OWN if (s := system_of(names, model, c)) is not None}
    lost: list[str] = []
    kept: list[str] = []
    for control, system in controls.items():
        (lost if better(pair_of(summary["pairs"], world, system)) else kept).append(control)
    said = {c: _control(summary, c, system, world, baseline) for c, system in controls.items()}
    if kept:
        return Verdict(
            NOT_THE_WORLD,
            f"World tokens raise the accuracy, {figures}, but {' and '.join(said[c] for c in kept)}.",
            tuple(f"{said[c][0].upper()}{said[c][1:]}." for c in lost),
        )
    if CONTROLS.keys() - controls:
        missing = " and ".join(words for c, words in CONTROLS.items() if c not in controls)
        return Verdict(
            UNCONTROLLED,
            f"World tokens raise the accuracy, {figures}; whether it is the world that does is open: {missing} "
            f"{'were' if ' ' in missing else 'was'} not scored.",
        )
    gone = [said[c].removesuffix(LOSE) for c in lost if said[c].endswith(LOSE)]
    rest = [said[c] for c in lost if not said[c].endswith(LOSE)]
    ends = [" and ".join(gone) + LOSE] * bool(gone) + rest
    return Verdict(HELPS, f"World tokens help: {figures}; {', '.join(ends)}.")


def better(pair: dict[str, Any] | None) -> bool:
    """Whether the first of a pair is shown to be better: by both tests. Without an interval nothing is shown."""
    return pair is not None and pair["p_value"] < ALPHA and pair["low"] is not None and pair["low"] > 0


def _control(summary: dict[str, Any], control: str, system: str, world: str, baseline: str) -> str:
    """What a control does to the gain."""
    words = f"{(CONTROLS | OWN)[control]} ({share(summary, system)})"
    rest = pair_of(summary["pairs"], system, baseline)
    less = pair_of(summary["pairs"], world, system)
    assert rest is not None
    assert less is not None
    if not better(less):
        test = f"{points(less['difference'])} for the world, {_interval(less)}"
        if better(rest):
            return f"{words} help as much ({test}): not the world"
        return f"{words} are not shown to do less ({test})"
    if better(rest):
        return f"{words} keep {points(rest['difference'])} of it"
    return words + LOSE


def _notes(summary: dict[str, Any]) -> list[str]:
    """What else a reader has to know."""
    notes = []
    unseen = summary["gain_by_seen"].get("False", [])
    if unseen and "True" in summary["gain_by_seen"]:
        gains = [f"{model_of(p['first'])} {points(p['difference'])} ({_interval(p)})".strip() for p in unseen]
        where = f"On the {unseen[0]['n']:,} statements about images that training did not show"
        notes.append(f"{where}: {'; '.join(gains)}.")
    if summary["statements_in_train"]:
        notes.append(
            f"{summary['statements_in_train']:,} of the {summary['statements']:,} statements were trained on: no "
            "figure here is one of held-out statements."
        )
    below = [
        s
        for s, found in summary["systems"].items()
        if kind_of(s) == "world" and found["accuracy"] <= summary["majority_class"]
    ]
    if below:
        notes.append(
            f"With world tokens the accuracy is not above that of always giving the more frequent answer "
            f"({100 * summary['majority_class']:.1f} %)."
        )
    outside = [s for s, found in summary["systems"].items() if found["outside_mean"] > 0.5]
    if outside:
        notes.append(
            f"Most of the probability lies outside '0' and '1' ({', '.join(outside)}): what is compared is the smaller "
            "part of it."
        )
    if summary["statements"] < FEW:
        notes.append(f"{summary['statements']} statements are few: the intervals are wide.")
    return notes


def points(difference: float) -> str:
    """A difference of two shares in percentage points, with its sign."""
    return f"{100 * difference:+.1f} points".replace("-", "−")


def share(summary: dict[str, Any], system: str) -> str:
    """A system's accuracy in percent."""
    return f"{100 * summary['systems'][system]['accuracy']:.1f} %"


def _interval(pair: dict[str, Any]) -> str:
    if pair["low"] is None:
        interval = "no interval over a single image"
    else:
        interval = f"95 % interval {100 * pair['low']:+.1f} to {100 * pair['high']:+.1f}".replace("-", "−")
    return f"{interval}, exact McNemar p = {pair['p_value']:.2g}"


def _turned(pair: dict[str, Any]) -> dict[str, Any]:
    turned = pair_of([pair], pair["second"], pair["first"])
    assert turned is not None
    return turned
