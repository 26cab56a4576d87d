"""Train the two embedded models from random weights: a small Gemma 3 and a small Wan VAE.

The small Gemma sees a picture as 4 x 4 pixels, which miss most of the things in a scene. So that its language model
still learns to use detailed image tokens, a second vision tower sees 64 x 64 pixels of the same picture during
training; its tokens stand alone or in a block before the Gemma's own. It is discarded afterwards: a projection has to
learn to produce such tokens. The VAE is trained separately.

Dimensions: N scenes of a pool, B scenes of a batch, D hidden size; S and P, sides of the Gemma's and the VAE's
picture in pixels.
"""

import json
import math
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from demo_models.lessons import (
    Pool,
    Prompts,
    answer_logits,
    draw_lesson,
    draw_pool,
    held_out,
    lesson_loss,
    read_lesson,
    to_pixels,
)
from demo_models.settings import PretrainSettings
from demo_models.small_models import (
    TOKENS_PER_IMAGE,
    VAE_PIXELS,
    build_tokenizer,
    make_gemma,
    make_vae,
    save_processor,
)
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Gemma3ForConditionalGeneration

from theworld.utils.device import resolve_device
from theworld.utils.files import check_folder
from theworld.utils.text import counted


class SecondTower(nn.Module):
    """A second vision tower for training only: each of 16 patches of the 64 x 64 picture becomes a token.

    Noise makes the language model robust to tokens that are not quite right.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        side = VAE_PIXELS // math.isqrt(TOKENS_PER_IMAGE)
        self.patch = nn.Conv2d(3, 4 * width, side, stride=side)
        self.token = nn.Linear(4 * width, width)
        self.place = nn.Parameter(0.1 * torch.randn(TOKENS_PER_IMAGE, width))
        self.norm = nn.RMSNorm(width)

    def forward(self, pixels: Tensor) -> Tensor:
        """Return the tokens, float32[B, 16, D], of pictures, float32[B, 3, P, P]."""
        hidden = F.gelu(self.patch(pixels)).flatten(2).transpose(1, 2)
        tokens = self.norm(self.token(hidden) + self.place)
        return tokens + 0.3 * torch.randn_like(tokens) if self.training else tokens


@dataclass(frozen=True)
class Trainee:
    """The trained modules: the Gemma, and the second vision tower that it has during training."""

    model: Gemma3ForConditionalGeneration
    second_tower: SecondTower

    def see(self, pool: Pool, scenes: Tensor, tower: str) -> Tensor:
        """Return the image tokens, float32[B, 16, D], of scenes, int64[B]; `tower` is "own" or "sharp"."""
        if tower == "own":
            return self.model.model.get_image_features(to_pixels(pool.thumbnails[scenes])).pooler_output
        return self.second_tower(to_pixels(pool.pictures[scenes]))


LessonKind = tuple[str, tuple[str, ...]]  # a key of Prompts.heads, and the tower of each of its blocks


def gemma_curriculum(progress: float, rng: np.random.Generator) -> LessonKind:
    """Return the kind of the next batch: at first one block of the second tower, later all kinds."""
    if progress < 0.35:
        return "one", ("sharp",)
    kinds: list[LessonKind] = [
        *[("one", ("own",))] * 3, ("one", ("sharp",)),
        *[("beside", ("sharp", "own"))] * 4, ("two", ("sharp", "own")), ("two", ("own", "sharp")),
    ]  # fmt: skip
    return kinds[int(rng.integers(len(kinds)))]


@torch.no_grad()
def gemma_accuracy(trainee: Trainee, prompts: Prompts, pool: Pool, kind: LessonKind, shift: int = 0) -> float:
    """Return the accuracy on the held-out scenes; with `shift` the first block is of another scene."""
    scenes = held_out(pool)
    lesson = draw_lesson(pool, scenes)
    images = [trainee.see(pool, scenes.roll(0 if k else shift), tower) for k, tower in enumerate(kind[1])]
    states, _ = read_lesson(trainee.model, prompts, lesson, prompts.heads[kind[0]], images)
    no, yes = answer_logits(trainee.model, prompts, lesson, states)[:, prompts.answers].unbind(1)
    return round(float(((yes > no) == (lesson.labels == 1)).float().mean()), 4)


class Steps:
    """Optimizer steps: AdamW with clipping, warm-up and cosine decay.

    On CUDA each kind of step is captured as a graph and replayed: for models this small, launching kernels one by one
    would take most of the time.
    """

    def __init__(
        self, parameters: list[nn.Parameter], learning_rate: float, loss_of: Callable[[Any], Tensor]
    ) -> None:
        self.parameters, self.learning_rate, self.loss_of = parameters, learning_rate, loss_of
        self.on_cuda = parameters[0].is_cuda
        rate = torch.tensor(0.0, device=parameters[0].device)
        self.optimizer = torch.optim.AdamW(
            parameters, lr=rate, betas=(0.9, 0.98), weight_decay=0.01, capturable=self.on_cuda
        )
        self.graphs: dict[Any, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self.num_seen: dict[Any, int] = {}

    def run(self, steps: int, kind_at: Callable[[int], Any], report: Callable[[int, float], None]) -> None:
        """Take steps of kind `kind_at(step)`, and call `report(step, mean loss)` twenty times."""
        losses = torch.zeros(steps, device=self.parameters[0].device)
        every = max(1, steps // 20)
        for step in range(steps):
            warm, left = min(1.0, (step + 1) / min(300, steps)), 0.5 * (1 + math.cos(math.pi * step / steps))
            self.optimizer.param_groups[0]["lr"].fill_(self.learning_rate * warm * max(0.01, left))
            losses[step] = self._step(kind_at(step))
            if (step + 1) % every == 0:
                report(step + 1, float(losses[step + 1 - every : step + 1].mean()))

    def _step(self, kind: Any) -> Tensor:
        self.num_seen[kind] = self.num_seen.get(kind, 0) + 1
        # three plain steps first, in which libraries allocate and choose kernels
        if not self.on_cuda or self.num_seen[kind] <= 3:
            return self._plain_step(kind)
        if kind not in self.graphs:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                loss = self._plain_step(kind)
            self.graphs[kind] = graph, loss
        graph, loss = self.graphs[kind]
        graph.replay()
        return loss

    def _plain_step(self, kind: Any) -> Tensor:
        loss = self.loss_of(kind)
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        return loss.detach()


def train_gemma(model: Gemma3ForConditionalGeneration, pool: Pool, settings: PretrainSettings) -> list[dict]:
    """Train vision tower, projector and language model together; return losses and accuracies over time."""
    prompts = Prompts(build_tokenizer(), settings.device)
    trainee = Trainee(model.train(), SecondTower(model.config.text_config.hidden_size).to(settings.device))
    rng, history = np.random.default_rng(settings.seed), []
    num_scenes = len(pool.things) - len(held_out(pool))

    def loss_of(kind: LessonKind) -> Tensor:
        scenes = torch.randint(num_scenes, (settings.batch_size,), device=settings.device)
        images = [trainee.see(pool, scenes, tower) for tower in kind[1]]
        return lesson_loss(model, prompts, draw_lesson(pool, scenes), prompts.heads[kind[0]], images)

    def report(step: int, loss: float) -> None:
        trainee.second_tower.eval()
        row = {
            "step": step,
            "loss": round(loss, 4),
            "own": gemma_accuracy(trainee, prompts, pool, ("one", ("own",))),
        }
        row["sharp"] = gemma_accuracy(trainee, prompts, pool, ("one", ("sharp",)))
        row["sharp_beside_own"] = gemma_accuracy(trainee, prompts, pool, ("beside", ("sharp", "own")))
        row["wrong_beside_own"] = gemma_accuracy(
            trainee, prompts, pool, ("beside", ("sharp", "own")), shift=1
        )
        trainee.second_tower.train()
        history.append(row)
        print("gemma", row, flush=True)

    trained_rows = torch.zeros(model.config.text_config.vocab_size, 1, device=settings.device)
    trained_rows[prompts.token_ids()] = 1
    # Tokens in no prompt keep their initial embeddings; as wrong answers only, they would grow without bound.
    model.get_input_embeddings().weight.register_hook(lambda gradient: gradient * trained_rows)
    parameters = [*model.parameters(), *trainee.second_tower.parameters()]
    steps = Steps(parameters, settings.learning_rate, loss_of)
    steps.run(settings.gemma_steps, lambda step: gemma_curriculum(step / settings.gemma_steps, rng), report)
    return history


@contextmanager
def one_frame() -> Iterator[None]:
    """Run Wan's causal convolutions on a single frame as 2-D convolutions with the last temporal tap.

    The earlier taps see only padding, so this is exact, and several times faster, gradients included.
    """

    def forward(self: WanCausalConv3d, x: Tensor, cache_x: Tensor | None = None) -> Tensor:
        padding = (self._padding[2], self._padding[0])
        return F.conv2d(x[:, :, 0], self.weight[:, :, -1], self.bias, self.stride[1:], padding)[:, :, None]

    original = WanCausalConv3d.forward
    WanCausalConv3d.forward = forward
    try:
        yield
    finally:
        WanCausalConv3d.forward = original


def train_vae(vae: AutoencoderKLWan, pool: Pool, settings: PretrainSettings) -> list[dict]:
    """Train the VAE (squared error and a small KL term), and store mean and std of its latents in its config."""
    history: list[dict] = []
    # The convolutions over time are not run for one frame, so they have no gradient and do not change.
    parameters = [p for name, p in vae.named_parameters() if "time_conv" not in name]

    def loss_of(_: None) -> Tensor:
        chosen = torch.randint(len(pool.pictures), (settings.vae_batch_size,), device=settings.device)
        pixels = to_pixels(pool.pictures[chosen])[:, :, None]
        posterior = vae.encode(pixels).latent_dist
        return F.mse_loss(vae.decode(posterior.sample()).sample, pixels) + 1e-6 * posterior.kl().mean()

    def report(step: int, loss: float) -> None:
        history.append({"step": step, "loss": round(loss, 6)})
        print("vae", history[-1], flush=True)

    with one_frame():
        steps = Steps(parameters, settings.vae_learning_rate, loss_of)
        steps.run(settings.vae_steps, lambda _: None, report)
        latents = encode(vae, pool.pictures[:4096])
    std, mean = torch.std_mean(latents, dim=(0, 2, 3))
    vae.register_to_config(latents_mean=mean.tolist(), latents_std=std.tolist())
    return history


@torch.no_grad()
def encode(vae: AutoencoderKLWan, pictures: Tensor) -> Tensor:
    """Return the posterior means, float32[N, 16, P / 8, P / 8], of pictures, uint8[N, 3, P, P]."""
    parts = [
        vae.encode(to_pixels(part)[:, :, None]).latent_dist.mode()[:, :, 0] for part in pictures.split(256)
    ]
    return torch.cat(parts)


def check_models(folder: Path, settings: PretrainSettings) -> str:
    """Return a line that names what would be replaced, or "".

    Raises ValueError for a missing device and for settings that are not positive, OSError for a folder that cannot be
    written.
    """
    resolve_device(settings.device)
    for key, value in asdict(settings).items():
        if key not in ("seed", "device") and value <= 0:
            raise ValueError(f"{key} is {value}; give more than 0")
    check_folder(folder, "--output")
    there = [name for name in ("gemma", "vae", "training.json") if (folder / name).exists()]
    return f"replaces {', '.join(there)} there" if there else ""


def plan_models(folder: Path, settings: PretrainSettings) -> Iterator[str]:
    """Yield lines that say what `make_models` would do with the same arguments. Raises the same errors."""
    replaces = check_models(folder, settings)
    workers = counted(settings.workers, "process", "processes")
    yield f"draws        {settings.num_scenes:,} scenes with seed {settings.seed}, in {workers}"
    gemma = f"a small Gemma in {settings.gemma_steps:,} steps of {settings.batch_size} statements"
    yield f"trains       {gemma}, on {settings.device}"
    yield f"             a small VAE in {settings.vae_steps:,} steps of {settings.vae_batch_size} pictures"
    yield f"writes       {folder}: gemma/, vae/ and training.json, about 4 MiB{'; ' if replaces else ''}{replaces}"


def make_models(folder: Path, settings: PretrainSettings, command: str) -> None:
    """Draw the scenes, train both models and write `folder`/gemma, `folder`/vae and `folder`/training.json.

    Raises the errors of `check_models` before anything is drawn.
    """
    check_models(folder, settings)
    torch.manual_seed(settings.seed)
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True
    started = time.perf_counter()
    pool = draw_pool(settings.seed, settings.num_scenes, settings.workers, settings.device)
    seconds = {"scenes": time.perf_counter() - started}
    gemma, vae = make_gemma(build_tokenizer()).to(settings.device), make_vae().to(settings.device)
    started = time.perf_counter()
    history = {"gemma": train_gemma(gemma, pool, settings)}
    seconds["gemma"] = time.perf_counter() - started
    gemma.eval().save_pretrained(folder / "gemma")
    save_processor(folder / "gemma")
    started = time.perf_counter()
    history["vae"] = train_vae(vae, pool, settings)
    seconds["vae"] = time.perf_counter() - started
    vae.eval().save_pretrained(folder / "vae")
    on_cuda = torch.device(settings.device).type == "cuda"
    made = {
        "command": command,
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "settings": asdict(settings),
        "device": torch.cuda.get_device_name(settings.device) if on_cuda else platform.processor() or "cpu",
        "versions": {n: version(n) for n in ("torch", "transformers", "diffusers", "tokenizers", "pillow")},
    }
    models = {"gemma": gemma, "vae": vae}
    record = {
        "models": {name: made for name in models},
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
        "parameters": {name: sum(p.numel() for p in model.parameters()) for name, model in models.items()},
        "history": history,
    }
    (folder / "training.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
