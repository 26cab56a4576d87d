"""The statements, losses and learning rate of each optimizer step: pure functions of (settings, step), so that a resume
is exact."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from theworld.config.config import Config
from theworld.data.vsr import Statement
from theworld.models.packing import Packer


class Order:
    """The endless stream of training statements, a pure function of the seed.

    Each epoch has the images in a new random order, and the statements of an image side by side, so that they share
    its tokens.
    """

    def __init__(self, statements: Sequence[Statement], seed: int) -> None:
        self.seed = seed
        self.by_image: dict[str, list[Statement]] = {}
        for statement in statements:
            self.by_image.setdefault(statement.image, []).append(statement)
        self._images = sorted(self.by_image)
        self.num_statements = len(statements)
        self._epoch: tuple[int, list[Statement]] = (-1, [])

    def epoch(self, number: int) -> list[Statement]:
        """Return all statements in the order of an epoch."""
        last = self._epoch  # read once: another thread may change it
        if last[0] != number:
            shuffled = np.random.default_rng([self.seed, number]).permutation(len(self._images)).tolist()
            last = self._epoch = (number, [s for i in shuffled for s in self.by_image[self._images[i]]])
        return last[1]

    def take(self, start: int, count: int) -> list[Statement]:
        """Return `count` statements of the stream, from the `start`-th on."""
        taken: list[Statement] = []
        while len(taken) < count:
            number, offset = divmod(start + len(taken), self.num_statements)
            taken += self.epoch(number)[offset : offset + count - len(taken)]
        return taken


def split(
    statements: Sequence[Statement], num_parts: int, image_tokens: int, statement_tokens: int
) -> list[list[Statement]]:
    """Return the statements in parts of about equal work, for the micro-batches of a step in all of its processes.

    Statements of one image stay together, since they share its tokens: the longest group first, each to the part with
    the fewest tokens so far (Graham 1969). With fewer images than parts some parts are empty.
    """
    by_image: dict[str, list[Statement]] = {}
    for statement in statements:
        by_image.setdefault(statement.image, []).append(statement)
    parts: list[list[Statement]] = [[] for _ in range(num_parts)]
    tokens = [0] * num_parts
    for own in sorted(by_image.values(), key=len, reverse=True):
        part = tokens.index(min(tokens))
        parts[part] += own
        tokens[part] += image_tokens + len(own) * statement_tokens
    return parts


def num_train_steps(config: Config, num_statements: int, global_batch_size: int) -> int:
    """Return the optimizer steps of the main phase, each of which takes exactly `global_batch_size` statements."""
    steps = math.ceil(config.num_epochs * num_statements / global_batch_size)
    return min(steps, config.max_steps) if config.max_steps is not None else steps


@dataclass(frozen=True)
class Phase:
    """Steps with one objective, and an optimizer and a learning rate schedule of their own."""

    # "align": world tokens at Gemma's image tokens; "words": next-word losses alone; "train": the main phase
    name: Literal["align", "words", "train"]
    start: int  # its first step
    stop: int  # the step after its last
    peak_learning_rate: float
    # options of `TheWorld.losses`; none for "align"
    loss_weights: dict[str, float] = field(default_factory=dict)

    @property
    def word_losses(self) -> list[str]:
        """The next-word losses that count: some of "statement" and "relation"."""
        return [name for name in ("statement", "relation") if self.loss_weights.get(f"{name}_loss_weight")]


def phases(config: Config, num_steps: int) -> tuple[Phase, ...]:
    """Return the phases of a run of `num_steps` steps in all, without those that have no steps."""
    weights = {
        "statement_loss_weight": config.statement_loss_weight,
        "relation_loss_weight": config.relation_loss_weight,
    }
    # Where no weight of words is set, the phase "words" reads whole statements.
    words = weights if any(weights.values()) else weights | {"statement_loss_weight": 1.0}
    first, second = config.align_steps, config.align_steps + config.statement_steps
    rate = config.learning_rate
    every = (
        Phase("align", 0, first, config.align_learning_rate),
        Phase("words", first, second, rate, words | {"label_loss_weight": 0.0}),
        Phase("train", second, num_steps, rate, weights | {"label_loss_weight": 1.0}),
    )
    return tuple(phase for phase in every if phase.start < phase.stop)


def phase_of(phases: Sequence[Phase], step: int) -> Phase:
    """Return the phase of a step."""
    return next(phase for phase in phases if phase.start <= step < phase.stop)


def num_warmup_steps(config: Config, num_steps: int) -> int:
    """Return the warm-up steps of a phase of `num_steps` steps."""
    share = math.ceil(config.warmup_ratio * num_steps)
    return share if config.warmup_steps is None else config.warmup_steps


def learning_rate(config: Config, phase: Phase, step: int) -> float:
    """Return the learning rate of a step: linear warm-up to the phase's peak, then decay to 0 at its end (cosine:
    Loshchilov and Hutter 2017)."""
    step, num_steps, peak = step - phase.start, phase.stop - phase.start, phase.peak_learning_rate
    warmup = num_warmup_steps(config, num_steps)
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, num_steps - warmup)
    if config.lr_schedule == "constant":
        return peak
    return peak * (
        1 - progress if config.lr_schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    )


def split_step(
    config: Config, packer: Packer, order: Order, start: int, num_processes: int
) -> list[list[Statement]]:
    """Return the statements of a step from the `start`-th of the order on, in one part for each micro-batch of each
    process, of about equal length; some are empty where a step has few images."""
    num_parts = config.gradient_accumulation_steps * num_processes
    statements = order.take(start, config.batch_size * num_parts)
    example = packer.prompt(statements[0].caption, True)
    shared = len(example.shared) + packer.num_world_tokens + 2
    return split(statements, num_parts, shared, len(example.branch))
