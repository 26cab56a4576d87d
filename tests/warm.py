"""Imported by the process that the tests' processes are forked from (see `forks`): no thread of Python, no tensor."""

import garbage
import jobs  # noqa: F401
import matplotlib.figure  # noqa: F401
import runs  # noqa: F401
import scipy.stats  # noqa: F401
import sklearn.manifold
import sklearn.metrics  # noqa: F401
import torch
from diffusers import AutoencoderKLWan  # noqa: F401 - which imports for a second
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

import theworld.cli.dry_run
import theworld.extraction.audit
import theworld.extraction.extract
import theworld.report.report
import theworld.training.sweep
import theworld.training.trainer  # noqa: F401

torch.set_num_threads(1)
get_checkpoint_conversion_mapping("gemma3")  # compiles a thousand patterns
garbage.imported()
