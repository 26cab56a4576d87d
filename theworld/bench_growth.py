"""How cost grows: with the images of a store, with the statements of an image, with the world tokens of an image."""

import hashlib
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from theworld.bench_models import num_world_tokens
from theworld.bench_results import spread
from theworld.bench_setup import Workbench
from theworld.chip import time_calls
from theworld.store import ArraySpec, ImageEntry, Store, StoreReader
from theworld.train import Trainer
from theworld.vsr import Statement

ROW = (16, 2, 2)  # of a tiny latent: what grows with the number of images is all that is left
READS = 2000
STATEMENTS_AN_IMAGE = (1, 2, 4, 8)


def growth_images(bench: Workbench) -> None:
    """Stores of tiny rows: to write, to open, to read at random."""
    for rows in bench.shapes.store_rows:
        with bench.results.attempt("growth_images", f"{rows:,} images"):
            root = bench.fresh("store") / "latents"
            start = time.perf_counter()
            _write_store(root, rows)
            figures = {"write_s": time.perf_counter() - start, **_read_store(root, rows)}
            bench.results.add("growth_images", f"{rows:,} images", figures)


def _write_store(root: Path, rows: int) -> None:
    images = [ImageEntry(f"{i:012}.jpg", hashlib.sha256(str(i).encode()).hexdigest()) for i in range(rows)]
    store = Store.create(root, {"about": "growth"}, images, [ArraySpec("latents", ROW, "float16")], 512)
    for shard in store.pending():
        values = np.ones((len(store.shard_rows(shard)), *ROW), np.float16)
        store.write_shard(shard, {"latents": values})
    store.publish()


def _read_store(root: Path, rows: int) -> dict[str, Any]:
    """Seconds to open, microseconds a read (the first of each shard opens it, so those come before), and memory."""
    before = _resident_mib()
    start = time.perf_counter()
    reader = StoreReader(root)
    opened = time.perf_counter() - start
    start = time.perf_counter()
    for row in range(0, rows, 512):
        reader.read(f"{row:012}.jpg", "latents")
    shards = time.perf_counter() - start
    chosen = np.random.default_rng(0).integers(0, rows, READS).tolist()
    start = time.perf_counter()
    for row in chosen:
        reader.read(f"{row:012}.jpg", "latents")
    read = (time.perf_counter() - start) / READS
    memory = _resident_mib() - before
    return {"open_s": opened, "open_shards_s": shards, "read_us": read * 1e6, "memory_mib": memory}


def _resident_mib() -> float:
    """Resident memory of this process (statm, second number, pages of 4 KiB)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20


def growth_statements(bench: Workbench) -> None:
    """The same number of statements about fewer and fewer images: what a shared prefix saves."""
    trainer = bench.trainer()
    size = max(trainer.config.batch_size, STATEMENTS_AN_IMAGE[-1])
    for count in STATEMENTS_AN_IMAGE:
        name = f"{count} an image"
        with bench.results.attempt("growth_statements", name):
            statements = _statements(size, count)
            tokens = trainer.packer.pack(statements).token_ids.numel()
            bench.free()
            call = _forward_and_backward(trainer, statements)
            seconds = time_calls(
                call, bench.device, bench.shapes.repeats, bench.shapes.warm_up, bench.shapes.steps
            )
            row = spread([size / s for s in seconds]) | {"unit": "statements/s", "tokens": tokens}
            row |= {"statements": size, "memory_gib": bench.peak_gib()}
            bench.results.add("growth_statements", name, row)


def _statements(number: int, an_image: int) -> list[Statement]:
    captions = ("The cat is left of the laptop.", "The dog is in front of the bicycle.")
    return [
        Statement(f"{i // an_image}.jpg", captions[i % 2], i % 2, "left of", index=i) for i in range(number)
    ]


def _forward_and_backward(trainer: Trainer, statements: list[Statement]) -> Any:
    """A call that runs a step without its optimizer, on random latents and vision features already on the device."""
    gemma, shape = trainer.model.gemma, trainer.model.projection.shape
    images = len({s.image for s in statements})
    latents = torch.randn(images, *shape.latent_shape, device=gemma.device)
    width = int(gemma.model.config.vision_config.hidden_size)
    vision = torch.randn(images, gemma.num_image_tokens, width, device=gemma.device, dtype=gemma.dtype)
    weights = list(trainer.model.trainable().values())

    def call() -> None:
        batch = trainer.packer.pack(statements).to(gemma.device)
        losses = trainer.model.losses(batch, latents, vision)
        torch.autograd.backward(losses["total"], inputs=weights)
        for weight in weights:
            weight.grad = None

    return call


def growth_tokens(bench: Workbench) -> None:
    """More and more world tokens an image, a new run for each; batches of fewer statements where they are many."""
    for patch in bench.shapes.world_patches:
        tokens = num_world_tokens(bench.shapes, patch)
        name = f"{tokens:,} world tokens"
        # As many tokens in a pass as 16 images with 1,024 world tokens have.
        size = max(1, min(bench.shapes.batch_size, 16 * 1024 // tokens))
        with bench.results.attempt("growth_tokens", name):
            row = bench.train_row(world_patch=patch, batch_size=size)
            bench.results.add("growth_tokens", name, row | {"batch_size": size})
        bench.free()
