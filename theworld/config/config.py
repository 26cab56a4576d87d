"""The settings of a run: typed, validated, each with its meaning and unit.

A settings file is JSON with `//`, `#` and `/* */` comments and trailing commas; keys that start with "_" or "//" are
comments too. `load_config` reads a file and puts overrides on top; `theworld.config.cli` makes a command-line flag of
every setting. A `Config` refuses a value that is not allowed when it is made, so a `Config` that exists is valid.
"""

import dataclasses
import functools
import json
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from theworld.config.fields import Refused, nearest_name, refused, setting, settings_of, shown
from theworld.utils.commands import command
from theworld.utils.files import publish_bytes
from theworld.utils.jsonc import is_comment, read_json_with_comments

FRAMES_A_STEP = 4  # video frames in a latent frame, after the first
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)

SPLITS = ("train", "dev", "test")
SPLIT_ALIASES = {"validation": "dev"}  # of splits

# The groups of settings in `--help`: the name of each and its first setting; a group ends where the next begins.
GROUPS = {
    "models": "model_name",
    "data": "dataset_name",
    "latents": "latent_size",
    "world tokens": "standardization",
    "objective": "statement_loss_weight",
    "optimisation": "batch_size",
    "memory and speed": "dtype",
    "evaluation": "do_eval",
    "checkpoints and logging": "output_dir",
    "hub": "push_to_hub",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Every setting of a run, in the order of `--help`.

    Raises ValueError naming the setting, its value and what is allowed.
    """

    # Models
    model_name: str = setting(
        "google/gemma-3-4b-it",
        "Gemma 3 model: a name on the hub or a local folder.",
        defines_run=True,
        path=True,
    )
    world_encoder: Literal[
        "cosmos", "none", "pixels", "cosmos_random", "gemma_vision", "noise", "mismatched"
    ] = setting(
        "cosmos",
        "Encoder whose rows the world tokens are made of. cosmos: the latents of the Cosmos VAE; the others are "
        "controls. none: no picture, but input rows that are trained; pixels: the photograph's own pixels on the same "
        "grid; cosmos_random: latents of the VAE with random weights; gemma_vision: Gemma's own vision features; "
        "noise: fixed noise of each image; mismatched: the latents of another image.",
        defines_run=True,
    )
    control_seed: int = setting(
        0,
        "Random seed of the world encoders that draw: of the weights of cosmos_random, of the values of noise, and of "
        "the pairs of images of mismatched.",
        defines_run=True,
        at_least=0,
        below=2**32,
    )
    cosmos_model_name: str = setting(
        "nvidia/Cosmos-Predict2-2B-Video2World",
        "Cosmos model whose VAE encodes the photographs: a name on the hub or a local folder.",
        defines_run=False,
        path=True,
    )
    init_from: str | None = setting(
        None,
        "Run or checkpoint of an earlier training stage whose weights this run starts from; none: the projection "
        "starts from new weights.",
        defines_run=True,
        path=True,
    )
    freeze_gemma_vision: bool = setting(
        True, "Keep Gemma's vision tower and its projector frozen.", defines_run=True
    )
    freeze_gemma_language: bool = setting(True, "Keep Gemma's language model frozen.", defines_run=True)
    lora_rank: int | None = setting(
        None,
        "Rank of the LoRA matrices that are trained in place of the language model's own weights; none: a language "
        "model that is not frozen trains all of its weights.",
        defines_run=True,
        at_least=1,
    )
    freeze_cosmos_vae: bool = setting(
        True,
        "Keep the Cosmos VAE frozen; always true, since its latents are cached before training.",
        defines_run=True,
    )

    # Data
    dataset_name: Literal["vsr", "vsr_random", "vsr_zeroshot"] = setting(
        "vsr",
        "Release of Visual Spatial Reasoning; vsr and vsr_random are the same release.",
        defines_run=True,
    )
    annotations: str | None = setting(
        None,
        "Folder with train.jsonl, dev.jsonl and test.jsonl, or with random/ and zeroshot/ that hold these files; none: "
        "download dataset_name from the hub.",
        defines_run=False,
        path=True,
    )
    image_folder: str | None = setting(
        None,
        "Folder of the photographs that the statements name; none: all that is needed is read from the cache.",
        defines_run=False,
        path=True,
    )
    follow_links: bool = setting(
        False,
        "Read photographs through symbolic links that lead out of image_folder, as the hub's cache, DVC and git-annex "
        "make them; false: such a link is refused.",
        defines_run=False,
    )
    question_template: str = setting(
        "Statement: {caption}\nAnswer (only '0' or '1'):",
        "Question that Gemma answers about each statement; {caption} is replaced by the statement and occurs once.",
        defines_run=True,
    )
    num_samples: int | None = setting(
        None,
        "Number of training statements to use, from the first one on; none: all statements.",
        defines_run=True,
        at_least=1,
    )
    train_share: float | None = setting(
        None,
        "Share of the training statements to use, drawn by the seed, in as many optimizer steps as with all of them; "
        "none: all statements.",
        defines_run=True,
        above=0.0,
        below=1.0,
    )
    max_seq_length: int | None = setting(
        None,
        "Largest length of a statement with its image, in tokens; a longer one is an error; none: no limit.",
        defines_run=False,
        at_least=1,
    )
    max_image_pixels: int = setting(
        89_478_485,
        "Largest photograph that is decoded, in pixels (width times height); a larger one is refused by its header.",
        defines_run=False,
        at_least=1,
    )

    # Latents (phase 1)
    latent_size: int = setting(
        512,
        "Side of the square, in pixels, to which a photograph is scaled for the VAE; a multiple of 16.",
        defines_run=True,
        at_least=16,
    )
    latent_dtype: Literal["float32", "float16", "bfloat16"] | None = setting(
        None,
        "Floating-point type in which latents are stored; none: the type in which they are computed.",
        defines_run=True,
    )
    encode_batch_size: int = setting(
        8, "Number of photographs that are encoded in one batch in phase 1.", defines_run=False, at_least=1
    )
    shard_size: int = setting(
        512, "Number of photographs in one shard file of the cache.", defines_run=False, at_least=1
    )
    num_world_steps: int = setting(
        0,
        "Number of latent frames, of 4 video frames each, that the Cosmos video model predicts after each photograph; "
        "0: the photograph alone.",
        defines_run=True,
        at_least=0,
    )
    rollout_prompt: str = setting(
        "The scene goes on as it is. The camera does not move.",
        "Text prompt of the video model, the same for every photograph.",
        defines_run=True,
        filled=True,
    )
    rollout_frames: int | None = setting(
        None,
        "Number of video frames to predict, the photograph included: 1 + 4 k; the first 1 + 4 num_world_steps are "
        "kept; none: 1 + 4 num_world_steps.",
        defines_run=True,
        at_least=5,
    )
    rollout_steps: int = setting(
        35, "Number of denoising steps of the video model.", defines_run=True, at_least=2
    )
    rollout_guidance: float = setting(
        7.0,
        "Scale of classifier-free guidance of the video model; 1: no guidance, at half the cost.",
        defines_run=True,
        at_least=1.0,
    )
    rollout_seed: int = setting(
        0,
        "Random seed of the video model's noise, combined with each photograph's hash.",
        defines_run=True,
        at_least=0,
        below=2**32,
    )

    # World tokens
    standardization: Literal["encoder", "training_images"] = setting(
        "encoder",
        "Source of the mean and standard deviation of each channel by which rows are standardised: those that the "
        "encoder states (of the training images where it states none: cosmos_random, gemma_vision), or those of the "
        "training images for every encoder.",
        defines_run=True,
    )
    world_mode: Literal["patch", "channel"] = setting(
        "patch",
        "Part of a latent that becomes one world token: a square patch or a whole channel.",
        defines_run=True,
    )
    world_patch: int = setting(
        4, "Side of a patch, in latent cells; only for world_mode patch.", defines_run=True, at_least=1
    )
    max_world_steps: int | None = setting(
        None,
        "Largest num_world_steps, in latent frames, for which the time embedding has a row; none: num_world_steps. "
        "Without predicted frames there is no time embedding.",
        defines_run=True,
        at_least=0,
    )
    projection: Literal["mlp", "linear", "conv", "transformer"] = setting(
        "mlp",
        "Network from a patch to its world token; conv and transformer also read the other patches of the image.",
        defines_run=True,
    )
    projection_hidden: int | None = setting(
        None,
        "Number of hidden units in each layer of the projection; none: Gemma's hidden size, for conv and transformer "
        "at most 512.",
        defines_run=True,
        at_least=1,
    )
    projection_layers: int = setting(
        2, "Number of layers of a conv or transformer projection.", defines_run=True, at_least=1
    )
    projection_scale: float = setting(
        1.0,
        "Root mean square of world tokens at the start of training, as a multiple of that of Gemma's token embeddings.",
        defines_run=True,
        above=0.0,
    )
    world_positions: bool = setting(
        False,
        "Add a trained position embedding to the world tokens, one vector for each position.",
        defines_run=True,
    )
    world_attention: Literal["bidirectional", "causal"] = setting(
        "bidirectional",
        "Attention among the world tokens of an image: in both directions or causal.",
        defines_run=True,
    )
    world_position: Literal["before", "after"] = setting(
        "before",
        "Position of the world tokens: before or after the image tokens; after trains faster.",
        defines_run=True,
    )

    # Objective
    statement_loss_weight: float = setting(
        0.0,
        "Weight of the next-token loss on the words of true statements, or of captions if captions is set; the loss on "
        "the answer has weight 1.",
        defines_run=True,
        at_least=0.0,
    )
    captions: str | None = setting(
        None,
        "File of captions (COCO's .json, or .jsonl) for the next-token loss; none: the loss is on true statements.",
        defines_run=False,
        path=True,
    )
    relation_loss_weight: float = setting(
        0.0,
        "Weight of the next-token loss on only the words of the relation in true statements; the loss on the answer "
        "has weight 1.",
        defines_run=True,
        at_least=0.0,
    )
    statement_steps: int = setting(
        0,
        "Number of optimizer steps with the next-token losses alone, before the answer is trained; if "
        "statement_loss_weight and relation_loss_weight are 0, on whole statements.",
        defines_run=True,
        at_least=0,
    )
    align_steps: int = setting(
        0,
        "Number of optimizer steps, before all others, that train world tokens to equal Gemma's image tokens.",
        defines_run=True,
        at_least=0,
    )
    align_learning_rate: float = setting(
        0.001,
        "Peak learning rate of AdamW, per optimizer step, during align_steps.",
        defines_run=True,
        above=0.0,
    )

    # Optimisation (phase 2)
    batch_size: int = setting(8, "Number of statements in a micro-batch.", defines_run=False, at_least=1)
    gradient_accumulation_steps: int = setting(
        2, "Number of micro-batches in an optimizer step, in each process.", defines_run=False, at_least=1
    )
    num_epochs: int = setting(
        3, "Number of epochs: times that each training statement is used.", defines_run=True, at_least=1
    )
    max_steps: int | None = setting(
        None,
        "Largest number of optimizer steps, not counting align_steps and statement_steps; none: all epochs.",
        defines_run=True,
        at_least=1,
    )
    learning_rate: float = setting(
        0.0001,
        "Peak learning rate of AdamW for the projection, per optimizer step.",
        defines_run=True,
        above=0.0,
    )
    gemma_learning_rate: float | None = setting(
        None,
        "Peak learning rate of AdamW for the trained parts of Gemma, per optimizer step; none: a tenth of "
        "learning_rate, or learning_rate itself with LoRA.",
        defines_run=True,
        above=0.0,
    )
    lr_schedule: Literal["cosine", "linear", "constant"] = setting(
        "cosine",
        "Decay of the learning rate after the warm-up: to 0 by a cosine or a line, or none at all.",
        defines_run=True,
    )
    warmup_steps: int | None = setting(
        None,
        "Number of optimizer steps of linear warm-up; none: given by warmup_ratio.",
        defines_run=True,
        at_least=0,
    )
    warmup_ratio: float = setting(
        0.03,
        "Share of the optimizer steps that is linear warm-up; only if warmup_steps is none.",
        defines_run=True,
        at_least=0.0,
        below=1.0,
    )
    weight_decay: float = setting(
        0.01,
        "Weight decay of AdamW for matrices, per optimizer step, times the learning rate.",
        defines_run=True,
        at_least=0.0,
    )
    adam_beta2: float = setting(
        0.999,
        "Decay rate of AdamW's mean of squared gradients, per optimizer step.",
        defines_run=True,
        at_least=0.0,
        below=1.0,
    )
    max_grad_norm: float = setting(
        1.0, "L2 norm of all gradients above which they are scaled down to it.", defines_run=True, above=0.0
    )
    seed: int = setting(
        0,
        "Random seed of the projection's weights and of the order of statements.",
        defines_run=True,
        at_least=0,
        below=2**32,
    )

    # Memory and speed
    dtype: Literal["auto", "float32", "bfloat16"] = setting(
        "auto",
        "Floating-point type of the frozen models; auto: bfloat16 on CUDA, float32 on a CPU.",
        defines_run=True,
    )
    device: str = setting(
        "auto",
        "Device to compute on: auto, cpu, cuda or cuda:N; auto: CUDA if there is one, else the CPU.",
        defines_run=False,
    )
    compile: bool | None = setting(
        None, "Compile the frozen models with torch.compile; none: on CUDA only.", defines_run=False
    )
    fp8: bool = setting(
        False,
        "Compute the frozen linear layers in 8-bit floating point: faster, in less memory, less exact (a small model "
        "stayed at chance for as long as most of its runs in 16 bits took to learn); needs a Hopper GPU or newer.",
        defines_run=True,
    )
    use_gradient_checkpointing: bool = setting(
        False, "Recompute activations in the backward pass: less memory, slower.", defines_run=False
    )
    check_memory: bool = setting(
        True,
        "Refuse a training run whose estimated memory is larger than that of the device, before weights load.",
        defines_run=False,
    )
    num_workers: int | None = setting(
        None,
        "Number of processes that read and decode photographs; 0: the main process reads; none: one for each CPU core.",
        defines_run=False,
        at_least=0,
    )

    # Evaluation
    do_eval: bool = setting(True, "Evaluate on the dev split during training.", defines_run=False)
    eval_steps: int = setting(
        500, "Number of optimizer steps between two evaluations.", defines_run=False, at_least=1
    )
    eval_batch_size: int | None = setting(
        None,
        "Number of statements in a batch of an evaluation; none: 4 times batch_size.",
        defines_run=False,
        at_least=1,
    )

    # Checkpoints and logging
    output_dir: str = setting(
        "checkpoints/theworld-vsr",
        "Folder of the run, for checkpoints and logs.",
        defines_run=False,
        path=True,
    )
    resume_from: str | None = setting(
        None,
        "Run to resume from its newest checkpoint, or a checkpoint folder; none: start a new run.",
        defines_run=False,
        path=True,
    )
    save_steps: int = setting(
        500, "Number of optimizer steps between two checkpoints.", defines_run=False, at_least=1
    )
    save_total_limit: int | None = setting(
        3,
        "Number of checkpoints to keep, the newest ones; none: all checkpoints.",
        defines_run=False,
        at_least=1,
    )
    logging_steps: int = setting(
        10, "Number of optimizer steps between two lines of metrics.jsonl.", defines_run=False, at_least=1
    )
    log_to_tensorboard: bool = setting(
        True, "Write TensorBoard logs into the folder of the run.", defines_run=False
    )
    log_to_wandb: bool = setting(False, "Log to Weights & Biases.", defines_run=False)
    wandb_project: str = setting(
        "theworld-vsr", "Project on Weights & Biases.", defines_run=False, filled=True
    )
    wandb_run_name: str | None = setting(
        None,
        "Name of the run on Weights & Biases; none: the name of the folder output_dir or, in the default folder, made "
        "of settings that tell runs apart.",
        defines_run=False,
    )

    # Hub
    push_to_hub: bool = setting(False, "Upload checkpoints to the Hugging Face hub.", defines_run=False)
    hub_model_id: str | None = setting(
        None,
        "Name of the model on the hub, user/name; none: allowed only if push_to_hub is false.",
        defines_run=False,
    )
    hub_strategy: Literal["end", "every_save", "checkpoint"] = setting(
        "every_save",
        "Checkpoints to upload; end: the last one; every_save: each one; checkpoint: each one with the optimizer state "
        "that a resume needs.",
        defines_run=False,
    )
    hub_private_repo: bool = setting(
        False, "Make the model private when it is created on the hub.", defines_run=False
    )

    def __post_init__(self) -> None:
        for name, declared in FIELDS.items():
            object.__setattr__(self, name, declared.check(getattr(self, name)))
        if not self.freeze_cosmos_vae:
            raise refused("freeze_cosmos_vae", False, "true; a cache cannot follow a VAE that trains")
        self._check_stage()
        if self.projection == "conv" and self.world_mode == "channel":
            raise refused(
                "projection", "conv", "another, as world_mode is channel: there is no grid of patches"
            )
        if self.world_encoder != "cosmos" and self.num_world_steps:
            allowed = f"0, as world_encoder is {self.world_encoder}: only cosmos predicts frames"
            raise refused("num_world_steps", self.num_world_steps, allowed)
        if self.world_encoder == "gemma_vision" and self.world_mode == "channel":
            allowed = "patch, as world_encoder is gemma_vision: its channels are not as many as a latent's"
            raise refused("world_mode", self.world_mode, allowed)
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
        """Refuse settings that need a frozen Gemma with one that trains, and the reverse."""
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
        """Number of video frames of a rollout, the photograph included."""
        return self.rollout_frames or 1 + FRAMES_A_STEP * self.num_world_steps

    @property
    def rollout_settings(self) -> dict[str, Any]:
        """The settings of a rollout that a cache's fingerprint records; empty without predicted frames."""
        if not self.num_world_steps:
            return {}
        keys = ("rollout_prompt", "rollout_steps", "rollout_guidance", "rollout_seed")
        return {"rollout_frames": self.video_frames} | {key: getattr(self, key) for key in keys}

    @property
    def eval_statements(self) -> int:
        """Number of statements in a batch of an evaluation."""
        return self.eval_batch_size or 4 * self.batch_size

    @property
    def run_name(self) -> str:
        """Name of the run on Weights & Biases."""
        if self.wandb_run_name:
            return self.wandb_run_name
        if self.output_dir != FIELDS["output_dir"].default:
            return Path(self.output_dir).resolve().name
        return "-".join(
            (
                self.dataset_name,
                self.world_encoder,
                self.projection,
                f"lr{self.learning_rate:g}",
                f"seed{self.seed}",
            )
        )

    def to_dict(self) -> dict[str, Any]:
        """Return every setting with its value, as plain JSON types; `Config(**config.to_dict()) == config`."""
        return dataclasses.asdict(self)


def _is_video(frames: int, fewest: int) -> bool:
    return frames >= fewest and frames % FRAMES_A_STEP == 1


FIELDS = settings_of(Config)
PROJECTIONS = FIELDS["projection"].choices

# Settings that have another name in older files and on older command lines: that name -> the setting.
RENAMED = {"resume_from_checkpoint": "resume_from"}
_MIXED_PRECISION = {"bf16": "bfloat16", "no": "float32"}
# Settings of the original recipe without a counterpart here: the value that changes nothing and is accepted, and why
# any other is refused.
UNSUPPORTED: dict[str, tuple[Any, str]] = {
    "train_dataset_path": (None, "not supported; use annotations"),
    "eval_dataset_path": (None, "not supported; use annotations"),
    "streaming": (False, "not supported; photographs are read from the cache"),
    "mixed_precision": (None, "not supported; bf16, no and null are"),
    "hf_token": (None, "a token does not belong in the settings; set HF_TOKEN in the environment"),
}


def split_name(split: str) -> str:
    """Return the one name of a split: validation is dev. Raises ValueError for what is no split."""
    name = SPLIT_ALIASES.get(split, split)
    if name not in SPLITS:
        raise ValueError(f"split is {split!r}; allowed: train, dev, validation, test")
    return name


def load_config(
    path: str | Path | None, overrides: Mapping[str, object] | None = None, base: Config | None = None
) -> Config:
    """Return the settings of a file (None: none) with `overrides` on top. What neither has is as in `base`, or in its
    absence the default.

    Raises ValueError for a syntax error (file:line:column), an unknown key (with the nearest known key) or a value that
    is not allowed, each with its source, the file or "override"; OSError for a file that cannot be read.
    """
    return config_from({} if path is None else read_json_with_comments(Path(path)), path, overrides, base)


def config_from(
    values: dict[str, Any],
    path: str | Path | None,
    overrides: Mapping[str, object] | None = None,
    base: Config | None = None,
) -> Config:
    """Return the settings in the content of the file `path`, as `load_config` does."""
    from_file = _known_keys(values, str(path))
    from_overrides = _known_keys(dict(overrides or {}), "override")
    try:
        return Config(**{**({} if base is None else base.to_dict()), **from_file, **from_overrides})
    except Refused as error:
        source = "override" if error.key in from_overrides or path is None else str(path)
        raise ValueError(f"{source}: {error}") from None


def _known_keys(values: dict[str, Any], source: str) -> dict[str, Any]:
    """Return the settings among `values` by their present names, without comments. Raises for an unknown key."""
    known: dict[str, Any] = {}
    for given, value in values.items():
        if is_comment(given):
            continue
        key = RENAMED.get(given, given)
        if given in RENAMED:
            _log_renamed(given, key)
        if given == "mixed_precision" and isinstance(value, str) and value in _MIXED_PRECISION:
            key, value = "dtype", _MIXED_PRECISION[value]
        if key in UNSUPPORTED:
            accepted, reason = UNSUPPORTED[key]
            if value is accepted:
                continue
            described = "set" if key == "hf_token" else shown(value)  # a token must reach no log
            raise ValueError(f"{source}: {key} is {described}: {reason}")
        if key not in FIELDS:
            raise ValueError(f"{source}: {unknown_key(given, values, list(FIELDS), source)}")
        if key in known and known[key] != value:
            raise ValueError(f"{source}: {key} is given as {shown(known[key])} and as {shown(value)}")
        known[key] = value
    return known


def unknown_key(key: str, values: Mapping[str, Any], known: Sequence[str], source: str) -> str:
    """Return what is wrong with the key of a file, in words: the file is of another kind, whose keys are not `known`
    here, and is for another tool, or else the key is unknown, with the nearest known key."""
    kinds = {
        "arms": f"is a study's, for: {command('study', '--config', source)}",
        "runs": f"is a sweep's, for: {command('sweep', '--config', 'FILE', '--runs', source)}",
    }
    for telling, kind in kinds.items():
        if telling in values and telling not in known:
            return f"the file has the key {shown(telling)}, so it {kind}"
    if key in FIELDS:  # where settings are wanted it would be known
        return (
            f"{shown(key)} is a setting, so the file is a run's, for: {command('train', '--config', source)}"
        )
    return f"unknown key {shown(key)}; the nearest known key is {nearest_name(key, list(known))}"


@functools.cache  # once for each name
def _log_renamed(old: str, new: str) -> None:
    logging.getLogger(__name__).warning("the setting %s is named %s here; both names work", old, new)


def save_config(config: Config, path: str | Path) -> None:
    """Write plain JSON that loads to an equal object. An existing file is replaced as a whole or not at all."""
    text = json.dumps(config.to_dict(), indent=2, ensure_ascii=False) + "\n"
    publish_bytes(Path(path), text.encode("utf-8"), overwrite=True)
