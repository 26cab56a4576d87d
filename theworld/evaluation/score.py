"""Checkpoints scored on a split: from a cache, or from photographs alone.

Which statements are scored, and what of them the training of the scored checkpoints had.

Where results come from: what stands beside a file of records, so that they can be made again.
"""

import json
import logging
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

import theworld
from theworld.config.config import Config, load_config
from theworld.data.vsr import RELEASES, Statement, dataset_label, load_statements, seen_images
from theworld.evaluation.conditions import checkpoint_of
from theworld.evaluation.metrics import write_summary
from theworld.evaluation.predict import possible_conditions, predict
from theworld.evaluation.records import Row, publish_json, records, write_jsonl
from theworld.extraction.batches import FeatureSource
from theworld.extraction.extract import stores_of
from theworld.extraction.features import (
    OnTheFlyLatents,
    OnTheFlyVision,
    cached_vision,
    in_cache,
    latents_for,
    vision_note,
    vision_source,
)
from theworld.models.gemma import load_gemma
from theworld.models.serialization import CONFIG_FILE, INDEX, checkpoint_step, find_model, read_world
from theworld.models.theworld import TheWorld
from theworld.store.reader import StoreReader
from theworld.utils.device import count_parameters
from theworld.utils.files import canonical_sha256, check_output, hash_file
from theworld.utils.hub import model_id

logger = logging.getLogger(__name__)

Load = Callable[[str | None, str, str], list[Statement]]  # as `load_statements`


@dataclass(frozen=True)
class HeldOut:
    """A split to score; the training data is that of all checkpoints together."""

    statements: list[Statement]
    split: str
    dataset: str  # see `theworld.data.vsr.dataset_label`
    annotations: str | None  # None: the hub
    image_folder: str | None
    seen_images: set[str]  # those of the split that training had
    in_train: set[tuple[str, str]]  # (image, caption) of the statements that training had
    trained_on: dict[str, str]  # for each checkpoint in words


def held_out(
    checkpoints: Mapping[str, Path],
    split: str,
    overrides: Mapping[str, Any],
    train_annotations: str | None = None,
    allow_trained: bool = False,
    load: Load = load_statements,
) -> HeldOut:
    """The split that the checkpoints' settings name, with `overrides` on top, and what training had of it.

    What a checkpoint was trained on is in its own settings and in those of the stages before it, whatever `overrides`
    say; `train_annotations` is where the statements of all stages lie now, if they moved. Raises ValueError where
    checkpoints name different splits, where training statements are not found, and, unless `allow_trained`, for a split
    of one release of VSR and a checkpoint of the other, since the releases share statements. `load` reads statements.
    """
    settings = {name: load_config(path / CONFIG_FILE, overrides) for name, path in checkpoints.items()}
    sources = {name: (c.annotations, c.dataset_name) for name, c in settings.items()}
    if len(set(sources.values())) > 1:
        found = "; ".join(f"{name}: {a or 'the hub'}, {d}" for name, (a, d) in sources.items())
        raise ValueError(
            f"the checkpoints' settings name different statements ({found}); give --annotations and --dataset_name"
        )
    annotations, dataset_name = next(iter(sources.values()))
    statements = load(annotations, split, dataset_name)
    dataset = dataset_label(dataset_name, split, len(statements))
    in_train: set[tuple[str, str]] = set()
    seen: set[str] = set()
    trained_on = {}
    for name, path in checkpoints.items():
        stages = _stages(path, train_annotations, load)
        had = {(s.image, s.caption) for train, _ in stages for s in train}
        overlap = sum((s.image, s.caption) in had for s in statements)
        trained = {RELEASES[own.dataset_name] for _, own in stages}
        if not allow_trained:
            _check_release(path, trained, RELEASES[dataset_name], split, overlap, len(statements))
        in_train |= had
        seen |= {image for train, _ in stages for image in seen_images(statements, train)}
        trained_on[name] = ", before that on ".join(
            f"{len(train):,} statements of {dataset_label(own.dataset_name, 'train', len(train))} train"
            for train, own in stages
        )
    image_folder = next(iter(settings.values())).image_folder
    return HeldOut(statements, split, dataset, annotations, image_folder, seen, in_train, trained_on)


def _stages(path: Path, train_annotations: str | None, load: Load) -> list[tuple[list[Statement], Config]]:
    """What a checkpoint was trained on, and with which settings, by stage, the last first."""
    found = []
    stage: Path | None = path
    while stage is not None:
        own = load_config(stage / CONFIG_FILE)
        source = own.annotations if train_annotations is None else train_annotations
        try:
            train = load(source, "train", own.dataset_name)[: own.num_samples]
            before = own.init_from if train_annotations is None else None
            stage = find_model(before) if before else None
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{stage} was trained on train of {source or 'the hub'} ({own.dataset_name})"
                f"{f' from {own.init_from}' if own.init_from else ''}, and which images it has seen cannot be told: "
                f"{error}; give --train_annotations, where the training statements of all stages lie now"
            ) from error
        found.append((train, own))
    return found


def _check_release(
    path: Path, trained: set[str], scored: str, split: str, overlap: int, num_statements: int
) -> None:
    """ValueError for a split that is not held out from the other release's training."""
    if trained == {scored} or not (overlap or scored == "zeroshot"):
        return
    raise ValueError(
        f"{path} was trained on VSR {' and '.join(sorted(trained))}, and {overlap:,} of the {num_statements:,} "
        f"statements of {scored} {split} are among its training statements, so this would be no {scored} result; score "
        f"a model that was trained with --dataset_name vsr_{scored}, or give --allow_trained_statements: the records "
        "then mark them"
    )


_LONG = ("latents_mean", "latents_std")  # of a fingerprint: numbers a channel
_OF_RESULTS = set(
    "command records_sha256 date dataset split annotations statements_in_split image_folder cache checkpoints "
    "versions".split()
)
_OF_CHECKPOINT = set(
    "checkpoint step seed model_name model_revision dtype device trained_on parts trained_parameters projection "
    "fingerprint fingerprint_sha256".split()
)
LIBRARIES = ("torch", "transformers", "numpy", "scipy", "scikit-learn")


def of_checkpoint(model: TheWorld, path: Path, trained_on: str) -> dict[str, Any]:
    """Of one scored checkpoint."""
    fingerprint = model.fingerprint
    return {
        "checkpoint": str(path),
        "step": checkpoint_step(path) if (path / INDEX).is_file() else None,
        "seed": model.config.seed,
        "model_name": model_id(model.gemma.name),
        "model_revision": model.gemma.revision,
        "dtype": str(model.gemma.dtype).removeprefix("torch."),
        "device": str(model.gemma.device),
        "trained_on": trained_on,
        "parts": list(model.gemma.changed),  # of Gemma, that are not as they were published
        "trained_parameters": count_parameters(model.projection)[0],
        "projection": model.projection.shape.to_dict(),
        "fingerprint": {k: v for k, v in fingerprint.items() if k not in _LONG},
        "fingerprint_sha256": canonical_sha256(fingerprint),
    }


def of_results(
    data: HeldOut, cache: Path | None, image_folder: Path | None, checkpoints: dict[str, Any]
) -> dict[str, Any]:
    """Of a whole file of records."""
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "dataset": data.dataset,
        "split": data.split,
        "annotations": data.annotations,
        "statements_in_split": len(data.statements),
        "image_folder": str(image_folder) if image_folder else data.image_folder,
        "cache": _cache(cache) if cache else None,
        "checkpoints": checkpoints,
        "versions": {"theworld": theworld.__version__, **{name: version(name) for name in LIBRARIES}},
    }


def _cache(cache: Path) -> dict[str, Any]:
    """The fingerprints of what is in a cache."""
    found: dict[str, Any] = {"folder": str(cache)}
    for root in stores_of(cache):
        fingerprint = StoreReader(root).fingerprint
        shown = {k: v for k, v in fingerprint.items() if k not in _LONG}
        found[root.name] = {"sha256": canonical_sha256(fingerprint), "fingerprint": shown}
    return found


def write_results(rows: Sequence[Row], source: dict[str, Any], path: Path, command: Sequence[str]) -> Row:
    """Writes records, where they come from (.meta.json, with the hash of the records and the command that made them)
    and the summary (.summary.json), and returns the summary."""
    write_jsonl(rows, path)
    meta = {"command": shlex.join(command), "records_sha256": hash_file(path)[1], **source}
    publish_json(meta, path.with_suffix(".meta.json"))
    return write_summary(rows, path)


def read_source(path: Path) -> dict[str, Any] | None:
    """What stands beside the records of `path`; None if nothing does. ValueError if it is of other records or lacks
    something."""
    meta = path.with_suffix(".meta.json")
    if not meta.is_file():
        return None
    source = json.loads(meta.read_text())
    kinds = [
        (source, _OF_RESULTS),
        *((one, _OF_CHECKPOINT) for one in source.get("checkpoints", {}).values()),
    ]
    lacking = sorted({field for found, fields in kinds for field in fields - found.keys()})
    if lacking:
        raise ValueError(f"{meta} has no {', '.join(lacking)}; score again, or move it away")
    have = hash_file(path)[1]
    if source["records_sha256"] != have:
        raise ValueError(
            f"{meta} is of records with SHA-256 {source['records_sha256']}, {path} has {have}; "
            "score again, or move one of them away"
        )
    return source


# ---- names and places


def short_names(folders: Sequence[Path], checkpoints: Sequence[Path]) -> list[str]:
    """The shortest tails of the folders' paths, as they were given, that tell them apart, or [""] for a single one.
    ValueError if two of them lead to the same checkpoint."""
    if len(folders) == 1:
        return [""]
    found = [checkpoint.resolve() for checkpoint in checkpoints]
    for path in found:
        if found.count(path) > 1:
            raise ValueError(f"{path} is named twice; name each checkpoint once")
    parts = [folder.resolve().parts for folder in folders]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(path[-length:]).replace(":", "_") for path in parts]
        if len(set(names)) == len(names):
            return names
    raise AssertionError("different paths have different parts")


def default_output(given: Sequence[Path], checkpoints: Sequence[Path], dataset: str, split: str) -> Path:
    """Where the results of one checkpoint go: into evaluation/ of its run, with the checkpoint in their name. A model
    that lies by itself, such as a download, has them in its own folder. ValueError for several."""
    if len(checkpoints) > 1:
        raise ValueError("several models belong to no single run; name an --output, such as comparison.jsonl")
    run = checkpoints[0].parent if (checkpoints[0] / INDEX).is_file() else given[0]
    return run / "evaluation" / f"{checkpoints[0].name}-{dataset.replace(' ', '-')}-{split}.jsonl"


NOT_ALONE = "photographs alone, --image_folder, are not enough"


def score(
    checkpoint: Path,
    cache: Path | None,
    image_folder: Path | None,
    split: str,
    conditions: Sequence[str],
    overrides: dict[str, Any],
) -> list[Row]:
    """One record a statement of the split, with the answers under every condition (see `theworld.evaluation.predict`).

    Exactly one of `cache` and `image_folder` is given. Prints what is left out, if anything is.
    """
    data = held_out({"": checkpoint}, split, overrides)
    return score_all({"": checkpoint}, data, cache, image_folder, conditions, overrides)[0]


def score_to_file(
    models: Sequence[Path],
    split: str,
    cache: Path | None,
    image_folder: Path | None,
    conditions: Sequence[str],
    overrides: dict[str, Any],
    command: Sequence[str],
    output: Path | None = None,
    train_annotations: str | None = None,
    allow_trained: bool = False,
) -> tuple[Path, dict[str, Any]]:
    """Scores checkpoints, or the newest ones in folders, writes records, summary and where they come from, and returns
    the path of the records and the summary. `output` None: a place in the run of a single model.

    Raises ValueError as `held_out` and `score_all` do, and for several models without `output`.
    """
    found = [find_model(model) for model in models]
    checkpoints = dict(zip(short_names(models, found), found, strict=True))
    data = held_out(checkpoints, split, overrides, train_annotations, allow_trained)
    output = output or default_output(models, found, data.dataset, split)
    check_output(output)
    rows, source = score_all(checkpoints, data, cache, image_folder, conditions, overrides)
    return output, write_results(rows, source, output, command)


@dataclass
class _Answers:
    """What each system says of the same statements, put together model by model."""

    data: HeldOut
    cache: Path | None
    image_folder: Path | None
    shared: set[str]  # systems that are the same for all checkpoints, and have no name before them
    statements: Sequence[Statement] = ()  # as they were read
    logits: dict[str, np.ndarray] = field(default_factory=dict)

    def add(self, model: TheWorld, name: str, kinds: dict[str, str]) -> None:
        """Asks a checkpoint's model; `kinds`: what it is asked by what its answers are called."""
        latents, vision, self.statements = _sources(
            model, self.cache, self.image_folder, self.data.statements
        )
        named = {k if k in self.shared or not name else f"{name}:{k}": kind for k, kind in kinds.items()}
        named = {system: kind for system, kind in named.items() if system not in self.logits}
        print(f"answering as {', '.join(named)}", flush=True)
        size = model.config.eval_statements
        found = predict(model, self.statements, latents, vision, list(named.values()), size, quiet=False)
        self.logits.update({system: found[kind] for system, kind in named.items()})


def score_all(
    checkpoints: Mapping[str, Path],
    data: HeldOut,
    cache: Path | None,
    image_folder: Path | None,
    conditions: Sequence[str],
    overrides: dict[str, Any],
) -> tuple[list[Row], dict[str, Any]]:
    """The records of several checkpoints on the same statements, and where they come from.

    `checkpoints`: folders by the names that stand before their systems, "" for a single one. "baseline" is always Gemma
    as it was published: where a checkpoint has a Gemma of its own, what that answers without world tokens is "without".
    What is the same for all checkpoints is answered once, and has no name before it. Gemma stays loaded from one to the
    next that has the same.
    """
    worlds = {name: read_world(path) for name, path in checkpoints.items()}
    if cache is not None:  # before any model loads
        for name, path in checkpoints.items():
            latents_for(worlds[name]["fingerprint"], load_config(path / CONFIG_FILE, overrides), cache)
    keys = {name: _gemma_key(path, worlds[name], overrides) for name, path in checkpoints.items()}
    shared = _shared(worlds, keys)
    answers = _Answers(data, cache, image_folder, shared)
    sources: dict[str, Any] = {}
    gemma, loaded = None, None  # as it was published, and its key
    for name, path in checkpoints.items():
        world = worlds[name]
        if world["parts"] or keys[name] != loaded:
            gemma, loaded = None, None  # before another is loaded
        model = TheWorld.from_pretrained(path, gemma, **overrides)
        sources[name] = of_checkpoint(model, path, data.trained_on[name])
        kinds = possible_conditions(conditions, model.gemma.is_multimodal, model.gemma.name)
        if len(kinds) < len(conditions):
            print("without 'text': this Gemma sees no photograph, so it is 'baseline'")
        called = {"without" if world["parts"] and kind == "baseline" else kind: kind for kind in kinds}
        answers.add(model, name, called)
        if world["parts"] and "baseline" in kinds and not shared & answers.logits.keys():
            config, fingerprint = model.config, model.fingerprint
            del model
            plain = load_gemma(config, revision=world["model_revision"])
            model = TheWorld.from_config(config, plain, fingerprint)
            answers.add(model, name, {"baseline": "baseline"})
        if not model.gemma.changed:
            gemma, loaded = model.gemma, keys[name]
        del model  # before the next: it holds merged copies of Gemma's matrices
    # What all share first.
    logits = dict(sorted(answers.logits.items(), key=lambda item: bool(checkpoint_of(item[0]))))
    rows = records(answers.statements, logits, data.seen_images, data.in_train, data.dataset, data.split)
    return rows, of_results(data, cache, image_folder, sources)


def _shared(worlds: dict[str, dict[str, Any]], keys: dict[str, tuple[Any, ...]]) -> set[str]:
    """The systems that answer alike whatever the checkpoint: those of one Gemma, and without its changes."""
    if len(set(keys.values())) > 1:
        return set()
    return {"baseline"} if any(world["parts"] for world in worlds.values()) else {"baseline", "text"}


def _gemma_key(path: Path, world: dict[str, Any], overrides: dict[str, Any]) -> tuple[Any, ...]:
    """What is equal for two checkpoints if and only if the Gemma that they started from answers both alike without
    world tokens."""
    config = load_config(path / CONFIG_FILE, overrides)
    fields = ("model_name", "dtype", "device", "compile", "fp8", "question_template", "max_seq_length")
    return (world["model_revision"], *(getattr(config, field) for field in fields))


def _sources(
    model: TheWorld, cache: Path | None, image_folder: Path | None, statements: list[Statement]
) -> tuple[FeatureSource, FeatureSource | None, list[Statement]]:
    if cache is not None:
        return _from_cache(model, cache, statements)
    assert image_folder is not None
    return *_from_photographs(model, model.config, image_folder), statements


def _from_cache(
    model: TheWorld, cache: Path, statements: list[Statement]
) -> tuple[FeatureSource, FeatureSource | None, list[Statement]]:
    latents = latents_for(model.fingerprint, model.config, cache)
    statements, note = in_cache(statements, latents, cache)
    print(f"scoring {note}")
    cached = cached_vision(model.config, cache)
    vision = vision_source(model.gemma, model.config, cached, latents.reader.images)
    for note in vision_note(model.gemma, cached):
        logger.info("%s", note)
    return latents, vision, statements


def _from_photographs(
    model: TheWorld, config: Config, folder: Path
) -> tuple[FeatureSource, FeatureSource | None]:
    model.check_no_steps(NOT_ALONE)
    latents = OnTheFlyLatents(model.encoder, folder, config.max_image_pixels)
    if not model.gemma.is_multimodal:
        return latents, None
    return latents, OnTheFlyVision(model.gemma, folder, config.max_image_pixels)
