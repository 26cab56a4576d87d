"""Phase 2: only the projection trains, against a frozen Gemma, from the cache. The VAE never loads.

Everything that a step does is a function of (settings, cache, step): the order of the statements, the learning
rate, nothing else is random. So a run that was resumed gives the same weights, bit for bit on the CPU.
"""

import math
import time
from collections.abc import Generator
from contextlib import closing
from dataclasses import replace
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
from theworld.failed_step import NotFinite, OutOfMemory, is_out_of_memory, named, not_finite, out_of_memory
from theworld.feed import Pass, ahead, make_pass, parts_of_step
from theworld.metrics import label_loss
from theworld.objectives import align_loss, align_pass, answer_loss, make_optimizer
from theworld.preflight import Plan
from theworld.publish import Publisher
from theworld.resume import Found, check_optimizer, check_same_run, tidy
from theworld.runlog import ASIDE, METRICS, append, set_aside, sync
from theworld.schedule import learning_rate
from theworld.sharding import clip, is_sharded, load_state, whole_state
from theworld.stopping import StopRequest
from theworld.trackers import Trackers, check_trackers

__all__ = ["NotFinite", "OutOfMemory", "Trainer"]

FIGURES = ("total", "label", "statement", "correct")  # of each pass, summed over its statements


class Trainer:
    """One run: `Trainer(config, cache).run()`. Progress counts optimizer steps, those of the start at Gemma's image
    tokens (`align_steps`) first, then those of the main phase."""

    def __init__(self, config: Config, cache: str | Path, stop: StopRequest | None = None) -> None:
        """`stop`: where a request to stop is heard of; all processes then stop after the same step, and save."""
        self.stop = stop or StopRequest()
        self.stopping = False  # all processes know that one of them was asked
        self.owes_dev = False  # an evaluation was due when the run was stopped
        plan = Plan(config, Path(cache))
        self.config, self.plan, self.data, self.order = config, plan, plan.data, plan.order
        self.processes, self.per_step, self.num_steps = plan.processes, plan.per_step, plan.num_steps
        self.output_dir = plan.output_dir
        self.step = 0
        self.window = {"loss": 0.0, "statement_loss": 0.0, "correct": 0.0, "statements": 0.0}
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
        if plan.resumed is not None:
            self._resume(plan.resumed)

    # ---- one step

    def prepare(self, step: int) -> list[Pass]:
        """What this process reads at a step, put together on the host: its share of the step's statements, in
        gradient_accumulation_steps passes of about equal length."""
        config = self.config
        aligning = step < config.align_steps
        parts = parts_of_step(config, self.packer, self.order, self._start(step), self.processes.count)
        passes = config.gradient_accumulation_steps
        own = parts[self.processes.rank * passes : (self.processes.rank + 1) * passes]
        if aligning:
            return [align_pass(self.model, self.data, part) for part in own if part]
        fetch = (self.data.latents, self.data.vision)
        if not self.sharded:
            return [make_pass(self.model, self.packer, part, *fetch) for part in own if part]
        # Sharded processes work layer by layer together: one without a statement goes along, and counts for nothing.
        filled = next(part for part in parts if part)
        made = [make_pass(self.model, self.packer, part or filled[:1], *fetch) for part in own]
        return [replace(one, weight=float(bool(part))) for one, part in zip(made, own, strict=True)]

    def _start(self, step: int) -> int:
        """The place in the order of a step's first statement."""
        return (step if step < self.config.align_steps else step - self.config.align_steps) * self.per_step

    def train_step(self, passes: list[Pass] | None = None) -> dict[str, float]:
        """Forward, backward, clip, step. `passes`: what `prepare` gave for this step, if it was called already."""
        config, step = self.config, self.step
        if step == config.align_steps and step > 0:
            self.optimizer = make_optimizer(self.model, config)  # another objective, so no old momentum
        rate = self._set_learning_rate()
        passes = self.prepare(step) if passes is None else passes
        sums = torch.zeros(len(FIGURES) + 1, device=self.model.gemma.device)  # and who was asked to stop
        for one in passes:
            sums[:-1] += self._backward(one)
        sums[-1] = float(self.stop.asked)
        sums = self._sum_over_processes(sums)
        norm = clip(list(self.model.trainable().values()), config.max_grad_norm)
        total, label, statement, correct, asked, norm = torch.cat(
            [sums, norm[None]]
        ).tolist()  # waits for the device
        if not (math.isfinite(total) and math.isfinite(norm)):
            raise not_finite(step + 1, total, norm, rate, passes)
        self.stopping = asked > 0
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        for key, value in zip(self.window, (label, statement, correct, self.per_step), strict=True):
            self.window[key] += value
        return {"learning_rate": rate, "gradient_norm": norm}

    def _backward(self, one: Pass) -> Tensor:
        """Adds the gradients of a pass; its FIGURES."""
        aligning = self.step < self.config.align_steps
        try:
            there = one.to(self.model.gemma.device)
            losses = align_loss(self.model, there) if aligning else answer_loss(self.model, there)
            (losses["total"] * (one.weight * self.scale / self.per_step)).backward()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            start = 0 if aligning else self._start(self.step)
            raise out_of_memory(self.plan, self.step + 1, start, one) from error
        return torch.stack([losses[name].detach() for name in FIGURES]) * one.weight

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

    def _set_learning_rate(self) -> float:
        config = self.config
        if self.step < config.align_steps:
            rate = learning_rate(config, self.step, config.align_steps, config.align_learning_rate)
        else:
            done, steps = self.step - config.align_steps, self.num_steps - config.align_steps
            rate = learning_rate(config, done, steps, config.learning_rate)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["share"]
        return rate

    # ---- the run

    def run(self) -> Path:
        """Trains to the end, or until it was asked to stop (`stopped`), and returns the last checkpoint."""
        main = self.processes.is_main
        if main:
            self.output_dir.mkdir(parents=True, exist_ok=True)
            tqdm.write("\n".join([*self.plan.lines, *self._tidy()]))
        settings = public_settings(self.config)
        trackers = (
            Trackers(self.config, settings, self.output_dir, self.step > 0, self.step) if main else None
        )
        last = self.plan.resumed.path if self.plan.resumed is not None else self.output_dir
        with (
            progress(
                total=self.num_steps,
                initial=self.step,
                desc="train",
                unit=" steps",
                smoothing=0.05,
                disable=not main,
            ) as bar,
            self.stop.working(),
            closing(self._steps()) as steps,
        ):
            if self.owes_dev:
                self._log(self.evaluate_dev(), trackers, bar)
                self.owes_dev = False
            start, done = time.perf_counter(), 0
            for figures in steps:
                bar.update()
                done += 1
                if self._due(self.config.logging_steps):
                    figures["statements_per_second"] = done * self.per_step / (time.perf_counter() - start)
                    self._log(self._averages() | figures, trackers, bar)
                    start, done = time.perf_counter(), 0
                if self.data.dev and self._due(self.config.eval_steps):
                    if self.stopped:
                        self.owes_dev = True  # there may be no time for it now
                    else:
                        self._log(self.evaluate_dev(), trackers, bar)
                if self._due(self.config.save_steps) or self.stopped:
                    last = self.save()
                if self.stopped:
                    break
        if self.publisher is not None and not self.stopped:  # else there is no time to wait for it
            self.publisher.finish(last, self.plan.facts)
        if trackers is not None:
            trackers.close()
        return last

    @property
    def stopped(self) -> bool:
        """Whether the run ends here because it was asked to, before its last step."""
        return self.stopping and self.step < self.num_steps

    def _tidy(self) -> list[str]:
        """Moves what earlier starts left out of the way of this one; a line for each thing."""
        owed, resumed = self.owes_dev, self.plan.resumed
        lines = tidy(self.output_dir, resumed.skipped if resumed is not None else ())
        last = self.step

        def keep(line: dict[str, Any]) -> bool:
            return line["step"] < last or (line["step"] == last and not (owed and "dev_loss" in line))

        moved = set_aside(self.output_dir, keep)
        if moved:
            lines.append(f"{moved} lines of {METRICS} about steps that are taken again are now in {ASIDE}")
        return lines

    def _steps(self) -> Generator[dict[str, float], None, None]:
        with self.data.reading_ahead():
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
        if not np.isfinite(logits).all():
            images = [
                s.image for s, row in zip(self.data.dev, logits, strict=True) if not np.isfinite(row).all()
            ]
            raise NotFinite(
                f"step {self.step}: answers on dev are not finite (images {named(sorted(set(images)))}); nothing was "
                "overwritten. Resume from the last checkpoint with a lower --learning_rate"
            )
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
        append(self.output_dir, line)
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
        record |= {"statements_per_step": self.per_step, "trained": list(self.model.gemma.trained)}
        record |= {"owes_dev": self.owes_dev}
        sync(self.output_dir)
        path = save_checkpoint(self.output_dir, self.step, self.model, state, record, weights)
        if self.publisher is not None:
            self.publisher.saved(path, self.plan.facts)
        rotate(self.output_dir, self.config.save_total_limit)
        self.processes.wait()
        return path

    def _resume(self, found: Found) -> None:
        path, record = found.path, found.progress
        check_same_run(found, len(self.data.train), self.per_step, list(self.model.gemma.trained))
        check_optimizer(self.optimizer, found.state["optimizer"], path)
        self.step, self.window = record["step"], record["window"]
        self.owes_dev = record.get("owes_dev", False)
        load_state(self.optimizer, found.state["optimizer"])
        try:
            torch.set_rng_state(found.state["rng"])
        except (RuntimeError, TypeError) as error:
            raise CheckpointError(f"{path}: its random state cannot be used: {error}; use another") from None
