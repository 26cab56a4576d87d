"""A study that the tests of its figures and those of its verdict read."""

import pytest
from study_records import run, study

from theworld.evaluation.study_summary import summarise_study
from theworld.evaluation.study_verdict import PLAIN


@pytest.fixture(scope="session")
def helpful() -> dict:
    """The summary of a study whose world tokens help."""
    return summarise_study(study(0.7) | {PLAIN: {0: run(0.55, 0, "baseline")}})
