"""Check everything that a run needs before it starts, on one page, with a hint for each fault."""

import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import TypeVar

import numpy as np
from packaging.requirements import Requirement

from theworld.config.cli import extraction_command
from theworld.config.config import Config
from theworld.data.images import ImageError, check_photographs, missing_photographs, read_image
from theworld.data.vsr import Statement, images_of, load_all, statements_at_hand
from theworld.extraction.extract import photographs_command
from theworld.models import world_encoder
from theworld.models.encoder import EncoderSpec, NotYetKnown
from theworld.models.fp8 import FP8_CAPABILITY
from theworld.models.gemma import is_multimodal
from theworld.models.gemma_vision import VisionEncoder
from theworld.models.serialization import checkpoint_step, list_checkpoints
from theworld.store.format import VISION, read_failures, read_manifest
from theworld.store.reader import StoreReader, verify_store
from theworld.training.checkpoint import latest_valid_checkpoint
from theworld.training.memory import sizes_of, training_bytes
from theworld.utils.commands import flags
from theworld.utils.device import memory_of, resolve_device
from theworld.utils.errors import explain
from theworld.utils.files import check_folder, check_room, free_bytes
from theworld.utils.hub import GEMMA_FILE, Fault, file_at_hand, locate
from theworld.utils.text import byte_size, counted

SAMPLE = 100  # photographs that are decoded; extraction decodes all
OK, NOTE, FAULT = "ok", "note", "FAULT"

Splits = dict[str, list[Statement]]
Result = TypeVar("Result")


@dataclass(frozen=True)
class Finding:
    """One line of the page."""

    topic: str
    state: str  # OK, NOTE or FAULT
    message: str
    hint: str = ""

    def __str__(self) -> str:
        hint = f"\n{'':<20}hint: {self.hint}" if self.hint else ""
        return f"{self.state:<6} {self.topic:<12} {self.message}{hint}"


def look_over(config: Config, cache: Path) -> list[Finding]:
    """Return what is in order and what is not. Loads no model, changes nothing, and raises no error that a check
    finds."""
    extract = extraction_command(config, cache)
    statements = once(lambda: _statements(config))
    checks: list[tuple[str, Callable[[], Iterator[Finding]]]] = [
        ("libraries", lambda: _libraries()),
        ("device", lambda: _device(config)),
        ("Gemma", lambda: _model("Gemma", config.model_name, GEMMA_FILE)),
        ("encoder", lambda: _world_encoder(config)),
        ("rollout", lambda: _rollout(config)),
        ("statements", lambda: _counts(statements())),
        ("photographs", lambda: _photographs(config, statements())),
        ("latents", lambda: _store("latents", _world(config), cache, extract, config, statements())),
        (
            "vision",
            lambda: _vision(cache, extraction_command(config, cache, "--gemma_vision"), config, statements),
        ),
        ("compared", lambda: _compared(config, cache)),
        ("output_dir", lambda: _output(config)),
    ]
    found: list[Finding] = []
    for topic, check in checks:
        try:
            found += check()
        except Fault as fault:
            found.append(_once(found, Finding(topic, FAULT, fault.message, fault.hint)))
        except (ValueError, OSError) as error:
            found.append(_once(found, Finding(topic, FAULT, explain(error, "doctor") or str(error))))
    return found


def once(make: Callable[[], Result]) -> Callable[[], Result]:
    """Return a function that does the work of `make` once, and then gives its result, or raises its error, again."""
    outcome: Future[Result] = Future()

    def get() -> Result:
        if not outcome.done():
            try:
                outcome.set_result(make())
            except (ValueError, OSError) as error:
                outcome.set_exception(error)
        return outcome.result()

    return get


def _once(found: list[Finding], fault: Finding) -> Finding:
    """Return a fault, or a note in its place if an earlier line has the same cause."""
    for earlier in found:
        if earlier.state == FAULT and earlier.message == fault.message:
            return Finding(fault.topic, NOTE, f"not looked at; see {earlier.topic} above")
    return fault


def _world(config: Config) -> EncoderSpec:
    return world_encoder.describe(config)


def _libraries() -> Iterator[Finding]:
    python = sys.version.split()[0]
    try:
        wanted = [Requirement(text) for text in requires("theworld") or []]
    except PackageNotFoundError:
        yield Finding(
            "libraries",
            NOTE,
            "theworld itself is not installed, so they are not looked at",
            "pip install -e .",
        )
        return
    wrong = False
    for requirement in (r for r in wanted if r.marker is None):
        hint = f"pip install '{requirement}'"
        try:
            have = version(requirement.name)
        except PackageNotFoundError:
            yield Finding(requirement.name, FAULT, "not installed", hint)
            wrong = True
            continue
        if not requirement.specifier.contains(have, prereleases=True):
            yield Finding(requirement.name, NOTE, f"{have}; tested with {requirement.specifier}", hint)
            wrong = True
    if not wrong:
        versions = ", ".join(f"{n} {version(n)}" for n in ("torch", "transformers", "diffusers"))
        yield Finding("libraries", OK, f"Python {python}, {versions}")


def _device(config: Config) -> Iterator[Finding]:
    device = resolve_device(config.device)
    have = memory_of(device)
    room = f"{byte_size(have.free)} of {byte_size(have.total)} free"
    if device.type == "cpu":
        hint = "a machine with a CUDA GPU, for models of the real size"
        yield Finding("device", NOTE, f"{have.name}, in float32, {room}: for the small models", hint)
    else:
        yield Finding("device", OK, f"{have.name}, {room}")
    if config.fp8 and (have.capability or (0, 0)) < FP8_CAPABILITY:
        message = f"fp8 is true, and {device.type} here has no 8-bit products; a Hopper GPU or newer has"
        yield Finding("fp8", FAULT, message, "--no-fp8")
    sizes = sizes_of(config.model_name)
    if sizes is None:
        return
    weights, kept = training_bytes(config, sizes)
    parts = f"weights {byte_size(weights)}, a micro-batch {byte_size(kept)}"
    need = f"with Gemma frozen training takes about {byte_size(weights + kept)}: {parts}"
    hint = "halve --batch_size and double --gradient_accumulation_steps; or --use_gradient_checkpointing"
    if weights > have.total:
        yield Finding("memory", FAULT, need, "a larger GPU, or a smaller Gemma")
    elif weights + kept > have.total:
        yield Finding("memory", FAULT, f"{need}, at most", hint)
    elif weights + kept > have.free:
        yield Finding(
            "memory", NOTE, f"{need}; other programs hold part of the memory", "end them, or " + hint
        )
    else:
        yield Finding("memory", OK, need)


def _model(topic: str, name: str, file: str) -> Iterator[Finding]:
    try:
        yield Finding(topic, OK, f"{name}: {locate(name, file).words}")
    except Fault as fault:
        yield Finding(topic, FAULT, fault.message, fault.hint)


def _world_encoder(config: Config) -> Iterator[Finding]:
    weights = _world(config).weights
    return iter(()) if weights is None else _model(*weights)


def _statements(config: Config) -> Splits:
    return statements_at_hand(config.annotations, config.dataset_name) or load_all(None, config.dataset_name)


def _rollout(config: Config) -> Iterator[Finding]:
    """Check what phase 1 needs beside the VAE where frames are predicted."""
    if config.num_world_steps:
        from theworld.models.rollout import check_rollout

        check_rollout(config)
        message = f"{config.cosmos_model_name}: a Video2World pipeline, and its guardrail is installed"
        yield Finding("rollout", OK, message)


def _counts(splits: Splits) -> Iterator[Finding]:
    counts = ", ".join(f"{len(own):,} {split}" for split, own in splits.items())
    yield Finding("statements", OK, f"{counts}, about {counted(len(_names(splits)), 'photograph')}")


def _names(splits: Splits) -> list[str]:
    return images_of([s for own in splits.values() for s in own])


def _photographs(config: Config, splits: Splits) -> Iterator[Finding]:
    names = _names(splits)
    if config.image_folder is None:
        yield Finding("photographs", NOTE, "image_folder is not set", "--image_folder FOLDER, for extraction")
        return
    folder = Path(config.image_folder)
    if not folder.is_dir():
        yield Finding(
            "photographs", FAULT, f"image_folder {folder}: not a folder", photographs_command(config)
        )
        return
    missing = missing_photographs(names, folder, config.follow_links)
    if missing:
        first, reason = next(iter(missing.items()))
        message = f"{len(missing):,} of {len(names):,} cannot be read, such as {first}: {reason}"
        hint = f"extract with --allow_missing (GUIDE.md, Photographs), or: {photographs_command(config)}"
        yield Finding("photographs", FAULT, message, hint)
        return
    sample = np.random.default_rng(0).permutation(names)[:SAMPLE]
    bad = []
    for name in sample.tolist():
        try:
            read_image(folder, name, config.max_image_pixels, config.follow_links)
        except ImageError as error:
            bad.append(str(error))
    message = f"{len(names):,} in {folder}; {len(sample) - len(bad)} of {len(sample)} looked at can be read"
    hint = f"{bad[0]}: get it again" if bad else ""
    yield Finding("photographs", FAULT if bad else OK, message, hint)


def _vision(cache: Path, command: str, config: Config, statements: Callable[[], Splits]) -> Iterator[Finding]:
    """Check the store of vision features, which a text-only Gemma has none of; once, where world tokens are made of
    them."""
    path = file_at_hand(config.model_name, GEMMA_FILE)
    if _world(config).name != VISION and (path is None or is_multimodal(str(path.parent))):
        yield from _store("vision", VisionEncoder.describe(config), cache, command, config, statements())


def _store(
    topic: str, spec: EncoderSpec, cache: Path, command: str, config: Config, splits: Splits
) -> Iterator[Finding]:
    root, names = cache / spec.name, _names(splits)
    if not spec.stored:
        yield Finding(topic, OK, f"world_encoder {config.world_encoder} reads none")
        return
    if not root.exists():
        check_folder(root, "--cache")
        yield Finding(topic, NOTE, f"{root} is not there yet; {_room(root, spec, len(names))}", command)
        return
    if read_manifest(root) is None:  # extraction goes on with it
        spec.check_store(root, config.shard_size)
    reader = StoreReader(root)
    spec.check_compatible(root, reader.fingerprint)
    problems = verify_store(root)
    if problems:
        yield Finding(topic, FAULT, problems[0], command)
        return
    left_out = read_failures(cache)
    missing = [name for name in names if name not in reader and name not in left_out]
    message = f"{counted(len(reader), 'image')}, every byte as it was written"
    message += f"; {len(left_out):,} left out" if left_out else ""
    hint = f"{len(missing):,} of the statements' images are not in it: extract again" if missing else ""
    yield Finding(topic, FAULT if missing else OK, message, hint)


def _compared(config: Config, cache: Path) -> Iterator[Finding]:
    """Compare every photograph that is on this machine with the hash it was extracted with."""
    root, folder = cache / _world(config).name, Path(config.image_folder or "")
    if config.image_folder is None or not folder.is_dir() or not (root / "manifest.json").exists():
        return
    yield Finding(
        "compared", OK, check_photographs(StoreReader(root).images, folder, follow_links=config.follow_links)
    )


def _room(root: Path, spec: EncoderSpec, num_images: int) -> str:
    """Return the size of a new store and the free room in words. Raises ValueError where that is not enough."""
    if isinstance(spec.row_shape, NotYetKnown):
        return f"{byte_size(free_bytes(root))} free"
    size = num_images * spec.array.row_nbytes
    return f"it takes {byte_size(size)}, {byte_size(check_room(root, size, '--cache'))} free"


def _output(config: Config) -> Iterator[Finding]:
    """Check whether a training could write its checkpoints."""
    folder = Path(config.output_dir)
    check_folder(folder, "--output_dir")
    found = latest_valid_checkpoint(config.resume_from) if config.resume_from else None
    resumed, skipped = (found.progress["step"], found.skipped) if found is not None else (-1, {})
    there = [p for p in list_checkpoints(folder) if p not in skipped and checkpoint_step(p) > resumed]
    for reason in skipped.values():
        yield Finding("output_dir", NOTE, f"skipped: {reason}", "")
    if there:
        message = (
            f"{folder} holds {', '.join(path.name for path in there)}, which a training would not overwrite"
        )
        hint = f"{flags('--resume_from', folder)} to go on with it, or another --output_dir"
        yield Finding("output_dir", FAULT, message, hint)
    else:
        yield Finding(
            "output_dir", OK, f"{folder}: {'resumed there' if resumed >= 0 else 'free for a training'}"
        )
