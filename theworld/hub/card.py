"""The model card of a checkpoint, written from the files of its run alone: every number in it comes from there.

The text is the template card.md.j2. Its YAML header names base model, data set and, where the checkpoint was evaluated,
the accuracies (the hub's model-index).
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from theworld.config.config import FIELDS, Config
from theworld.data.vsr import RELEASES, split_words
from theworld.models.serialization import SavedModel, part_file
from theworld.utils.files import canonical_sha256
from theworld.utils.hub import model_id
from theworld.utils.text import counted

TEMPLATE = Path(__file__).with_name("card.md.j2")
TAGS = ["visual-spatial-reasoning", "world-tokens", "gemma-3"]
TRAINING_METRICS = {
    "loss": "training loss, mean since the previous log",
    "accuracy": "training accuracy, mean since the previous log",
    "dev_loss": "dev loss",
    "dev_accuracy": "dev accuracy, with world tokens",
    "relation_loss": "training, next-word loss on relations, nats per statement",
    "dev_relation_loss": "dev, next-word loss on relations, nats per statement",
    "statement_loss": "training, next-word loss on statements or captions, nats per statement",
    "dev_statement_loss": "dev, next-word loss on statements, nats per statement",
}
_LOCAL_PATHS = ("annotations", "captions", "image_folder", "output_dir", "resume_from", "init_from")
_MODELS = ("model_name", "cosmos_model_name")
# Settings about where a run is stored and shown, which do not change what it learns.
_NOT_SHOWN = {*_LOCAL_PATHS, "push_to_hub", "hub_model_id", "hub_strategy", "hub_private_repo"}
_NOT_SHOWN |= {"log_to_tensorboard", "log_to_wandb", "wandb_project", "wandb_run_name"}


@dataclass(frozen=True)
class Facts:
    """The facts about a run that a card states and a checkpoint does not hold."""

    trainable: int  # parameters
    frozen: int  # parameters
    num_steps: int  # optimizer steps of the whole run
    statements_per_step: int
    data: Sequence[str]  # lines such as "train: 6 of 6 statements, 3 of 3 images"
    also: dict[str, int] = field(default_factory=dict)  # description of a trained part of Gemma -> parameters


def public_settings(config: Config) -> dict[str, Any]:
    """Return the settings without paths of this machine: defaults for local files, the folder's name for a model."""
    values = config.to_dict()
    for key, value in values.items():
        if key in _LOCAL_PATHS:
            values[key] = FIELDS[key].default
        elif key in _MODELS:
            values[key] = Path(value).name if Path(value).is_absolute() else model_id(value)
    return values


def read_metrics(output_dir: Path) -> list[dict[str, Any]]:
    """Return the lines of metrics.jsonl, or an empty list if there is no such file yet."""
    path = output_dir / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def read_results(checkpoint: Path) -> dict[str, Any] | None:
    """Return the summary of an evaluation of a checkpoint, or None if it was not evaluated.

    The summary beside the checkpoint (`tools/eval.py --output .../checkpoint-N.jsonl`) is preferred to the newest one
    in the run's evaluation/ folder. Raises ValueError for a file that is no summary.
    """
    beside = checkpoint.with_name(f"{checkpoint.name}.summary.json")
    found = list((checkpoint.parent / "evaluation").glob(f"{checkpoint.name}-*.summary.json"))
    if not (beside.exists() or found):
        return None
    path = beside if beside.exists() else max(found, key=lambda path: path.stat().st_mtime_ns)
    results = json.loads(path.read_text())
    if not isinstance(results, dict) or not {"systems", "statements", "images"} <= results.keys():
        raise ValueError(f"{path} is no summary of tools/eval.py; move it away")
    return results


def model_card(
    saved: SavedModel,
    facts: Facts,
    metrics: Sequence[dict[str, Any]],
    results: dict[str, Any] | None = None,
) -> str:
    """Return the README.md of a checkpoint for the hub.

    `metrics` are the lines of metrics.jsonl; lines of later steps are left out. `results` is the summary of an
    evaluation of this checkpoint by tools/eval.py.
    """
    config, world, step = saved.config(), saved.world, saved.step
    assert step is not None, "a card is of a checkpoint"
    name = (config.hub_model_id or f"checkpoint-{step}").split("/")[-1]
    fingerprint = world["fingerprint"]
    public = public_settings(config)
    card = ModelCard.from_template(
        _header(config, name, results),
        template_path=str(TEMPLATE),
        name=name,
        gemma=public["model_name"],
        world_encoder=config.world_encoder,
        cosmos=public["cosmos_model_name"],
        predicted_frames=fingerprint.get("num_world_steps", 0),
        projection=world["projection"],
        facts=facts,
        step=step,
        modified_files=[part_file(part) for part in world["parts"]],
        release=RELEASES[config.dataset_name] if config.annotations is None else None,
        fingerprint=_json({k: v for k, v in fingerprint.items() if k not in ("latents_mean", "latents_std")}),
        fingerprint_sha256=canonical_sha256(fingerprint),
        settings=_json(_changed_settings(public)),
        training_metrics=_newest([line for line in metrics if line["step"] <= step]),
        results=results,
        evaluated_on=_evaluated_on(results),
        hub_id=json.dumps(config.hub_model_id or "USER/NAME"),
        gemma_is_local=not _on_hub(config.model_name),
        code=code,
        counted=counted,
        plain=plain,
    )
    return f"{card}\n"


def _header(config: Config, name: str, results: dict[str, Any] | None) -> ModelCardData:
    """Return the metadata for the hub. Local models and data sets are left out: the hub knows no names for them."""
    base: dict[str, Any] = {}
    if _on_hub(config.model_name):
        base = {"base_model": [config.model_name], "base_model_relation": "adapter"}
    own_data = config.annotations is not None
    evaluated: dict[str, Any] = {}
    if results is not None:
        evaluated = {"model_name": name, "eval_results": _eval_results(results)}
    return ModelCardData(
        library_name="theworld",
        license="other",
        license_name="terms-of-the-base-models",
        license_link="https://ai.google.dev/gemma/terms",
        datasets=None if own_data else [f"cambridgeltl/vsr_{RELEASES[config.dataset_name]}"],
        tags=[*TAGS, config.world_encoder],
        **base,
        **evaluated,
    )


def _eval_results(results: dict[str, Any]) -> list[EvalResult]:
    """Return the accuracy of each condition, with its number of statements and its 95 % interval as arguments."""
    pairs = results.get("data", [])
    dataset, split = pairs[0] if len(pairs) == 1 else (_evaluated_on(results), None)
    released = {f"vsr_{release}" for release in RELEASES.values()}
    return [
        EvalResult(
            task_type="visual-question-answering",
            task_name="Visual Spatial Reasoning",
            dataset_type=f"cambridgeltl/{dataset}" if dataset in released else "own-data",
            dataset_name=dataset or "not recorded",
            dataset_split=split or None,
            metric_type="accuracy",
            metric_name=f"accuracy, {condition}",
            metric_value=score["accuracy"],
            metric_args={"n": score["n"], "low": score["low"], "high": score["high"]},
        )
        for condition, score in results["systems"].items()
    ]


def _evaluated_on(results: dict[str, Any] | None) -> str:
    """Return the data sets and splits of an evaluation in words; empty if they are not recorded."""
    pairs = [] if results is None else results.get("data", [])
    return " and ".join(split_words(*pair) for pair in pairs if all(pair))


def _on_hub(name: str) -> bool:
    return not Path(name).is_absolute() and not Path(name).is_dir() and name.count("/") == 1


def _changed_settings(public: dict[str, Any]) -> dict[str, Any]:
    defaults = public_settings(Config())
    return {k: v for k, v in public.items() if v != defaults[k] and k not in _NOT_SHOWN}


def _newest(lines: Sequence[dict[str, Any]]) -> list[tuple[str, float, int]]:
    """Return (description, value, step) of the newest value of each training metric."""
    newest = {key: line for line in lines for key in TRAINING_METRICS if key in line}
    return [
        (description, newest[key][key], newest[key]["step"])
        for key, description in TRAINING_METRICS.items()
        if key in newest
    ]


def _json(values: dict[str, Any]) -> str | None:
    """Return JSON for a fenced block, or None for no values. It cannot end the block: line breaks are escaped."""
    return json.dumps(values, indent=2, ensure_ascii=False) if values else None


def code(text: str) -> str:
    """Return a Markdown code span that shows the text, whatever backticks are in it."""
    text = " ".join(text.split())
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    padding = " " if longest else ""
    fence = "`" * (longest + 1)
    return f"{fence}{padding}{text}{padding}{fence}"


def plain(text: str) -> str:
    """Return one line of Markdown that shows the text as it is: no link, no emphasis, no HTML, no table cell."""
    return re.sub(r"([\\`*\[\]<>|])", r"\\\1", " ".join(text.split()))
