"""Imported by the process that the tests' processes are forked from (see `forks`): no thread, no tensor."""

import jobs  # noqa: F401
import runs  # noqa: F401
import torch
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

import theworld.extraction.extract
import theworld.training.trainer  # noqa: F401

torch.set_num_threads(1)
get_checkpoint_conversion_mapping("gemma3")  # compiles a thousand patterns
