"""Whether the loss at the label is below chance, and settings to try where it is not.

Steps have independent statements, so the mean of their label losses over a window has a standard error. The loss is
below chance where that mean is below it by more than three standard errors.
"""

import math
import statistics
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from theworld.config.config import Config

NUM_ERRORS = 3  # standard errors


def chance_loss(labels: Sequence[int]) -> float:
    """Return the lowest loss, in nats, of answers that depend on the share of 1 among the labels alone: their entropy,
    ln 2 for a half."""
    share = sum(labels) / len(labels)
    return -sum(p * math.log(p) for p in (share, 1 - share) if p > 0)


@dataclass(frozen=True)
class LossWindow:
    """The mean of the label loss over a window of steps, beside chance, in nats."""

    steps: int
    mean: float
    noise: float  # NUM_ERRORS standard errors of the mean
    chance: float

    @property
    def below_chance(self) -> bool:
        """Whether the mean is below chance by more than the noise."""
        return self.mean + self.noise < self.chance


def loss_window(losses: Sequence[float], chance: float) -> LossWindow:
    """Return the window of two or more losses."""
    error = statistics.stdev(losses) / math.sqrt(len(losses))
    return LossWindow(len(losses), statistics.fmean(losses), NUM_ERRORS * error, chance)


def below_chance_from(losses: Sequence[float], chance: float, window: int) -> int | None:
    """Return the number of losses after which every window of the last `window` losses is below chance, or None.

    A single window may be below chance by luck alone, so all later ones have to be.
    """
    ends = range(window, len(losses) + 1)
    at_chance = [end for end in ends if not loss_window(losses[end - window : end], chance).below_chance]
    last = max(at_chance, default=window - 1)
    return last + 1 if last < len(losses) else None


def window_size(num_steps: int) -> int:
    """Return the steps of a window in a main phase of `num_steps`: a tenth of it, at least 10 and at most 200."""
    return min(200, max(10, num_steps // 10))


class LossMonitor:
    """Checks each window of the main phase, one after the other, once the warm-up is over; reports once."""

    def __init__(self, num_steps: int, warmup: int, chance: float) -> None:
        self.window, self.warmup, self.chance = window_size(num_steps), warmup, chance
        self.losses: deque[float] = deque(maxlen=self.window)
        self.reported = False

    def add(self, step: int, loss: float) -> LossWindow | None:
        """Take the mean label loss of a step of the main phase, counted from 1.

        Return the first window that is not below chance when it ends, else None.
        """
        self.losses.append(loss)
        after = step - self.warmup
        full = len(self.losses) == self.window  # not so after a resume from a checkpoint without a monitor
        if self.reported or after <= 0 or after % self.window or not full:
            return None
        found = loss_window(self.losses, self.chance)
        self.reported = not found.below_chance
        return found if self.reported else None

    def state(self) -> dict[str, object]:
        """Return JSON from which `restore` makes an equal monitor."""
        return {"losses": list(self.losses), "said": self.reported}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from what `state` returned."""
        self.losses, self.reported = deque(state["losses"], maxlen=self.window), state["said"]


def what_to_try(config: Config, same_places: bool) -> list[str]:
    """Return settings that a run at chance has not tried, the most promising first.

    `same_places`: whether world tokens and image tokens are of the same patches, as `align_steps` needs.
    """
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


def warning(window: LossWindow, tries: Sequence[str]) -> str:
    """Return the lines to show for a window that is not below chance."""
    where = "at" if abs(window.mean - window.chance) <= window.noise else "above"
    head = (
        f"the loss is {where} chance: {window.mean:.4f} ± {window.noise:.4f} over the last {window.steps} steps, "
        f"and {window.chance:.4f} is what knowing nothing of the picture costs. The projection has not begun to "
        "learn; the run goes on. What to try, in this order:"
    )
    return "\n".join([head, *(f"  {number}. {line}" for number, line in enumerate(tries, 1))])
