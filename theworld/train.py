"""Phase 2: only the projection trains, against a frozen Gemma, from the cache. The VAE never loads.

Everything that a step does is a function of (settings, cache, step): the order of the statements, the learning
rate, nothing else is random. So a run that was resumed gives the same weights, bit for bit on the CPU.
"""

import json
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from theworld.batch import Packer
from theworld.cache import meaning
from theworld.checkpoint import (
    CheckpointError,
    find_checkpoint,
    list_checkpoints,
    load_checkpoint,
    rotate,
    save_checkpoint,
)
from theworld.config import Config
from theworld.console import progress
from theworld.data import load_data, load_model
from theworld.evaluate import predict
from theworld.metrics import label_loss
from theworld.model import TheWorld
from theworld.schedule import Order, learning_rate, num_train_steps
from theworld.store import StoreMismatch, fingerprint_differences
from theworld.vsr import Statement
from theworld.weights import count_parameters


class NotFinite(ArithmeticError):
    """A loss or gradient that is not a number; the step, its images and settings are in the message."""


def make_optimizer(model: TheWorld, config: Config) -> torch.optim.AdamW:
    """AdamW over what trains; weight decay on the matrices alone, as is usual."""
    named = model.trainable()
    matrices = [p for name, p in named.items() if name.endswith("weight") and p.ndim >= 2]
    vectors = [p for name, p in named.items() if not (name.endswith("weight") and p.ndim >= 2)]
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, config.adam_beta2))


class Trainer:
    """One run: `Trainer(config, cache).run()`. Progress counts optimizer steps, those of the start at Gemma's image
    tokens (`align_steps`) first, then those of the main phase."""

    def __init__(self, config: Config, cache: str | Path) -> None:
        torch.manual_seed(config.seed)
        self.config = config
        self.output_dir = Path(config.output_dir)
        self.data, vision_cached = load_data(config, Path(cache))
        self.step = 0
        self.window = {"loss": 0.0, "statement_loss": 0.0, "correct": 0.0, "statements": 0.0}
        resumed = find_checkpoint(config.resume_from) if config.resume_from else None
        self._refuse_to_overwrite(resumed)
        self.model = load_model(config, self.data, vision_cached)
        self.packer: Packer = self.model.packer()
        self.order = Order(self.data.train, config.seed)
        self.num_steps = config.align_steps + num_train_steps(config, len(self.data.train))
        self.optimizer = make_optimizer(self.model, config)
        self._check_align()
        if resumed is not None:
            self._resume(resumed)

    # ---- one step

    def train_step(self) -> dict[str, float]:
        """Forward, backward, clip, step: on exactly batch_size x gradient_accumulation_steps statements."""
        config, step = self.config, self.step
        if step == config.align_steps and step > 0:
            self.optimizer = make_optimizer(self.model, config)  # another objective, so no old momentum
        rate = self._set_learning_rate()
        per_step = config.batch_size * config.gradient_accumulation_steps
        phase_start = 0 if step < config.align_steps else config.align_steps
        statements = self.order.take((step - phase_start) * per_step, per_step)
        figures = {"loss": 0.0, "statement_loss": 0.0, "correct": 0.0, "statements": float(per_step)}
        for start in range(0, per_step, config.batch_size):
            micro = statements[start : start + config.batch_size]
            losses = self._align_loss(micro) if step < config.align_steps else self._label_loss(micro)
            if not torch.isfinite(losses["total"]):
                self._stop("loss", losses["total"].item(), micro, rate)
            (losses["total"] / per_step).backward()
            figures["loss"] += float(losses["label"])
            figures["statement_loss"] += float(losses["statement"])
            figures["correct"] += float(losses["correct"])
        norm = torch.nn.utils.clip_grad_norm_(list(self.model.trainable().values()), config.max_grad_norm)
        if not torch.isfinite(norm):
            self._stop("gradient norm", float(norm), statements, rate)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        for key, value in figures.items():
            self.window[key] += value
        return {"learning_rate": rate, "gradient_norm": float(norm)}

    def _label_loss(self, statements: list[Statement]) -> dict[str, Tensor]:
        batch = self.packer.pack(statements)
        device = self.model.gemma.device
        latents = self.data.latents(batch.images).to(device)
        vision = self.data.vision(batch.images).to(device) if self.data.vision is not None else None
        batch = batch.to(device)
        losses = self.model.losses(batch, latents, vision, self.config.statement_loss_weight)
        said_true = losses["logits"][:, 1] > losses["logits"][:, 0]
        is_true = batch.labels == self.model.gemma.answer_ids[1]
        return losses | {"correct": (said_true == is_true).sum()}

    def _align_loss(self, statements: list[Statement]) -> dict[str, Tensor]:
        """Mean squared distance of world tokens to Gemma's image tokens of the same places, summed over statements."""
        images = [s.image for s in statements]
        device = self.model.gemma.device
        assert self.data.vision is not None
        target = self.model.gemma.image_features(self.data.vision(images)).float()
        tokens = self.model.projection(self.data.latents(images).to(device))
        scale = target.pow(2).mean()  # so that the loss is a share of the image tokens' own size
        loss = F.mse_loss(tokens, target) / scale * len(images)
        zero = torch.zeros_like(loss).detach()
        return {"total": loss, "label": loss.detach(), "statement": zero, "correct": zero}

    def _check_align(self) -> None:
        """A start at Gemma's image tokens needs as many of them as there are world tokens, on the same places."""
        world, image = self.model.projection.shape.num_tokens, self.model.gemma.num_image_tokens
        if self.config.align_steps and (world != image or self.config.world_mode != "patch"):
            raise ValueError(
                f"align_steps {self.config.align_steps}: {world} world tokens (world_mode {self.config.world_mode}) "
                f"and {image} image tokens do not lie on the same places; choose a world_patch that gives as many, "
                "or align_steps 0"
            )

    def _set_learning_rate(self) -> float:
        config = self.config
        if self.step < config.align_steps:
            rate = learning_rate(config, self.step, config.align_steps, config.align_learning_rate)
        else:
            done, steps = self.step - config.align_steps, self.num_steps - config.align_steps
            rate = learning_rate(config, done, steps, config.learning_rate)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        return rate

    def _stop(self, what: str, value: float, statements: list[Statement], rate: float) -> None:
        images = ", ".join(sorted({s.image for s in statements})[:8])
        raise NotFinite(
            f"step {self.step + 1}: the {what} is {value} (learning rate {rate:.3g}; images {images}); nothing was "
            "updated or overwritten. Lower --learning_rate, or resume from the last checkpoint"
        )

    # ---- the run

    def run(self) -> Path:
        """Trains to the end and returns the last checkpoint."""
        self.output_dir.mkdir(parents=True, exist_ok=True)
        for line in self.describe():
            tqdm.write(line)
        writer = SummaryWriter(str(self.output_dir / "logs")) if self.config.log_to_tensorboard else None
        last = find_checkpoint(self.config.resume_from) if self.config.resume_from else self.output_dir
        with progress(
            total=self.num_steps, initial=self.step, desc="train", unit=" steps", smoothing=0.05
        ) as bar:
            start, done = time.perf_counter(), 0
            for figures in self._steps():
                bar.update()
                done += 1
                if self._due(self.config.logging_steps):
                    per_step = self.config.batch_size * self.config.gradient_accumulation_steps
                    figures["statements_per_second"] = done * per_step / (time.perf_counter() - start)
                    self._log(self._averages() | figures, writer, bar)
                    start, done = time.perf_counter(), 0
                if self.data.dev and self._due(self.config.eval_steps):
                    self._log(self.evaluate_dev(), writer, bar)
                if self._due(self.config.save_steps):
                    last = self.save()
        if writer is not None:
            writer.close()
        return last

    def _steps(self) -> Iterator[dict[str, float]]:
        while self.step < self.num_steps:
            yield self.train_step()

    def _due(self, every: int) -> bool:
        return self.step % every == 0 or self.step == self.num_steps

    def _averages(self) -> dict[str, float]:
        window, n = self.window, max(1.0, self.window["statements"])
        averages = {"loss": window["loss"] / n}
        if self.step > self.config.align_steps:
            averages["accuracy"] = window["correct"] / n
            if self.config.statement_loss_weight > 0:
                averages["statement_loss"] = window["statement_loss"] / n
        self.window = dict.fromkeys(window, 0.0)
        return averages

    def evaluate_dev(self) -> dict[str, float]:
        """Loss and accuracy on dev, with world tokens."""
        size = self.config.eval_batch_size or self.config.batch_size
        logits = predict(self.model, self.data.dev, self.data.latents, self.data.vision, "world", size)
        labels = np.array([s.label for s in self.data.dev])
        correct = (logits[:, 1] > logits[:, 0]) == (labels == 1)
        return {"dev_loss": label_loss(logits, labels), "dev_accuracy": float(correct.mean())}

    def _log(self, figures: dict[str, float], writer: SummaryWriter | None, bar: tqdm) -> None:
        per_step = self.config.batch_size * self.config.gradient_accumulation_steps
        phase = "align" if self.step <= self.config.align_steps else "train"
        line = {
            "step": self.step,
            "epoch": self.step * per_step / len(self.data.train),
            "phase": phase,
            **figures,
        }
        with open(self.output_dir / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        for key, value in figures.items():
            if writer is not None:
                writer.add_scalar(key, value, self.step)
        shown = {"loss": ".3f", "accuracy": ".1%", "dev_accuracy": ".1%", "statements_per_second": ".1f"}
        bar.set_postfix({k: format(figures[k], f) for k, f in shown.items() if k in figures})

    def describe(self) -> list[str]:
        """What trains, what is frozen, on what: lines to show before the start."""
        trainable, _ = count_parameters(self.model.projection)
        frozen = sum(p.numel() for p in self.model.gemma.model.parameters())
        share = trainable / (trainable + frozen)
        lines = [
            f"trains: projection, {trainable:,} parameters ({share:.3%}); frozen: Gemma, {frozen:,} ({1 - share:.3%})",
            *self.data.notes,
            f"{self.num_steps:,} optimizer steps of {self.config.batch_size} x "
            f"{self.config.gradient_accumulation_steps} statements, {self.model.projection.shape.num_tokens} world "
            f"tokens and {self.model.gemma.num_image_tokens} image tokens each, on {self.model.gemma.device}",
        ]
        return lines + ([f"resumed after step {self.step:,}"] if self.step else [])

    # ---- checkpoints

    def save(self) -> Path:
        """Publishes checkpoint-<step>, then removes the oldest ones beyond save_total_limit."""
        state = {"optimizer": self.optimizer.state_dict(), "rng": torch.get_rng_state()}
        record = {"step": self.step, "window": self.window, "num_statements": len(self.data.train)}
        path = save_checkpoint(self.output_dir, self.step, self.model, state, record)
        rotate(self.output_dir, self.config.save_total_limit)
        return path

    def _resume(self, path: Path) -> None:
        state, record = load_checkpoint(path, self.model.gemma.device)
        world = json.loads((path / "world.json").read_text())
        fingerprint = self.data.latents.reader.fingerprint
        differences = fingerprint_differences(meaning(world["fingerprint"]), meaning(fingerprint))
        if differences:
            raise StoreMismatch(self.data.latents.reader.root, differences)
        if record["num_statements"] != len(self.data.train):
            raise CheckpointError(
                f"{path} was trained on {record['num_statements']} statements, now there are "
                f"{len(self.data.train)}; use the same --annotations and cache"
            )
        self.model.load_projection(path / "projection.safetensors")
        self.step, self.window = record["step"], record["window"]
        self.optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["rng"].cpu())

    def _refuse_to_overwrite(self, resumed: Path | None) -> None:
        """Checkpoints that this run would write again must not be there when it starts."""
        ahead = [p for p in list_checkpoints(self.output_dir) if resumed is None or _step(p) > _step(resumed)]
        if ahead:
            cure = "use another --output_dir, or move them away"
            if resumed is None:
                cure = f"go on with --resume_from {self.output_dir}, " + cure
            raise CheckpointError(
                f"{self.output_dir} already holds {', '.join(p.name for p in ahead)}; {cure}"
            )


def _step(path: Path) -> int:
    return int(path.name.removeprefix("checkpoint-"))
