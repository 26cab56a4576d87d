"""The world encoder that the settings name: the one place that knows which there are."""

from theworld.config.config import Config
from theworld.models.cosmos import CosmosLatents
from theworld.models.encoder import Encoder
from theworld.models.pixels import PixelEncoder


def encoder_class(config: Config) -> type[Encoder]:
    """Return the class of the encoder whose rows the world tokens are made of."""
    return PixelEncoder if config.world_encoder == "pixels" else CosmosLatents
