"""The settings of a run: typed, validated, each with its meaning and unit.

A settings file is JSON with `//`, `#` and `/* */` comments and trailing commas; keys that start with "_" or
"//" are comments too. `load_config` puts it together with overrides (`theworld.arguments`
makes a command-line flag of every key). A value that is not allowed is refused when a `Config` is made, so a `Config`
that exists is a valid one.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from theworld.files import publish_bytes
from theworld.jsonc import is_comment, read_json_with_comments
from theworld.settings import Refused, checked, nearest_name, refused, setting, shown

DATASET_NAMES = ("vsr", "vsr_random", "vsr_zeroshot")
DTYPES = ("float32", "float16", "bfloat16")  # of stored latents
PROJECTIONS = ("mlp", "linear", "conv", "transformer")
COMPUTE = ("float32", "bfloat16")  # of the frozen models
FRAMES_A_STEP = 4  # video frames to one latent frame, after the first
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Every setting, in the order of `--help`.

    Raises ValueError naming the key, its value and what is allowed.
    """

    # Models
    model_name: str = setting("google/gemma-3-4b-it", "Gemma 3: hub name or local folder", filled=True)
    cosmos_model_name: str = setting(
        "nvidia/Cosmos-Predict2-2B-Video2World", "whose VAE encodes: hub name or local folder", filled=True
    )
    freeze_gemma_vision: bool = setting(True, "keep Gemma's vision tower and its projector as they are")
    freeze_gemma_language: bool = setting(True, "keep Gemma's language model as it is")
    lora_rank: int | None = setting(
        None, "of the language model train LoRA matrices alone; none: all weights", "rank", at_least=1
    )
    freeze_cosmos_vae: bool = setting(True, "keep the VAE as it is; a cache allows nothing else")
    num_world_steps: int = setting(
        0, "predict so many moments after the photograph, each 4 video frames; 0: none", "steps", at_least=0
    )
    max_world_steps: int | None = setting(
        None, "rows of the time embedding; none: num_world_steps, and 0 needs none", "steps", at_least=0
    )

    # Data
    dataset_name: str = setting("vsr", "VSR release; vsr is vsr_random", choices=DATASET_NAMES)
    annotations: str | None = setting(
        None,
        "folder of train, dev, test.jsonl or of random/, zeroshot/; none: dataset_name's hub data",
        filled=True,
    )
    image_folder: str | None = setting(None, "folder of the photographs that statements name", filled=True)
    question_template: str = setting(
        "Statement: {caption}\nAnswer (only '0' or '1'):", "what Gemma is asked; {caption} stands in it once"
    )
    num_samples: int | None = setting(None, "train on the first so many; none: all", "statements", at_least=1)
    max_seq_length: int | None = setting(
        None, "a statement with its image that is longer is an error; none: no limit", "tokens", at_least=1
    )
    max_image_pixels: int = setting(
        89_478_485, "refuse larger photographs by their header", "pixels", at_least=1
    )

    # Latents (phase 1)
    latent_size: int = setting(
        512, "side of the square the VAE sees; a multiple of 16", "pixels", at_least=16
    )
    latent_dtype: str | None = setting(None, "latents are stored in it; none: as computed", choices=DTYPES)
    encode_batch_size: int = setting(8, "encoded at a time", "photographs", at_least=1)
    shard_size: int = setting(512, "in one file of the cache", "photographs", at_least=1)
    rollout_prompt: str = setting(
        "The scene goes on as it is. The camera does not move.",
        "what the video model is told of what follows a photograph, in all rollouts",
        filled=True,
    )
    rollout_frames: int | None = setting(
        None,
        "predicted, 1 + 4 k; the first are kept; none: 1 + 4 num_world_steps",
        "video frames",
        at_least=5,
    )
    rollout_steps: int = setting(35, "of denoising", "steps", at_least=2)
    rollout_guidance: float = setting(
        7.0, "classifier-free guidance; 1: none, at half the cost", "scale", at_least=1.0
    )
    rollout_seed: int = setting(
        0, "of the noise, with the photograph's hash", "seed", at_least=0, below=2**32
    )

    # World tokens
    world_mode: str = setting("patch", "what of a latent is one world token", choices=("patch", "channel"))
    world_patch: int = setting(4, "side of a patch, in mode patch", "latent cells", at_least=1)
    projection: str = setting(
        "mlp", "from a patch to its token; conv and transformer see others too", choices=PROJECTIONS
    )
    projection_hidden: int | None = setting(
        None, "width inside; none: Gemma's, for conv and transformer at most 512", "units", at_least=1
    )
    projection_layers: int = setting(2, "of conv or transformer", "layers", at_least=1)
    projection_scale: float = setting(
        1.0, "size of world tokens at the start", "times Gemma's embeddings", above=0.0
    )
    world_positions: bool = setting(False, "add a trained vector for each place")
    world_attention: str = setting("bidirectional", "among world tokens", choices=("bidirectional", "causal"))
    world_position: str = setting(
        "before",
        "world tokens stand before or after the image; after trains faster",
        choices=("before", "after"),
    )

    # Objective
    statement_loss_weight: float = setting(
        0.0, "next-word loss on true statements (answer: 1), or on captions", "weight", at_least=0.0
    )
    captions: str | None = setting(
        None, "file of captions (COCO's .json, or .jsonl) for it; none: true statements", filled=True
    )
    relation_loss_weight: float = setting(
        0.0, "next-word loss on the words of their relation alone", "weight", at_least=0.0
    )
    statement_steps: int = setting(
        0, "before, words alone (all, where both weights are 0)", "optimizer steps", at_least=0
    )
    align_steps: int = setting(0, "first, towards Gemma's own image tokens", "optimizer steps", at_least=0)
    align_learning_rate: float = setting(0.001, "learning rate of these steps", "per step", above=0.0)

    # Training (phase 2)
    batch_size: int = setting(8, "in one pass of one process", "statements", at_least=1)
    gradient_accumulation_steps: int = setting(2, "to one optimizer step", "passes", at_least=1)
    num_epochs: int = setting(3, "times over the training statements", "epochs", at_least=1)
    max_steps: int | None = setting(
        None, "stop after so many; none: all epochs", "optimizer steps", at_least=1
    )
    learning_rate: float = setting(0.0001, "peak learning rate", "per step", above=0.0)
    gemma_learning_rate: float | None = setting(
        None,
        "peak learning rate of what trains of Gemma; none: a tenth of learning_rate, for LoRA all of it",
        "per step",
        above=0.0,
    )
    lr_schedule: str = setting("cosine", "decay after the warm-up", choices=("cosine", "linear", "constant"))
    warmup_steps: int | None = setting(None, "warm-up; none: by warmup_ratio", "optimizer steps", at_least=0)
    warmup_ratio: float = setting(
        0.03, "warm-up without warmup_steps", "share of all steps", at_least=0.0, below=1.0
    )
    weight_decay: float = setting(0.01, "AdamW's, times the learning rate", "per step", at_least=0.0)
    adam_beta2: float = setting(
        0.999, "AdamW's decay of the squared gradient", "per step", at_least=0.0, below=1.0
    )
    max_grad_norm: float = setting(1.0, "longer gradients are scaled to it", "L2 norm", above=0.0)
    use_gradient_checkpointing: bool = setting(False, "recompute activations: less memory, slower")
    seed: int = setting(0, "of weights and order", "seed", at_least=0, below=2**32)
    dtype: str = setting(
        "auto", "of frozen models; auto: bfloat16 on CUDA, float32 on CPU", choices=("auto", *COMPUTE)
    )
    device: str = setting("auto", "auto, cpu, cuda or cuda:N; auto: CUDA where there is one")
    compile: bool | None = setting(None, "compile the frozen models; none: on CUDA")
    fp8: bool = setting(False, "frozen linears in 8 bits, on a Hopper GPU: faster, not exact")
    num_workers: int | None = setting(
        None, "read and decode photographs; 0: in this one; none: one a core", "processes", at_least=0
    )

    # Evaluation while training, checkpoints, logs
    do_eval: bool = setting(True, "evaluate on dev while training")
    eval_steps: int = setting(500, "between two evaluations", "optimizer steps", at_least=1)
    eval_batch_size: int | None = setting(
        None, "in one pass, which keeps nothing; none: 4 batch_size", "statements", at_least=1
    )
    output_dir: str = setting("checkpoints/vsr", "folder of checkpoints and logs", filled=True)
    init_from: str | None = setting(
        None, "checkpoint of an earlier stage whose weights this run starts from", filled=True
    )
    save_steps: int = setting(500, "between two checkpoints", "optimizer steps", at_least=1)
    save_total_limit: int | None = setting(3, "keep the newest; none: all", "checkpoints", at_least=1)
    resume_from: str | None = setting(None, "checkpoint folder to go on from; none: start anew", filled=True)
    logging_steps: int = setting(10, "between two lines of metrics.jsonl", "optimizer steps", at_least=1)
    log_to_tensorboard: bool = setting(True, "write TensorBoard logs to output_dir")
    log_to_wandb: bool = setting(False, "log to Weights & Biases")
    wandb_project: str = setting("theworld", "project there", filled=True)
    wandb_run_name: str | None = setting(None, "name of the run there")
    push_to_hub: bool = setting(False, "upload checkpoints to the hub")
    hub_model_id: str | None = setting(None, "name of the model there: user/name")
    hub_strategy: str = setting(
        "every_save",
        "end: the last model; every_save: each saved one; checkpoint: with what it takes to resume, too",
        choices=("end", "every_save", "checkpoint"),
    )
    hub_private_repo: bool = setting(False, "make that model private")

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = checked(field, getattr(self, field.name))
            object.__setattr__(self, field.name, value)
        if not self.freeze_cosmos_vae:
            raise refused("freeze_cosmos_vae", False, "true; a cache cannot follow a VAE that trains")
        self._check_stage()
        if self.projection == "conv" and self.world_mode == "channel":
            raise refused(
                "projection", "conv", "another, as world_mode is channel: there is no grid of patches"
            )
        if self.latent_size % 16:
            raise refused("latent_size", self.latent_size, "a multiple of 16 pixels")
        if self.max_world_steps is not None and self.num_world_steps > self.max_world_steps:
            allowed = f"at most max_world_steps, {self.max_world_steps}"
            raise refused("num_world_steps", self.num_world_steps, allowed)
        fewest = 1 + FRAMES_A_STEP * self.num_world_steps
        if self.rollout_frames is not None and not _is_video(self.rollout_frames, fewest):
            allowed = f"1 + 4 k frames, at least {fewest}, as num_world_steps is {self.num_world_steps}"
            raise refused("rollout_frames", self.rollout_frames, allowed)
        if self.question_template.count("{caption}") != 1:
            raise refused("question_template", self.question_template, "{caption} in it exactly once")
        if not re.fullmatch(r"auto|cpu|cuda(:(0|[1-9][0-9]{0,3}))?", self.device):
            raise refused("device", self.device, "auto, cpu, cuda or cuda:N")
        read = self.statement_loss_weight or (self.statement_steps and not self.relation_loss_weight)
        if self.captions and not read:
            raise refused("captions", self.captions, "null: statement_loss_weight 0 reads none of them")
        if self.push_to_hub and not HUB_NAME.fullmatch(self.hub_model_id or ""):
            raise refused("hub_model_id", self.hub_model_id, "user/name, as push_to_hub is true")

    def _check_stage(self) -> None:
        """What only a frozen Gemma can have, and what only one that trains has a use for."""
        if self.freeze_gemma_language and self.lora_rank is not None:
            raise refused("lora_rank", self.lora_rank, "null, as freeze_gemma_language is true")
        if self.fp8 and not self.freeze_gemma_language:
            raise refused("fp8", True, "false, as freeze_gemma_language is false: only frozen linears can be")
        if self.freeze_gemma_vision and self.freeze_gemma_language:
            if self.gemma_learning_rate is not None:
                raise refused(
                    "gemma_learning_rate", self.gemma_learning_rate, "null, as nothing of Gemma trains"
                )
        elif self.align_steps:
            allowed = "0, as Gemma trains: do these steps in a first stage, and go on from it with init_from"
            raise refused("align_steps", self.align_steps, allowed)

    @property
    def video_frames(self) -> int:
        """Frames that are predicted of each photograph, itself included."""
        return self.rollout_frames or 1 + FRAMES_A_STEP * self.num_world_steps

    @property
    def rollout_settings(self) -> dict[str, Any]:
        """What a fingerprint says of the settings of a rollout; nothing where there is none."""
        if not self.num_world_steps:
            return {}
        keys = ("rollout_prompt", "rollout_steps", "rollout_guidance", "rollout_seed")
        return {"rollout_frames": self.video_frames} | {key: getattr(self, key) for key in keys}

    @property
    def eval_statements(self) -> int:
        """Statements in one pass of an evaluation, each with all systems that are asked."""
        return self.eval_batch_size or 4 * self.batch_size

    def to_dict(self) -> dict[str, Any]:
        """Every key with its value, as plain JSON types; `Config(**config.to_dict()) == config`."""
        return dataclasses.asdict(self)


def _is_video(frames: int, fewest: int) -> bool:
    return frames >= fewest and frames % FRAMES_A_STEP == 1


FIELDS = {field.name: field for field in dataclasses.fields(Config)}

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


def load_config(path: str | Path | None, overrides: Mapping[str, object] | None = None) -> Config:
    """The settings of a file (None: the defaults) with `overrides` on top.

    Raises ValueError for a syntax error (file:line:column), an unknown key (with the nearest known one) or a
    value that is not allowed, each with the file, or "override", that it came from; OSError for the file.
    """
    from_file = {} if path is None else _known_keys(read_json_with_comments(Path(path)), str(path))
    from_overrides = _known_keys(dict(overrides or {}), "override")
    try:
        return Config(**{**from_file, **from_overrides})
    except Refused as error:
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
            what = "set" if key == "hf_token" else shown(value)
            raise ValueError(f"{source}: {key} is {what}: {_INERT[key][1]}")
        if key not in FIELDS:
            nearest = nearest_name(key, list(FIELDS))
            raise ValueError(f"{source}: unknown key {shown(given)}; the nearest known key is {nearest}")
        if key in known and known[key] != value:
            raise ValueError(f"{source}: {key} is given as {shown(known[key])} and as {shown(value)}")
        known[key] = value
    return known


def save_config(config: Config, path: str | Path) -> None:
    """Writes plain JSON that loads to an equal object; replaces a file as a whole or not at all."""
    text = json.dumps(config.to_dict(), indent=2, ensure_ascii=False) + "\n"
    publish_bytes(Path(path), text.encode("utf-8"), overwrite=True)
