"""Checkpoints through transformers' auto classes: how `AutoConfig` recognises them, and which classes they have.

`import theworld` lets transformers know of them as soon as `AutoConfig` loads, which costs nothing; the model and the
processor are imported with the first config of a checkpoint. A checkpoint's config.json holds the settings of its run
and no `model_type`, so it is recognised by its keys, as transformers recognises checkpoints of timm.
"""

from typing import Any

from transformers.configuration_utils import PreTrainedConfig

from theworld.models.transformers_config import TheWorldConfig

MODEL_TYPE = TheWorldConfig.model_type
# Keys that the config.json of every checkpoint has, and none of transformers' own.
_RECOGNISED = {"model_name", "cosmos_model_name", "world_patch"}


class _CheckpointConfig(TheWorldConfig):
    """The class that `AutoConfig` finds, whose objects are plain `TheWorldConfig`."""

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **options: Any) -> Any:
        """Return the config of a checkpoint, after model and processor are registered for it."""
        register_classes()
        return TheWorldConfig.from_dict(config_dict, **options)


def register(configuration_auto: Any) -> None:
    """Let `AutoConfig` recognise checkpoints. `configuration_auto`: transformers' module of that name."""
    configuration_auto.CONFIG_MAPPING.register(MODEL_TYPE, _CheckpointConfig, exist_ok=True)
    own = PreTrainedConfig.get_config_dict.__func__

    def get_config_dict(cls: Any, *arguments: Any, **options: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return what transformers reads, with the `model_type` that checkpoints leave out."""
        found, rest = own(cls, *arguments, **options)
        if "model_type" not in found and found.keys() >= _RECOGNISED:
            found["model_type"] = MODEL_TYPE
        return found, rest

    PreTrainedConfig.get_config_dict = classmethod(get_config_dict)


def register_classes() -> None:
    from transformers import AutoModel, AutoModelForImageTextToText, AutoProcessor
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    from theworld.models.transformers_model import TheWorldForConditionalGeneration
    from theworld.models.transformers_processor import TheWorldProcessor

    for auto in (AutoModel, AutoModelForImageTextToText):
        auto.register(TheWorldConfig, TheWorldForConditionalGeneration, exist_ok=True)
    AutoProcessor.register(TheWorldConfig, TheWorldProcessor, exist_ok=True)
    # The pipeline logs an error about a model that is not in this list.
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES[MODEL_TYPE] = TheWorldForConditionalGeneration.__name__
