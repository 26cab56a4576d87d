"""Phase 2: only the projection trains, against a frozen Gemma, from the cache. The VAE never loads.

Everything that a step does is a function of (settings, cache, step): the order of the statements, the learning
rate, nothing else is random. So a run that was resumed gives the same weights, bit for bit on the CPU.
"""

import json
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from theworld.batch import Packer
from theworld.card import public_settings
from theworld.checkpoint import CheckpointError, rotate, save_checkpoint
from theworld.config import Config
from theworld.console import progress
from theworld.data import load_model
from theworld.evaluate import predict
from theworld.feed import Pass, ahead, make_pass, parts_of_step
from theworld.metrics import label_loss
from theworld.objectives import (
    align_loss,
    align_pass,
    answer_loss,
    loss_weights,
    make_optimizer,
    on_image_tokens,
)
from theworld.preflight import Plan
from theworld.publish import Publisher
from theworld.schedule import Phase, learning_rate, num_warmup_steps, phase_at
from theworld.sharding import clip, is_sharded, load_state, whole_state
from theworld.trackers import Trackers, check_trackers
from theworld.watch import LossWatch, Reading, chance_loss, warning, what_to_try

FIGURES = ("total", "label", "statement", "relation", "correct")  # of each pass, summed over its statements


class NotFinite(ArithmeticError):
    """A loss or gradient that is not a number; the step, its images and settings are in the message."""


class Trainer:
    """One run: `Trainer(config, cache).run()`. Progress counts optimizer steps, those of the start at Gemma's image
    tokens (`align_steps`) first, then those with words alone (`statement_steps`), then those of the main phase."""

    def __init__(self, config: Config, cache: str | Path) -> None:
        plan = Plan(config, Path(cache))
        self.config, self.plan, self.data, self.order = config, plan, plan.data, plan.order
        self.processes, self.per_step, self.num_steps = plan.processes, plan.per_step, plan.num_steps
        self.output_dir = Path(config.output_dir)
        self.step = 0
        sums = ("loss", "statement_loss", "relation_loss", "correct", "statements")
        self.window = dict.fromkeys(sums, 0.0)
        main_steps = self.num_steps - config.align_steps - config.statement_steps
        warmup, chance = num_warmup_steps(config, main_steps), chance_loss([s.label for s in self.data.train])
        self.watch = LossWatch(main_steps, warmup, chance)
        self.at_chance: Reading | None = None  # what the watch has found and nobody said yet
        self.processes.wait()  # until all have looked: the main one is going to write there
        main = self.processes.is_main
        if main:
            check_trackers(config)
        self.publisher = Publisher(config, self.output_dir) if main and config.push_to_hub else None
        self.model = load_model(plan.gemma, config, self.data, plan.start)
        self.packer: Packer = self.model.packer()
        self.sharded = plan.sharded
        self.scale = (
            self.processes.count if self.sharded else 1
        )  # FSDP averages gradients; here they are sums
        if self.sharded:
            self.model.shard()
        self.optimizer = make_optimizer(self.model, config)
        if plan.resumed is not None and plan.progress is not None:
            self._resume(plan.resumed, *plan.progress)

    # ---- one step

    def prepare(self, step: int) -> list[Pass]:
        """What this process reads at a step, put together on the host: its share of the step's statements, in
        gradient_accumulation_steps passes of about equal length."""
        config = self.config
        phase = phase_at(config, step, self.num_steps)
        start = (step - phase.start) * self.per_step
        parts = parts_of_step(config, self.packer, self.order, start, self.processes.count)
        passes = config.gradient_accumulation_steps
        own = parts[self.processes.rank * passes : (self.processes.rank + 1) * passes]
        if phase.name == "align":
            return [align_pass(self.model, self.data, part) for part in own if part]
        fetch = (self.data.latents, self.data.vision)
        if not self.sharded:
            return [make_pass(self.model, self.packer, part, *fetch) for part in own if part]
        # Sharded processes work layer by layer together: one without a statement goes along, and counts for nothing.
        filled = next(part for part in parts if part)
        made = [make_pass(self.model, self.packer, part or filled[:1], *fetch) for part in own]
        return [replace(one, weight=float(bool(part))) for one, part in zip(made, own, strict=True)]

    def train_step(self, passes: list[Pass] | None = None) -> dict[str, float]:
        """Forward, backward, clip, step. `passes`: what `prepare` gave for this step, if it was called already."""
        config, step = self.config, self.step
        phase = phase_at(config, step, self.num_steps)
        if step == phase.start and step > 0:
            self.optimizer = make_optimizer(self.model, config)  # another objective, so no old momentum
        rate = self._set_learning_rate(phase)
        passes = self.prepare(step) if passes is None else passes
        sums = torch.zeros(len(FIGURES), device=self.model.gemma.device)
        for one in passes:
            one = one.to(self.model.gemma.device)
            aligning = phase.name == "align"
            losses = align_loss(self.model, one) if aligning else answer_loss(self.model, one, phase.name)
            (losses["total"] * (one.weight * self.scale / self.per_step)).backward()
            sums += torch.stack([losses[name].detach() for name in FIGURES]) * one.weight
        sums = self._sum_over_processes(sums)
        norm = clip(list(self.model.trainable().values()), config.max_grad_norm)
        total, *figures, norm = torch.cat([sums, norm[None]]).tolist()  # waits for the device
        if not (math.isfinite(total) and math.isfinite(norm)):
            self._stop(total, norm, passes, rate)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        for key, value in zip(self.window, (*figures, self.per_step), strict=True):
            self.window[key] += value
        if phase.name == "train":
            self.at_chance = self.watch.add(self.step - phase.start, figures[0] / self.per_step)
        return {"learning_rate": rate, "gradient_norm": norm}

    def _sum_over_processes(self, sums: Tensor) -> Tensor:
        """The figures of all processes; gradients are added up in the same message, but for those of sharded weights,
        which FSDP has averaged. A process without a statement, where a step has few images, adds nothing."""
        if self.processes.count == 1:
            return sums
        parameters = [p for p in self.model.trainable().values() if not is_sharded(p)]
        own = [p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters]
        sums, *gradients = self.processes.sum([sums, *own])
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient.div(self.scale)
        return sums

    def _set_learning_rate(self, phase: Phase) -> float:
        peak = self.config.align_learning_rate if phase.name == "align" else self.config.learning_rate
        rate = learning_rate(self.config, self.step - phase.start, phase.stop - phase.start, peak)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["share"]
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
            tqdm.write("\n".join(self.plan.lines))
        settings = public_settings(self.config)
        trackers = Trackers(self.config, settings, self.output_dir, self.step > 0) if main else None
        last = self.plan.resumed or self.output_dir
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
                if self.at_chance is not None:
                    self._warn(self.at_chance, trackers, bar)
                if self.data.dev and self._due(self.config.eval_steps):
                    self._log(self.evaluate_dev(), trackers, bar)
                if self._due(self.config.save_steps):
                    last = self.save()
        if self.publisher is not None:
            self.publisher.finish(last, self.plan.facts)
        if trackers is not None:
            trackers.close()
        return last

    def _steps(self) -> Iterator[dict[str, float]]:
        self.data.read_ahead()
        for passes in ahead(self.prepare(step) for step in range(self.step, self.num_steps)):
            yield self.train_step(passes)

    def _phase(self) -> str:
        """That of the last step."""
        return phase_at(self.config, self.step - 1, self.num_steps).name

    def _due(self, every: int) -> bool:
        return self.step % every == 0 or self.step == self.num_steps

    def _averages(self) -> dict[str, float]:
        window, n = self.window, max(1.0, self.window["statements"])
        averages = {"loss": window["loss"] / n}
        phase = self._phase()
        if phase != "align":
            averages["accuracy"] = window["correct"] / n
            weights = loss_weights(self.config, phase)
            asked = [name for name in ("statement_loss", "relation_loss") if weights[f"{name}_weight"] > 0]
            averages |= {name: window[name] / n for name in asked}
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

    def _warn(self, reading: Reading, trackers: Trackers | None, bar: tqdm) -> None:
        """Says once that the loss is at chance, and what to try."""
        gemma, shape = self.model.gemma, self.model.projection.shape
        same_places = on_image_tokens(self.config, shape, gemma.num_image_tokens) and not gemma.trained
        if self.processes.is_main:
            tqdm.write(warning(reading, what_to_try(self.config, same_places)))
        self._log({f"watch_{name}": value for name, value in asdict(reading).items()}, trackers, bar)

    def _log(self, figures: dict[str, float], trackers: Trackers | None, bar: tqdm) -> None:
        if trackers is None:
            return
        line = {
            "step": self.step,
            "epoch": self.step * self.per_step / len(self.data.train),
            "phase": self._phase(),
            **figures,
        }
        with open(self.output_dir / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        trackers.log(figures, self.step)
        shown = {"loss": ".3f", "accuracy": ".1%", "dev_accuracy": ".1%", "statements_per_second": ".1f"}
        bar.set_postfix({k: format(figures[k], f) for k, f in shown.items() if k in figures})

    # ---- checkpoints

    def save(self) -> Path:
        """Publishes checkpoint-<step>, then removes the oldest ones beyond save_total_limit."""
        main = self.processes.is_main
        weights = optimizer = None
        if main or self.sharded:  # the others give their shares
            weights, optimizer = self.model.weights(), whole_state(self.optimizer.state_dict())
        if not main:
            self.processes.wait()
            return self.output_dir / f"checkpoint-{self.step}"
        state = {"optimizer": optimizer, "rng": torch.get_rng_state()}
        record = {"step": self.step, "window": self.window, "num_statements": len(self.data.train)}
        record |= {
            "watch": self.watch.state(),
            "statements_per_step": self.per_step,
            "trained": list(self.model.gemma.trained),
        }
        path = save_checkpoint(self.output_dir, self.step, self.model, state, record, weights)
        if self.publisher is not None:
            self.publisher.saved(path, self.plan.facts)
        rotate(self.output_dir, self.config.save_total_limit)
        self.processes.wait()
        return path

    def _resume(self, path: Path, state: dict[str, Any], record: dict[str, Any]) -> None:
        statements, trained = len(self.data.train), list(self.model.gemma.trained)
        if record["num_statements"] != statements:
            raise CheckpointError(
                f"{path} was trained on {record['num_statements']} statements, now there are {statements}; use the "
                "same --annotations and cache"
            )
        if record["statements_per_step"] != self.per_step:
            raise CheckpointError(
                f"{path} was trained with {record['statements_per_step']} statements a step, now there are "
                f"{self.per_step}: batch_size x gradient_accumulation_steps x processes has to stay the same"
            )
        if record["trained"] != trained:
            raise CheckpointError(
                f"{path} trained {record['trained'] or 'nothing'} of Gemma, now {trained or 'nothing'} would train; "
                "start a new stage with --init_from in place of --resume_from"
            )
        self.step, self.window = record["step"], self.window | record["window"]
        if "watch" in record:  # not in checkpoints of before there was one
            self.watch.restore(**record["watch"])
        load_state(self.optimizer, state["optimizer"])
        torch.set_rng_state(state["rng"])
