"""TheWorld in lmms-eval, with the harness where it is installed, and against its interface everywhere."""

import importlib
import runpy
import shutil
import sys
from configparser import ConfigParser
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from constants import ROOT
from harness_interfaces import LMMS_EVAL, Scored, stand_in
from PIL import ImageFile

from theworld.config.config import Config

TASKS = ROOT / "theworld/harnesses/tasks/vsr"
INSTALLED = find_spec("lmms_eval") is not None


@pytest.fixture(autouse=True)
def restored(monkeypatch: pytest.MonkeyPatch) -> None:
    """lmms-eval tells Pillow to accept half a photograph as it is imported; other tests are not to know of that."""
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", False)


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module of the adapter, over stand-ins for lmms-eval's classes if that is not installed."""
    if INSTALLED:
        return importlib.import_module("theworld.harnesses.lmms_eval")
    monkeypatch.delitem(sys.modules, "theworld.harnesses.lmms_eval", raising=False)
    stand_in(monkeypatch, LMMS_EVAL)
    found = importlib.import_module("theworld.harnesses.lmms_eval")
    monkeypatch.delitem(sys.modules, "theworld.harnesses.lmms_eval")
    return found


@pytest.fixture
def model(module: Any, scored: Scored) -> Any:
    """A model as lmms-eval makes it from its command line."""
    return module.TheWorldModel(
        pretrained=str(scored.checkpoint), batch_size=4, device="cpu", dtype="float32"
    )


@pytest.fixture
def utils(monkeypatch: pytest.MonkeyPatch, scored: Scored) -> dict[str, Any]:
    """The functions beside the task files, as lmms-eval loads them."""
    monkeypatch.setenv("VSR_IMAGES", str(scored.images))
    return runpy.run_path(str(TASKS / "utils.py"))


def task(name: str) -> dict[str, Any]:
    """Return a task file with what it includes; functions are their names."""

    class Loader(yaml.SafeLoader):
        pass

    Loader.add_constructor("!function", lambda loader, node: node.value.removeprefix("utils."))
    own = yaml.load((TASKS / f"{name}.yaml").read_text(), Loader)
    included = yaml.load((TASKS / own.pop("include")).read_text(), Loader)
    return included | own


def requests_of(settings: dict[str, Any], utils: dict[str, Any], model: Any, scored: Scored) -> list[Any]:
    """Return the requests that lmms-eval makes of a task, and give the model its documents."""
    docs = [{"image": s.image, "caption": s.caption, "label": s.label} for s in scored.statements]
    model.task_dict["vsr"] = {"test": docs}
    visual, text = utils[settings["doc_to_visual"]], utils[settings["doc_to_text"]]
    words = settings["lmms_eval_specific_kwargs"]["theworld"]
    tails = settings.get("doc_to_choice", [settings.get("generation_kwargs")])
    return [
        SimpleNamespace(args=(text(doc, words), tail, visual, number, "vsr", "test"))
        for number, doc in enumerate(docs)
        for tail in tails
    ]


@pytest.mark.parametrize("name", ["vsr_random", "vsr_zeroshot"])
def test_by_likelihood_every_statement_is_judged_as_by_the_evaluation(
    name: str, model: Any, utils: dict[str, Any], scored: Scored
) -> None:
    settings = task(name)
    assert settings["dataset_path"] == f"cambridgeltl/{name}"
    found = [one.text for one in model.loglikelihood(requests_of(settings, utils, model, scored))]
    pairs = [found[start : start + 2] for start in range(0, len(found), 2)]
    docs = model.task_dict["vsr"]["test"]
    right = [utils[settings["process_results"]](doc, pair) for doc, pair in zip(docs, pairs, strict=True)]
    want = [float(said == s.label) for said, s in zip(scored.said, scored.statements, strict=True)]
    assert [one["vsr_acc"] for one in right] == want
    # Some releases hand on pairs as text.
    texts = [utils["vsr_process_results"](doc, list(map(str, p))) for doc, p in zip(docs, pairs, strict=True)]
    assert texts == right


@pytest.mark.parametrize("name", ["vsr_random_generate", "vsr_zeroshot_generate"])
def test_answers_in_words_are_those_of_theworld(
    name: str, model: Any, utils: dict[str, Any], scored: Scored
) -> None:
    settings = task(name)
    found = model.generate_until(requests_of(settings, utils, model, scored))
    questions = [model.answers.statement(s.caption) for s in scored.statements]
    images = [scored.images / s.image for s in scored.statements]
    own = model.answers.model.theworld.generate(images, questions, max_new_tokens=16, do_sample=False)
    assert found == own


def test_the_default_template_is_the_one_in_the_task_files() -> None:
    for path in sorted(TASKS.glob("vsr_*.yaml")):
        words = task(path.stem)["lmms_eval_specific_kwargs"]["theworld"]
        assert "{caption}".join((words["pre_prompt"], words["post_prompt"])) == Config().question_template


def test_an_answer_in_words_is_read_by_its_first_word_that_says_it(utils: dict[str, Any]) -> None:
    texts = ["1", "True.", " yes, it is", "0", "FALSE", "No", "The answer is 1, not 0", "10", "perhaps", ""]
    assert [utils["vsr_answer"](text) for text in texts] == [1, 1, 1, 0, 0, 0, 1, None, None, None]
    found = utils["vsr_process_results"]({"label": 0}, ["perhaps"])
    assert found == {"vsr_acc": 0.0, "vsr_answered": 0.0}


def test_a_missing_photograph_is_named_with_what_mends_it(utils: dict[str, Any], scored: Scored) -> None:
    with pytest.raises(FileNotFoundError, match=r"no x\.jpg in it; export VSR_IMAGES=FOLDER"):
        utils["vsr_doc_to_visual"]({"image": "x.jpg"})


def test_half_a_photograph_is_refused_whatever_other_tasks_allow(
    utils: dict[str, Any], scored: Scored, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = (scored.images / scored.statements[0].image).read_bytes()
    (tmp_path / "train2017").mkdir()
    (tmp_path / "train2017" / "half.png").write_bytes(whole[: len(whole) // 2])
    monkeypatch.setenv("VSR_IMAGES", str(tmp_path))
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    with pytest.raises(OSError, match="truncated"):
        utils["vsr_doc_to_visual"]({"image": "half.png"})
    assert ImageFile.LOAD_TRUNCATED_IMAGES is True


def test_continuations_may_be_functions_of_the_document(model: Any, scored: Scored) -> None:
    model.task_dict["t"] = {"test": [{"answer": " 1"}]}
    place = (None, 0, "t", "test")
    request = SimpleNamespace(args=("What is it?", lambda doc: doc["answer"], *place))
    plain = SimpleNamespace(args=("What is it?", "1", *place))
    first, second = model.loglikelihood([request, plain])
    assert first.text == second.text


def test_a_stop_string_ends_an_answer(module: Any) -> None:
    assert module._until("one. two; three", [";", "."]) == "one"
    assert module._until("one\n\ntwo", ["\n\n"]) == "one\n\ntwo"
    assert module._until("one", None) == "one"


def test_what_theworld_cannot_answer_is_refused(module: Any, model: Any, scored: Scored) -> None:
    model.task_dict["v"] = {"test": [{}]}
    request = SimpleNamespace(args=("What happens?", {}, lambda doc: ["clip.mp4"], 0, "v", "test"))
    with pytest.raises(
        ValueError, match="task v, document 0: a visual of type str; TheWorld takes images alone"
    ):
        model.generate_until([request])
    with pytest.raises(ValueError, match="leave out tasks of several rounds"):
        model.generate_until_multi_round([request])
    with pytest.raises(ValueError, match="batch_size is 'auto'; give a number"):
        module.TheWorldModel(pretrained=str(scored.checkpoint), batch_size="auto")
    with pytest.raises(ValueError, match="devise: not an option"):
        module.TheWorldModel(pretrained=str(scored.checkpoint), devise="cpu")


def test_each_of_several_processes_says_which_it_is_and_has_a_device_of_its_own(
    module: Any, scored: Scored, monkeypatch: pytest.MonkeyPatch
) -> None:
    launched = SimpleNamespace(num_processes=2, process_index=1, device="cpu")
    monkeypatch.setattr(module, "Accelerator", lambda: launched)
    model = module.TheWorldModel(pretrained=str(scored.checkpoint), device="cuda:7", dtype="float32")
    assert (model.rank, model.world_size, str(model.device)) == (1, 2, "cpu")
    assert model.accelerator is launched  # by which lmms-eval counts the requests of all


def test_lmms_eval_finds_the_model_through_the_entry_point(module: Any) -> None:
    parser = ConfigParser()
    parser.read(ROOT / "setup.cfg")
    (line,) = parser["options.entry_points"]["lmms_eval.models"].split("\n")[1:]
    name, _, target = line.partition(" = ")
    place, _, function = target.partition(":")
    manifest = getattr(importlib.import_module(place), function)()
    assert (name, manifest.model_id) == ("theworld", "theworld")
    package, _, attribute = manifest.simple_class_path.rpartition(".")
    assert package == module.__name__
    assert module.TheWorldModel.__name__ == attribute
    assert module.TheWorldModel.is_simple  # as the registry asks of a simple class


@pytest.mark.skipif(not INSTALLED, reason="lmms-eval is not installed: pip install 'theworld[lmms-eval]'")
def test_lmms_eval_itself_gives_the_accuracy_of_the_evaluation(
    scored: Scored, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.tasks import TaskManager

    data = tmp_path / "cambridgeltl/vsr_random"  # found before the hub is asked
    shutil.copytree(scored.scenes, data, ignore=shutil.ignore_patterns("images"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VSR_IMAGES", str(scored.images))
    manager = TaskManager("ERROR", include_path=str(TASKS.parent), model_name="theworld")
    results = simple_evaluate(
        model="theworld",
        model_args=f"pretrained={scored.checkpoint},dtype=float32",
        tasks=["vsr_random"],
        batch_size=4,
        device="cpu",
        task_manager=manager,
        bootstrap_iters=0,
    )
    samples = sorted(results["samples"]["vsr_random"], key=lambda sample: sample["doc_id"])
    want = [float(said == s.label) for said, s in zip(scored.said, scored.statements, strict=True)]
    assert [sample["vsr_acc"] for sample in samples] == want
    assert results["results"]["vsr_random"]["vsr_acc,none"] == pytest.approx(scored.accuracy)
