"""Phase 2: only the projection trains, against a frozen Gemma, from the cache. The VAE never loads.

Everything that a step does is a function of (settings, cache, step): the order of the statements, the learning
rate, nothing else is random. So a run that was resumed gives the same weights, bit for bit on the CPU.
"""

import json
import math
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from theworld.batch import Packer
from theworld.card import Facts, public_settings
from theworld.checkpoint import (
    CheckpointError,
    checkpoint_step,
    find_checkpoint,
    list_checkpoints,
    load_checkpoint,
    rotate,
    save_checkpoint,
)
from theworld.config import Config
from theworld.console import progress
from theworld.data import check_trained_for, load_data, load_model
from theworld.evaluate import predict
from theworld.feed import Pass, ahead, make_pass
from theworld.metrics import label_loss
from theworld.objectives import align_loss, align_pass, answer_loss, check_align, make_optimizer
from theworld.processes import Processes
from theworld.publish import Publisher
from theworld.schedule import Order, learning_rate, num_train_steps, split
from theworld.trackers import Trackers, check_trackers
from theworld.weights import count_parameters

FIGURES = ("total", "label", "statement", "correct")  # of each pass, summed over its statements


class NotFinite(ArithmeticError):
    """A loss or gradient that is not a number; the step, its images and settings are in the message."""


class Trainer:
    """One run: `Trainer(config, cache).run()`. Progress counts optimizer steps, those of the start at Gemma's image
    tokens (`align_steps`) first, then those of the main phase."""

    def __init__(self, config: Config, cache: str | Path) -> None:
        torch.manual_seed(config.seed)
        self.config = config
        self.processes = Processes(config.device)
        self.per_step = config.batch_size * config.gradient_accumulation_steps * self.processes.count
        self.output_dir = Path(config.output_dir)
        self.data, vision_cached = load_data(config, Path(cache))
        self.step = 0
        self.window = {"loss": 0.0, "statement_loss": 0.0, "correct": 0.0, "statements": 0.0}
        resumed = find_checkpoint(config.resume_from) if config.resume_from else None
        if resumed is not None:
            reader = self.data.latents.reader
            check_trained_for(resumed, reader.root, reader.fingerprint)
        self._refuse_to_overwrite(resumed)
        self.processes.wait()  # until all have looked: the main one is going to write there
        main = self.processes.is_main
        if main:
            check_trackers(config)
        self.publisher = Publisher(config, self.output_dir) if main and config.push_to_hub else None
        self.model = load_model(config, self.data, vision_cached, self.processes.device)
        self.packer: Packer = self.model.packer()
        self.order = Order(self.data.train, config.seed)
        self.num_steps = config.align_steps + num_train_steps(config, len(self.data.train), self.per_step)
        self.optimizer = make_optimizer(self.model, config)
        check_align(self.model)
        if resumed is not None:
            self._resume(resumed)

    # ---- one step

    def prepare(self, step: int) -> list[Pass]:
        """What this process reads at a step, put together on the host: its share of the step's statements, in
        gradient_accumulation_steps passes of about equal length."""
        config = self.config
        aligning = step < config.align_steps
        start = (step if aligning else step - config.align_steps) * self.per_step
        statements = self.order.take(start, self.per_step)
        example = self.packer.prompt(statements[0].caption, True)
        shared = len(example.shared) + self.packer.num_world_tokens + 2
        passes = config.gradient_accumulation_steps
        parts = split(statements, passes * self.processes.count, shared, len(example.branch))
        own = parts[self.processes.rank * passes : (self.processes.rank + 1) * passes]
        if aligning:
            return [align_pass(self.model, self.data, part) for part in own if part]
        fetch = (self.data.latents, self.data.vision)
        return [make_pass(self.model, self.packer, part, *fetch) for part in own if part]

    def train_step(self, passes: list[Pass] | None = None) -> dict[str, float]:
        """Forward, backward, clip, step. `passes`: what `prepare` gave for this step, if it was called already."""
        config, step = self.config, self.step
        if step == config.align_steps and step > 0:
            self.optimizer = make_optimizer(self.model, config)  # another objective, so no old momentum
        rate = self._set_learning_rate()
        passes = self.prepare(step) if passes is None else passes
        sums = torch.zeros(len(FIGURES), device=self.model.gemma.device)
        for one in passes:
            one = one.to(self.model.gemma.device)
            aligning = step < config.align_steps
            losses = align_loss(self.model, one) if aligning else answer_loss(self.model, one)
            (losses["total"] / self.per_step).backward()
            sums += torch.stack([losses[name].detach() for name in FIGURES])
        sums = self._sum_over_processes(sums)
        norm = torch.nn.utils.clip_grad_norm_(list(self.model.trainable().values()), config.max_grad_norm)
        total, label, statement, correct, norm = torch.cat(
            [sums, norm[None]]
        ).tolist()  # waits for the device
        if not (math.isfinite(total) and math.isfinite(norm)):
            self._stop(total, norm, passes, rate)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        for key, value in zip(self.window, (label, statement, correct, self.per_step), strict=True):
            self.window[key] += value
        return {"learning_rate": rate, "gradient_norm": norm}

    def _sum_over_processes(self, sums: Tensor) -> Tensor:
        """The figures of all processes; gradients are added up in the same message. A process without a statement, as
        there may be when a step has few images, adds nothing."""
        if self.processes.count == 1:
            return sums
        parameters = list(self.model.trainable().values())
        own = [p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters]
        sums, *gradients = self.processes.sum([sums, *own])
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient.clone()
        return sums

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

    def _stop(self, loss: float, norm: float, passes: list[Pass], rate: float) -> None:
        what, value = ("loss", loss) if not math.isfinite(loss) else ("gradient norm", norm)
        images = ", ".join(sorted({s.image for one in passes for s in one.statements})[:8])
        raise NotFinite(
            f"step {self.step + 1}: the {what} is {value} (learning rate {rate:.3g}; images {images}); nothing was "
            "updated or overwritten. Lower --learning_rate, or resume from the last checkpoint"
        )

    # ---- the run

    def run(self) -> Path:
        """Trains to the end and returns the last checkpoint."""
        main = self.processes.is_main
        if main:
            self.output_dir.mkdir(parents=True, exist_ok=True)
            for line in self.describe():
                tqdm.write(line)
        settings = public_settings(self.config)
        trackers = Trackers(self.config, settings, self.output_dir, self.step > 0) if main else None
        last = find_checkpoint(self.config.resume_from) if self.config.resume_from else self.output_dir
        with progress(
            total=self.num_steps,
            initial=self.step,
            desc="train",
            unit=" steps",
            smoothing=0.05,
            disable=not main,
        ) as bar:
            start, done = time.perf_counter(), 0
            for figures in self._steps():
                bar.update()
                done += 1
                if self._due(self.config.logging_steps):
                    figures["statements_per_second"] = done * self.per_step / (time.perf_counter() - start)
                    self._log(self._averages() | figures, trackers, bar)
                    start, done = time.perf_counter(), 0
                if self.data.dev and self._due(self.config.eval_steps):
                    self._log(self.evaluate_dev(), trackers, bar)
                if self._due(self.config.save_steps):
                    last = self.save()
        if self.publisher is not None:
            self.publisher.finish(last, self._facts())
        if trackers is not None:
            trackers.close()
        return last

    def _steps(self) -> Iterator[dict[str, float]]:
        self.data.read_ahead()
        for passes in ahead(self.prepare(step) for step in range(self.step, self.num_steps)):
            yield self.train_step(passes)

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
        size = self.config.eval_statements
        fetch = (self.data.latents, self.data.vision)
        logits = predict(self.model, self.data.dev, *fetch, batch_size=size, processes=self.processes)[
            "world"
        ]
        labels = np.array([s.label for s in self.data.dev])
        correct = (logits[:, 1] > logits[:, 0]) == (labels == 1)
        return {"dev_loss": label_loss(logits, labels), "dev_accuracy": float(correct.mean())}

    def _log(self, figures: dict[str, float], trackers: Trackers | None, bar: tqdm) -> None:
        if trackers is None:
            return
        phase = "align" if self.step <= self.config.align_steps else "train"
        line = {
            "step": self.step,
            "epoch": self.step * self.per_step / len(self.data.train),
            "phase": phase,
            **figures,
        }
        with open(self.output_dir / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        trackers.log(figures, self.step)
        shown = {"loss": ".3f", "accuracy": ".1%", "dev_accuracy": ".1%", "statements_per_second": ".1f"}
        bar.set_postfix({k: format(figures[k], f) for k, f in shown.items() if k in figures})

    def describe(self) -> list[str]:
        """What trains, what is frozen, on what: lines to show before the start."""
        facts = self._facts()
        trainable, frozen = facts.trainable, facts.frozen
        share = trainable / (trainable + frozen)
        lines = [
            f"trains: projection, {trainable:,} parameters ({share:.3%}); frozen: Gemma, {frozen:,} ({1 - share:.3%})",
            *self.data.notes,
            f"{self.num_steps:,} optimizer steps of {self._shares()} statements, "
            f"{self.model.projection.shape.num_tokens} world tokens and {self.model.gemma.num_image_tokens} image "
            f"tokens each, on {self.model.gemma.device}",
        ]
        return lines + ([f"resumed after step {self.step:,}"] if self.step else [])

    def _facts(self) -> Facts:
        trainable, _ = count_parameters(self.model.projection)
        frozen = sum(p.numel() for p in self.model.gemma.model.parameters())
        return Facts(trainable, frozen, self.num_steps, self.per_step, self.data.notes)

    def _shares(self) -> str:
        own = f"{self.config.batch_size} x {self.config.gradient_accumulation_steps}"
        return own + (f" x {self.processes.count} (processes)" if self.processes.count > 1 else "")

    # ---- checkpoints

    def save(self) -> Path:
        """Publishes checkpoint-<step>, then removes the oldest ones beyond save_total_limit."""
        if not self.processes.is_main:
            self.processes.wait()
            return self.output_dir / f"checkpoint-{self.step}"
        state = {"optimizer": self.optimizer.state_dict(), "rng": torch.get_rng_state()}
        record = {"step": self.step, "window": self.window, "num_statements": len(self.data.train)}
        record["statements_per_step"] = self.per_step
        path = save_checkpoint(self.output_dir, self.step, self.model, state, record)
        if self.publisher is not None:
            self.publisher.saved(path, self._facts())
        rotate(self.output_dir, self.config.save_total_limit)
        self.processes.wait()
        return path

    def _resume(self, path: Path) -> None:
        state, record = load_checkpoint(path, self.model.gemma.device)
        if record["num_statements"] != len(self.data.train):
            raise CheckpointError(
                f"{path} was trained on {record['num_statements']} statements, now there are "
                f"{len(self.data.train)}; use the same --annotations and cache"
            )
        if record["statements_per_step"] != self.per_step:
            raise CheckpointError(
                f"{path} was trained with {record['statements_per_step']} statements a step, now there are "
                f"{self.per_step}: batch_size x gradient_accumulation_steps x processes has to stay the same"
            )
        self.model.load_projection(path / "projection.safetensors")
        self.step, self.window = record["step"], record["window"]
        self.optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["rng"].cpu())

    def _refuse_to_overwrite(self, resumed: Path | None) -> None:
        """Checkpoints that this run would write again must not be there when it starts."""
        done = -1 if resumed is None else checkpoint_step(resumed)
        ahead = [p for p in list_checkpoints(self.output_dir) if _step(p) > done]
        if ahead:
            cure = "use another --output_dir, or move them away"
            if resumed is None:
                cure = f"go on with --resume_from {self.output_dir}, " + cure
            raise CheckpointError(
                f"{self.output_dir} already holds {', '.join(p.name for p in ahead)}; {cure}"
            )


def _step(path: Path) -> int:
    return int(path.name.removeprefix("checkpoint-"))
