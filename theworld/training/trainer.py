"""Phase 2: the projection trains against a frozen Gemma, from the cache; no world encoder loads.

A step is a function of (settings, cache, step): the order of the statements, their captions and the learning rate are,
and nothing else is random. So a run that was resumed gives the same weights, bit for bit on the CPU.
"""

import logging
import math
import time
from collections import Counter
from collections.abc import Generator, Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from theworld.config.config import Config
from theworld.data.vsr import Statement
from theworld.evaluation.predict import label_loss, predict, word_losses
from theworld.extraction.batches import Microbatch, make_microbatch, prefetch
from theworld.hub.card import public_settings
from theworld.hub.publish import Publisher
from theworld.models.fsdp import clip, sum_over
from theworld.models.gemma import KeptGemma
from theworld.models.packing import Packer
from theworld.training.checkpoint import (
    ResumePoint,
    clean_up_run,
    load_optimizer,
    refuse_to_overwrite,
    rotate,
    save_checkpoint,
)
from theworld.training.data import load_model
from theworld.training.logging import Trackers, append, sync
from theworld.training.memory import Plan, check_answers, is_out_of_memory, not_finite, out_of_memory
from theworld.training.monitor import LossMonitor, LossWindow, chance_loss, warning, what_to_try
from theworld.training.objectives import align_losses, align_microbatch, make_optimizer, on_image_tokens
from theworld.training.schedule import Phase, learning_rate, num_warmup_steps, phase_of, split_step
from theworld.utils.console import progress
from theworld.utils.device import num_compiled_graphs, set_up_torch, to_host
from theworld.utils.locks import OutputLock
from theworld.utils.signals import StopRequest

logger = logging.getLogger(__name__)

LOSSES = ("total", "label", "statement", "relation", "correct")  # those of a micro-batch that a step adds up


@dataclass(frozen=True)
class LaunchedStep:
    """A step whose kernels a GPU has in its queue; on a CPU, a step but for its update."""

    step: int  # steps before it
    phase: Phase
    rate: float  # learning rate
    microbatches: list[Microbatch]
    figures: Tensor  # float32[_] on the host: the sums of LOSSES, the requests to stop, the gradient norm
    ready: torch.cuda.Event | None  # a GPU has written `figures`; None: they are there


class Trainer:
    """One run: `Trainer(config, cache).run()`. Progress counts the optimizer steps of all phases."""

    def __init__(
        self,
        config: Config,
        cache: str | Path,
        stop: StopRequest | None = None,
        allow_changed: bool = False,
        kept: KeptGemma | None = None,
    ) -> None:
        """`stop` receives requests to stop; all processes then stop after the same step, and save. `allow_changed`: a
        resume takes settings and data that change what is learnt, and checkpoints record both. `kept`: see
        `load_model`.

        Sets process-wide state (`set_up_torch`).
        """
        self.stop = stop or StopRequest()
        self.asked_to_stop = False  # all processes know that one of them was
        self.stopping = False  # and no step is under way any more
        self.pending_dev_eval = False  # an evaluation was due when the run was stopped
        # By resumes with --allow_changed: what a setting or fact was, and what it is since.
        self.changed: list[dict[str, Any]] = []
        plan = Plan(config, Path(cache), allow_changed)
        config = plan.config  # init_from is the checkpoint that it meant
        self.config, self.plan, self.data, self.order = config, plan, plan.data, plan.order
        self.processes, self.phases, self.num_steps = plan.processes, plan.phases, plan.num_steps
        self.global_batch_size, self.identity = plan.global_batch_size, plan.identity()
        self.output_dir = plan.output_dir
        self.step = 0
        self.packing = Event()  # set while a thread may pack: see `prefetch`
        self.packing.set()
        self.steps_taken = Counter[str]()  # by this process, in each phase
        # Sums over the statements since the last log.
        names = ("loss", "statement_loss", "relation_loss", "correct", "statements")
        self.window = dict.fromkeys(names, 0.0)
        main_steps = self.phases[-1].stop - self.phases[-1].start
        warmup, chance = num_warmup_steps(config, main_steps), chance_loss([s.label for s in self.data.train])
        self.monitor = LossMonitor(main_steps, warmup, chance)
        self.at_chance: LossWindow | None = None  # a window at chance that has not been reported yet
        self.processes.barrier()  # until all have looked: the main one is going to write there
        main = self.processes.is_main_process
        self.lock: OutputLock | None = None
        if main:
            self.lock = OutputLock(self.output_dir, "--output_dir")
            refuse_to_overwrite(self.output_dir, plan.resumed)  # again: now no other run writes there
        self.publisher = Publisher(config, self.output_dir) if main and config.push_to_hub else None
        set_up_torch(plan.gemma.dtype)
        kept = None if plan.sharded else kept
        self.model, self.data = load_model(plan.gemma, config, plan.data, plan.start, kept)
        self.packer: Packer = self.model.packer()
        self.sharded = plan.sharded
        # FSDP averages gradients; here they are sums.
        self.scale = self.processes.count if self.sharded else 1
        if self.sharded:
            self.model.shard()
        self.optimizer = make_optimizer(self.model, config)
        self.fused = self.model.gemma.device.type == "cuda" and not self.sharded
        self.failed = torch.zeros((), device=self.model.gemma.device)  # 1 after a step that is not finite
        if plan.resumed is not None:
            self._resume(plan.resumed)

    # ---- one step

    def microbatches(self, step: int) -> list[Microbatch]:
        """Return the micro-batches of this process at a step, put together on the host.

        They are its share of the step's statements, in gradient_accumulation_steps parts of about equal length.
        """
        config, phase = self.config, phase_of(self.phases, step)
        start = (step - phase.start) * self.global_batch_size
        parts = split_step(config, self.packer, self.order, start, self.processes.count)
        count = config.gradient_accumulation_steps
        own = parts[self.processes.rank * count : (self.processes.rank + 1) * count]
        if phase.name == "align":
            return [align_microbatch(self.model, self.data, part) for part in own if part]

        def made(part: list[Statement]) -> Microbatch:
            captions = self.data.captions_of(part, phase, config.seed, step)
            sources = self.data.latents, self.data.vision
            return make_microbatch(self.model, self.packer, part, *sources, captions=captions)

        if not self.sharded:
            return [made(part) for part in own if part]
        # Sharded processes work layer by layer together: one without a statement goes along, and counts for nothing.
        filled = next(part for part in parts if part)
        return [replace(made(part or filled[:1]), weight=float(bool(part))) for part in own]

    def train_step(self, microbatches: list[Microbatch] | None = None) -> dict[str, float]:
        """Take an optimizer step and return its learning rate and gradient norm.

        `microbatches` are those of this step, if they have been put together already.
        """
        microbatches = self.microbatches(self.step) if microbatches is None else microbatches
        return self._finish(self._launch(microbatches, self.step))

    def steps(self, coming: Iterable[list[Microbatch]]) -> Generator[dict[str, float], None, None]:
        """Take a step for each of `coming`, and yield what `train_step` returns.

        A GPU gets the kernels of a step while it computes the one before, so that it need not wait for the host;
        except where the weights after a step are read, by a checkpoint or an evaluation.
        """
        before: LaunchedStep | None = None
        for microbatches in coming:
            if not self.fused:
                yield self.train_step(microbatches)
                continue
            launched = self._launch(microbatches, self.step + (before is not None))
            if before is not None:
                yield self._finish(before, followed=True)
            before = launched
            if self.asked_to_stop or self._weights_are_read_after(launched.step + 1):
                before = None
                yield self._finish(launched)
        if before is not None:
            yield self._finish(before)

    def _launch(self, microbatches: list[Microbatch], step: int) -> LaunchedStep:
        """Do a step, but for its update where that is not left to the GPU. Nothing in here waits for a GPU."""
        phase, graphs = phase_of(self.phases, step), num_compiled_graphs()
        if step == phase.start and step > 0:
            self.optimizer = make_optimizer(self.model, self.config)  # another objective, so no old momentum
        rate = learning_rate(self.config, phase, step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["share"]
        device, scale = self.model.gemma.device, self.scale / self.global_batch_size
        sums = {name: torch.zeros((), device=device) for name in LOSSES}
        for microbatch in microbatches:
            with self._explaining_out_of_memory(microbatch, phase, step):
                losses = self._forward(microbatch.to(device), phase)
                (losses["total"] * (microbatch.weight * scale)).backward()
            for name in LOSSES:
                sums[name] += losses[name].detach() * microbatch.weight
        # `full` and not `tensor`, which would wait for the GPU.
        sums["stop_requests"] = torch.full((), float(self.stop.asked), device=device)
        parameters = list(self.model.trainable().values())
        summed = sum_over(self.processes, parameters, torch.stack(list(sums.values())), self.scale)
        norm = clip(parameters, self.config.max_grad_norm)
        if self.fused:
            # The kernel leaves out a step that is not finite and those after it, whenever the host comes to look.
            finite = torch.stack([summed[0], norm]).isfinite().all()
            self.failed = torch.maximum(self.failed, 1 - finite.float())
            self.optimizer.found_inf = self.failed  # type: ignore[attr-defined]
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        self._report_compiling(num_compiled_graphs() - graphs, phase, step + 1)
        return LaunchedStep(step, phase, rate, microbatches, *to_host(torch.cat([summed, norm[None]])))

    def _finish(self, launched: LaunchedStep, followed: bool = False) -> dict[str, float]:
        """Wait for a step and count it; `followed`: another one is launched already, and a stop waits for that."""
        *values, gradient_norm = self._read(launched)
        figures = dict(zip((*LOSSES, "stop_requests"), values, strict=True))
        if not (math.isfinite(figures["total"]) and math.isfinite(gradient_norm)):
            self.failed.zero_()  # whoever catches the error may go on
            total = figures["total"]
            raise not_finite(launched.step + 1, total, gradient_norm, launched.rate, launched.microbatches)
        self.asked_to_stop = self.asked_to_stop or figures["stop_requests"] > 0
        self.stopping = self.asked_to_stop and not followed
        if not self.fused:
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self._count(figures, launched.phase)
        return {"learning_rate": launched.rate, "gradient_norm": gradient_norm}

    def _read(self, launched: LaunchedStep) -> list[float]:
        """Return the figures of a step. This is its only wait for the device, and the time to pack for others."""
        self.packing.set()
        if launched.ready is not None:
            launched.ready.synchronize()
            self.packing.clear()
        return launched.figures.tolist()

    def _weights_are_read_after(self, step: int) -> bool:
        """Whether a checkpoint or an evaluation follows the `step`-th step."""
        evaluates = bool(self.data.dev) and step % self.config.eval_steps == 0
        return step == self.num_steps or step % self.config.save_steps == 0 or evaluates

    def _forward(self, microbatch: Microbatch, phase: Phase) -> dict[str, Tensor]:
        if phase.name == "align":
            return align_losses(self.model, microbatch)
        assert microbatch.batch is not None
        return self.model.losses(
            microbatch.batch, microbatch.latents, microbatch.vision, **phase.loss_weights
        )

    def _count(self, figures: dict[str, float], phase: Phase) -> None:
        """Add the sums of a step, over all processes, to the window since the last log."""
        step = {
            "loss": figures["label"],
            "statement_loss": figures["statement"],
            "relation_loss": figures["relation"],
            "correct": figures["correct"],
            "statements": self.global_batch_size,
        }
        for name, value in step.items():
            self.window[name] += value
        if phase.name == "train":
            self.at_chance = self.monitor.add(
                self.step - phase.start, figures["label"] / self.global_batch_size
            )

    def _report_compiling(self, graphs: int, phase: Phase, step: int) -> None:
        """Log that a step compiled anything after the first two of its phase in this process, whose code is for all
        lengths."""
        self.steps_taken[phase.name] += 1
        if graphs and self.steps_taken[phase.name] > 2:
            logger.warning(
                "step %d: compiled %d graphs anew, which takes seconds and should not happen after two steps; "
                "TORCH_LOGS=recompiles says why",
                step,
                graphs,
            )

    @contextmanager
    def _explaining_out_of_memory(self, microbatch: Microbatch, phase: Phase, step: int) -> Iterator[None]:
        """Raise OutOfMemory, with settings that would fit, where memory runs out within the block."""
        try:
            yield
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            start = 0 if phase.name == "align" else (step - phase.start) * self.global_batch_size
            raise out_of_memory(self.plan, step + 1, start, microbatch) from error

    # ---- the run

    def run(self) -> Path:
        """Train to the end, or until a request to stop (`stopped`), and return the last checkpoint."""
        main = self.processes.is_main_process
        if main:
            self.output_dir.mkdir(parents=True, exist_ok=True)
            logger.info("\n".join(self.plan.lines))
            clean_up_run(self.output_dir, self.plan.resumed, self.step, self.pending_dev_eval)
        settings = public_settings(self.config)
        trackers = (
            Trackers(self.config, settings, self.output_dir, self.step > 0, self.step) if main else None
        )
        last = self.plan.resumed.path if self.plan.resumed is not None else self.output_dir
        shown: dict[str, Any] = {"total": self.num_steps, "initial": self.step, "disable": not main}
        with (
            progress(desc="train", unit=" steps", smoothing=0.05, **shown) as bar,
            self.stop.working(),
            closing(self._packed()) as packed,
            closing(self.steps(packed)) as steps,
        ):
            if self.pending_dev_eval:
                self._log(self.evaluate_dev(), trackers, bar)
                self.pending_dev_eval = False
            start, done = time.perf_counter(), 0
            for figures in steps:
                bar.update()
                done += 1
                if self._due(self.config.logging_steps):
                    figures["statements_per_second"] = (
                        done * self.global_batch_size / (time.perf_counter() - start)
                    )
                    self._log(self._averages() | figures, trackers, bar)
                    start, done = time.perf_counter(), 0
                if self.at_chance is not None:
                    self._warn(self.at_chance, trackers, bar)
                if self.data.dev and self._due(self.config.eval_steps):
                    if self.stopped:
                        self.pending_dev_eval = True  # there may be no time for it now
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
        if self.lock is not None:
            self.lock.release()
        return last

    @property
    def stopped(self) -> bool:
        """Whether the run ends here on request, before its last step."""
        return self.stopping and self.step < self.num_steps

    def _packed(self) -> Generator[list[Microbatch], None, None]:
        """Yield the micro-batches of each step that is left, put together while the device computes others."""
        coming = (self.microbatches(step) for step in range(self.step, self.num_steps))
        return prefetch(coming, gate=self.packing)

    def _last_phase(self) -> Phase:
        """Return the phase of the last step."""
        return phase_of(self.phases, self.step - 1)

    def _due(self, every: int) -> bool:
        return self.step % every == 0 or self.step == self.num_steps

    def _averages(self) -> dict[str, float]:
        window, n = self.window, max(1.0, self.window["statements"])
        averages = {"loss": window["loss"] / n}
        phase = self._last_phase()
        if phase.name != "align":
            averages["accuracy"] = window["correct"] / n
            averages |= {f"{name}_loss": window[f"{name}_loss"] / n for name in phase.word_losses}
        self.window = dict.fromkeys(window, 0.0)
        return averages

    def evaluate_dev(self) -> dict[str, float]:
        """Return loss and accuracy on dev, with world tokens, and the next-word losses that count in this phase."""
        config, processes = self.config, self.processes
        dev = (self.data.dev, self.data.latents, self.data.vision)
        size = config.eval_statements
        logits = predict(self.model, *dev, batch_size=size, processes=processes)["world"]
        labels = np.array([s.label for s in self.data.dev])
        correct = (logits[:, 1] > logits[:, 0]) == (labels == 1)
        check_answers(self.step, self.data.dev, logits)
        figures = {"dev_loss": label_loss(logits, labels), "dev_accuracy": float(correct.mean())}
        words = self._last_phase().word_losses
        if self.data.captions is not None and "statement" in words:
            words.remove("statement")  # training reads other texts, the captions
        # In micro-batches of training: each word has logits of the whole vocabulary.
        losses = word_losses(self.model, *dev, words, config.batch_size, processes) if words else {}
        return figures | {f"dev_{name}_loss": value for name, value in losses.items()}

    def _warn(self, window: LossWindow, trackers: Trackers | None, bar: tqdm) -> None:
        """Report that the loss is at chance, and what to try."""
        gemma, shape = self.model.gemma, self.model.projection.shape
        on_patches = on_image_tokens(self.config, shape, gemma.num_image_tokens)
        same_places = on_patches and not gemma.trainable_parts
        if self.processes.is_main_process:
            logger.warning(warning(window, what_to_try(self.config, same_places)))
        self._log({f"watch_{name}": value for name, value in asdict(window).items()}, trackers, bar)

    def _log(self, figures: dict[str, float], trackers: Trackers | None, bar: tqdm) -> None:
        if trackers is None:
            return
        line = {
            "step": self.step,
            "epoch": self.step * self.global_batch_size / len(self.data.train),
            "phase": self._last_phase().name,
            **figures,
        }
        append(self.output_dir, line)
        trackers.log(figures, self.step)
        shown = {"loss": ".3f", "accuracy": ".1%", "dev_accuracy": ".1%", "statements_per_second": ".1f"}
        bar.set_postfix({k: format(figures[k], f) for k, f in shown.items() if k in figures})

    # ---- checkpoints

    def save(self) -> Path:
        """Publish checkpoint-<step>, then remove the oldest ones beyond save_total_limit; return the new one."""
        main, path = self.processes.is_main_process, self.output_dir / f"checkpoint-{self.step}"
        record = {"step": self.step, "window": self.window}
        record |= {"watch": self.monitor.state(), "owes_dev": self.pending_dev_eval} | self.identity
        record |= {"changed": self.changed}
        if main:
            sync(self.output_dir)
        if main or self.sharded:  # the others write their shares
            state = self.optimizer.state_dict()
            save_checkpoint(self.output_dir, self.step, self.model, state, record, main)
        if main:
            if self.publisher is not None:
                self.publisher.saved(path, self.plan.facts)
            rotate(self.output_dir, self.config.save_total_limit)
        self.processes.barrier()
        return path

    def _resume(self, point: ResumePoint) -> None:
        record = point.progress
        load_optimizer(self.optimizer, point)
        self.step, self.window = record["step"], self.window | record["window"]
        self.changed = record.get("changed", [])  # older checkpoints have none
        if self.plan.changed:
            self.changed = [*self.changed, {"after_step": self.step, "settings": self.plan.changed}]
        if "watch" in record:  # older checkpoints have none
            self.monitor.restore(record["watch"])
        self.pending_dev_eval = record.get("owes_dev", False)
