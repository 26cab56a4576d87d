"""TheWorld in VLMEvalKit, with the harness where it is installed, and against its interface everywhere."""

import base64
import csv
import importlib
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from harness_interfaces import Scored, stand_in, vlmevalkit

INSTALLED = find_spec("vlmeval") is not None
# As the questions of VSR-zeroshot end.
TAIL = " Please answer yes or no. Please answer strictly Yes or No."


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module of the adapter, over stand-ins for VLMEvalKit's classes if that is not installed."""
    if INSTALLED:
        return importlib.import_module("theworld.harnesses.vlmevalkit")
    stand_in(monkeypatch, vlmevalkit())
    found = importlib.import_module("theworld.harnesses.vlmevalkit")
    monkeypatch.delitem(sys.modules, "theworld.harnesses.vlmevalkit")
    return found


@pytest.fixture
def model(module: Any, scored: Scored) -> Any:
    """A model as VLMEvalKit makes it of its name."""
    from vlmeval.config import supported_VLM

    module.register({"TheWorld": str(scored.checkpoint)}, device="cpu", dtype="float32", max_new_tokens=5)
    return supported_VLM.pop("TheWorld")()


def message(image: Path, text: str) -> list[dict[str, str]]:
    return [{"type": "image", "value": str(image)}, {"type": "text", "value": text}]


def test_every_statement_is_judged_as_by_the_evaluation(model: Any, scored: Scored) -> None:
    found = [
        model.generate(message(scored.images / s.image, s.caption + TAIL), "VSR-zeroshot")
        for s in scored.statements
    ]
    assert found == [("No", "Yes")[said] for said in scored.said]


def test_other_questions_are_answered_in_words(model: Any, scored: Scored) -> None:
    image = scored.images / scored.statements[0].image
    found = model.generate(message(image, "Where is the ball?"), "MMVP")
    own = model.answers.model.theworld.generate(
        image, "Where is the ball?", max_new_tokens=5, do_sample=False
    )
    assert [found] == own


def test_a_question_of_another_form_is_refused(model: Any, scored: Scored) -> None:
    image = scored.images / scored.statements[0].image
    with pytest.raises(
        ValueError, match="VSR-zeroshot: question 'Is it so'; wanted a statement and 'Please answer"
    ):
        model.generate(message(image, "Is it so"), "VSR-zeroshot")


@pytest.mark.skipif(
    not INSTALLED, reason="VLMEvalKit is not installed: its package, or a clone with `pip install -e .`"
)
def test_vlmevalkit_itself_gives_the_accuracy_of_the_evaluation(
    model: Any, scored: Scored, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vlmeval.dataset import ImageYORNDataset
    from vlmeval.inference import infer_data_job
    from vlmeval.smp import get_pred_file_path, load

    monkeypatch.setenv("LMUData", str(tmp_path))
    monkeypatch.delitem(ImageYORNDataset.DATASET_MD5, "VSR-zeroshot")  # of the real photographs
    with open(tmp_path / "VSR-zeroshot.tsv", "w", newline="") as file:
        table = csv.writer(file, delimiter="\t")
        table.writerow(["index", "image", "question", "answer"])
        for number, s in enumerate(scored.statements):
            image = base64.b64encode((scored.images / s.image).read_bytes()).decode()
            table.writerow([number, image, s.caption + TAIL, ("No", "Yes")[s.label]])
    dataset = ImageYORNDataset("VSR-zeroshot")
    infer_data_job(model, str(tmp_path), "TheWorld", dataset)
    file = get_pred_file_path(str(tmp_path), "TheWorld", "VSR-zeroshot", use_env_format=True)
    assert list(load(file)["prediction"]) == [("No", "Yes")[said] for said in scored.said]
    assert dataset.evaluate(file)["acc"].item() == pytest.approx(100 * scored.accuracy)
