"""Extractions that the tests run, kill and damage: photographs of noise, settings, and what became of them."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

from theworld.config import Config, save_config

EMBEDDED_VAE = Path(__file__).parent.parent / "theworld" / "embedded" / "vae"


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


def flip(path: Path, byte: int | None = None, bit: int = 2) -> None:
    """Another bit in a file, by default in its middle."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2 if byte is None else byte] ^= 1 << bit
    path.write_bytes(data)
