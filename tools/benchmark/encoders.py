"""Measure the machine, the encoders and phase 1, and how cost grows with images, statements and world tokens."""

import hashlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from benchmark.chip import (
    copy_bytes_per_second,
    matmul_flops_per_second,
    time_calls,
    vae_encode_flops,
    vision_flops,
)
from benchmark.end_to_end import VaePixels, extract_plainly
from benchmark.models import draw_photograph, num_world_tokens, statement_images
from benchmark.results import spread
from benchmark.setup import Workbench, quietly, run_tool
from diffusers import AutoencoderKLWan
from torch import Tensor
from transformers import AutoConfig

from theworld.data.images import decode
from theworld.data.square import square
from theworld.data.vsr import Statement
from theworld.extraction.extract import extract
from theworld.models.cosmos import CosmosEncoder, load_vae, unit_range
from theworld.store.reader import StoreReader
from theworld.store.shard import ArraySpec, ImageEntry
from theworld.store.writer import Store
from theworld.training.trainer import Trainer

PLAIN_IMAGES = 1024  # at most, for the plain loop: its rate does not depend on how many there are


def part_chip(bench: Workbench) -> None:
    """Measure the machine's rates, and derive the floors of the frozen models."""
    cuda = bench.device.type == "cuda"
    size = 8192 if cuda else 1024
    bench.rates["flops"] = matmul_flops_per_second(bench.device, bench.dtype, size)
    bench.rates["bytes"] = copy_bytes_per_second(bench.device, 2**32 if cuda else 2**27)
    dtype = str(bench.dtype).removeprefix("torch.")
    bench.results.add(
        "chip",
        "matmul",
        {"rate": bench.rates["flops"] / 1e12, "unit": "TFLOP/s", "size": size, "dtype": dtype},
    )
    bench.results.add(
        "chip", "copy", {"rate": bench.rates["bytes"] / 1e9, "unit": "GB/s", "counts": "read + write"}
    )
    config, rate = bench.config(), bench.rates["flops"]
    with bench.results.attempt("chip", "floors"):
        counted = vae_encode_flops(config.cosmos_model_name, config.latent_size)
        for name, flops in (("VAE floor", counted["frame"]), ("VAE floor as it is", counted["as_it_is"])):
            bench.results.add("chip", name, {"rate": rate / flops, "unit": "images/s", "gflop": flops / 1e9})
        flops = vision_flops(AutoConfig.from_pretrained(config.model_name).vision_config)
        bench.results.add(
            "chip", "SigLIP floor", {"rate": rate / flops, "unit": "images/s", "gflop": flops / 1e9}
        )


# ---- phase 1


def part_encode(bench: Workbench) -> None:
    """Measure encoding from pixels on the device to latents: diffusers and TheWorld, in turns."""
    config, size, device = bench.config(), bench.shapes.encode_batch_size, bench.device
    count = size * (4 if device.type == "cuda" else 1)
    pixels = torch.rand(count, 3, config.latent_size, config.latent_size, device=device) * 2 - 1
    vae = AutoencoderKLWan.from_pretrained(config.cosmos_model_name, torch_dtype=bench.dtype)
    vae = vae.to(device).eval().requires_grad_(False)
    # As phase 1 makes it with these settings: compiled on CUDA.
    encoder = CosmosEncoder(config.cosmos_model_name, bench.dtype, device, device.type == "cuda")

    @torch.inference_mode()
    def as_it_is(batch: Tensor) -> Tensor:
        return vae.encode(batch[:, :, None].to(device, bench.dtype)).latent_dist.mode().cpu()

    def ours(batch: Tensor) -> Tensor:
        return encoder.encode(batch).cpu()

    def run(encode: Callable[[Tensor], Tensor], batch_size: int) -> Callable[[], None]:
        def call() -> None:
            for batch in pixels.split(batch_size):
                encode(batch)

        return call

    baseline_size = bench.shapes.baseline_batch_size
    kinds = {"diffusers as it is": run(as_it_is, baseline_size), "ours": run(ours, size)}
    memory = {}
    for name, call in kinds.items():
        bench.free()
        call()
        memory[name] = bench.peak_gib()
    seconds = in_turns(kinds, bench)
    flops = vae_encode_flops(config.cosmos_model_name, config.latent_size)["frame"]
    for name, batch_size in (("diffusers as it is", baseline_size), ("ours", size)):
        row = spread([count / s for s in seconds[name]]) | {"unit": "images/s", "batch_size": batch_size}
        row |= {"mfu": flops * row["rate"] / bench.rates["flops"], "memory_gib": memory[name]}
        bench.results.add("encode", name, row)
    with bench.results.attempt("encode", "error"):
        bench.results.add("encode", "error", _encoding_error(bench, encoder))


def _encoding_error(bench: Workbench, encoder: CosmosEncoder) -> dict[str, float]:
    """Return the relative error of phase 1's latents against diffusers in float32, over a batch of photographs.

    It is the norm of the difference over the norm, of all photographs together and of the worst one.
    """
    config, size = bench.config(), bench.shapes.encode_batch_size
    drawn = [decode(draw_photograph(seed, bench.shapes.photograph), str(seed)) for seed in range(4)]
    one = torch.from_numpy(np.stack([square(pixels, config.latent_size) for pixels in drawn]))
    pixels = one.permute(0, 3, 1, 2)[torch.arange(size) % 4].contiguous()
    vae = load_vae(config.cosmos_model_name).to(bench.device).eval()
    exactly = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    with torch.inference_mode():
        frames = torch.stack([unit_range(p.to(bench.device)) for p in pixels[:4]])
        wanted = torch.cat([vae.encode(f[None, :, None]).latent_dist.mode()[:, :, 0] for f in frames])
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = exactly
    found = encoder.encode(pixels)[:4].float()
    each = (found - wanted).flatten(1).norm(dim=1) / wanted.flatten(1).norm(dim=1)
    return {"relative": float((found - wanted).norm() / wanted.norm()), "worst": float(each.max())}


def in_turns(kinds: dict[str, Callable[[], Any]], bench: Workbench) -> dict[str, list[float]]:
    """Return the seconds of each call, in turns (A B A B ...); each was called once before."""
    seconds: dict[str, list[float]] = {name: [] for name in kinds}
    for _ in range(bench.shapes.repeats):
        for name, call in kinds.items():
            seconds[name] += time_calls(call, bench.device, 1, warm_up=0)
    return seconds


def part_extract(bench: Workbench) -> None:
    """Measure JPEG files to stored latents: a plain diffusers loop and TheWorld in turns, then the cold command."""
    images = len(statement_images(Path(str(bench.config().annotations))))
    counts = {"plain loop": min(images, PLAIN_IMAGES), "ours": images}
    seconds: dict[str, list[float]] = {"plain loop": [], "ours": []}
    for _ in range(min(2, bench.shapes.repeats)):
        seconds["plain loop"].append(_plain_extraction(bench))
        seconds["ours"].append(_own_extraction(bench))
    for name, own in seconds.items():
        count = counts[name]
        row = spread([count / s for s in own]) | {"unit": "images/s", "images": count, "seconds": min(own)}
        bench.results.add("extract", name, row)
    with bench.nothing_compiled():  # the second one finds what the first one has compiled
        for name, with_vision in (("command with vision", True), ("command, compiled before", False)):
            with bench.results.attempt("extract", name):
                taken, said = _extract_command(bench, with_vision)
                row = {"rate": images / taken, "unit": "images/s", "seconds": taken, "says": said}
                share = _share_of_floor(bench, images, with_vision, taken)
                bench.results.add("extract", name, row | {"mfu": share})


def _share_of_floor(bench: Workbench, images: int, with_vision: bool, seconds: float) -> float | None:
    """Return the share of `seconds` in which the models of phase 1 could have done their work; None if the machine's
    rate is not known."""
    names = ("VAE floor", "SigLIP floor") if with_vision else ("VAE floor",)
    rates = [rate for name in names if (rate := bench.results.rate("chip", name))]
    return sum(images / rate for rate in rates) / seconds if len(rates) == len(names) else None


def _own_extraction(bench: Workbench) -> float:
    """Return the seconds of phase 1 without vision features, into an empty folder, in this process."""
    bench.free()
    torch._dynamo.reset()  # what one run compiled, a new one compiles again
    config, target = bench.config(), bench.fresh("own")
    start = time.perf_counter()
    with quietly():
        extract(config, target, with_vision=False, allow_missing=False)
    return time.perf_counter() - start


def _plain_extraction(bench: Workbench) -> float:
    """Return the seconds of a plain diffusers loop."""
    bench.free()
    config, target = bench.config(), bench.fresh("plain")
    images = statement_images(Path(str(config.annotations)))[:PLAIN_IMAGES]
    photographs = VaePixels(images, str(config.image_folder), config.latent_size)
    size, workers = bench.shapes.baseline_batch_size, bench.cores
    start = time.perf_counter()
    extract_plainly(config.cosmos_model_name, photographs, target, size, workers, bench.dtype, bench.device)
    return time.perf_counter() - start


def _extract_command(bench: Workbench, with_vision: bool) -> tuple[float, str]:
    """Return the seconds of tools/extract_latents.py from its start, and its lines of rates.

    A cache with vision features is used by the next parts, if they have none yet.
    """
    wanted = with_vision and not bench.has_cache()
    target = bench.cache_folder if wanted else bench.fresh("extract")
    flags = ["--gemma_vision"] if with_vision else []
    seconds, output = run_tool("extract_latents.py", bench.config(), target, flags)
    return seconds, "; ".join(
        line.strip() for line in output.splitlines() if "bound by" in line and "%" not in line
    )


ROW = (16, 2, 2)  # a tiny latent, so that only the cost of the number of images is left
READS = 2000
STATEMENTS_AN_IMAGE = (1, 2, 4, 8)


def growth_images(bench: Workbench) -> None:
    """Measure writing, opening and randomly reading stores of tiny rows."""
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
    """Return the seconds to open, the microseconds of a read from an open shard, and the memory."""
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
    """Return the resident memory of this process (second number of statm, pages of 4 KiB), in MiB."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20


def growth_statements(bench: Workbench) -> None:
    """Measure the same number of statements about fewer and fewer images: the gain of a shared prefix."""
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
    """Return a call of forward and backward on random latents and vision features that are on the device."""
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
    """Measure more and more world tokens for each image, in a new run each; with smaller batches if there are many."""
    for patch in bench.shapes.world_patches:
        tokens = num_world_tokens(bench.shapes, patch)
        name = f"{tokens:,} world tokens"
        # As many tokens in a pass as 16 images with 1,024 world tokens have.
        size = max(1, min(bench.shapes.batch_size, 16 * 1024 // tokens))
        with bench.results.attempt("growth_tokens", name):
            row = bench.train_row(world_patch=patch, batch_size=size)
            bench.results.add("growth_tokens", name, row | {"batch_size": size})
        bench.free()
