"""Arms of about as many trained parameters, so that none wins by a larger projection."""

from dataclasses import replace

from theworld.config.config import Config
from theworld.models.matching import TOLERANCE, match_hidden, num_parameters, shape_of
from theworld.study.protocol import Arm, Study, arm_config
from theworld.training.memory import sizes_of


def equal_sizes(study: Study) -> Study:
    """Return the study with `projection_hidden` solved for in each arm whose world encoder gives rows of another width.

    Its trained parameters are then within TOLERANCE of those of the arm that has to win, or of the first. An arm that
    sets `projection_hidden` itself, or no world encoder, stays as it is. The models' config files have to be on this
    machine. Raises ValueError naming the arm where no width does it.
    """
    wanted = study.primary.arm if study.primary else study.arms[0].name
    (reference,) = [arm for arm in study.arms if arm.name == wanted]
    target = parameters(arm_config(study, reference))
    return replace(study, arms=[_equal(study, arm, target) for arm in study.arms])


def parameters(config: Config) -> int:
    """Return the number of trained parameters of the projection of these settings."""
    return num_parameters(shape_of(config, _width(config)))


def _width(config: Config) -> int:
    sizes = sizes_of(config.model_name)
    if sizes is None:
        raise ValueError(
            f"model_name {config.model_name}: its config is not on this machine, so its width is not known"
        )
    return sizes.hidden


def _equal(study: Study, arm: Arm, target: int) -> Arm:
    config = arm_config(study, arm)
    if "world_encoder" not in arm.changes or "projection_hidden" in arm.changes:
        return arm
    if abs(parameters(config) - target) <= TOLERANCE * target:
        return arm
    try:
        hidden = match_hidden(shape_of(config, _width(config)), target).hidden
    except ValueError as error:
        raise ValueError(f"arm {arm.name!r}: {error}") from None
    return replace(arm, changes={**arm.changes, "projection_hidden": hidden})
