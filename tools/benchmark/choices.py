"""The choices of the command line, apart from the measurements, so that --help need not load torch."""

import argparse
import json
from typing import Any

SHAPE_NAMES = ("real", "small", "tiny")
PART_NAMES = (
    "encode",
    "extract",
    "train",
    "variants",
    "evaluate",
    "losses",
    "start",
    "run",
    "processes",
    "sharded",
    "growth_images",
    "growth_statements",
    "growth_tokens",
)
# Runs to compare, as changes of the settings. The default recipe has micro-batches of 8 statements, 16 in a step.
VARIANTS: dict[str, dict[str, Any]] = {
    "exact": {},
    "fp8": {"fp8": True},
    "after": {"world_position": "after"},
    "after fp8": {"world_position": "after", "fp8": True},
    "batch 8 x 2": {"batch_size": 8, "gradient_accumulation_steps": 2},
    "checkpointing": {"use_gradient_checkpointing": True},
    "not compiled": {"compile": False},
    "world_patch 1": {"world_patch": 1, "batch_size": 2},
    "vision": {"freeze_gemma_vision": False, "batch_size": 8, "gradient_accumulation_steps": 2},
    "vision, checkpointing": {"freeze_gemma_vision": False, "use_gradient_checkpointing": True},
    "language": {"freeze_gemma_language": False, "batch_size": 8, "gradient_accumulation_steps": 2},
    "language, checkpointing": {"freeze_gemma_language": False, "use_gradient_checkpointing": True},
    "lora": {
        "freeze_gemma_language": False,
        "lora_rank": 16,
        "batch_size": 8,
        "gradient_accumulation_steps": 2,
    },
    "lora, checkpointing": {
        "freeze_gemma_language": False,
        "lora_rank": 16,
        "use_gradient_checkpointing": True,
    },
}


def json_object(text: str) -> dict[str, Any]:
    """Return the JSON object of a flag, for settings or sizes. Raises ArgumentTypeError for anything else."""
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no JSON: {error}") from None
    if not isinstance(values, dict):
        raise argparse.ArgumentTypeError(f'{text!r} is no JSON object, such as {{"batch_size": 4}}')
    return values
