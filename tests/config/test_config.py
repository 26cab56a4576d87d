"""The settings: what loads, what is refused, and in which words."""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
from constants import ROOT

from theworld.config.cli import ArgumentParser, add_config_arguments, config_from_arguments, grouped
from theworld.config.config import FIELDS, Config, _log_renamed, load_config, save_config
from theworld.data import images


def write(folder: Path, text: str) -> Path:
    path = folder / "run.json"
    path.write_text(text, encoding="utf-8")
    return path


def refusal(folder: Path, text: str) -> str:
    path = write(folder, text)
    with pytest.raises(ValueError, match=r"run\.json") as error:
        load_config(path)
    return str(error.value).removeprefix(str(path))


def parse(*arguments: str) -> Config:
    parser = ArgumentParser(prog="train")
    add_config_arguments(parser)
    return config_from_arguments(parser.parse_args(arguments))


def test_the_shipped_recipe_has_the_values_of_the_original_one() -> None:
    config = load_config(ROOT / "configs" / "vsr_training.json")
    changed = {key: value for key, value in config.to_dict().items() if value != getattr(Config(), key)}
    assert changed == {"image_folder": "data/images"}
    assert config.model_name == "google/gemma-3-4b-it"
    assert config.cosmos_model_name == "nvidia/Cosmos-Predict2-2B-Video2World"
    assert config.question_template == "Statement: {caption}\nAnswer (only '0' or '1'):"
    assert (config.batch_size, config.num_epochs, config.learning_rate) == (8, 3, 1e-4)
    assert (config.gradient_accumulation_steps, config.save_steps) == (2, 500)


def test_every_key_of_the_original_recipes_longer_file_loads(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        """{
        "_notes": ["a list", "of notes"], "_comment": "one", "_comment": "two", "//": "three",
        "model_name": "google/gemma-3-4b-it", "num_world_steps": 0, "max_world_steps": 16,
        "freeze_gemma_vision": true, "freeze_gemma_language": true, "freeze_cosmos_vae": true,
        "learning_rate": 0.0001, "batch_size": 4, "gradient_accumulation_steps": 1, "num_epochs": 1,
        "warmup_steps": 100, "weight_decay": 0.01, "max_grad_norm": 1.0,
        "use_gradient_checkpointing": true, "mixed_precision": "bf16",
        "output_dir": "./checkpoints/x", "save_steps": 500, "save_total_limit": 3,
        "resume_from_checkpoint": null, "eval_steps": 500, "eval_batch_size": 8, "do_eval": false,
        "logging_steps": 50, "log_to_wandb": false, "wandb_project": "p", "wandb_run_name": "r",
        "log_to_tensorboard": true, "max_seq_length": 2048, "num_workers": 4,
        "train_dataset_path": null, "eval_dataset_path": null, "dataset_name": "vsr",
        "num_samples": null, "streaming": false, "image_folder": "/data/images", "hf_token": null,
        "push_to_hub": false, "hub_model_id": "you/model", "hub_strategy": "every_save",
        "hub_private_repo": false
        }""",
    )
    config = load_config(path)
    assert config.dtype == "bfloat16"
    assert (config.max_world_steps, config.warmup_steps, config.max_seq_length) == (16, 100, 2048)
    assert (config.do_eval, config.eval_batch_size, config.use_gradient_checkpointing) == (False, 8, True)


def test_comments_and_trailing_commas_load_and_strings_keep_their_marks(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        """// first
        { # second
          "output_dir": "a//b #c /* d */ ,]",  // a string is left alone
          /* over
             lines */ "batch_size": 4, "hub_model_id": "quote \\" // still inside",
        }""",
    )
    config = load_config(path)
    assert config.output_dir == "a//b #c /* d */ ,]"
    assert config.hub_model_id == 'quote " // still inside'
    assert config.batch_size == 4


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ('{\n  // note\n  "batch_size": 4 5\n}', ":3:19: "),
        ('{"batch_size": 4, /* ', ":1:19: Comment without its end"),
        ('{"batch_size": 4, /*/', ":1:19: Comment without its end"),
        ("", ":1:1: "),
        ('{"output_dir": "a\nb"}', ":1:18: "),
    ],
)
def test_a_syntax_error_is_named_by_line_and_column(tmp_path: Path, text: str, where: str) -> None:
    assert refusal(tmp_path, text).startswith(where)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"batchsize": 4}', ["unknown key", '"batchsize"', "batch_size"]),
        ('{"batch_size": "8"}', ["batch_size", '"8"', "an integer of at least 1"]),
        ('{"batch_size": true}', ["batch_size", "true", "an integer"]),
        ('{"batch_size": 8.0}', ["batch_size", "8.0", "an integer"]),
        ('{"batch_size": null}', ["batch_size", "null", "an integer"]),
        ('{"batch_size": 0}', ["batch_size", "0", "at least 1"]),
        ('{"batch_size": 1, "batch_size": 2}', ['"batch_size" stands twice']),
        ('{"learning_rate": 0}', ["learning_rate", "above 0.0"]),
        ('{"learning_rate": "1e-4"}', ["learning_rate", '"1e-4"', "a finite number"]),
        ('{"learning_rate": NaN}', ["NaN is not a finite number"]),
        ('{"learning_rate": 1e999}', ["learning_rate", "Infinity", "a finite number"]),
        ('{"learning_rate": 1' + "0" * 400 + "}", ["learning_rate", "a finite number"]),
        ('{"seed": 1' + "0" * 5000 + "}", ["4300 digits"]),
        ('{"adam_beta2": 1.0}', ["adam_beta2", "below 1.0"]),
        ('{"push_to_hub": "true"}', ["push_to_hub", '"true"', "true or false"]),
        ('{"push_to_hub": 1}', ["push_to_hub", "1", "true or false"]),
        ('{"push_to_hub": true}', ["hub_model_id is null", "user/name", "push_to_hub is true"]),
        ('{"push_to_hub": true, "hub_model_id": "name"}', ['hub_model_id is "name"', "user/name"]),
        ('{"push_to_hub": true, "hub_model_id": "a/b/c"}', ['hub_model_id is "a/b/c"', "user/name"]),
        ('{"wandb_project": ""}', ["wandb_project", "not empty"]),
        ('{"lora_rank": 8}', ["lora_rank is 8", "null, as freeze_gemma_language is true"]),
        ('{"freeze_gemma_language": false, "lora_rank": 0}', ["lora_rank is 0", "at least 1"]),
        ('{"freeze_gemma_language": false, "fp8": true}', ["fp8 is true", "only frozen linears"]),
        ('{"gemma_learning_rate": 1e-5}', ["gemma_learning_rate is 1e-05", "nothing of Gemma trains"]),
        ('{"freeze_gemma_vision": false, "align_steps": 9}', ["align_steps is 9", "with init_from"]),
        ('{"num_world_steps": -1}', ["num_world_steps", "at least 0"]),
        ('{"num_world_steps": 4, "max_world_steps": 3}', ["num_world_steps is 4", "max_world_steps, 3"]),
        ('{"num_world_steps": 2, "rollout_frames": 5}', ["rollout_frames is 5", "at least 9", "is 2"]),
        ('{"num_world_steps": 1, "rollout_frames": 12}', ["rollout_frames is 12", "1 + 4 k frames"]),
        ('{"rollout_steps": 1}', ["rollout_steps", "at least 2"]),
        ('{"rollout_guidance": 0.5}', ["rollout_guidance", "at least 1.0"]),
        ('{"rollout_prompt": " "}', ["rollout_prompt", "not empty"]),
        ('{"streaming": true}', ["streaming is true: not supported"]),
        ('{"train_dataset_path": "x"}', ['train_dataset_path is "x": not supported', "annotations"]),
        ('{"mixed_precision": "fp16"}', ['mixed_precision is "fp16": not supported']),
        ('{"mixed_precision": "bf16", "dtype": "float32"}', ["dtype", '"bfloat16"', '"float32"']),
        (
            '{"freeze_cosmos_vae": false}',
            ["freeze_cosmos_vae is false", "a cache cannot follow a VAE that trains"],
        ),
        ('{"dataset_name": "vsr_zero_shot"}', ['"vsr_zero_shot"', "nearest: vsr_zeroshot"]),
        ('{"dataset_name": "gqa"}', ['"gqa"', "vsr, vsr_random, vsr_zeroshot"]),
        ('{"hub_strategy": "always"}', ['"always"', "end, every_save, checkpoint"]),
        ('{"latent_size": 500}', ["latent_size is 500", "multiple of 16"]),
        ('{"question_template": "True?"}', ["question_template", "{caption}"]),
        ('{"question_template": "{caption} {caption}"}', ["exactly once"]),
        ('{"device": "gpu"}', ['device is "gpu"', "cuda:N"]),
        ('{"device": "cuda:-1"}', ["device", "cuda:N"]),
        ('{"image_folder": ""}', ["image_folder", "not empty"]),
        ('{"output_dir": "a\\u0000b"}', ["output_dir"]),
        ('{"output_dir": "\\ud800"}', ["output_dir", "half a character"]),
        ('{"rollout_prompt": "a\\u0000"}', ["rollout_prompt", "NUL"]),
        ("[]", ["wanted one object"]),
        ("[" * 100_000, ["nested too deeply"]),
    ],
)
def test_a_refusal_names_the_key_the_value_and_what_is_allowed(
    tmp_path: Path, text: str, words: list[str]
) -> None:
    message = refusal(tmp_path, text)
    for word in words:
        assert word in message
    assert len(message) < 600


def test_a_file_that_is_not_text_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    path.write_bytes(b'{"output_dir": "\xff"}')
    with pytest.raises(ValueError, match=r"run\.json:1: byte 0xff is not utf-8"):
        load_config(path)
    path.write_text('{"output_dir": "a"}', encoding="utf-16")
    with pytest.raises(ValueError, match=r"run\.json: is UTF-16, .*iconv"):
        load_config(path)
    path.write_text("\n")
    with pytest.raises(ValueError, match=r"run\.json:1:1: the file is empty; wanted one object: \{\.\.\.\}$"):
        load_config(path)


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("demo_study", '"arms", so it is a study\'s, for: python tools/study.py --config {path}'),
        ("sweep", '"runs", so it is a sweep\'s, for: python tools/sweep.py --config FILE --runs {path}'),
    ],
)
def test_a_file_for_another_tool_is_refused_with_the_command_that_it_is_for(name: str, command: str) -> None:
    path = ROOT / "configs" / f"{name}.json"
    with pytest.raises(ValueError, match="the file has the key") as error:
        load_config(path)
    assert str(error.value) == f"{path}: the file has the key " + command.format(path=path)


def test_a_token_is_refused_and_never_shown(tmp_path: Path) -> None:
    message = refusal(tmp_path, '{"hf_token": "hf_canary"}')
    assert "HF_TOKEN" in message
    assert "canary" not in message


def test_an_integer_is_accepted_for_a_float() -> None:
    config = Config(max_grad_norm=2)
    assert isinstance(config.max_grad_norm, float)
    assert config == Config(max_grad_norm=2.0)


def test_a_config_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().batch_size = 3  # type: ignore[misc]


def test_a_saved_config_loads_to_an_equal_object(tmp_path: Path) -> None:
    config = Config(
        image_folder="Bilder/größe",
        learning_rate=1 / 3,
        save_total_limit=None,
        do_eval=False,
        question_template="{caption}\n\u2028?",
        latent_dtype="bfloat16",
    )
    path = tmp_path / "config.json"
    save_config(Config(), path)
    save_config(config, path)
    assert load_config(path) == config
    assert Config(**config.to_dict()) == config
    assert list(json.loads(path.read_text(encoding="utf-8"))) == [f.name for f in dataclasses.fields(Config)]
    assert [p.name for p in tmp_path.iterdir()] == ["config.json"]


def test_an_override_goes_before_the_file_and_is_named_when_refused(tmp_path: Path) -> None:
    path = write(tmp_path, '{"batch_size": 4, "max_steps": 7, "resume_from_checkpoint": "a"}')
    config = load_config(path, {"batch_size": 16, "max_steps": None, "resume_from": "b"})
    assert (config.batch_size, config.max_steps, config.resume_from) == (16, None, "b")
    with pytest.raises(ValueError, match=r"^override: batch_size is 0"):
        load_config(path, {"batch_size": 0})
    with pytest.raises(ValueError, match=r"^override: unknown key \"batch\""):
        load_config(path, {"batch": 1})


def test_flags_take_both_spellings_and_the_rest_stays_as_in_the_file(tmp_path: Path) -> None:
    path = write(tmp_path, '{"batch_size": 4, "seed": 5, "max_steps": 9}')
    config = parse("--config", str(path), "--batch_size", "2", "--learning-rate=3e-4", "--max-steps", "none")
    assert (config.batch_size, config.learning_rate, config.max_steps, config.seed) == (2, 3e-4, None, 5)
    assert parse() == Config()
    assert parse("--resume_from_checkpoint", "c") == parse("--resume-from", "c") == Config(resume_from="c")


def test_booleans_are_flags() -> None:
    assert parse("--world_positions").world_positions is True
    assert parse("--no-do_eval").do_eval is parse("--no-do-eval").do_eval is False
    assert parse("--no-push_to_hub") == Config()
    assert parse("--push-to-hub", "--hub_model_id", "user/name").push_to_hub is True


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ["--batchsize", "3"],
            "train: error: unknown flag --batchsize; did you mean --batch_size? (--help lists all)\n",
        ),
        (["--batch_size", "x"], "'x' is not an integer"),
        (["--batch", "3"], "unknown flag --batch; did you mean --batch_size?"),
        (["--learning-rat=1"], "unknown flag --learning-rat; did you mean --learning_rate?"),
        (["--no-do_evil"], "unknown flag --no-do_evil; did you mean --no-do_eval?"),
        (["stray"], "unexpected argument stray"),
        (["--output_dir", "~nobody-of-that-name/x"], "no home folder of that user is known"),
    ],
)
def test_a_wrong_flag_is_answered(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        parse(*arguments)
    assert stop.value.code == 2
    out, err = capsys.readouterr()
    assert words in err
    assert (out, err.count("\n")) == ("", 1)


# What a number counts or measures, by words of its help.
UNITS = (
    "statements|photographs|steps|micro-batches|epochs|checkpoints|processes|frames|layers|hidden units|tokens|pixels|"
    "latent cells|per optimizer step|times that|[Rr]ank|seed|[Ww]eight|Scale|Share|multiple|norm"
)


def test_help_shows_every_setting_as_a_sentence_with_its_unit_and_default() -> None:
    parser = argparse.ArgumentParser(formatter_class=lambda prog: argparse.HelpFormatter(prog, width=600))
    add_config_arguments(parser)
    text = parser.format_help()
    for name, declared in FIELDS.items():
        assert f"--{name}" in text
        assert f"{declared.help} (default: " in text
        assert re.fullmatch(r"[A-Z].*\.", declared.help)
        assert "guide" not in declared.help
        if declared.kind in (int, float):
            assert re.search(UNITS, declared.help), name
        if declared.default is None:
            assert "; none: " in declared.help or declared.name == "latent_dtype", name
    assert "Number of statements in a micro-batch. (default: 8)" in text
    assert "Number of checkpoints to keep, the newest ones; none: all checkpoints. (default: 3)" in text
    assert "(default: Statement: {caption}\\nAnswer (only '0' or '1'):)" in text


def test_help_shows_settings_in_groups() -> None:
    groups = grouped(list(FIELDS))
    assert [(title, keys[0], len(keys)) for title, keys in groups.items()] == [
        ("models", "model_name", 9),
        ("data", "dataset_name", 9),
        ("latents", "latent_size", 10),
        ("world tokens", "standardization", 11),
        ("objective", "statement_loss_weight", 6),
        ("optimisation", "batch_size", 13),
        ("memory and speed", "dtype", 7),
        ("evaluation", "do_eval", 3),
        ("checkpoints and logging", "output_dir", 9),
        ("hub", "push_to_hub", 4),
    ]
    assert [key for keys in groups.values() for key in keys] == list(FIELDS)
    assert grouped(["device", "dataset_name", "dtype"]) == {
        "data": ["dataset_name"],
        "memory and speed": ["dtype", "device"],
    }
    parser = ArgumentParser()
    add_config_arguments(parser)
    titles = re.findall(r"^(\w.*):$", parser.format_help(), re.MULTILINE)
    assert [title for title in titles if title in groups] == list(groups)


def test_a_home_folder_is_expanded_in_every_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    paths = [name for name, declared in FIELDS.items() if declared.rules.get("path")]
    wanted = "model_name cosmos_model_name init_from annotations image_folder captions output_dir resume_from"
    assert paths == wanted.split()
    others = {"statement_loss_weight": 1.0}  # which captions want
    config = Config(**dict.fromkeys(paths, "~/x"), **others)  # type: ignore[arg-type]
    assert {getattr(config, name) for name in paths} == {str(tmp_path / "x")}
    flags = [word for name in paths for word in (f"--{name}", "~/x")]
    assert parse(*flags, "--statement_loss_weight", "1") == config
    with pytest.raises(
        ValueError, match=r'output_dir is "~nobody-of-that-name/x"; allowed: .*no home folder'
    ):
        Config(output_dir="~nobody-of-that-name/x")


def test_an_old_name_works_with_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    _log_renamed.cache_clear()
    path = write(tmp_path, '{"resume_from_checkpoint": "a"}')
    assert load_config(path) == load_config(path) == parse("--resume-from-checkpoint", "a")
    assert [record.getMessage() for record in caplog.records] == [
        "the setting resume_from_checkpoint is named resume_from here; both names work"
    ]


def test_aliases_of_flags() -> None:
    assert parse("--dataset", "vsr_zeroshot", "--image-dir", "b") == Config(
        dataset_name="vsr_zeroshot", image_folder="b"
    )


def test_a_run_has_the_name_of_its_folder_unless_it_is_given() -> None:
    assert (Config().output_dir, Config().wandb_project) == ("checkpoints/theworld-vsr", "theworld-vsr")
    assert Config().run_name == "vsr-cosmos-mlp-lr0.0001-seed0"
    assert Config(seed=3, learning_rate=0.002).run_name == "vsr-cosmos-mlp-lr0.002-seed3"
    assert Config(output_dir="a/b/").run_name == "b"
    assert Config(wandb_run_name="first").run_name == "first"


def test_only_the_wanted_keys_become_flags() -> None:
    parser = ArgumentParser()
    add_config_arguments(parser, ["batch_size", "device"])
    arguments = parser.parse_args(["--device", "cpu"])
    assert vars(arguments) == {"config": None, "device": "cpu"}
    assert config_from_arguments(arguments) == Config(device="cpu")


def test_the_pixel_limit_is_the_one_of_images() -> None:
    assert Config().max_image_pixels == images.MAX_PIXELS


@pytest.mark.parametrize("words", [{}, {"relation_loss_weight": 1.0, "statement_steps": 9}])
def test_captions_that_no_step_would_read_are_refused(words: dict[str, Any]) -> None:
    with pytest.raises(
        ValueError, match=r'captions is "c\.json"; allowed: null: statement_loss_weight 0 reads none'
    ):
        Config(captions="c.json", **words)
    for enough in ({"statement_steps": 9}, {"statement_loss_weight": 0.1, "relation_loss_weight": 1.0}):
        assert Config(captions="c.json", **enough).captions == "c.json"  # type: ignore[arg-type]


def test_a_convolution_wants_a_grid_of_patches() -> None:
    with pytest.raises(ValueError, match=r'projection is "conv"; allowed: another, as world_mode is channel'):
        Config(projection="conv", world_mode="channel")
    assert Config(projection="transformer", world_mode="channel").projection_layers == 2
