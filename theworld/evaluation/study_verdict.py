"""What was fixed before a study, and what its figures (`theworld.evaluation.study_summary`) say to it, in words."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from theworld.data.vsr import split_words
from theworld.evaluation.comparison import ALPHA, METRICS, NO_INTERVAL
from theworld.evaluation.power import NONE, POWER, smallest_points
from theworld.evaluation.verdict import points

WORLD = "world"  # the arm whose world tokens are made of the video model's latents
PLAIN = "plain"  # the arm of Gemma as it was published: one run, without seeds, its answers under "baseline"
LEAST_SEEDS = 3  # of a verdict
SHOWN_PAIRS = 3  # that differ, in the sentence of a study that explores
HELPS, CONTROL_AS_WELL, NO_DIFFERENCE, WORSE, NO_VERDICT = (
    "helps",
    "a control does as well",
    "no difference",
    "worse",
    "no verdict",
)
ARM_WORDS = {
    WORLD: "the video model's latents",
    "prompt": "training alone",
    "pixels": "the picture's own pixels",
    "untrained": "an untrained encoder",
    "noise": "noise",
    "again": "Gemma's own features once more",
    "mismatched": "another image's latents",
    PLAIN: "plain Gemma",
}
METRIC_WORDS = {"accuracy": "accuracy", "balanced_accuracy": "balanced accuracy", "auroc": "AUROC"}


@dataclass(frozen=True)
class Question:
    """What a study fixes before it runs. `margin` is the largest difference, as a share, that counts as equal.

    A study that explores fixes no comparison: `decides` is False, and it has figures and no verdict. It compares every
    two arms, or each with the `baseline`.
    """

    world: str = WORLD
    reference: str = "prompt"  # the arm that has all of the training and nothing of the picture
    controls: tuple[str, ...] = ("prompt", "pixels", "untrained", "noise")  # each has to be beaten
    metric: str = "accuracy"
    alpha: float = ALPHA
    margin: float = 0.01
    decides: bool = True
    baseline: str | None = None

    def __post_init__(self) -> None:
        if self.reference not in self.controls:
            raise ValueError(f"reference is {self.reference!r}; wanted one of {', '.join(self.controls)}")
        if self.metric not in METRICS:
            raise ValueError(f"metric is {self.metric!r}; allowed: {', '.join(METRICS)}")
        if not 0 < self.alpha < 0.5 or self.margin <= 0:
            raise ValueError(f"alpha is {self.alpha} and margin {self.margin}; wanted 0 to 0.5 and above 0")


@dataclass(frozen=True)
class StudyVerdict:
    """One of the outcomes, the sentence that says it, and notes that a reader needs beside it."""

    kind: str
    sentence: str
    notes: tuple[str, ...] = ()


def arm_words(arm: str) -> str:
    """Return an arm in words; an arm of another name in its own."""
    return ARM_WORDS.get(arm, arm)


def data_words(data: Sequence[Sequence[str]]) -> str:
    """Return the data sets and splits in words: "the test split of VSR random"."""
    return " and ".join(split_words(name, split) for name, split in data)


def point_words(points: float) -> str:
    """Return a number of percentage points in words: "1 percentage point"."""
    number = f"{points:g}"
    return f"{number} percentage point{'' if number == '1' else 's'}"


# ---- the verdict


def verdict_on_scope(
    scope: dict[str, Any], question: Question, seeds: Sequence[int], place: str
) -> StudyVerdict:
    """Return what the differences of a scope show. `place` is the data in words, such as "on the test split of ..."."""
    if not question.decides:
        explored = _explored(scope, question, seeds)
        nothing = f"No verdict {place}: no comparison was fixed before the study ran."
        return StudyVerdict(NO_VERDICT, f"{nothing} {explored}")
    notes = tuple(_notes(scope, question))
    test = scope["differences"][question.reference][question.metric]
    against = _against(scope, question.reference, question)
    if scope["images"] < 2:
        return StudyVerdict(NO_VERDICT, f"No verdict {place}: it takes two images. So far {against}.", notes)
    if len(seeds) < LEAST_SEEDS:
        lacks = f"it takes {LEAST_SEEDS} seeds. So far {against}"
        return StudyVerdict(NO_VERDICT, f"No verdict {place}: {lacks}.", notes)
    if test["high"] < 0:
        return StudyVerdict(WORSE, f"Worse {place}: {against}.", notes)
    if test["low"] <= 0:
        opening = f"No difference that this study could have detected {place}"
        equal = f"; the two are {_equal(question)}" if test["within_margin"] else ""
        return StudyVerdict(NO_DIFFERENCE, f"{opening}: {against}{equal}; {_detectable(test)}.", notes)
    return _above_reference(scope, question, place, notes)


def _above_reference(
    scope: dict[str, Any], question: Question, place: str, notes: tuple[str, ...]
) -> StudyVerdict:
    """Return whether an arm that is above the reference is above every control."""
    tests = {control: scope["differences"][control][question.metric] for control in question.controls}
    against = {control: _against(scope, control, question) for control in question.controls}
    beaten = [control for control in question.controls if tests[control]["low"] > 0]
    unbeaten = [control for control in question.controls if control not in beaten]
    beyond = f"beyond {_listed([arm_words(control) for control in beaten])}"
    if not unbeaten:
        subject = "The video model" if question.world == WORLD else question.world
        return StudyVerdict(HELPS, f"{subject} helps {beyond} {place}: {'; '.join(against.values())}.", notes)
    subject = "World tokens help" if question.world == WORLD else f"{question.world} helps"
    but = f"but not beyond {_listed([arm_words(control) for control in unbeaten])}"
    said = "; ".join(f"{against[control]}, {_as_well(tests[control], question)}" for control in unbeaten)
    others = (f"{against[control][0].upper()}{against[control][1:]}." for control in beaten)
    return StudyVerdict(CONTROL_AS_WELL, f"{subject} {beyond}, {but}, {place}: {said}.", (*others, *notes))


def _explored(scope: dict[str, Any], question: Question, seeds: Sequence[int]) -> str:
    """Return which arms of a study that explores differ, as a sentence."""
    said = []
    for pair in sorted(scope["pairs"], key=lambda pair: -abs(pair[question.metric]["difference"])):
        test = pair[question.metric]
        if test["adjusted_p_value"] < question.alpha:
            first, second = (arm_words(pair[key]) for key in ("first", "second"))
            higher, lower = (first, second) if test["difference"] > 0 else (second, first)
            said.append(f"{higher} is above {lower} by {points(abs(test['difference'])).lstrip('+')}")
    more = len(said) - SHOWN_PAIRS
    if more > 0:
        said = [*said[:SHOWN_PAIRS], f"{more} more pair{'s differ' if more > 1 else ' differs'}"]
    nothing = "no two arms are shown to differ"
    if question.baseline is not None:
        nothing = f"no arm is shown to differ from {arm_words(question.baseline)}"
    number = len(scope["pairs"])
    corrected = f", corrected for {number} comparisons" if number > 1 else ""
    alone = "; of one seed each, so of these runs alone" if len(seeds) == 1 else ""
    alone += f"; {NO_INTERVAL}, so none could be" if scope["images"] < 2 else ""
    return f"In {METRIC_WORDS[question.metric]}{corrected}, {_listed(said) if said else nothing}{alone}."


def _against(scope: dict[str, Any], control: str, question: Question) -> str:
    """Return both arms' figures and their difference in words."""
    test, arms = scope["differences"][control][question.metric], scope["arms"]
    mine, other = (100 * arms[arm][question.metric]["mean"] for arm in (question.world, control))
    level = f"{100 * (1 - question.alpha):g}"
    interval = f"{level} % interval {100 * test['low']:+.1f} to {100 * test['high']:+.1f}".replace("-", "−")
    if scope["images"] < 2:
        interval = NO_INTERVAL
    return f"{mine:.1f} % against {other:.1f} % of {arm_words(control)}, {points(test['difference'])} ({interval})"


def _as_well(test: dict[str, Any], question: Question) -> str:
    """Return what is shown of a control that is not beaten, as a clause."""
    if test["high"] < 0:
        return "which does better"
    if test["within_margin"]:
        return f"which is {_equal(question)}"
    return f"which is not shown to do less ({_detectable(test)})"


def _equal(question: Question) -> str:
    return f"equal within {points(question.margin).lstrip('+')}"


def _detectable(test: dict[str, Any]) -> str:
    size, power = test["smallest_detectable"], f"with {100 * POWER:.0f} % power"
    if size >= NONE:
        return f"no difference, however large, would be found {power}"
    return f"the smallest difference found {power} is {smallest_points(size)} points"


def _notes(scope: dict[str, Any], question: Question) -> list[str]:
    """Return where the other metrics and the bootstrap disagree with the metric of the question."""
    notes = []
    own = {c: scope["differences"][c][question.metric] for c in question.controls}
    for metric in METRICS:
        silent = [
            arm_words(control)
            for control, test in own.items()
            if test["low"] > 0
            and metric in scope["differences"][control]
            and scope["differences"][control][metric]["low"] <= 0
        ]
        if silent:
            notes.append(
                f"{METRIC_WORDS[metric][0].upper()}{METRIC_WORDS[metric][1:]} does not show the gain over "
                f"{_listed(silent)}: it may be one of calibration."
            )
    apart = [
        arm_words(control)
        for control, test in own.items()
        if (test["low"] > 0) != (test["bootstrap_low"] > 0)
        or (test["high"] < 0) != (test["bootstrap_high"] < 0)
    ]
    if apart:
        notes.append(
            "The bootstrap over images and seeds, which is too narrow for few seeds, says otherwise of "
            f"{_listed(apart)}."
        )
    return notes


def _listed(words: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(words[:-1]), words[-1]]))
