"""Projections of about as many trained parameters, whatever the width of the rows that they take.

Where two encoders are compared, neither may win by a larger projection: the width inside, `projection_hidden`, is
solved for.
"""

from dataclasses import dataclass, replace

import torch

from theworld.config.config import Config
from theworld.models import world_encoder
from theworld.models.projection import HEAD, ProjectionShape, WorldProjection, make_layers
from theworld.utils.device import count_parameters

TOLERANCE = 0.1  # of the wanted number of parameters
LARGEST = 2**20  # width inside


@dataclass(frozen=True)
class Match:
    """A width inside, and the numbers of trained parameters that it gives and that are wanted."""

    hidden: int | None  # None: the architecture has no such width
    parameters: int
    target: int

    def __str__(self) -> str:
        return (
            f"projection_hidden {self.hidden or 'none'}: {self.parameters:,} trained parameters, "
            f"{self.parameters / self.target:.1%} of {self.target:,}"
        )


def shape_of(config: Config, width: int) -> ProjectionShape:
    """Return the shape of the projection of these settings, whose model files have to be on this machine. `width`: of
    the language model."""
    spec = world_encoder.describe(config)
    return ProjectionShape.from_settings(config, {**spec.fields, **spec.use.fields}, width)


def num_parameters(shape: ProjectionShape) -> int:
    """Return the number of trained parameters of a projection of this shape, brackets included."""
    least = WorldProjection(replace(shape, hidden=1), [0.0] * shape.num_channels, [1.0] * shape.num_channels)
    others = count_parameters(least)[0] - count_parameters(least.layers)[0]
    with torch.device("meta"):  # wide layers without their values
        return others + count_parameters(make_layers(shape))[0]


def match_hidden(shape: ProjectionShape, target: int) -> Match:
    """Return the width inside that brings the projection closest to `target` trained parameters.

    Raises ValueError where that is not within TOLERANCE.
    """
    best = (
        Match(None, num_parameters(shape), target)
        if shape.architecture == "linear"
        else _closest(shape, target)
    )
    if abs(best.parameters - target) > TOLERANCE * target:
        raise ValueError(
            f"projection {shape.architecture}: no projection_hidden gives rows of shape {list(shape.latent_shape)} "
            f"{target:,} trained parameters within {TOLERANCE:.0%}; the closest is {best}"
        )
    return best


def _closest(shape: ProjectionShape, target: int) -> Match:
    """Return the width with the closest number of parameters, which grows with it."""
    step = HEAD if shape.architecture == "transformer" else 1

    def match(hidden: int) -> Match:
        return Match(hidden, num_parameters(replace(shape, hidden=hidden)), target)

    low, high = 1, LARGEST // step  # in steps
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if match(middle * step).parameters <= target else (low, middle)
    return min(match(low * step), match(high * step), key=lambda one: abs(one.parameters - target))
