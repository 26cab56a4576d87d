"""Phase 2: only the projection trains, against a frozen Gemma, from the cache. The VAE never loads.

Everything that a step does is a function of (settings, cache, step): the order of the statements, the learning
rate, nothing else is random. So a run that was resumed gives the same weights, bit for bit on the CPU.
"""

import math
import time
from collections.abc import Generator
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from theworld.config.config import Config
from theworld.data.vsr import Statement
from theworld.evaluation.metrics import label_loss
from theworld.evaluation.predict import predict, word_losses
from theworld.extraction.batches import Pass, ahead, make_pass
from theworld.hub.card import public_settings
from theworld.hub.publish import Publisher
from theworld.models.fsdp import clip, load_state, sum_over, whole_state
from theworld.models.packing import Packer
from theworld.training.checkpoint import (
    Found,
    check_optimizer,
    check_same_run,
    rotate,
    save_checkpoint,
    set_random_state,
    tidy_run,
)
from theworld.training.data import load_model
from theworld.training.logging import Trackers, append, check_trackers, sync
from theworld.training.memory import Plan, check_answers, is_out_of_memory, not_finite, out_of_memory
from theworld.training.monitor import LossWatch, Reading, chance_loss, warning, what_to_try
from theworld.training.objectives import (
    align_loss,
    align_pass,
    answer_loss,
    asked_words,
    captions_for,
    make_optimizer,
    on_image_tokens,
)
from theworld.training.schedule import Phase, learning_rate, num_warmup_steps, parts_of_step, phase_at
from theworld.utils.console import progress
from theworld.utils.signals import StopRequest

FIGURES = ("total", "label", "statement", "relation", "correct")  # of each pass, summed over its statements


class Trainer:
    """One run: `Trainer(config, cache).run()`. Progress counts optimizer steps, those of the start at Gemma's image
    tokens (`align_steps`) first, then those with words alone (`statement_steps`), then those of the main phase."""

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
        self.packing = Event()  # set while a thread may pack: see `ahead`
        self.packing.set()
        sums = ("loss", "statement_loss", "relation_loss", "correct", "statements")
        self.window = dict.fromkeys(sums, 0.0)
        main_steps = self.num_steps - config.align_steps - config.statement_steps
        warmup, chance = num_warmup_steps(config, main_steps), chance_loss([s.label for s in self.data.train])
        self.watch = LossWatch(main_steps, warmup, chance)
        self.at_chance: Reading | None = None  # what the watch has found and nobody said yet
        self.processes.barrier()  # until all have looked: the main one is going to write there
        main = self.processes.is_main_process
        if main:
            check_trackers(config)
        self.publisher = Publisher(config, self.output_dir) if main and config.push_to_hub else None
        self.model = load_model(plan.gemma, config, self.data, plan.start)
        self.packer: Packer = self.model.packer()
        self.sharded = plan.sharded
        # FSDP averages gradients; here they are sums.
        self.scale = self.processes.count if self.sharded else 1
        if self.sharded:
            self.model.shard()
        self.optimizer = make_optimizer(self.model, config)
        self.fused = self.model.gemma.device.type == "cuda" and not self.sharded
        if plan.resumed is not None:
            self._resume(plan.resumed)

    # ---- one step

    def prepare(self, step: int) -> list[Pass]:
        """What this process reads at a step, put together on the host: its share of the step's statements, in
        gradient_accumulation_steps passes of about equal length."""
        config = self.config
        phase = phase_at(config, step, self.num_steps)
        parts = parts_of_step(config, self.packer, self.order, self._start(step), self.processes.count)
        passes = config.gradient_accumulation_steps
        own = parts[self.processes.rank * passes : (self.processes.rank + 1) * passes]
        if phase.name == "align":
            return [align_pass(self.model, self.data, part) for part in own if part]
        fetch = (self.data.latents, self.data.vision)

        def made(part: list[Statement]) -> Pass:
            captions = captions_for(config, self.data, phase.name, part, step)
            return make_pass(self.model, self.packer, part, *fetch, captions=captions)

        if not self.sharded:
            return [made(part) for part in own if part]
        # Sharded processes work layer by layer together: one without a statement goes along, and counts for nothing.
        filled = next(part for part in parts if part)
        return [replace(made(part or filled[:1]), weight=float(bool(part))) for part in own]

    def _start(self, step: int) -> int:
        """The place in the order of a step's first statement."""
        return (step - phase_at(self.config, step, self.num_steps).start) * self.per_step

    def train_step(self, passes: list[Pass] | None = None) -> dict[str, float]:
        """Forward, backward, clip, step. `passes`: what `prepare` gave for this step, if it was called already."""
        config, step = self.config, self.step
        phase = phase_at(config, step, self.num_steps)
        if step == phase.start and step > 0:
            self.optimizer = make_optimizer(self.model, config)  # another objective, so no old momentum
        rate = self._set_learning_rate(phase)
        passes = self.prepare(step) if passes is None else passes
        sums = torch.zeros(len(FIGURES) + 1, device=self.model.gemma.device)  # and who was asked to stop
        for one in passes:
            sums[:-1] += self._backward(one, phase)
        sums[-1:].fill_(self.stop.asked)  # an assignment would wait for the device
        parameters = list(self.model.trainable().values())
        sums = sum_over(self.processes, parameters, sums, self.scale)
        norm = clip(parameters, config.max_grad_norm)
        if self.fused:
            # The kernel leaves out a step that is not finite, so that it need not wait until the host has looked.
            finite = torch.stack([sums[0], norm]).isfinite().all()
            self.optimizer.found_inf = 1 - finite.float()  # type: ignore[attr-defined]
            self.optimizer.step()
        total, *figures, asked, gradient_norm = self._read(torch.cat([sums, norm[None]]))
        if not (math.isfinite(total) and math.isfinite(gradient_norm)):
            raise not_finite(step + 1, total, gradient_norm, rate, passes)
        self.stopping = asked > 0
        if not self.fused:
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        for key, value in zip(self.window, (*figures, self.per_step), strict=True):
            self.window[key] += value
        if phase.name == "train":
            self.at_chance = self.watch.add(self.step - phase.start, figures[0] / self.per_step)
        return {"learning_rate": rate, "gradient_norm": gradient_norm}

    def _read(self, figures: Tensor) -> list[float]:
        """The only wait for the device in a step, and the time to pack further ones: see `ahead`."""
        self.packing.set()
        read = figures.tolist()
        if figures.is_cuda:
            self.packing.clear()
        return read

    def _backward(self, one: Pass, phase: Phase) -> Tensor:
        """Adds the gradients of a pass; its FIGURES."""
        try:
            there = one.to(self.model.gemma.device)
            aligning = phase.name == "align"
            losses = align_loss(self.model, there) if aligning else answer_loss(self.model, there, phase.name)
            (losses["total"] * (one.weight * self.scale / self.per_step)).backward()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            start = 0 if phase.name == "align" else self._start(self.step)
            raise out_of_memory(self.plan, self.step + 1, start, one) from error
        return torch.stack([losses[name].detach() for name in FIGURES]) * one.weight

    def _set_learning_rate(self, phase: Phase) -> float:
        peak = self.config.align_learning_rate if phase.name == "align" else self.config.learning_rate
        rate = learning_rate(self.config, self.step - phase.start, phase.stop - phase.start, peak)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["share"]
        return rate

    # ---- the run

    def run(self) -> Path:
        """Trains to the end, or until it was asked to stop (`stopped`), and returns the last checkpoint."""
        main = self.processes.is_main_process
        if main:
            self.output_dir.mkdir(parents=True, exist_ok=True)
            tidied = tidy_run(self.output_dir, self.plan.resumed, self.step, self.owes_dev)
            tqdm.write("\n".join([*self.plan.lines, *tidied]))
        settings = public_settings(self.config)
        trackers = (
            Trackers(self.config, settings, self.output_dir, self.step > 0, self.step) if main else None
        )
        last = self.plan.resumed.path if self.plan.resumed is not None else self.output_dir
        shown: dict[str, Any] = {"total": self.num_steps, "initial": self.step, "disable": not main}
        with (
            progress(desc="train", unit=" steps", smoothing=0.05, **shown) as bar,
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
                if self.at_chance is not None:
                    self._warn(self.at_chance, trackers, bar)
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

    def _steps(self) -> Generator[dict[str, float], None, None]:
        coming = (self.prepare(step) for step in range(self.step, self.num_steps))
        for passes in ahead(coming, gate=self.packing):
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
            words = [f"{name}_loss" for name in asked_words(self.config, phase)]
            averages |= {name: window[name] / n for name in words}
        self.window = dict.fromkeys(window, 0.0)
        return averages

    def evaluate_dev(self) -> dict[str, float]:
        """Loss and accuracy on dev, with world tokens, and the losses of words that the phase asks for."""
        config, processes = self.config, self.processes
        dev = (self.data.dev, self.data.latents, self.data.vision)
        size = config.eval_statements
        logits = predict(self.model, *dev, batch_size=size, processes=processes)["world"]
        labels = np.array([s.label for s in self.data.dev])
        correct = (logits[:, 1] > logits[:, 0]) == (labels == 1)
        check_answers(self.step, self.data.dev, logits)
        figures = {"dev_loss": label_loss(logits, labels), "dev_accuracy": float(correct.mean())}
        words = asked_words(config, self._phase())
        if self.data.captions is not None and "statement" in words:
            words.remove("statement")  # of other texts than those that are trained on
        # In the passes of training: each word has logits of the whole vocabulary.
        losses = word_losses(self.model, *dev, words, config.batch_size, processes) if words else {}
        return figures | {f"dev_{name}_loss": value for name, value in losses.items()}

    def _warn(self, reading: Reading, trackers: Trackers | None, bar: tqdm) -> None:
        """Says once that the loss is at chance, and what to try."""
        gemma, shape = self.model.gemma, self.model.projection.shape
        same_places = on_image_tokens(self.config, shape, gemma.num_image_tokens) and not gemma.trained
        if self.processes.is_main_process:
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
        append(self.output_dir, line)
        trackers.log(figures, self.step)
        shown = {"loss": ".3f", "accuracy": ".1%", "dev_accuracy": ".1%", "statements_per_second": ".1f"}
        bar.set_postfix({k: format(figures[k], f) for k, f in shown.items() if k in figures})

    # ---- checkpoints

    def save(self) -> Path:
        """Publishes checkpoint-<step>, then removes the oldest ones beyond save_total_limit."""
        main = self.processes.is_main_process
        weights = optimizer = None
        if main or self.sharded:  # the others give their shares
            weights, optimizer = self.model.weights(), whole_state(self.optimizer.state_dict())
        if not main:
            self.processes.barrier()
            return self.output_dir / f"checkpoint-{self.step}"
        state = {"optimizer": optimizer, "rng": torch.get_rng_state()}
        record = {"step": self.step, "window": self.window}
        record |= {"watch": self.watch.state(), "owes_dev": self.owes_dev} | self._identity()
        sync(self.output_dir)
        path = save_checkpoint(self.output_dir, self.step, self.model, state, record, weights)
        if self.publisher is not None:
            self.publisher.saved(path, self.plan.facts)
        rotate(self.output_dir, self.config.save_total_limit)
        self.processes.barrier()
        return path

    def _identity(self) -> dict[str, Any]:
        """What has to be the same where a run goes on."""
        return {
            "num_statements": len(self.data.train),
            "data_sha256": self.data.sha256(),
            "statements_per_step": self.per_step,
            "trained": list(self.model.gemma.trained),
        }

    def _resume(self, found: Found) -> None:
        path, record = found.path, found.progress
        check_same_run(found, self._identity())
        check_optimizer(self.optimizer, found.state["optimizer"], path)
        self.step, self.window = record["step"], self.window | record["window"]
        if "watch" in record:  # not in checkpoints of before there was one
            self.watch.restore(**record["watch"])
        self.owes_dev = record.get("owes_dev", False)
        load_state(self.optimizer, found.state["optimizer"])
        set_random_state(found)
