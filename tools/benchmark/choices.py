"""What can be chosen of a measurement, apart from what measures, so that a command line need not load torch."""

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
# Kinds of runs, as changes of the settings; the guide's is 8 statements in a pass and 16 in a step.
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
    """Settings or sizes. Raises ArgumentTypeError for anything else."""
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no JSON: {error}") from None
    if not isinstance(values, dict):
        raise argparse.ArgumentTypeError(f'{text!r} is no JSON object, such as {{"batch_size": 4}}')
    return values
