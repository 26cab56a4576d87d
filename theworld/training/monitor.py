"""Whether the loss at the label has left chance, and what to try where it has not.

Steps have independent statements, so the mean of their label losses over a window has a standard error. The loss has
left chance where that mean lies below chance by more than three of them; above chance it has not, however far.
"""

import math
import statistics
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from theworld.config.config import Config

ERRORS = 3  # standard errors


def chance_loss(labels: Sequence[int]) -> float:
    """The least loss, in nats, of who knows nothing but how many of these labels are 1: ln 2 where half of them are."""
    share = sum(labels) / len(labels)
    return -sum(p * math.log(p) for p in (share, 1 - share) if p > 0)


@dataclass(frozen=True)
class Reading:
    """A window's mean of the label loss beside chance, in nats."""

    steps: int
    mean: float
    noise: float  # ERRORS standard errors of the mean
    chance: float

    @property
    def left(self) -> bool:
        """Whether the mean is below chance by more than the noise."""
        return self.mean + self.noise < self.chance


def read(losses: Sequence[float], chance: float) -> Reading:
    """What a window of two or more losses says."""
    error = statistics.stdev(losses) / math.sqrt(len(losses))
    return Reading(len(losses), statistics.fmean(losses), ERRORS * error, chance)


def left_at(losses: Sequence[float], chance: float, window: int) -> int | None:
    """After how many losses the last `window` of them had left chance, and had from there on to the end; None: never.
    (By luck alone one of many windows lies below chance for a while.)"""
    ends = range(window, len(losses) + 1)
    last_at_chance = max(
        (end for end in ends if not read(losses[end - window : end], chance).left), default=window - 1
    )
    return last_at_chance + 1 if last_at_chance < len(losses) else None


def window_of(num_steps: int) -> int:
    """Steps of a window in a main phase of so many: a tenth of it, at least 10 and at most 200."""
    return min(200, max(10, num_steps // 10))


class LossWatch:
    """Looks at each window of the main phase, one after the other, once the warm-up is over; speaks once."""

    def __init__(self, num_steps: int, warmup: int, chance: float) -> None:
        self.window, self.warmup, self.chance = window_of(num_steps), warmup, chance
        self.losses: deque[float] = deque(maxlen=self.window)
        self.said = False

    def add(self, done: int, loss: float) -> Reading | None:
        """Takes the mean label loss of the `done`-th step of the main phase, from 1. A reading where a window ends at
        chance for the first time."""
        self.losses.append(loss)
        after = done - self.warmup
        whole = len(self.losses) == self.window  # it is not after a resume from before there was a watch
        if self.said or after <= 0 or after % self.window or not whole:
            return None
        reading = read(self.losses, self.chance)
        self.said = not reading.left
        return reading if self.said else None

    def state(self) -> dict[str, object]:
        """JSON from which `restore` makes an equal watch."""
        return {"losses": list(self.losses), "said": self.said}

    def restore(self, losses: Sequence[float], said: bool) -> None:
        """The inverse of `state`."""
        self.losses, self.said = deque(losses, maxlen=self.window), said


def what_to_try(config: Config, same_places: bool) -> list[str]:
    """Settings that a run at chance has not tried, in the order in which they are worth it. `same_places`: whether
    world tokens and image tokens lie on the same places, as `align_steps` wants."""
    positions = "" if config.world_positions or config.projection == "transformer" else " --world_positions"
    tries = []
    if not config.align_steps and same_places:
        tries.append(f"--align_steps 300{positions}: start at Gemma's own image tokens, seconds")
    if not config.relation_loss_weight:
        tries.append("--relation_loss_weight 1: the words of the relation in true statements count too")
    if config.projection in ("mlp", "linear"):
        deep = "conv" if config.world_mode == "patch" else "transformer"
        tries.append(f"--projection {deep}: world tokens that know of other patches")
    if not config.statement_steps:
        tries.append("--statement_steps 500: true statements word by word first")
    tries.append(
        f"another --learning_rate than {config.learning_rate:g}: three times it, then a third; or more steps"
    )
    return tries


def warning(reading: Reading, tries: Sequence[str]) -> str:
    """The lines to show."""
    where = "at" if abs(reading.mean - reading.chance) <= reading.noise else "above"
    head = (
        f"the loss is {where} chance: {reading.mean:.4f} ± {reading.noise:.4f} over the last {reading.steps} steps, "
        f"and {reading.chance:.4f} is what knowing nothing of the picture costs. The projection has not begun to "
        "learn; the run goes on. What to try, in this order:"
    )
    return "\n".join([head, *(f"  {number}. {line}" for number, line in enumerate(tries, 1))])
