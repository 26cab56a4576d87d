"""Extractions that the tests run, kill and damage: photographs of noise, settings, and what became of them."""

import hashlib
import io
import json
import logging
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
from constants import EMBEDDED_VAE
from forks import fork, in_child
from PIL import Image

from theworld.config.config import Config, save_config
from theworld.utils.locks import OutputLock


def make_photographs(folder: Path, number: int, size: int) -> Config:
    """Settings of an extraction of so many photographs of noise, in shards of 8 and batches of 3."""
    generator = np.random.default_rng(0)
    (folder / "photographs").mkdir(parents=True)
    names = [f"{i:04}.png" for i in range(number)]
    for name in names:
        pixels = generator.integers(0, 256, (size, size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "photographs" / name)
    row = {"image_link": "", "caption": "The cat is on the mat.", "label": 1, "relation": "on"}
    (folder / "annotations").mkdir()
    for split, chosen in (("train", names), ("dev", names[:1]), ("test", names[:1])):
        lines = [json.dumps({"image": name, **row}) + "\n" for name in chosen]
        (folder / "annotations" / f"{split}.jsonl").write_text("".join(lines))
    config = Config(
        cosmos_model_name=str(EMBEDDED_VAE),
        annotations=str(folder / "annotations"),
        image_folder=str(folder / "photographs"),
        latent_size=32,
        shard_size=8,
        encode_batch_size=3,
        device="cpu",
        num_workers=0,
    )
    save_config(config, folder / "config.json")
    return config


def config_of(job: Path) -> Config:
    """The settings that `make_photographs` saved."""
    return Config(**json.loads((job / "config.json").read_text()))


def content(cache: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(p.relative_to(cache)): p.read_bytes() for p in sorted(cache.rglob("*")) if p.is_file()}


def sound(cache: Path) -> dict[str, bytes]:
    """Every file below a folder but those in a quarantine."""
    return {name: data for name, data in content(cache).items() if "/quarantine/" not in name}


def flip(path: Path, byte: int | None = None, bit: int = 2) -> None:
    """Another bit in a file, by default in its middle."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2 if byte is None else byte] ^= 1 << bit
    path.write_bytes(data)


# --- extractions in processes of their own, which can be killed ---------------------------------------


def run_extraction(
    job: str, cache: str, part: str | None, log: str, kill_at: tuple[str, int] | None = None
) -> None:
    """An extraction whose output goes to `log`. `kill_at`: ("before" or "after", n), the n-th rename."""
    descriptor = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    import torch

    from theworld.extraction.extract import extract
    from theworld.utils.console import configure_logging
    from theworld.utils.distributed import part_of

    configure_logging()
    torch.set_num_threads(1)
    if kill_at is not None:
        _kill_at_rename(*kill_at)
    extract(config_of(Path(job)), Path(cache), False, True, part_of(part) if part else None)


def _kill_at_rename(side: str, rename: int) -> None:
    real, count = os.replace, iter(range(10_000))

    def replace(source: Path, target: Path) -> None:
        kill = next(count) == rename
        if side == "after" or not kill:
            real(source, target)
        if kill:
            os.kill(os.getpid(), signal.SIGKILL)

    os.replace = replace  # type: ignore[assignment]


def start_extraction(
    job: Path, cache: Path, part: str | None = None, kill_at: tuple[str, int] | None = None
) -> BaseProcess:
    """A process that extracts; its output is in `log.txt` beside the cache."""
    log = cache.parent / f"{cache.name}.log"
    return fork(run_extraction, str(job), str(cache), part, str(log), kill_at)


def finish_extraction(job: Path, cache: Path) -> str:
    """Extract to the end in this process and return the lines of the log."""
    from theworld.extraction.extract import extract

    logger, lines = logging.getLogger("theworld"), io.StringIO()
    handler, level = logging.StreamHandler(lines), logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        assert extract(config_of(job), cache, False, True)
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
    return lines.getvalue()


def published(cache: Path) -> dict[str, bytes]:
    """Every file of a cache but the temporary ones of killed processes."""
    return {name: data for name, data in content(cache).items() if not name.endswith(".tmp")}


# --- outputs in use ------------------------------------------------------------------------------


@contextmanager
def held(output: Path, is_file: bool = False, before: Callable[[], object] = lambda: None) -> Iterator[int]:
    """A process that holds the lock of an output: its id."""
    receiver, sender = multiprocessing.Pipe(duplex=False)

    def work() -> None:
        before()
        with OutputLock(output, "--output", is_file):
            sender.send("held")
            time.sleep(60)

    child = in_child(work)
    try:
        assert receiver.poll(30)
        yield child
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


# --- processes that read a store ------------------------------------------------------------------


def read_twice(root: str, output: str) -> None:
    """Read all rows of a store twice; write their hash, and by how many KiB the memory of this process grew."""
    from theworld.extraction.features import CachedFeatures

    rows = CachedFeatures(Path(root))
    images = sorted(rows.reader.images)
    rows(images[:64])
    before, digest = _anonymous(), hashlib.sha256()
    for _ in range(2):
        for start in range(0, len(images), 16):
            digest.update(rows(images[start : start + 16]).numpy())
    Path(output).write_text(f"{digest.hexdigest()} {_anonymous() - before}")


def _anonymous() -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("RssAnon"))
