"""Looks over everything that a run needs before it starts, and says the cure of each fault, in one page."""

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import requires, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)
from packaging.requirements import Requirement

from theworld.cache import LATENTS, VISION, expected_latents, expected_vision, read_failures
from theworld.compare import check_photographs
from theworld.config import Config
from theworld.images import ImageError, read_image
from theworld.store import StoreReader, verify_store
from theworld.vsr import images_of, load_all
from theworld.weights import resolve_device

SAMPLE = 100  # photographs that are decoded; extraction decodes all
OK, NOTE, FAULT = "ok", "note", "FAULT"


@dataclass(frozen=True)
class Finding:
    """One line of the page."""

    topic: str
    state: str  # OK, NOTE or FAULT
    says: str
    cure: str = ""

    def __str__(self) -> str:
        cure = f"\n{'':<20}cure: {self.cure}" if self.cure else ""
        return f"{self.state:<6} {self.topic:<12} {self.says}{cure}"


def look_over(config: Config, cache: Path) -> list[Finding]:
    """What is well and what is not. Loads no model, changes nothing, and raises nothing that a check is for."""
    checks: list[tuple[str, Callable[[], Iterator[Finding]]]] = [
        ("libraries", lambda: _libraries()),
        ("device", lambda: _device(config)),
        ("Gemma", lambda: _model("Gemma", config.model_name, "config.json")),
        ("Cosmos VAE", lambda: _model("Cosmos VAE", config.cosmos_model_name, "vae/config.json")),
        ("rollout", lambda: _rollout(config)),
        ("photographs", lambda: _photographs(config)),
        ("latents", lambda: _store("latents", cache / LATENTS, expected_latents(config), config)),
        ("vision", lambda: _store("vision", cache / VISION, expected_vision(config), config)),
        ("compared", lambda: _compared(config, cache / LATENTS)),
    ]
    found: list[Finding] = []
    for topic, check in checks:
        try:
            found += check()
        except (ValueError, OSError) as error:
            found.append(Finding(topic, FAULT, str(error)))
    return found


def _libraries() -> Iterator[Finding]:
    wanted = [Requirement(text) for text in requires("theworld") or []]
    wrong = [
        r for r in wanted if r.marker is None and not r.specifier.contains(version(r.name), prereleases=True)
    ]
    for requirement in wrong:
        says = f"{requirement.name} {version(requirement.name)}; tested with {requirement.specifier}"
        yield Finding("libraries", NOTE, says, f"pip install '{requirement}'")
    if not wrong:
        yield Finding(
            "libraries", OK, ", ".join(f"{n} {version(n)}" for n in ("torch", "transformers", "diffusers"))
        )


def _device(config: Config) -> Iterator[Finding]:
    device = resolve_device(config.device)
    if device.type == "cpu":
        yield Finding("device", NOTE, "CPU, in float32: for the small models", "a machine with a CUDA GPU")
        return
    free, total = (size / 2**30 for size in torch.cuda.mem_get_info(device))
    says = f"{torch.cuda.get_device_name(device)}, {free:.0f} of {total:.0f} GiB free"
    yield Finding("device", OK if free > 0.8 * total else NOTE, says)


def _model(topic: str, name: str, file: str) -> Iterator[Finding]:
    if Path(name).is_dir():
        there = any((Path(name) / own).is_file() for own in (file, Path(file).name))
        cure = "" if there else "name a folder with a model, or its name on the hub"
        yield Finding(
            topic,
            OK if there else FAULT,
            f"{name}: a local folder{'' if there else f' without {file}'}",
            cure,
        )
        return
    try:
        hf_hub_download(name, file)
    except GatedRepoError:
        cure = f"accept the licence on https://huggingface.co/{name}, then export HF_TOKEN=hf_..."
        yield Finding(topic, FAULT, f"{name}: the licence is not accepted, or no token is set", cure)
    except RepositoryNotFoundError:
        yield Finding(
            topic, FAULT, f"{name}: no such model, or a private one", "check the name, and HF_TOKEN"
        )
    except LocalEntryNotFoundError:
        yield Finding(
            topic, FAULT, f"{name}: the hub cannot be reached", "check the network; or name a local folder"
        )
    except HfHubHTTPError as error:
        yield Finding(topic, FAULT, f"{name}: {str(error).splitlines()[0]}", "check the name, and HF_TOKEN")
    else:
        yield Finding(topic, OK, f"{name}: on the hub, and open to you")


def _rollout(config: Config) -> Iterator[Finding]:
    """What phase 1 takes beside the VAE where moments are predicted."""
    if config.num_world_steps:
        from theworld.rollout import check_rollout

        check_rollout(config)
        says = f"{config.cosmos_model_name}: a Video2World pipeline, and its guardrail is installed"
        yield Finding("rollout", OK, says)


def _photographs(config: Config) -> Iterator[Finding]:
    splits = load_all(config.annotations, config.dataset_name)
    counts = ", ".join(f"{len(own):,} {split}" for split, own in splits.items())
    names = images_of([s for own in splits.values() for s in own])
    yield Finding("statements", OK, f"{counts}, about {len(names):,} photographs")
    if config.image_folder is None:
        yield Finding("photographs", NOTE, "image_folder is not set", "--image_folder FOLDER, for extraction")
        return
    folder = Path(config.image_folder)
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        says = f"{len(missing):,} of {len(names):,} are not in {folder}, such as {missing[0]}"
        yield Finding(
            "photographs", FAULT, says, "get them (README, step 3), or extract with --allow_missing"
        )
        return
    sample = np.random.default_rng(0).permutation(names)[:SAMPLE]
    bad = []
    for name in sample.tolist():
        try:
            read_image(folder, name, config.max_image_pixels)
        except ImageError as error:
            bad.append(str(error))
    says = f"{len(names):,} in {folder}; {len(sample) - len(bad)} of {len(sample)} looked at can be read"
    cure = f"{bad[0]}: get it again" if bad else ""
    yield Finding("photographs", FAULT if bad else OK, says, cure)


def _store(topic: str, root: Path, expected: dict[str, Any], config: Config) -> Iterator[Finding]:
    if not root.exists():
        free = shutil.disk_usage(root.parent if root.parent.exists() else Path.cwd()).free / 2**30
        flag = " --gemma_vision" if topic == "vision" else ""
        cure = f"python tools/extract_latents.py --cache {root.parent}{flag}"
        yield Finding(topic, NOTE, f"{root} is not there yet; {free:.0f} GiB free", cure)
        return
    reader = StoreReader(root, expected)
    problems = verify_store(root)
    if problems:
        command = f"python tools/extract_latents.py --repair --cache {root.parent}"
        yield Finding(topic, FAULT, problems[0], f"{command}, with the settings of the extraction")
        return
    splits = load_all(config.annotations, config.dataset_name)
    left_out = read_failures(root.parent)
    names = images_of([s for own in splits.values() for s in own])
    missing = [name for name in names if name not in reader and name not in left_out]
    says = f"{len(reader):,} images, every byte as it was written" + (
        f"; {len(left_out):,} left out" if left_out else ""
    )
    cure = f"{len(missing):,} of the statements' images are not in it: extract again" if missing else ""
    yield Finding(topic, FAULT if missing else OK, says, cure)


def _compared(config: Config, root: Path) -> Iterator[Finding]:
    """Every photograph that is at hand with what was extracted."""
    folder = Path(config.image_folder or "")
    if config.image_folder is None or not folder.is_dir() or not (root / "manifest.json").exists():
        return
    yield Finding("compared", OK, check_photographs(StoreReader(root).images, folder))
