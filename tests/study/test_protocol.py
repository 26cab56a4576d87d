"""What a study fixes before it runs: the file, its faults by field, and that it stays as it was."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from constants import ROOT

from theworld.config.config import Config, load_config, save_config
from theworld.models.matching import shape_of
from theworld.study.protocol import Primary, read_study, runs_of

ARMS = {"world": {}, "pixels": {"world_encoder": "pixels", "rules_out": "that any look did it"}}
PRIMARY = {"arm": "world", "against": ["pixels"]}


@pytest.fixture
def write(tmp_path: Path, config: Config) -> Any:
    save_config(config, tmp_path / "recipe.json")

    def write(**fields: Any) -> Path:
        path = tmp_path / "study.json"
        given = {"settings": "recipe.json", "arms": ARMS, "primary": PRIMARY, "seeds": [0, 1, 2]} | fields
        path.write_text(json.dumps({key: value for key, value in given.items() if value != "left out"}))
        return path

    return write


def test_a_study_has_a_run_for_each_arm_and_seed_in_whole_seeds(
    write: Any, config: Config, tmp_path: Path
) -> None:
    study = read_study(write())
    assert study.base == replace(config, standardization="training_images")
    assert study.primary == Primary("world", ["pixels"], margin=1.0, alpha=0.05)
    runs = runs_of(study, tmp_path / "out")
    assert [(run.number, run.name, run.config.world_encoder, run.config.seed) for run in runs] == [
        *((0, "world-0", "cosmos", 0), (1, "pixels-0", "pixels", 0), (2, "world-1", "cosmos", 1)),
        *((3, "pixels-1", "pixels", 1), (4, "world-2", "cosmos", 2), (5, "pixels-2", "pixels", 2)),
    ]
    assert runs[5].folder == tmp_path / "out" / "runs" / "pixels-2"
    assert runs[0].config.push_to_hub is False


def test_flags_choose_arms_and_seeds_and_change_settings_of_all_arms(write: Any) -> None:
    study = read_study(write(), {"max_steps": 7}, ["pixels"], [4])
    assert [arm.name for arm in study.arms] == ["pixels"]
    assert (list(study.seeds), study.base.max_steps) == ([4], 7)
    assert study.primary is None  # the arm that has to win is not among them


def test_the_study_of_vsr_has_the_arms_that_the_question_needs() -> None:
    study = read_study(ROOT / "configs" / "vsr_study.json")
    assert [arm.name for arm in study.arms] == [
        *("world", "prompt", "pixels", "untrained", "again", "noise", "mismatched")
    ]
    assert study.primary == Primary("world", ["prompt", "pixels", "untrained", "noise"])
    assert all(arm.rules_out for arm in study.arms[1:])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"armz": {}}, 'unknown key "armz"; the nearest known key is arms'),
        ({"runs": []}, 'the file has the key "runs", so it is a sweep\'s, for: python tools/sweep.py '),
        (
            {"seed": 1},
            '"seed" is a setting, so the file is a run\'s, for: python tools/train.py --config .*json',
        ),
        ({"arms": []}, "arms is \\[\\]; wanted"),
        ({"arms": {"a/b": {}}}, "arms.a/b: a name has letters"),
        ({"arms": {"a": 3}}, "arms.a is 3; wanted an object"),
        (
            {"arms": {"a": {"worldencoder": "pixels"}}},
            "arms.a.worldencoder: no setting; the nearest is world_encoder",
        ),
        ({"arms": {"a": {"seed": 3}}}, "arms.a.seed: the study decides that itself"),
        (
            {"primary": {"arm": "world", "against": ["prompt"]}},
            "primary names the arm 'prompt'; the arms are world",
        ),
        (
            {"primary": {"arm": "world", "against": ["world"]}},
            "primary.against has 'world', which is primary.arm",
        ),
        ({"primary": {"arm": "world", "against": []}}, "primary.against is \\[\\]; wanted a list"),
        ({"primary": PRIMARY | {"margin": -1}}, "primary.margin is -1; wanted a number between 0 and 100"),
        ({"primary": PRIMARY | {"alpha": "5 %"}}, "primary.alpha is '5 %'; wanted a number"),
        ({"primary": PRIMARY | {"beta": 1}}, "primary.beta: wanted arm, against, margin and alpha"),
        ({"train_shares": [0.1, 0.3]}, "train_shares is \\[0.1, 0.3\\]; wanted .* with 1 among them"),
        ({"train_shares": [0, 1]}, "train_shares is \\[0, 1\\]; wanted a list of shares above 0"),
        ({"train_shares": [True, 1]}, "train_shares is \\[True, 1\\]; wanted"),
        ({"train_shares": 0.1}, "train_shares is 0.1; wanted"),
        (
            {"train_shares": [0.1, 1], "arms": ARMS | {"few": {"train_share": 0.5}}},
            "arms.few.train_share: train_shares says it; leave one of them out",
        ),
        ({"baseline": "pixels"}, "baseline is 'pixels', but primary says what is compared"),
        ({"baseline": "prompt", "primary": "left out"}, "baseline is 'prompt'; the arms are world, pixels"),
        ({"seeds": 3}, "seeds is 3; wanted a list of integers"),
        ({"seeds": [1, 1]}, "seeds are \\[1, 1\\]; name each once"),
        ({"caution": ["none"]}, "caution is \\['none'\\]; wanted a sentence"),
        ({"settings": 3}, "settings is 3; wanted the name of a settings file"),
    ],
)
def test_a_file_that_makes_no_study_is_refused_by_field(
    write: Any, fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        read_study(write(**fields))


def test_each_arm_is_trained_on_each_share_and_first_on_all(write: Any, tmp_path: Path) -> None:
    study = read_study(write(train_shares=[1, 0.1], seeds=[3]))
    assert study.train_shares == [0.1, 1.0]
    runs = runs_of(study, tmp_path)
    assert [(run.name, run.share, run.config.train_share, run.config.seed) for run in runs] == [
        *(("world-3", 1.0, None, 3), ("pixels-3", 1.0, None, 3)),
        *(("world@0.1-3", 0.1, 0.1, 3), ("pixels@0.1-3", 0.1, 0.1, 3)),
    ]
    assert [run.number for run in runs] == [0, 1, 2, 3]
    assert runs[2].folder == tmp_path / "runs" / "world@0.1-3"


def test_the_arm_that_others_are_compared_with_stays_among_them(write: Any) -> None:
    path = write(primary="left out", baseline="pixels")
    assert read_study(path).baseline == "pixels"
    with pytest.raises(ValueError, match=r"--arms world: .* compares them with pixels; name it too"):
        read_study(path, arms=["world"])
    assert "caution" not in read_study(path).protocol()


def test_a_caution_is_part_of_what_was_fixed(write: Any) -> None:
    assert read_study(write(caution="Toy.")).protocol()["caution"] == "Toy."


QUESTIONS = {  # of the studies that explore: their arms, and world tokens of each at the shapes of the demo
    "study_patch": {"patch-4": 4, "patch-2": 16, "patch-1": 64},
    "study_projection": {"linear": 16, "mlp": 16, "conv": 16},
    "study_placement": {"before": 16, "after": 16},
    "study_frames": {"none": 16, "one": 32, "two": 48},
}


@pytest.mark.parametrize("name", QUESTIONS)
def test_the_studies_of_settings_plan_at_the_shapes_of_the_demo(name: str, tmp_path: Path) -> None:
    """Their arms are those of the file, on the demo's recipe; what differs are the settings that they are about."""
    found = read_study(ROOT / "configs" / f"{name}.json")
    assert (found.primary, found.seeds) == (None, [0, 1, 2, 3, 4])
    assert found.base == read_study(ROOT / "configs" / "vsr_study.json").base
    demo = load_config(ROOT / "configs" / "demo.json", {"align_steps": 0})
    study = replace(found, base=replace(demo, standardization="training_images"))
    tokens = {}
    for run in runs_of(study, tmp_path)[: len(study.arms)]:
        shape = shape_of(run.config, width=320)
        tokens[run.arm.name] = shape.num_tokens
    assert tokens == QUESTIONS[name]


def test_a_protocol_of_before_a_setting_was_there_is_the_same(write: Any, tmp_path: Path) -> None:
    study = read_study(write())
    study.fix(tmp_path)
    path = tmp_path / "protocol.json"
    old = json.loads(path.read_text())
    assert old["settings"].pop("train_share") is None
    assert old.keys() == {"format", "settings", "arms", "rules_out", "primary", "seeds"}
    path.write_text(json.dumps(old))
    study.check(tmp_path)
    with pytest.raises(
        ValueError, match=r"settings\.train_share was null, and is 0\.5; give another --output"
    ):
        replace(study, base=replace(study.base, train_share=0.5)).check(tmp_path)
    with pytest.raises(ValueError, match=r"train_shares was null, and is \[0\.1, 1\.0\]; give another"):
        replace(study, train_shares=[0.1, 1.0]).check(tmp_path)


def test_an_arm_with_a_value_that_is_not_allowed_is_named(write: Any, tmp_path: Path) -> None:
    study = read_study(write(arms={"world": {}, "pixels": {"world_patch": 0}}))
    with pytest.raises(ValueError, match="arm 'pixels': world_patch is 0"):
        runs_of(study, tmp_path)


def test_an_unknown_arm_is_answered_with_those_there_are(write: Any) -> None:
    with pytest.raises(ValueError, match=r"--arms nothing: .* has world, pixels"):
        read_study(write(), arms=["nothing"])


def test_what_was_fixed_stays_fixed_and_places_may_change(write: Any, tmp_path: Path) -> None:
    output = tmp_path / "out"
    read_study(write()).fix(output)
    fixed = (output / "protocol.json").read_bytes()
    read_study(write(), {"image_folder": "elsewhere", "device": "cpu", "save_steps": 3}).fix(output)
    assert (output / "protocol.json").read_bytes() == fixed
    for overrides, seeds, message in (
        ({"learning_rate": 0.5}, None, r"settings.learning_rate was .*, and is 0.5"),
        ({}, [0, 1], r"seeds was \[0, 1, 2\], and is \[0, 1\]"),
    ):
        with pytest.raises(ValueError, match=message):
            read_study(write(), overrides, None, seeds).fix(output)
    with pytest.raises(ValueError, match=r"primary.margin was 1.0, and is 2.0; give another --output"):
        read_study(write(primary=PRIMARY | {"margin": 2})).check(output)
    (output / "protocol.json").write_text("{}")
    with pytest.raises(ValueError, match="format is not stated; wanted 1"):
        read_study(write()).check(output)
    (output / "protocol.json").write_text('{"format": 1, "arms": {}}')
    with pytest.raises(ValueError, match=r"protocol\.json: key 'rules_out' is missing"):
        read_study(write()).check(output)
