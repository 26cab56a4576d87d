"""The model card of a checkpoint: written from the run alone, so that it holds no number that the run did not give."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from theworld.checkpoint import checkpoint_step
from theworld.config import FIELDS, Config, load_config
from theworld.files import canonical_sha256
from theworld.saved import CONFIG_FILE, part_file, read_world
from theworld.vsr import RELEASES
from theworld.weights import model_id

_PLACES = (
    "annotations",
    "captions",
    "image_folder",
    "output_dir",
    "resume_from",
    "init_from",
)  # settings that name local files and folders
_MODELS = ("model_name", "cosmos_model_name")
# Settings that say where a run goes and who hears of it, not what it is.
_NOT_SHOWN = {*_PLACES, "push_to_hub", "hub_model_id", "hub_strategy", "hub_private_repo"}
_NOT_SHOWN |= {"log_to_tensorboard", "log_to_wandb", "wandb_project", "wandb_run_name"}

LIMITS = """\
## Limits
- An accuracy with world tokens says nothing by itself: the same model without them, with zero latents and with another
  image's latents has to be measured on the same statements. Claim nothing for world tokens from a figure without these.
- Trained on short English statements about one photograph each, answered with 0 or 1; nothing else was tried.
- The frozen models keep their own limits and biases.
- Works only with latents and a Gemma like those of the fingerprint; everything else is refused when it is loaded."""

LICENCES = """\
## Licences
The code that trained this is under the MIT licence. What it was trained with has terms of its own, which go on to hold:
Gemma's ([terms](https://ai.google.dev/gemma/terms)), the Cosmos models' (on their hub pages), those of Visual Spatial
Reasoning ([paper](https://arxiv.org/abs/2205.00363)) and of COCO's photographs
([terms](https://cocodataset.org/#termsofuse)). Read them before you use or pass on this projection."""


@dataclass(frozen=True)
class Facts:
    """What a card says of a run and its checkpoint does not hold."""

    trainable: int  # parameters
    frozen: int
    num_steps: int  # optimizer steps of the whole run
    statements_per_step: int
    data: Sequence[str]  # lines such as "train: 6 of 6 statements, 3 of 3 images"
    also: dict[str, int] = field(default_factory=dict)  # what trains of Gemma, in words, and its parameters


def public_settings(config: Config) -> dict[str, Any]:
    """The settings as others may read them: no folder of this machine, of a local model its folder's name alone."""
    values = config.to_dict()
    for key, value in values.items():
        if key in _PLACES:
            values[key] = FIELDS[key].default
        elif key in _MODELS:
            values[key] = Path(value).name if Path(value).is_absolute() else model_id(value)
    return values


def read_metrics(output_dir: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl; none if there is no such file yet."""
    path = output_dir / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def read_results(checkpoint: Path) -> dict[str, Any] | None:
    """The summary of an evaluation of a checkpoint: what `tools/eval.py --output .../checkpoint-N.jsonl` wrote beside
    it, else the newest that it wrote into evaluation/ of the run; None without one. ValueError for a file that is
    none."""
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
    checkpoint: Path,
    facts: Facts,
    metrics: Sequence[dict[str, Any]],
    results: dict[str, Any] | None = None,
) -> str:
    """A README.md for the hub. `metrics`: lines of metrics.jsonl; those after the checkpoint are left out.
    `results`: a summary of tools/eval.py for this checkpoint, if there is one."""
    config = load_config(checkpoint / CONFIG_FILE)
    world = read_world(checkpoint)
    step = checkpoint_step(checkpoint)
    parts = [
        _header(config),
        _what(config, world, facts, step),
        _data(config, world["fingerprint"], facts),
        _settings(config),
        _metrics([line for line in metrics if line["step"] <= step]),
        _results(results),
        LIMITS,
        _use(config),
        LICENCES,
    ]
    return "\n\n".join(parts) + "\n"


def _on_hub(name: str) -> bool:
    return not Path(name).is_absolute() and not Path(name).is_dir() and name.count("/") == 1


def _header(config: Config) -> str:
    """YAML for the hub. A local model or data set has no place in it."""
    lines = ["---", "library_name: theworld", "license: other", "license_name: terms-of-the-base-models"]
    lines.append("license_link: https://ai.google.dev/gemma/terms")
    if _on_hub(config.model_name):
        lines += ["base_model:", f"- {json.dumps(config.model_name)}", "base_model_relation: adapter"]
    if config.annotations is None:
        lines += ["datasets:", f"- cambridgeltl/vsr_{RELEASES[config.dataset_name]}"]
    tags = ("visual-spatial-reasoning", "world-tokens", "gemma-3", "cosmos")
    return "\n".join([*lines, "tags:", *(f"- {tag}" for tag in tags), "---"])


def _what(config: Config, world: dict[str, Any], facts: Facts, step: int) -> str:
    gemma, cosmos = (public_settings(config)[key] for key in _MODELS)
    shape = world["projection"]
    name = (config.hub_model_id or f"checkpoint-{step}").split("/")[-1]
    own = facts.trainable - sum(facts.also.values())
    also = "".join(
        f"- Trained as well: {part}, {count:,} parameters.\n" for part, count in facts.also.items()
    )
    if world["parts"]:
        files = ", ".join(f"`{part_file(part)}`" for part in world["parts"])
        also += f"- Not as Google published it: {files}, a derivative of Gemma under Gemma's terms.\n"
    frozen = "the rest of Gemma" if world["parts"] else "Gemma"
    kind = "a" if world["parts"] else "a frozen"
    return (
        f"# {name}\n\n"
        f"A projection that gives {kind} Gemma 3 (`{gemma}`) *world tokens*: latents of the frozen VAE of "
        f"`{cosmos}`, one set a photograph{_moments(world)},\nfor statements about where things are (Visual Spatial "
        "Reasoning).\n\n"
        f"- Trained: the projection and the two vectors around the world tokens, {own:,} parameters "
        f"(`{shape['architecture']}`, mode `{shape['mode']}`).\n{also}"
        f"- Frozen, and not in this repository: {frozen}, {facts.frozen:,} parameters as loaded here, and the VAE.\n"
        f"- After {step:,} of {facts.num_steps:,} optimizer steps of {facts.statements_per_step:,} statements."
    )


def _moments(world: dict[str, Any]) -> str:
    steps = world["fingerprint"].get("num_world_steps", 0)
    return f" and for each of {steps} moments that its Video2World model predicts after it" if steps else ""


def _data(config: Config, fingerprint: dict[str, Any], facts: Facts) -> str:
    source = f"`cambridgeltl/vsr_{RELEASES[config.dataset_name]}`"
    if config.annotations is not None:
        source = "a local folder, whose content this card cannot vouch for"
    fields = {k: v for k, v in fingerprint.items() if k not in ("latents_mean", "latents_std")}
    return (
        f"## Data\nStatements from {source}.\n\n"
        + "\n".join(f"- {line}" for line in facts.data)
        + f"\n\nThe latents' fingerprint (SHA-256 `{canonical_sha256(fingerprint)}`):\n\n{_block(fields)}"
    )


def _settings(config: Config) -> str:
    values, defaults = public_settings(config), public_settings(Config())
    changed = {k: v for k, v in values.items() if v != defaults[k] and k not in _NOT_SHOWN}
    return "## Settings that differ from the defaults\n" + (_block(changed) if changed else "None.")


def _block(values: dict[str, Any]) -> str:
    return f"```json\n{json.dumps(values, indent=2, ensure_ascii=False)}\n```"


def _metrics(lines: Sequence[dict[str, Any]]) -> str:
    """The newest value of each figure of training and dev."""
    names = {
        "loss": "training loss, mean since the line before",
        "accuracy": "training accuracy, likewise",
        "dev_loss": "dev loss",
        "dev_accuracy": "dev accuracy, with world tokens",
        "relation_loss": "training, next-word loss on relations, nats a statement",
        "dev_relation_loss": "dev, next-word loss on relations, nats a statement",
        "statement_loss": "training, next-word loss on statements or captions, nats a statement",
        "dev_statement_loss": "dev, next-word loss on statements, nats a statement",
    }
    newest = {name: line for line in lines for name in names if name in line}
    rows = [f"| {names[n]} | {newest[n][n]:.4f} | {newest[n]['step']:,} |" for n in names if n in newest]
    if not rows:
        return "## Figures while training\nNone were logged up to this checkpoint."
    return "\n".join(["## Figures while training", "| figure | value | step |", "|---|---|---|", *rows])


def _results(results: dict[str, Any] | None) -> str:
    title = "## Evaluation with controls\n"
    if results is None:
        return title + "Not part of this card: no evaluation with controls was at hand when it was written."
    rows = ["| system | n | accuracy | 95 % interval | p against world tokens |", "|---|---|---|---|---|"]
    for system, score in results["systems"].items():
        test = results.get("world_against", {}).get(system)
        p = f"{test['p_value']:.2g}" if test else ""
        interval = f"{score['low']:.1%} to {score['high']:.1%}"
        rows.append(f"| {system} | {score['n']:,} | {score['accuracy']:.1%} | {interval} | {p} |")
    data = ", ".join(" ".join(part) for part in results.get("data", []) if all(part))
    of = f" of {data}" if data else ""
    about = (
        f"{results['statements']:,} statements about {results['images']:,} images{of}; p: exact McNemar.\n\n"
    )
    return title + about + "\n".join(rows)


def _use(config: Config) -> str:
    own = "" if _on_hub(config.model_name) else ', model_name="FOLDER/OF/THAT/GEMMA"'
    name = config.hub_model_id or "USER/NAME"
    return (
        "## How to use\n"
        "```python\n"
        "from huggingface_hub import snapshot_download\n"
        "from theworld.model import TheWorld\n\n"
        f'folder = snapshot_download("{name}", allow_patterns=["*.json", "*.safetensors"])\n'
        f"model = TheWorld.from_pretrained(folder{own})\n"
        "```\n"
        "With its controls, on photographs of your own machine:\n"
        "`python tools/eval.py --model_name FOLDER --image-dir images/ --split test`"
    )
