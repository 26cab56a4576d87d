"""How often a study is wrong: studies are simulated with a known effect, and go through the study's own tests.

A run's margin of the right answer over the wrong one is a sum of normal parts: the statement's difficulty, which all
arms share; what an arm makes of an image and of a statement, in all of its runs; what a run makes of them; a shift of
the run, which is the spread over seeds; and a preference for "true" of the run. An effect raises the margin of the
first arm by as much as its accuracy needs. The statements and images are those of a file, or drawn with the counts of
VSR's random test.

Dimensions: B studies, A arms, S seeds, N statements, C images.
"""

import itertools
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats
from scipy.stats import binomtest

from theworld.data.vsr import load_statements
from theworld.evaluation.comparison import (
    ALPHA,
    METRICS,
    Images,
    Variance,
    difference_values,
    pigeonhole_interval,
    statement_values,
)
from theworld.evaluation.power import Assumptions, expected_variance, power

LOG = logging.getLogger(__name__)
# of VSR's random test: 2,195 statements, 1,874 images
IMAGES_BY_STATEMENTS = {
    1: 1609,
    2: 217,
    3: 41,
    4: 6,
    5: 1,
}
SHARE_TRUE = 0.538  # of its statements
ACCURACY = 0.76  # of an arm without an effect
# Standard deviations of the parts of a margin, in those of the statements' difficulty.
ARM_IMAGE, ARM_STATEMENT, RUN_IMAGE, RUN_STATEMENT, RUN_TRUE = 0.25, 0.35, 0.15, 0.35, 0.05
SEEDS, SPREADS, EFFECTS = (3, 5), (0.0, 0.5, 1.0, 2.0, 4.0), (1.0, 2.0, 4.0)  # spreads and effects in points
MARGIN = 0.01  # of the equivalence test
RESAMPLES = 499  # of the bootstrap of each study
CHUNK = 50  # studies at a time
WAYS = {
    "accuracy": "accuracy",
    "balanced_accuracy": "balanced accuracy",
    "auroc": "AUROC",
    "satterthwaite": "Satterthwaite's df",
    "bootstrap": "pigeonhole bootstrap",
    "seeds": "seeds alone",
    "images": "images alone",
    "mcnemar": "pooled McNemar",
    "within": "equal",
}


@dataclass(frozen=True)
class Structure:
    """The statements of a study: the index of their image, int[N], and their labels, int[N]."""

    index: np.ndarray
    labels: np.ndarray
    source: str

    @classmethod
    def read(cls, annotations: Path, split: str, dataset_name: str) -> "Structure":
        """Return that of a split. Raises the errors of `load_statements`."""
        statements = load_statements(annotations, split, dataset_name)
        _, index = np.unique([s.image for s in statements], return_inverse=True)
        return cls(index, np.array([s.label for s in statements]), f"{split} of {annotations.name}")

    @classmethod
    def drawn(cls) -> "Structure":
        """Return one with as many statements, images and true statements as VSR's random test has."""
        counts = np.repeat(list(IMAGES_BY_STATEMENTS), list(IMAGES_BY_STATEMENTS.values()))
        index = np.repeat(np.arange(len(counts)), counts)
        labels = np.random.default_rng(0).permutation(np.arange(len(index)) < SHARE_TRUE * len(index))
        return cls(index, labels.astype(int), "drawn with the counts of VSR's random test")

    @classmethod
    def pairs(cls, num_images: int) -> "Structure":
        """Return one with a true and a false statement about each image."""
        index = np.repeat(np.arange(num_images), 2)
        return cls(index, np.tile([1, 0], num_images), f"two about each of {num_images:,} images")


@dataclass(frozen=True)
class Case:
    """What studies are simulated with. Shares, not points. `alike`: the arms differ by their runs only."""

    num_seeds: int
    spread: float
    gains: tuple[float, ...]  # of each arm over ACCURACY
    alike: bool = False


def simulate(structure: Structure, case: Case, num_studies: int, rng: np.random.Generator) -> np.ndarray:
    """Return the logits of "1" less those of "0", float32[B, A, S, N]."""
    index, sign = structure.index, np.where(structure.labels == 1, 1, -1).astype(np.float32)
    shape = (num_studies, len(case.gains), case.num_seeds, len(index))
    arms = (*shape[:2], 1)

    def normal(deviation: float, *size: int) -> np.ndarray:
        return np.float32(deviation) * rng.standard_normal(size, dtype=np.float32)

    fixed = 1 + RUN_IMAGE**2 + RUN_STATEMENT**2 + RUN_TRUE**2
    fixed += 0 if case.alike else ARM_IMAGE**2 + ARM_STATEMENT**2
    # The spread is of the difference of two arms: each has a half of its variance.
    slope = stats.norm.pdf(stats.norm.ppf(ACCURACY)) / np.sqrt(fixed)
    shift = case.spread / np.sqrt(2) / slope
    means = stats.norm.ppf(ACCURACY + np.array(case.gains)) * np.sqrt(fixed + shift**2)
    right = normal(1, num_studies, 1, 1, len(index)) + means[:, None, None].astype(np.float32)
    if not case.alike:
        right = right + normal(ARM_STATEMENT, *arms, len(index))
        right += normal(ARM_IMAGE, *arms, index.max() + 1)[..., index]
    right = right + normal(RUN_STATEMENT, *shape)
    right += normal(RUN_IMAGE, *shape[:3], index.max() + 1)[..., index]
    right += normal(shift, *shape[:3], 1)
    return right * sign + normal(RUN_TRUE, *shape[:3], 1)


def tests_of(margin: np.ndarray, structure: Structure, usual: bool) -> dict[str, np.ndarray]:
    """Return what each way to compare the first arm with the second says: float[B], the sign of what it finds, or 0.

    "within" is 1 where the two are shown to be within MARGIN. `usual`: also balanced accuracy, AUROC and usual ways.
    """
    images = Images.of(structure.index)
    found = {}
    for metric in METRICS if usual else METRICS[:1]:
        values = difference_values(metric, margin[:, 0], margin[:, 1], structure.labels)
        parts, mean = Variance.of(values, images), values.mean((-2, -1))
        error = np.sqrt(parts.total)
        found[metric] = np.where(abs(mean) > parts.critical_value(ALPHA) * error, np.sign(mean), 0)
        if metric == "accuracy":
            inside = abs(mean) + parts.critical_value(2 * ALPHA) * error < MARGIN
            found["within"] = inside.astype(float)
            difference, accuracy_parts, accuracy_mean = values, parts, mean
    if usual:
        found |= _usual_ways(difference, accuracy_parts, accuracy_mean, images)
    return found


def _usual_ways(
    values: np.ndarray, parts: Variance, mean: np.ndarray, images: Images
) -> dict[str, np.ndarray]:
    """Return what other ways to compare accuracies say, from the differences of correct answers, float[B, S, N]."""
    error = np.sqrt(parts.total)
    by_seed = values.mean(-1)
    first, second = (values > 0).sum((-2, -1)), (values < 0).sum((-2, -1))
    low, high = pigeonhole_interval(values, images, resamples=RESAMPLES)
    significant = {
        "satterthwaite": abs(mean) > stats.t.isf(ALPHA / 2, parts.satterthwaite()) * error,
        "bootstrap": (low > 0) | (high < 0),
        "seeds": abs(mean) > stats.t.isf(ALPHA / 2, by_seed.shape[-1] - 1) * stats.sem(by_seed, axis=-1),
        "images": abs(mean) > stats.norm.isf(ALPHA / 2) * np.sqrt(parts.image),
        "mcnemar": 2 * stats.binom.cdf(np.minimum(first, second), first + second, 0.5) < ALPHA,
    }
    return {way: np.where(found, np.sign(mean), 0) for way, found in significant.items()}


def assumptions_of(structure: Structure, seed: int = 0) -> dict[bool, Assumptions]:
    """Return what the preflight assumes of arms that are alike (True) or differ: measured on one large pilot of each.

    The spread is given with each case, as the preflight's is by a pilot or by an assumption.
    """
    images, found = Images.of(structure.index), {}
    for alike in (True, False):
        rng = np.random.default_rng([seed, alike])
        margin = simulate(structure, Case(20, 0.0, (0.0, 0.0), alike), 4, rng)
        values = difference_values("accuracy", margin[:, 0], margin[:, 1], structure.labels)
        pilots = [Assumptions.from_pilot(v, images) for v in values]
        discordance, persistence, image_correlation = (
            float(np.mean([getattr(pilot, name) for pilot in pilots]))
            for name in ("discordance", "persistence", "image_correlation")
        )
        found[alike] = Assumptions(discordance, persistence, image_correlation, spread=0.0)
    return found


def measure(
    structure: Structure, case: Case, assumed: Assumptions, num_studies: int, seed: int = 0
) -> dict[str, Any]:
    """Simulate studies of two arms and return how often each way finds a difference, beside what was promised."""
    key = [seed, case.num_seeds, round(1e5 * case.spread), round(1e5 * case.gains[0]), case.alike]
    rng = np.random.default_rng(key)
    effect = case.gains[0] - case.gains[1]
    found: list[dict[str, np.ndarray]] = []
    deviations, discordance, gains = [], [], []
    for done in range(0, num_studies, CHUNK):
        margin = simulate(structure, case, min(CHUNK, num_studies - done), rng)
        found.append(tests_of(margin, structure, usual=not effect))
        correct = statement_values("accuracy", margin, structure.labels)
        deviations.append(correct.mean(-1).var(-1, ddof=1).mean())
        discordance.append((correct[:, 0] != correct[:, 1]).mean())
        gains.append((correct[:, 0] - correct[:, 1]).mean())
    signs = {way: np.concatenate([f[way] for f in found]) for way in found[0]}
    told = Assumptions(assumed.discordance, assumed.persistence, assumed.image_correlation, case.spread)
    counts = np.unique(structure.index, return_counts=True)[1]
    return {
        "seeds": case.num_seeds,
        "spread": case.spread,
        "alike": case.alike,
        "effect": effect,
        "studies": num_studies,
        "mean_difference": float(np.mean(gains)),
        "deviation_of_an_arm": float(np.sqrt(np.mean(deviations))),
        "discordance": float(np.mean(discordance)),
        "predicted": power(expected_variance(told, counts, case.num_seeds), effect) if effect else None,
        "found": {way: int((s == 1 if effect else s != 0).sum()) for way, s in signs.items()},
        "wrong_side": int((signs["accuracy"] == -1).sum()),
    }


def beats_all(structure: Structure, case: Case, num_studies: int, seed: int = 0) -> dict[str, Any]:
    """Simulate studies of the first arm against several controls, and return how often it beats every one of them."""
    rng = np.random.default_rng([seed, case.num_seeds, len(case.gains), round(1e5 * max(case.gains))])
    helps = 0
    for done in range(0, num_studies, CHUNK):
        margin = simulate(structure, case, min(CHUNK, num_studies - done), rng)
        beaten = [
            tests_of(margin[:, [0, control]], structure, usual=False)["accuracy"] == 1
            for control in range(1, len(case.gains))
        ]
        helps += int(np.all(beaten, 0).sum())
    return {"seeds": case.num_seeds, "spread": case.spread, "studies": num_studies, "helps": helps}


# ---- the whole table


def plan(structure: Structure, num_studies: int, output: Path) -> Iterator[str]:
    """Yield lines that say what `measure_all` would simulate."""
    rows = len(SEEDS) * len(SPREADS) * (2 + len(EFFECTS))
    yield f"simulates    {rows} rows of {num_studies:,} studies with {' and '.join(map(str, SEEDS))} seeds"
    yield f"             {len(structure.index):,} statements, {structure.source}"
    yield f"writes       {output}"


def measure_all(structure: Structure, num_studies: int) -> dict[str, Any]:
    """Simulate all cases and return their figures: without an effect, with effects, and against four controls."""
    assumed = assumptions_of(structure)
    cells = []
    for num_seeds, points, alike in itertools.product(SEEDS, SPREADS, (False, True)):
        cells.append(
            measure(structure, Case(num_seeds, points / 100, (0.0, 0.0), alike), assumed[alike], num_studies)
        )
        LOG.info("no effect, %d seeds, a spread of %g points: %s", num_seeds, points, cells[-1]["found"])
    for num_seeds, points, effect in itertools.product(SEEDS, SPREADS, EFFECTS):
        case = Case(num_seeds, points / 100, (effect / 100, 0.0))
        cells.append(measure(structure, case, assumed[False], num_studies))
        LOG.info("%g points, %d seeds, a spread of %g points: done", effect, num_seeds, points)
    others = {"no effect": (0.0,) * 5, "one control does as well": (0.0, 0.0, -0.1, -0.1, -0.1)}
    controls = {
        name: [beats_all(structure, Case(num_seeds, 0.01, gains), num_studies) for num_seeds in SEEDS]
        for name, gains in others.items()
    }
    return {
        "structure": structure.source,
        "statements": len(structure.index),
        "images": int(structure.index.max()) + 1,
        "assumed": {"alike" if k else "differ": a.words() for k, a in assumed.items()},
        "cells": cells,
        "controls": controls,
    }


def too_often(figures: dict[str, Any]) -> list[str]:
    """Return the cells in which the study's own tests raise false alarms in more than 5 %, beyond chance, in words.

    Beyond chance: the 95 % interval of the share (Clopper and Pearson 1934) lies above 5 %.
    """
    found = []
    for cell in figures["cells"]:
        ways = METRICS if not cell["effect"] else ()
        ways = (*ways, "within") if cell["effect"] >= MARGIN else ways
        for way in ways:
            test = binomtest(cell["found"][way], cell["studies"]).proportion_ci(0.95)
            if test.low > ALPHA:
                share = cell["found"][way] / cell["studies"]
                found.append(
                    f"{way}: {share:.1%} with {cell['seeds']} seeds, a spread of {100 * cell['spread']:g} points and "
                    f"an effect of {100 * cell['effect']:g}"
                )
    return found


def tables(figures: dict[str, Any]) -> str:
    """Return the figures as Markdown tables, in percent of the studies."""
    null = [cell for cell in figures["cells"] if not cell["effect"]]
    lines = [
        f"{figures['statements']:,} statements about {figures['images']:,} images ({figures['structure']}), "
        f"{null[0]['studies']:,} studies a row.",
        "",
        f"Without an effect: studies that are called different, in %; last, studies that call the arms equal within "
        f"{100 * MARGIN:g} point.",
        "",
        _row("seeds", "arms", "spread", "one arm's", "discordance", *WAYS.values()),
        _rule(5 + len(WAYS)),
    ]
    for cell in null:
        shares = [_percent(cell["found"][way], cell["studies"]) for way in WAYS]
        lines.append(_row(*_named(cell), *shares))
    lines += [
        "",
        f"With an effect on the accuracy: studies that find it, in %, after what the preflight promised, and studies "
        f"that call the arms equal within {100 * MARGIN:g} point.",
        "",
        _row("seeds", "spread", *(f"{e:g}: promised, found, equal" for e in EFFECTS)),
        _rule(2 + len(EFFECTS)),
    ]
    for seeds, spread in dict.fromkeys((cell["seeds"], cell["spread"]) for cell in null):
        own = [c for c in figures["cells"] if c["effect"] and (c["seeds"], c["spread"]) == (seeds, spread)]
        shown = [
            f"{100 * c['predicted']:.0f}, {100 * c['found']['accuracy'] / c['studies']:.0f}, "
            f"{_percent(c['found']['within'], c['studies'])}"
            for c in own
        ]
        lines.append(_row(str(seeds), f"{100 * spread:g}", *shown))
    lines.append("")
    for name, cells in figures["controls"].items():
        shares = [f"{c['seeds']} seeds {_percent(c['helps'], c['studies'])} %" for c in cells]
        lines.append(f"Beats each of four controls, {name}, spread 1 point: {', '.join(shares)}.")
    return "\n".join(lines)


def _named(cell: dict[str, Any]) -> list[str]:
    return [
        str(cell["seeds"]),
        "alike" if cell["alike"] else "differ",
        f"{100 * cell['spread']:g}",
        f"{100 * cell['deviation_of_an_arm']:.2f}",
        f"{100 * cell['discordance']:.1f} %",
    ]


def _percent(count: int, of: int) -> str:
    return f"{100 * count / of:.1f}"


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _rule(columns: int) -> str:
    return "|" + "---|" * columns
