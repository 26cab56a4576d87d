"""The model card: facts of the run and nothing else, metadata that the hub reads, and text that cannot break it."""

import json
from pathlib import Path

import yaml
from huggingface_hub import ModelCard
from small_checkpoint import FACTS, NAME, checkpoint_of

from theworld.config.config import Config
from theworld.hub.card import Facts, code, model_card, plain, public_settings, read_metrics, read_results
from theworld.models.serialization import SavedModel


def header(card: str) -> dict[str, object]:
    return yaml.safe_load(card.split("---\n")[1])


def test_a_card_tells_the_run_and_nothing_else(tmp_path: Path) -> None:
    config = Config(hub_model_id=NAME, learning_rate=0.5, image_folder="/secret/place", wandb_project="mine")
    path = checkpoint_of(tmp_path, 2, config, 0.0)
    metrics = [
        {"step": 1, "loss": 0.75, "accuracy": 0.25},
        {"step": 2, "loss": 0.5},
        {"step": 2, "dev_loss": 0.625, "dev_accuracy": 0.875, "dev_relation_loss": 0.4375},
        {"step": 3, "loss": 0.0625},
    ]
    card = model_card(SavedModel.read(path), FACTS, metrics)
    assert header(card)["base_model"] == ["google/gemma-3-4b-it"]
    assert header(card)["datasets"] == ["cambridgeltl/vsr_random"]
    assert header(card)["library_name"] == "theworld"
    assert "10 parameters" in card
    assert "Gemma, 20 parameters" in card
    assert "After 2 of 4 optimizer steps of 4 statements" in card
    assert "- train: 6 of 6 statements, 3 of 3 images" in card
    assert '```json\n{\n  "learning_rate": 0.5\n}\n```' in card
    assert "| training loss, mean since the previous log | 0.5000 | 2 |" in card
    assert "| training accuracy, mean since the previous log | 0.2500 | 1 |" in card
    assert "| dev accuracy, with world tokens | 0.8750 | 2 |" in card
    assert "| dev, next-word loss on relations, nats per statement | 0.4375 | 2 |" in card
    assert "0.0625" not in card  # of a later step
    assert "this checkpoint had not been evaluated with controls" in card
    assert "model-index" not in header(card)
    assert f'snapshot_download("{NAME}"' in card
    assert "secret" not in card


def test_a_card_names_the_world_encoder(tmp_path: Path) -> None:
    for name, words, tag in (
        (
            "cosmos",
            "the latents that the frozen VAE of\n`nvidia/Cosmos-Predict2-2B-Video2World` gives",
            "cosmos",
        ),
        ("pixels", "computed from\nthe photograph's own pixels, in cells of 8 x 8 pixels.", "pixels"),
        ("none", "computed from\nno picture: their input is trained, as a control.", "none"),
        (
            "cosmos_random",
            "a VAE as that of `nvidia/Cosmos-Predict2-2B-Video2World`\nwith random weights, as a control.",
            "cosmos_random",
        ),
        ("gemma_vision", "Gemma's own vision features, as a control.", "gemma_vision"),
        ("noise", "fixed noise of each photograph, as a control.", "noise"),
        (
            "mismatched",
            "`nvidia/Cosmos-Predict2-2B-Video2World` gives for another photograph, as a control.",
            "mismatched",
        ),
    ):
        config = Config(world_encoder=name)  # type: ignore[arg-type]
        card = model_card(SavedModel.read(checkpoint_of(tmp_path / name, 2, config, 0.0)), FACTS, [])
        assert words in card
        assert ("and the VAE." in card) is (name in ("cosmos", "mismatched"))
        assert header(card)["tags"][-1] == tag  # type: ignore[index]


def test_a_card_without_figures_or_public_sources_says_so(tmp_path: Path) -> None:
    config = Config(model_name="/models/my-gemma", annotations="/data/vsr")
    card = model_card(SavedModel.read(checkpoint_of(tmp_path, 2, config, 0.0)), FACTS, read_metrics(tmp_path))
    assert not {"base_model", "datasets"} & header(card).keys()
    assert "None were logged up to this checkpoint." in card
    assert "`my-gemma`" in card
    assert "/models" not in card
    assert "/data" not in card


def test_a_card_shows_controls_where_they_were_measured(tmp_path: Path) -> None:
    score = {"n": 8, "accuracy": 0.75, "low": 0.5, "high": 0.9}
    results = {
        "statements": 8,
        "images": 3,
        "systems": {"world": score, "baseline": score | {"accuracy": 0.5}},
        "world_against": {"baseline": {"only_first": 3, "only_second": 1, "p_value": 0.625}},
    }
    card = model_card(SavedModel.read(checkpoint_of(tmp_path, 2, Config(), 0.0)), FACTS, [], results)
    assert "| world | 8 | 75.0% | 50.0% to 90.0% |  |" in card
    assert "| baseline | 8 | 50.0% | 50.0% to 90.0% | 0.62 |" in card
    assert "8 statements about 3 images" in card


def test_an_evaluation_in_its_run_comes_with_it_too(tmp_path: Path) -> None:
    path = checkpoint_of(tmp_path, 2, Config(), 0.0)
    folder = tmp_path / "evaluation"
    folder.mkdir()
    score = {"n": 8, "accuracy": 0.75, "low": 0.5, "high": 0.9}
    results = {"statements": 8, "images": 3, "data": [["vsr_random", "test"]], "systems": {"world": score}}
    (folder / "checkpoint-2-vsr_random-test.summary.json").write_text(json.dumps(results))
    (folder / "checkpoint-20-vsr_random-test.summary.json").write_text("[]")  # of another
    assert read_results(path) == results
    assert (
        "8 statements about 3 images: the test split of VSR random; p-values: exact McNemar test."
        in model_card(SavedModel.read(path), FACTS, [], results)
    )
    beside = results | {"statements": 9}
    (tmp_path / "checkpoint-2.summary.json").write_text(json.dumps(beside))
    assert read_results(path) == beside


def test_public_settings_make_a_config_again() -> None:
    assert Config(**public_settings(Config())) == Config()


def test_the_hub_reads_the_accuracies_of_an_evaluation(tmp_path: Path) -> None:
    score = {"n": 8, "accuracy": 0.75, "low": 0.5, "high": 0.9}
    results = {
        "statements": 8,
        "images": 3,
        "data": [["vsr_random", "test"]],
        "systems": {"world": score, "zero": score | {"accuracy": 0.5}},
    }
    path = checkpoint_of(tmp_path, 2, Config(hub_model_id=NAME), 0.0)
    card = ModelCard(model_card(SavedModel.read(path), FACTS, [], results))
    assert card.data.model_name == "world"
    world, zero = card.data.eval_results
    assert (world.dataset_type, world.dataset_name, world.dataset_split) == (
        *("cambridgeltl/vsr_random", "vsr_random", "test"),
    )
    assert (world.metric_type, world.metric_name, world.metric_value) == ("accuracy", "accuracy, world", 0.75)
    assert world.metric_args == {"n": 8, "low": 0.5, "high": 0.9}
    assert (zero.metric_name, zero.metric_value) == ("accuracy, zero", 0.5)


def test_own_data_is_no_data_set_of_the_hub(tmp_path: Path) -> None:
    score = {"n": 8, "accuracy": 0.75, "low": 0.5, "high": 0.9}
    results = {"statements": 8, "images": 3, "data": [["own data", "test"]], "systems": {"world": score}}
    card = ModelCard(
        model_card(SavedModel.read(checkpoint_of(tmp_path, 2, Config(), 0.0)), FACTS, [], results)
    )
    (world,) = card.data.eval_results
    assert (world.dataset_type, world.dataset_name) == ("own-data", "own data")


def test_text_of_the_user_is_shown_as_it_is(tmp_path: Path) -> None:
    assert plain("a|b [x](y) *c* <i>\n# d `e`") == r"a\|b \[x\](y) \*c\* \<i\> # d \`e\`"
    assert code("a") == "`a`"
    assert code("a``b\n`") == "``` a``b ` ```"
    config = Config(model_name="/models/a`b {{ 7 * 7 }}", question_template="{caption}\n```\n<script>")
    facts = Facts(10, 20, 4, 4, ["train: <b>[1](2)|"])
    card = model_card(SavedModel.read(checkpoint_of(tmp_path, 2, config, 0.0)), facts, [])
    assert "(`` a`b {{ 7 * 7 }} ``)" in card
    assert r"- train: \<b\>\[1\](2)\|" in card
    assert r'"question_template": "{caption}\n```\n<script>"' in card
    assert [line for line in card.splitlines() if line.startswith("```")] == [
        *("```json", "```", "```json", "```", "```python", "```")
    ]


def test_the_headings_of_a_card_come_in_order(tmp_path: Path) -> None:
    card = model_card(SavedModel.read(checkpoint_of(tmp_path, 2, Config(), 0.0)), FACTS, [])
    assert card.endswith("--split test`\n")
    assert "\n\n\n" not in card
    assert [line for line in card.splitlines() if line.startswith("#")] == [
        "# checkpoint-2",
        "## Data",
        "## Settings that differ from the defaults",
        "## Metrics during training",
        "## Evaluation with controls",
        "## Limits",
        "## Licences",
        "## How to use",
    ]
