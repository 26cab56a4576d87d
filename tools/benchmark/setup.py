"""What all measurements use: model folders, data, a cache, trainers, and the time and FLOPs of a step.

The package is measured from outside, by patching its functions; nothing in it exists for a measurement.
"""

import gc
import io
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from dataclasses import dataclass, field
from itertools import count, pairwise
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from benchmark.chip import language_flops, projection_flops, synchronize, time_calls, work_of
from benchmark.models import (
    Shapes,
    make_gemma_folder,
    make_vae_folder,
    statement_images,
    write_photographs,
    write_random_cache,
    write_statements,
)
from benchmark.results import Results, Row, spread

import theworld
from theworld.config.config import Config, load_config, save_config
from theworld.data.vsr import Statement, load_statements
from theworld.extraction.batches import prefetch
from theworld.extraction.extract import extract
from theworld.models.packing import Batch, Packer
from theworld.models.theworld import TheWorld
from theworld.training.trainer import Trainer


@contextmanager
def quietly() -> Iterator[None]:
    """Hide the output of other code, so that the terminal shows figures; progress bars and errors stay."""
    with redirect_stdout(io.StringIO()):
        yield


@contextmanager
def packed_batches() -> Iterator[list[Batch]]:
    """Collect the batches that any thread packs inside the block."""
    batches: list[Batch] = []
    pack = Packer.pack

    def kept(packer: Packer, *arguments: Any, **options: Any) -> Batch:
        batches.append(pack(packer, *arguments, **options))
        return batches[-1]

    with patch.object(Packer, "pack", kept):
        yield batches


@contextmanager
def stopwatch(device: torch.device) -> Iterator[dict[str, float]]:
    """Collect the seconds in pack, forward, backward and optimizer inside the block, on the main thread.

    Waiting for the device after each makes a step a little slower.
    """
    seconds: dict[str, float] = {}

    def timed(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*arguments: Any, **options: Any) -> Any:
            if threading.current_thread() is not threading.main_thread():
                return call(*arguments, **options)
            synchronize(device)
            start = time.perf_counter()
            result = call(*arguments, **options)
            synchronize(device)
            seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - start
            return result

        return wrapper

    places: list[tuple[str, Any, str]] = [
        ("pack", Packer, "pack"),
        ("forward", TheWorld, "losses"),
        ("backward", torch.Tensor, "backward"),
        ("optimizer", torch.optim.AdamW, "step"),
    ]
    with ExitStack() as stack:
        for name, owner, attribute in places:
            stack.enter_context(patch.object(owner, attribute, timed(name, getattr(owner, attribute))))
        yield seconds


TOOLS = Path(__file__).parent.parent
EMBEDDED = Path(theworld.__file__).parent / "embedded"
# With this question and the stand-in's tokenizer a statement takes as many tokens, about 42, as a VSR statement with
# Gemma's tokenizer and the default question_template.
QUESTION = "Look at the picture. Statement: {caption} Is this true or false?\nAnswer (only '0' or '1'):"


@dataclass
class Workbench:
    """A machine, a size of models and data, and a folder for everything that is made."""

    shapes: Shapes
    folder: Path
    results: Results
    device: torch.device
    annotations: Path | None = None  # VSR's own; None: stand-ins
    image_folder: Path | None = None  # COCO's photographs; None: stand-ins
    variants: tuple[str, ...] = ()  # names of VARIANTS to measure
    changes: dict[str, Any] = field(default_factory=dict)  # settings of every measured run
    random_cache: bool = False  # instead of an extracted one
    rates: dict[str, float] = field(default_factory=dict)  # of the chip: flops and bytes a second

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype of the frozen models."""
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32

    @property
    def cores(self) -> int:
        return len(os.sched_getaffinity(0))

    @property
    def data_folder(self) -> Path:
        share = f"{self.shapes.share:g}" if self.annotations is None else "given"
        return self.folder / f"data-{self.shapes.name}-{share}"

    def config(self, **changes: Any) -> Config:
        """Return the default settings with `changes` on top, for a run that does not evaluate or end by itself."""
        settings: dict[str, Any] = {
            "model_name": str(self.folder / f"gemma-{self.shapes.name}"),
            "cosmos_model_name": str(self.folder / f"vae-{self.shapes.name}"),
            "annotations": str(self.annotations or self.data_folder),
            "image_folder": str(self.image_folder or self.data_folder / "images"),
            "question_template": QUESTION,
            "latent_size": self.shapes.latent_size,
            "encode_batch_size": self.shapes.encode_batch_size,
            "batch_size": self.shapes.batch_size,
            "gradient_accumulation_steps": 1,
            "num_epochs": 1000,
            "do_eval": False,
            "log_to_tensorboard": False,
            "device": str(self.device),
            "output_dir": str(self.folder / "runs" / "unused"),
        }
        # The patch that gives as many world tokens as image tokens, as the default world_patch does for Gemma: 256.
        side = self.shapes.latent_size // 8
        settings["world_patch"] = max(1, side // math.isqrt(self.shapes.image_tokens))
        return load_config(None, settings | self.changes | changes)

    def prepare(self) -> None:
        """Make the models, statements and photographs that are missing, and print how long each took."""
        config, shapes = self.config(), self.shapes
        self.folder.mkdir(parents=True, exist_ok=True)
        with self._told("Gemma"):
            folder = Path(config.model_name)
            make_gemma_folder(folder, shapes, EMBEDDED / "gemma", self.dtype, str(self.device))
        with self._told("VAE"):
            make_vae_folder(Path(config.cosmos_model_name), shapes)
        if self.annotations is None and not (self.data_folder / "train.jsonl").exists():
            write_statements(self.data_folder, shapes.share)
        if self.image_folder is None:
            with self._told("photographs"):
                target = self.data_folder / "images"
                names = [
                    n for n in statement_images(Path(str(config.annotations))) if not (target / n).exists()
                ]
                # starting processes takes longer than drawing a few
                workers = self.cores if self.cores > 2 else 1
                write_photographs(target, names, shapes.num_pictures, workers, shapes.photograph)
        self.free()

    @contextmanager
    def _told(self, what: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        print(f"made {what} in {time.perf_counter() - start:.1f} s", flush=True)

    @property
    def cache_folder(self) -> Path:
        return self.folder / f"cache-{self.data_folder.name}"

    def has_cache(self) -> bool:
        """Return whether both stores of the cache are finished."""
        stores = (self.cache_folder / name / "manifest.json" for name in ("latents", "gemma_vision"))
        return all(path.exists() for path in stores)

    def cache(self) -> Path:
        """Return the finished cache of latents and vision features, extracted if it is missing."""
        if not self.has_cache():
            with self._told("cache"), quietly():
                if self.random_cache:
                    write_random_cache(self.config(), self.cache_folder, self.dtype, self.device)
                else:
                    extract(self.config(), self.cache_folder, with_vision=True, allow_missing=False)
            self.free()
        return self.cache_folder

    def fresh(self, name: str) -> Path:
        """Make an empty folder for one measurement."""
        runs = self.folder / "runs"
        runs.mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(prefix=f"{name}-", dir=runs))

    @contextmanager
    def nothing_compiled(self) -> Iterator[None]:
        """Give the tools that are run within the block an empty folder for compiled code, as on a new machine."""
        with patch.dict(os.environ, {"TORCHINDUCTOR_CACHE_DIR": str(self.fresh("compiled"))}):
            yield

    def trainer(self, **changes: Any) -> Trainer:
        """Return the trainer of a new run on the cache."""
        return Trainer(self.config(**({"output_dir": str(self.fresh("train"))} | changes)), self.cache())

    def free(self) -> None:
        """Release the memory of dropped objects, and reset the peak."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)

    def peak_gib(self) -> float | None:
        """Return the peak of allocated GPU memory since `free`, in GiB; None on a CPU."""
        if self.device.type != "cuda":
            return None
        return torch.cuda.max_memory_allocated(self.device) / 2**30

    def held_gib(self) -> float:
        """Return the allocated GPU memory, in GiB; 0 on a CPU."""
        return torch.cuda.memory_allocated(self.device) / 2**30 if self.device.type == "cuda" else 0.0

    def clean(self) -> None:
        """Remove the folders of single measurements; models, data and cache stay for the next run."""
        shutil.rmtree(self.folder / "runs", ignore_errors=True)

    # ---- training

    def call_seconds(self, call: Callable[[], Any], calls: int) -> list[float]:
        """Return the seconds of each call, up to the end of the device's work."""
        return [s for _ in range(calls) for s in time_calls(call, self.device, 1, warm_up=0)]

    def step_seconds(self, step: Callable[[], Any], steps: int) -> list[float]:
        """Return the seconds from the end of each step to the end of the next, without another wait, as in a run."""
        ends = [time.perf_counter()]
        for _ in range(steps):
            step()
            ends.append(time.perf_counter())
        return [after - before for before, after in pairwise(ends)]

    def train_row(self, **changes: Any) -> Row:
        """Return speed, memory and start-up time of a run with these settings."""
        self.free()
        torch._dynamo.reset()
        start = time.perf_counter()
        trainer = self.trainer(**changes)
        loaded, load_peak = time.perf_counter() - start, self.peak_gib()
        self.free()  # for the peak of the steps alone
        step = stepper(trainer)
        first = self.call_seconds(step, self.shapes.warm_up)[0]
        seconds = self.step_seconds(step, self.shapes.repeats * self.shapes.steps)
        statements = statements_a_step(trainer.config)
        # The step that the estimate of memory is of, which may not have been among the others.
        heaviest = trainer.phases[-1].start + trainer.plan.heaviest_start // trainer.global_batch_size
        trainer.train_step(trainer.microbatches(heaviest))
        peak, estimate = self.peak_gib(), trainer.plan.memory.total / 2**30
        row = spread([statements / s for s in seconds]) | {
            "unit": "statements/s",
            # The weight gradients of a trained Gemma are not counted.
            "mfu": None
            if trainer.model.gemma.trainable_parts
            else self.mfu(trainer, statistics.median(seconds)),
            "memory_gib": peak,
            "estimated_gib": estimate,
            "estimate_error": None if peak is None else estimate / peak - 1,
            "load_s": loaded,
            "load_gib": load_peak,
            "first_step_s": first,
            "step_s": statistics.median(seconds),
        }
        del trainer, step
        self.free()
        return row

    def step_flops(self, trainer: Trainer, steps: int = 4) -> dict[str, float]:
        """Return the mean FLOPs of an optimizer step (see `benchmark.chip.language_flops`) and its mean tokens."""
        batches = [
            one.batch for step in range(steps) for one in trainer.microbatches(step) if one.batch is not None
        ]
        works = [work_of(batch, trainer.model.gemma.sliding_window) for batch in batches]
        projection = projection_flops(trainer.model.projection.shape)
        counted = language_flops(trainer.model.gemma.text_config, works, projection)
        counted["tokens"] = float(sum(work.tokens for work in works))
        counted["padded"] = float(sum(batch.token_ids.numel() for batch in batches))
        return {name: value / steps for name, value in counted.items()}

    def mfu(self, trainer: Trainer, seconds: float) -> float | None:
        """Return the MFU of a step of `seconds`; None if the rate of the chip was not measured."""
        if "flops" not in self.rates:
            return None
        counted = self.step_flops(trainer)
        return (counted["forward"] + counted["backward"]) / seconds / self.rates["flops"]


def stepper(trainer: Trainer) -> Callable[[], Any]:
    """Return a call that waits for the next optimizer step, with a thread that prepares its data, as in a run."""
    coming = (trainer.microbatches(step) for step in count(trainer.step))
    steps = trainer.steps(prefetch(coming, gate=trainer.packing))
    return lambda: next(steps)


def statements_a_step(config: Config) -> int:
    """Return the number of statements in an optimizer step of one process."""
    return config.batch_size * config.gradient_accumulation_steps


def branch_tokens(packer: Packer, config: Config) -> Row:
    """Return the tokens of a statement's own branch and of the prefix of an image, over 500 statements."""

    def tokens(*statements: Statement) -> int:
        return int((packer.pack(statements).preorder >= 0).sum())

    statements = load_statements(config.annotations, "train", config.dataset_name)[:500]
    own = [tokens(s, s) - tokens(s) for s in statements]
    shared = tokens(statements[0]) - own[0]
    return {
        "branch_tokens": statistics.mean(own),
        "shortest": min(own),
        "longest": max(own),
        "shared_tokens": shared,
    }


def metrics(output_dir: Path) -> list[Row]:
    """Return the lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]


def run_tool(
    tool: str, config: Config, cache: Path, flags: list[str], processes: int = 1
) -> tuple[float, str]:
    """Return the seconds of a tool from a cold start, and its output. Raises RuntimeError with its last lines."""
    settings = Path(config.output_dir).parent / f"{tool}-{os.getpid()}.json"
    settings.parent.mkdir(parents=True, exist_ok=True)
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command = [sys.executable, *(launcher if processes > 1 else []), str(TOOLS / tool)]
    keys = [*command, "--config", str(settings), "--cache", str(cache), *flags]
    save_config(config, settings)
    start = time.perf_counter()
    said = run_command(keys)
    return time.perf_counter() - start, said


def run_command(command: list[str], **variables: str) -> str:
    """Return the output of a command that uses this package. Raises RuntimeError with its last lines if it fails."""
    path = os.pathsep.join(
        [str(TOOLS.parent), str(TOOLS), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    )
    environment = os.environ | {"PYTHONPATH": path.rstrip(os.pathsep)} | variables
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=TOOLS.parent)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command[1:4])} ended with {done.returncode}: {done.stderr[-400:]}")
    return done.stderr + done.stdout
