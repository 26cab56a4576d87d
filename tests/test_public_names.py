"""The names that `import theworld` gives."""

import subprocess
import sys

import pytest
from constants import ROOT

import theworld
from theworld.config.config import Config, load_config
from theworld.evaluation.score import score_to_file
from theworld.extraction.extract import extract
from theworld.models.theworld import TheWorld
from theworld.training.trainer import Trainer


def test_each_public_name_is_what_its_module_defines() -> None:
    wanted = {
        "Config": Config,
        "TheWorld": TheWorld,
        "Trainer": Trainer,
        "evaluate": score_to_file,
        "extract": extract,
        "load_config": load_config,
    }
    assert {name: getattr(theworld, name) for name in theworld.__all__} == wanted
    assert wanted.keys() <= set(dir(theworld))


def test_another_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'theworld' has no attribute 'TheWord'"):
        theworld.TheWord  # noqa: B018


def test_importing_the_package_loads_nothing_of_it() -> None:
    own = "m.partition('.')[0] in {'theworld', 'torch'}"
    code = f"import sys, theworld; print(*sorted(m for m in sys.modules if {own}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout.split()) == (0, ["theworld"])


def test_the_tools_load_neither_statistics_nor_drawing_nor_the_vae_before_they_work() -> None:
    late = {"diffusers", "matplotlib", "pandas", "scipy.stats", "sklearn"}
    lines = [
        "import sys",
        "from transformers.models.gemma3 import modeling_gemma3",
        "before = set(sys.modules)",  # in some environments transformers loads scikit-learn by itself
        "import theworld.training.trainer, theworld.extraction.extract",
        "import theworld.evaluation.score, theworld.evaluation.tables, theworld.cli.dry_run",
        f"print(*sorted({late} & (sys.modules.keys() - before)))",
    ]
    code = "; ".join(lines)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout.split()) == (0, [])
