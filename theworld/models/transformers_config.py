"""The config of a checkpoint in transformers' terms."""

from typing import Any

from transformers.configuration_utils import PreTrainedConfig

from theworld.utils.hub import GEMMA_FILE, source_of_model


class TheWorldConfig(PreTrainedConfig):
    """The settings of a checkpoint's run, and the config of its Gemma as transformers wants it."""

    model_type = "theworld"

    def __init__(
        self,
        settings: dict[str, Any] | None = None,
        text_config: Any = None,
        vision_config: Any = None,
        **options: Any,
    ) -> None:
        """`settings`: the content of the checkpoint's config.json; `vision_config`: None for a text-only Gemma."""
        self.settings = settings or {}
        self.text_config, self.vision_config = text_config, vision_config
        super().__init__(**options)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **options: Any) -> Any:
        """Return the config of a checkpoint whose config.json has this content.

        Reads the config file of its Gemma. `options` are those of transformers; a setting among them takes precedence.
        """
        from transformers import AutoConfig  # which may be loading, and lets this module be imported

        settings = {k: v for k, v in config_dict.items() if k not in ("model_type", "_commit_hash")}
        name = options.get("model_name", settings["model_name"])
        gemma = AutoConfig.from_pretrained(source_of_model(name, GEMMA_FILE))
        own = {
            "settings": settings,
            "text_config": gemma.get_text_config(),
            "vision_config": getattr(gemma, "vision_config", None),
        }
        return super().from_dict(own, **options)
