"""What each optimizer step sees and how far it goes: pure functions of (settings, step), so a resume is exact."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from theworld.config.config import Config
from theworld.data.vsr import Statement
from theworld.models.packing import Packer


class Order:
    """The endless stream of training statements: epoch after epoch, the images of each in a new random order, the
    statements of an image side by side (so that they share its prefix). A pure function of (seed, epoch)."""

    def __init__(self, statements: Sequence[Statement], seed: int) -> None:
        self.seed = seed
        self.by_image: dict[str, list[Statement]] = {}
        for statement in statements:
            self.by_image.setdefault(statement.image, []).append(statement)
        self._images = sorted(self.by_image)
        self.num_statements = len(statements)
        self._epoch: tuple[int, list[Statement]] = (-1, [])

    def epoch(self, number: int) -> list[Statement]:
        """All statements in the order of that epoch."""
        if self._epoch[0] != number:
            shuffled = np.random.default_rng([self.seed, number]).permutation(len(self._images)).tolist()
            self._epoch = (number, [s for i in shuffled for s in self.by_image[self._images[i]]])
        return self._epoch[1]

    def take(self, start: int, count: int) -> list[Statement]:
        """`count` statements of the stream, from the `start`-th on."""
        taken: list[Statement] = []
        while len(taken) < count:
            number, offset = divmod(start + len(taken), self.num_statements)
            taken += self.epoch(number)[offset : offset + count - len(taken)]
        return taken


def split(
    statements: Sequence[Statement], num_parts: int, image_tokens: int, statement_tokens: int
) -> list[list[Statement]]:
    """The same statements in parts of about equal work, for the passes of a step in all of its processes.

    Those of one image stay together, since they share its tokens: longest first, each to the part with the fewest
    tokens so far (Graham 1969). With fewer images than parts some are empty. A pure function of its arguments.
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


def num_train_steps(config: Config, num_statements: int, per_step: int) -> int:
    """Optimizer steps of the main phase: each takes exactly `per_step` statements."""
    steps = math.ceil(config.num_epochs * num_statements / per_step)
    return min(steps, config.max_steps) if config.max_steps is not None else steps


@dataclass(frozen=True)
class Phase:
    """Steps with one objective, an optimizer and a learning rate schedule of their own."""

    name: str  # "align": towards Gemma's image tokens; "words": of true statements; "train": the main phase
    start: int  # its first step
    stop: int  # the step after its last


def phase_at(config: Config, step: int, num_steps: int) -> Phase:
    """The phase of a step of a run of `num_steps` in all."""
    words = config.align_steps
    train = words + config.statement_steps
    if step < words:
        return Phase("align", 0, words)
    return Phase("words", words, train) if step < train else Phase("train", train, num_steps)


def num_warmup_steps(config: Config, num_steps: int) -> int:
    """Of a phase of so many steps."""
    share = math.ceil(config.warmup_ratio * num_steps)
    return share if config.warmup_steps is None else config.warmup_steps


def learning_rate(config: Config, step: int, num_steps: int, peak: float) -> float:
    """Linear warm-up to `peak`, then decay to 0 at `num_steps` (cosine: Loshchilov and Hutter 2017)."""
    warmup = num_warmup_steps(config, num_steps)
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, num_steps - warmup)
    if config.lr_schedule == "constant":
        return peak
    return peak * (
        1 - progress if config.lr_schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    )


def parts_of_step(
    config: Config, packer: Packer, order: Order, start: int, processes: int
) -> list[list[Statement]]:
    """The statements of an optimizer step from the `start`-th of the order on, in one part for each pass of each
    process, of about equal length; some are empty where a step has few images."""
    passes = config.gradient_accumulation_steps * processes
    statements = order.take(start, config.batch_size * passes)
    example = packer.prompt(statements[0].caption, True)
    shared = len(example.shared) + packer.num_world_tokens + 2
    return split(statements, passes, shared, len(example.branch))
