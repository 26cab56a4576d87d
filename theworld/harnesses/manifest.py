"""The entry point through which lmms-eval finds TheWorld (group `lmms_eval.models` in setup.cfg)."""

from typing import Any


def lmms_eval_manifest() -> Any:
    """Return what lmms-eval registers: the name of the model, and the path of the class that it imports when asked."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id="theworld", simple_class_path="theworld.harnesses.lmms_eval.TheWorldModel")
