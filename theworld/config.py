"""The settings of a run: typed, validated, each with its meaning and unit.

A settings file is JSON with `//`, `#` and `/* */` comments and trailing commas; keys that start with "_" or
"//" are comments too. `load_config` puts it together with overrides (`theworld.arguments`
makes a command-line flag of every key). A value that is not allowed is refused when a `Config` is made, so a `Config`
that exists is a valid one.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
import sys
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from theworld.files import publish_bytes
from theworld.jsonc import is_comment, read_json_with_comments

DATASET_NAMES = ("vsr", "vsr_random", "vsr_zeroshot")
DTYPES = ("float32", "float16", "bfloat16")  # of stored latents
COMPUTE = ("float32", "bfloat16")  # of the frozen models
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)


def _key(default: Any, meaning: str, unit: str = "", **rules: Any) -> Any:
    """A field with `help`, `unit` and rules: `choices`, `at_least`, `above`, `below`, `filled`, `built`."""
    return dataclasses.field(default=default, metadata={"help": meaning, "unit": unit, **rules})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Every setting, in the order of `--help`.

    Raises ValueError naming the key, its value and what is allowed.
    """

    # Models
    model_name: str = _key("google/gemma-3-4b-it", "Gemma 3: hub name or local folder", filled=True)
    cosmos_model_name: str = _key(
        "nvidia/Cosmos-Predict2-2B-Video2World", "whose VAE encodes: hub name or local folder", filled=True
    )
    freeze_gemma_vision: bool = _key(True, "keep Gemma's vision tower as it is", built=True)
    freeze_gemma_language: bool = _key(True, "keep Gemma's language model as it is", built=True)
    freeze_cosmos_vae: bool = _key(True, "keep the VAE as it is; a cache allows nothing else")
    num_world_steps: int = _key(0, "future to roll out; 0: the photograph only", "steps", at_least=0, built=0)
    max_world_steps: int | None = _key(
        None, "without meaning while num_world_steps is 0", "steps", at_least=0
    )

    # Data
    dataset_name: str = _key("vsr", "VSR release; vsr is vsr_random", choices=DATASET_NAMES)
    annotations: str | None = _key(
        None,
        "folder of train, dev, test.jsonl or of random/, zeroshot/; none: dataset_name's hub data",
        filled=True,
    )
    image_folder: str | None = _key(None, "folder of the photographs that statements name", filled=True)
    question_template: str = _key(
        "Statement: {caption}\nAnswer (only '0' or '1'):", "what Gemma is asked; {caption} stands in it once"
    )
    num_samples: int | None = _key(None, "train on the first so many; none: all", "statements", at_least=1)
    max_seq_length: int | None = _key(
        None, "a statement with its image that is longer is an error; none: no limit", "tokens", at_least=1
    )
    max_image_pixels: int = _key(
        89_478_485, "refuse larger photographs by their header", "pixels", at_least=1
    )

    # Latents (phase 1)
    latent_size: int = _key(512, "side of the square the VAE sees; a multiple of 16", "pixels", at_least=16)
    latent_dtype: str | None = _key(None, "latents are stored in it; none: as computed", choices=DTYPES)
    encode_batch_size: int = _key(8, "encoded at a time", "photographs", at_least=1)
    shard_size: int = _key(512, "in one file of the cache", "photographs", at_least=1)

    # World tokens
    world_mode: str = _key("patch", "what of a latent is one world token", choices=("patch", "channel"))
    world_patch: int = _key(4, "side of a patch, in mode patch", "latent cells", at_least=1)
    projection: str = _key("mlp", "from a patch to its token", choices=("mlp", "linear"))
    projection_hidden: int | None = _key(
        None, "width of the mlp; none: Gemma's hidden size", "units", at_least=1
    )
    world_positions: bool = _key(False, "add a trained vector for each place")
    world_attention: str = _key("bidirectional", "among world tokens", choices=("bidirectional", "causal"))
    world_position: str = _key(
        "before",
        "world tokens stand before or after the image; after trains faster",
        choices=("before", "after"),
    )

    # Objective
    statement_loss_weight: float = _key(
        0.0, "next-word loss on true statements (answer: 1)", "weight", at_least=0.0
    )
    align_steps: int = _key(0, "first, towards Gemma's own image tokens", "optimizer steps", at_least=0)
    align_learning_rate: float = _key(0.001, "learning rate of these steps", "per step", above=0.0)

    # Training (phase 2)
    batch_size: int = _key(8, "in one pass of one process", "statements", at_least=1)
    gradient_accumulation_steps: int = _key(2, "to one optimizer step", "passes", at_least=1)
    num_epochs: int = _key(3, "times over the training statements", "epochs", at_least=1)
    max_steps: int | None = _key(None, "stop after so many; none: all epochs", "optimizer steps", at_least=1)
    learning_rate: float = _key(0.0001, "peak learning rate", "per step", above=0.0)
    lr_schedule: str = _key("cosine", "decay after the warm-up", choices=("cosine", "linear", "constant"))
    warmup_steps: int | None = _key(None, "warm-up; none: by warmup_ratio", "optimizer steps", at_least=0)
    warmup_ratio: float = _key(
        0.03, "warm-up without warmup_steps", "share of all steps", at_least=0.0, below=1.0
    )
    weight_decay: float = _key(0.01, "AdamW's, times the learning rate", "per step", at_least=0.0)
    adam_beta2: float = _key(
        0.999, "AdamW's decay of the squared gradient", "per step", at_least=0.0, below=1.0
    )
    max_grad_norm: float = _key(1.0, "longer gradients are scaled to it", "L2 norm", above=0.0)
    use_gradient_checkpointing: bool = _key(False, "recompute activations: less memory, slower")
    seed: int = _key(0, "of weights and order", "seed", at_least=0, below=2**32)
    dtype: str = _key(
        "auto", "of frozen models; auto: bfloat16 on CUDA, float32 on CPU", choices=("auto", *COMPUTE)
    )
    device: str = _key("auto", "auto, cpu, cuda or cuda:N; auto: CUDA where there is one")
    compile: bool | None = _key(None, "compile the frozen models; none: on CUDA")
    fp8: bool = _key(False, "frozen linears in 8 bits, on a Hopper GPU: faster, not exact")
    num_workers: int | None = _key(
        None, "read and decode photographs; 0: in this one; none: one a core", "processes", at_least=0
    )

    # Evaluation while training, checkpoints, logs
    do_eval: bool = _key(True, "evaluate on dev while training")
    eval_steps: int = _key(500, "between two evaluations", "optimizer steps", at_least=1)
    eval_batch_size: int | None = _key(
        None, "in one pass, which keeps nothing; none: 4 batch_size", "statements", at_least=1
    )
    output_dir: str = _key("checkpoints/vsr", "folder of checkpoints and logs", filled=True)
    save_steps: int = _key(500, "between two checkpoints", "optimizer steps", at_least=1)
    save_total_limit: int | None = _key(3, "keep the newest; none: all", "checkpoints", at_least=1)
    resume_from: str | None = _key(None, "checkpoint folder to go on from; none: start anew", filled=True)
    logging_steps: int = _key(10, "between two lines of metrics.jsonl", "optimizer steps", at_least=1)
    log_to_tensorboard: bool = _key(True, "write TensorBoard logs to output_dir")
    log_to_wandb: bool = _key(False, "log to Weights & Biases")
    wandb_project: str = _key("theworld", "project there", filled=True)
    wandb_run_name: str | None = _key(None, "name of the run there")
    push_to_hub: bool = _key(False, "upload checkpoints to the hub")
    hub_model_id: str | None = _key(None, "name of the model there: user/name")
    hub_strategy: str = _key(
        "every_save",
        "end: the last model; every_save: each saved one; checkpoint: with what it takes to resume, too",
        choices=("end", "every_save", "checkpoint"),
    )
    hub_private_repo: bool = _key(False, "make that model private")

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = _checked(field, getattr(self, field.name))
            object.__setattr__(self, field.name, value)
        if not self.freeze_cosmos_vae:
            raise _refused("freeze_cosmos_vae", False, "true; a cache cannot follow a VAE that trains")
        if self.latent_size % 16:
            raise _refused("latent_size", self.latent_size, "a multiple of 16 pixels")
        if self.question_template.count("{caption}") != 1:
            raise _refused("question_template", self.question_template, "{caption} in it exactly once")
        if not re.fullmatch(r"auto|cpu|cuda(:(0|[1-9][0-9]{0,3}))?", self.device):
            raise _refused("device", self.device, "auto, cpu, cuda or cuda:N")
        if self.push_to_hub and not HUB_NAME.fullmatch(self.hub_model_id or ""):
            raise _refused("hub_model_id", self.hub_model_id, "user/name, as push_to_hub is true")

    @property
    def eval_statements(self) -> int:
        """Statements in one pass of an evaluation, each with all systems that are asked."""
        return self.eval_batch_size or 4 * self.batch_size

    def to_dict(self) -> dict[str, Any]:
        """Every key with its value, as plain JSON types; `Config(**config.to_dict()) == config`."""
        return dataclasses.asdict(self)


FIELDS = {field.name: field for field in dataclasses.fields(Config)}
_HINTS = typing.get_type_hints(Config)
WANTED = {bool: "true or false", int: "an integer", float: "a finite number", str: "a string"}

# Keys of the guide's file that say the same as ours in other words.
RENAMED = {"resume_from_checkpoint": "resume_from"}
_MIXED_PRECISION = {"bf16": "bfloat16", "no": "float32"}
# Keys of the guide's file that ask for nothing while they hold the first value, and why no other is taken.
_INERT: dict[str, tuple[Any, str]] = {
    "train_dataset_path": (None, "not built yet; use annotations"),
    "eval_dataset_path": (None, "not built yet; use annotations"),
    "streaming": (False, "not built yet"),
    "mixed_precision": (None, "not built yet; bf16, no and null are"),
    "hf_token": (None, "a token does not belong in the settings; set HF_TOKEN in the environment"),
}


class _Refused(ValueError):
    """A refused setting; `key` tells load_config whether the file or an override gave it."""

    key: str = ""


def _refused(key: str, value: object, allowed: str, note: str = "") -> _Refused:
    error = _Refused(f"{key} is {_shown(value)}{note}; allowed: {allowed}")
    error.key = key
    return error


def _shown(value: object) -> str:
    """A value as JSON writes it, cut to 200 characters."""
    try:
        text = json.dumps(value, default=repr)
    except (TypeError, ValueError):  # an integer of thousands of digits, keys that JSON has not
        text = f"a value of type {type(value).__name__} that cannot be shown"
    return text if len(text) <= 200 else text[:197] + "..."


def type_of(key: str) -> tuple[type, bool]:
    """The plain type of a key (bool, int, float or str) and whether null is allowed."""
    options = typing.get_args(_HINTS[key]) or (_HINTS[key],)
    return next(option for option in options if option is not type(None)), type(None) in options


def _allowed(field: dataclasses.Field[Any]) -> str:
    """What a key may hold, in words."""
    kind, optional = type_of(field.name)
    rules = field.metadata
    words = ", ".join(rules["choices"]) if "choices" in rules else WANTED[kind]
    for rule, phrase in (("at_least", "of at least"), ("above", "above"), ("below", "below")):
        if rule in rules:
            words += f" {phrase} {rules[rule]}"
    if rules.get("filled"):
        words += " that is not empty"
    return words + (", or null" if optional else "")


def _checked(field: dataclasses.Field[Any], value: Any) -> Any:
    """`value` in the key's type (an integer becomes a float where one is wanted), or ValueError."""
    rules = field.metadata
    kind, optional = type_of(field.name)
    refused = _refused(field.name, value, _allowed(field))
    if value is None and optional:
        return None
    if isinstance(value, bool) and kind is not bool:  # Python takes a bool for an int; a reader does not
        raise refused
    accepted: Any = (int, float) if kind is float else kind
    if not isinstance(value, accepted):
        raise refused
    if kind is float:
        if not -sys.float_info.max <= value <= sys.float_info.max:  # NaN, infinity, an integer beyond floats
            raise refused
        value = float(value)
    if kind is str and (not _is_text(value) or (rules.get("filled") and not value.strip())):
        raise refused
    if "choices" in rules and value not in rules["choices"]:
        nearest = nearest_name(value, rules["choices"])
        raise _refused(field.name, value, f"{_allowed(field)} (nearest: {nearest})")
    too_low = value < rules.get("at_least", value) or ("above" in rules and value <= rules["above"])
    if too_low or ("below" in rules and value >= rules["below"]):
        raise refused
    if "built" in rules and value != rules["built"]:
        raise _refused(field.name, value, _shown(rules["built"]), ": not built yet")
    return value


def _is_text(value: str) -> bool:
    """Whether a string can be written to a file and used as a path: valid Unicode without NUL."""
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return "\0" not in value


def nearest_name(name: str, names: Sequence[str]) -> str:
    return difflib.get_close_matches(name, names, n=1, cutoff=0.0)[0]


def load_config(path: str | Path | None, overrides: Mapping[str, object] | None = None) -> Config:
    """The settings of a file (None: the defaults) with `overrides` on top.

    Raises ValueError for a syntax error (file:line:column), an unknown key (with the nearest known one) or a
    value that is not allowed, each with the file, or "override", that it came from; OSError for the file.
    """
    from_file = {} if path is None else _known_keys(read_json_with_comments(Path(path)), str(path))
    from_overrides = _known_keys(dict(overrides or {}), "override")
    try:
        return Config(**{**from_file, **from_overrides})
    except _Refused as error:
        source = "override" if error.key in from_overrides or path is None else str(path)
        raise ValueError(f"{source}: {error}") from None


def _known_keys(values: dict[str, Any], source: str) -> dict[str, Any]:
    """The settings among `values` under our own names; comments dropped, unknown keys refused."""
    known: dict[str, Any] = {}
    for given, value in values.items():
        key = RENAMED.get(given, given)
        if given == "mixed_precision" and isinstance(value, str) and value in _MIXED_PRECISION:
            key, value = "dtype", _MIXED_PRECISION[value]
        if is_comment(key):
            continue
        if key in _INERT:
            if value is _INERT[key][0]:
                continue
            # A token must reach no log.
            shown = "set" if key == "hf_token" else _shown(value)
            raise ValueError(f"{source}: {key} is {shown}: {_INERT[key][1]}")
        if key not in FIELDS:
            nearest = nearest_name(key, list(FIELDS))
            raise ValueError(f"{source}: unknown key {_shown(given)}; the nearest known key is {nearest}")
        if key in known and known[key] != value:
            raise ValueError(f"{source}: {key} is given as {_shown(known[key])} and as {_shown(value)}")
        known[key] = value
    return known


def save_config(config: Config, path: str | Path) -> None:
    """Writes plain JSON that loads to an equal object; replaces a file as a whole or not at all."""
    text = json.dumps(config.to_dict(), indent=2, ensure_ascii=False) + "\n"
    publish_bytes(Path(path), text.encode("utf-8"), overwrite=True)
