"""Score checkpoints on a split, from a cache or from photographs alone.

Three steps: `held_out` reads the statements and finds which of them training had, `score_all` asks the models, and
`write_results` writes the records with their provenance beside them.
"""

import logging
import os
import re
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

import theworld
from theworld.config.config import Config, split_name
from theworld.data.benchmarks import benchmark_of
from theworld.data.images import contents, same_photographs
from theworld.data.vsr import (
    RELEASES,
    Statement,
    dataset_label,
    images_of,
    load_statements,
    split_words,
    statements_sha256,
    training_statements,
)
from theworld.evaluation.conditions import checkpoint_of
from theworld.evaluation.metrics import write_summary
from theworld.evaluation.predict import left_out, possible_conditions, predict, shuffled_images
from theworld.evaluation.records import Row, publish_json, records, write_jsonl
from theworld.extraction.batches import FeatureSource
from theworld.extraction.features import (
    OnTheFlyLatents,
    OnTheFlyVision,
    cached_vision,
    in_cache,
    latents_for,
    vision_note,
    vision_source,
)
from theworld.models.gemma import Gemma, load_gemma
from theworld.models.serialization import CONFIG_FILE, SavedModel, find_model
from theworld.models.theworld import TheWorld
from theworld.store.format import known_hashes, stores_of
from theworld.store.reader import StoreReader
from theworld.utils.device import count_parameters, set_up_torch
from theworld.utils.files import canonical_sha256, check_output, companion, hash_file
from theworld.utils.hub import model_id
from theworld.utils.locks import OutputLock
from theworld.utils.text import counted, same_words

logger = logging.getLogger(__name__)

Load = Callable[[str | None, str, str], list[Statement]]  # as `load_statements`
Ask = Callable[..., dict[str, np.ndarray]]  # as `predict`
Checkpoints = Mapping[str, SavedModel]  # by the name before their conditions; "" for a single one

# ---- the split, and what training had of it


@dataclass(frozen=True)
class HeldOut:
    """A split to score, and what the training of all scored checkpoints together had of it."""

    statements: list[Statement]
    split: str
    dataset: str  # name of a benchmark, else see `theworld.data.vsr.dataset_label`
    annotations: str | None  # None: the hub
    image_folder: str | None
    seen_images: set[str]  # images of the split that training had, under whatever name
    in_train: set[tuple[str, str]]  # (image, caption) of each statement of the split that training had
    trained_on: dict[str, str]  # checkpoint -> its training data in words
    follow_links: bool = False  # whether links that lead out of the image folder are read


def held_out(
    checkpoints: Checkpoints,
    split: str,
    overrides: Mapping[str, Any],
    train_annotations: str | None = None,
    allow_trained: bool = False,
    load: Load = load_statements,
    cache: Path | None = None,
    image_folder: Path | None = None,
) -> HeldOut:
    """Return the split that the checkpoints' settings name, with `overrides` on top, and what training had of it.

    The training data of a checkpoint is named in its own settings and in those of the stages before it, whatever
    `overrides` say; `train_annotations` is the folder of the statements of all stages, if they have moved. Content is
    compared: photographs by their bytes, as far as `cache` or `image_folder` has them, and statements by `same_words`.
    Raises ValueError if checkpoints name different splits, if training statements are not found, and, unless
    `allow_trained`, for a split of one release of VSR and a checkpoint of the other, since the releases share
    statements. `load` reads statements.
    """
    split = split_name(split)
    settings = {name: saved.config(overrides) for name, saved in checkpoints.items()}
    sources = {name: (c.annotations, c.dataset_name) for name, c in settings.items()}
    if len(set(sources.values())) > 1:
        found = "; ".join(f"{name}: {a or 'the hub'}, {d}" for name, (a, d) in sources.items())
        raise ValueError(
            f"the checkpoints' settings name different statements ({found}); give --annotations and --dataset_name"
        )
    annotations, dataset_name = next(iter(sources.values()))
    statements = load(annotations, split, dataset_name)
    dataset = benchmark_of(annotations, split) or dataset_label(annotations, dataset_name, split, statements)
    stages = {name: _stages(saved, train_annotations, load) for name, saved in checkpoints.items()}
    trained = [s for own in stages.values() for train, _, _ in own for s in train]
    config = next(iter(settings.values()))
    places = (cache, image_folder, config.follow_links)
    every_stage = [stage for own in stages.values() for stage in own]
    folder = image_folder or config.image_folder
    here = [s for train, _, own in every_stage if not _is_elsewhere(own, folder) for s in train]
    identity = _identities(images_of([*statements, *trained]), images_of(here), *places)
    for image, name in _other_names(statements, every_stage, folder).items():
        identity[image] = identity.get(name, name)
    in_train: set[tuple[str, str]] = set()
    seen: set[str] = set()
    for name, saved in checkpoints.items():
        had = {_key(s, identity) for train, _, _ in stages[name] for s in train}
        repeated = [s for s in statements if _key(s, identity) in had]
        if not allow_trained:
            releases = {_release(label, own.dataset_name) for _, label, own in stages[name]}
            scored = _release(dataset, dataset_name)
            _check_release(saved.folder, releases, scored, split, len(repeated), len(statements))
        in_train |= {(s.image, s.caption) for s in repeated}
        images = {image for image, _ in had}
        seen |= {s.image for s in statements if identity.get(s.image, s.image) in images}
    trained_on = {
        name: ", before that on ".join(
            f"{counted(len(train), 'statement')} of {split_words(label, 'train')}" for train, label, _ in own
        )
        for name, own in stages.items()
    }
    data = (statements, split, dataset, annotations, config.image_folder)
    return HeldOut(*data, seen, in_train, trained_on, config.follow_links)


def _identities(
    images: list[str], trained: list[str], cache: Path | None, image_folder: Path | None, follow_links: bool
) -> dict[str, str]:
    """Return what tells the content of each image, as far as the cache or the folder has it; the others have a name."""
    if cache is not None:
        found, where = known_hashes(cache), cache
    elif image_folder is not None:
        found, where = contents(image_folder, images, follow_links), image_folder
    else:
        return {}
    unknown = sum(image not in found for image in trained)
    if unknown:
        logger.info(
            f"{unknown:,} of the {len(trained):,} training photographs are not in {where}: "
            "whether the split has them is told by their names alone"
        )
    return found


Stage = tuple[list[Statement], str, Config]  # training statements, data set and settings


def _other_names(
    statements: list[Statement], stages: Sequence[Stage], image_folder: str | Path | None
) -> dict[str, str]:
    """Return for each photograph that training had under another name the name that training had.

    It is told by `source_image`, the name in the data set that both are from, and by content where training read its
    photographs from another folder, which is still there.
    """
    known = {_source_name(s.source_image or s.image): s.image for train, *_ in stages for s in train}
    by_name = {
        s.image: known[name]
        for s in statements
        if s.source_image and (name := _source_name(s.source_image)) in known and known[name] != s.image
    }
    had = {s.image for train, *_ in stages for s in train}
    by_content: dict[str, str] = {}
    for train, _, own in stages:
        if not _is_elsewhere(own, image_folder):
            continue
        assert image_folder is not None
        assert own.image_folder is not None
        rest = [
            image for image in images_of(statements) if image not in had | by_name.keys() | by_content.keys()
        ]
        given = (Path(image_folder), rest, Path(own.image_folder), images_of(train))
        by_content |= same_photographs(*given, own.follow_links)
    if by_name or by_content:
        logger.info(
            f"photographs of the split that training had under another name: {len(by_name):,} by the name in their "
            f"data set, {len(by_content):,} by content"
        )
    return by_content | by_name


def _is_elsewhere(trained: Config, image_folder: str | Path | None) -> bool:
    """Return whether training read its photographs from another folder than this one, and both are there."""
    folder = trained.image_folder
    if not (image_folder and folder and Path(image_folder).is_dir() and Path(folder).is_dir()):
        return False
    return not os.path.samefile(image_folder, folder)


def _source_name(name: str) -> str:
    """Return the name of a photograph without folders, suffix and what COCO 2014 wrote before the number."""
    return re.sub(r"^COCO_(train|val|test)\d+_", "", PurePosixPath(name).stem)


def _key(statement: Statement, identity: Mapping[str, str]) -> tuple[str, str]:
    """Return what two statements share that say the same of the same photograph."""
    return identity.get(statement.image, statement.image), same_words(statement.caption)


def _release(label: str, dataset_name: str) -> str:
    """Return the release that statements are of: by their content, else as the settings name them."""
    return RELEASES.get(label, RELEASES[dataset_name])


def _stages(saved: SavedModel, train_annotations: str | None, load: Load) -> list[Stage]:
    """Return training statements, data set and settings of each stage of a checkpoint, the last stage first."""
    stages = []
    for stage in stages_of(saved, follow=train_annotations is None):
        own = stage.config()
        source = own.annotations if train_annotations is None else train_annotations
        try:
            train = load(source, "train", own.dataset_name)
        except (OSError, ValueError) as error:
            raise _unknown_training(stage, own, source, error) from error
        label = dataset_label(source, own.dataset_name, "train", train)
        stages.append((training_statements(train, own), label, own))
    return stages


def stages_of(saved: SavedModel, follow: bool = True) -> Iterator[SavedModel]:
    """Yield a checkpoint and, unless `follow` is false, the checkpoints that it and the earlier stages started from.

    Raises ValueError if one of them is not found, or if the stages lead back to an earlier one.
    """
    before, folders = saved, [saved.folder.resolve()]
    yield saved
    while follow and (init_from := before.config().init_from):
        try:
            folder = find_model(init_from)
            stage = SavedModel.read(folder)
        except (OSError, ValueError) as error:
            raise _unknown_training(before, before.config(), before.config().annotations, error) from error
        if folder.resolve() in folders:
            raise ValueError(
                f"{before.folder / CONFIG_FILE}: init_from is {init_from}, which leads back to {folder} among the "
                "stages before it, so what it was trained on cannot be told; give --train_annotations, the folder of "
                "the training statements of all stages"
            )
        if folder != Path(init_from):  # checkpoints of before version 2 recorded what was given
            logger.warning(
                "%s: init_from is the folder %s; its newest checkpoint now, %s, is taken for the one that was meant",
                *(before.folder / CONFIG_FILE, init_from, folder.name),
            )
        folders.append(folder.resolve())
        before = stage
        yield stage


def _unknown_training(saved: SavedModel, own: Config, source: str | None, error: Exception) -> ValueError:
    init_from = f" from {own.init_from}" if own.init_from else ""
    return ValueError(
        f"{saved.folder} was trained on train of {source or 'the hub'} ({own.dataset_name}){init_from}, and which "
        f"images it has seen cannot be told: {error}; give --train_annotations, where the training statements of all "
        "stages lie now"
    )


def _check_release(
    path: Path, trained: set[str], scored: str, split: str, overlap: int, num_statements: int
) -> None:
    """Raise ValueError for a split that is not held out from the other release's training."""
    if trained == {scored} or not (overlap or scored == "zeroshot"):
        return
    raise ValueError(
        f"{path} was trained on VSR {' and '.join(sorted(trained))}, and {overlap:,} of the {num_statements:,} "
        f"statements of {scored} {split} are among its training statements, so this would be no {scored} result; score "
        f"a model that was trained with --dataset_name vsr_{scored}, or give --allow_trained_statements: the records "
        "then mark them"
    )


# ---- provenance

_LONG = ("latents_mean", "latents_std")  # of a fingerprint: numbers a channel
LIBRARIES = ("torch", "transformers", "numpy", "scipy", "scikit-learn")


def checkpoint_provenance(model: TheWorld, saved: SavedModel, trained_on: str) -> dict[str, Any]:
    """Return the provenance of one scored checkpoint."""
    fingerprint = model.fingerprint
    return {
        "checkpoint": str(saved.folder),
        "step": saved.step,
        "seed": model.config.seed,
        "model_name": model_id(model.gemma.name),
        "model_revision": model.gemma.revision,
        "dtype": str(model.gemma.dtype).removeprefix("torch."),
        "device": str(model.gemma.device),
        "trained_on": trained_on,
        "parts": list(model.gemma.modified_parts),  # of Gemma, that are not as they were published
        "trained_parameters": count_parameters(model.projection)[0],
        "projection": model.projection.shape.to_dict(),
        "fingerprint": {k: v for k, v in fingerprint.items() if k not in _LONG},
        "fingerprint_sha256": canonical_sha256(fingerprint),
    }


def results_provenance(
    data: HeldOut, cache: Path | None, image_folder: Path | None, checkpoints: dict[str, Any]
) -> dict[str, Any]:
    """Return the provenance of a whole file of records."""
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "dataset": data.dataset,
        "statements_sha256": statements_sha256((s.image, s.caption, s.label) for s in data.statements),
        "split": data.split,
        "annotations": data.annotations,
        "statements_in_split": len(data.statements),
        "image_folder": str(image_folder) if image_folder else data.image_folder,
        "follow_links": data.follow_links,
        "cache": _cache(cache) if cache else None,
        "checkpoints": checkpoints,
        "versions": {"theworld": theworld.__version__, **{name: version(name) for name in LIBRARIES}},
    }


def _cache(cache: Path) -> dict[str, Any]:
    """Return the fingerprints of the stores in a cache."""
    found: dict[str, Any] = {"folder": str(cache)}
    for root in stores_of(cache):
        fingerprint = StoreReader(root).fingerprint
        shown = {k: v for k, v in fingerprint.items() if k not in _LONG}
        found[root.name] = {"sha256": canonical_sha256(fingerprint), "fingerprint": shown}
    return found


def write_results(rows: Sequence[Row], source: dict[str, Any], path: Path, command: Sequence[str]) -> Row:
    """Write records, provenance (.meta.json, with the SHA-256 of the records and the command) and summary
    (.summary.json), and return the summary."""
    write_jsonl(rows, path)
    meta = {"command": shlex.join(command), "records_sha256": hash_file(path)[1], **source}
    publish_json(meta, companion(path, ".meta.json", ".jsonl"))
    return write_summary(rows, path)


# ---- names and places


def short_names(folders: Sequence[Path], checkpoints: Sequence[Path]) -> list[str]:
    """Return the shortest tails of the given folders' paths that tell them apart, or [""] for a single one.

    Raises ValueError if two of them lead to the same checkpoint.
    """
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


def default_output(checkpoints: Sequence[SavedModel], dataset: str, split: str) -> Path:
    """Return the file for the results of one checkpoint, in evaluation/ of its run, or of its own folder if it is a
    model without a run, such as a download. Raises ValueError for several checkpoints."""
    if len(checkpoints) > 1:
        raise ValueError("several models belong to no single run; name an --output, such as comparison.jsonl")
    (saved,) = checkpoints
    return saved.run / "evaluation" / f"{saved.folder.name}-{dataset.replace(' ', '-')}-{split}.jsonl"


def check_results(path: Path) -> str:
    """Return " (replaces the one there)" or nothing. Raises OSError if records, or what goes beside them, could not be
    written."""
    for suffix in (".meta.json", ".summary.json"):
        check_output(companion(path, suffix, ".jsonl"))
    return check_output(path)


# ---- scoring

NOT_ALONE = "photographs alone, --image_folder, are not enough"


def score(
    checkpoint: Path | SavedModel,
    cache: Path | None,
    image_folder: Path | None,
    split: str,
    conditions: Sequence[str],
    overrides: dict[str, Any],
) -> list[Row]:
    """Return one record for each statement of the split, with the answers under each condition (see
    `theworld.evaluation.predict`).

    Exactly one of `cache` and `image_folder` is given. Logs which statements are left out.
    """
    checkpoints = {"": SavedModel.open_folder(checkpoint)}
    data = held_out(checkpoints, split, overrides, cache=cache, image_folder=image_folder)
    return score_all(checkpoints, data, cache, image_folder, conditions, overrides)[0]


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
    gemma: Gemma | None = None,
    load: Load = load_statements,
    ask: Ask = predict,
) -> tuple[Path, dict[str, Any]]:
    """Score checkpoints, or the newest ones in folders, write records, summary and provenance, and return the path of
    the records and the summary. Without `output` the path is `default_output`. `gemma`: see `score_all`. `load` reads
    statements and `ask` answers them.

    Raises ValueError as `held_out` and `score_all` do, and for several models without `output`.
    """
    found = [SavedModel.open_folder(model) for model in models]
    checkpoints = dict(zip(short_names(models, [saved.folder for saved in found]), found, strict=True))
    given = (split, overrides, train_annotations, allow_trained, load)
    data = held_out(checkpoints, *given, cache=cache, image_folder=image_folder)
    output = output or default_output(found, data.dataset, data.split)
    check_results(output)
    with OutputLock(output, "--output", is_file=True):
        rows, source = score_all(checkpoints, data, cache, image_folder, conditions, overrides, gemma, ask)
        return output, write_results(rows, source, output, command)


@dataclass
class _Answers:
    """The answers to the same statements under each condition, collected model by model."""

    data: HeldOut
    cache: Path | None
    image_folder: Path | None
    # conditions that are the same for all checkpoints, without a checkpoint's name before them
    shared: set[str]
    ask: Ask
    statements: Sequence[Statement] = ()  # in the order of the answers
    logits: dict[str, np.ndarray] = field(default_factory=dict)

    def add(self, model: TheWorld, name: str, conditions: dict[str, str]) -> None:
        """Add the answers of a checkpoint's model; `conditions`: recorded name -> condition of `predict`."""
        latents, vision, self.statements = _sources(
            model, self.cache, self.image_folder, self.data.statements
        )
        named = {k if k in self.shared or not name else f"{name}:{k}": c for k, c in conditions.items()}
        named = {key: condition for key, condition in named.items() if key not in self.logits}
        logger.info("answering as %s", ", ".join(named))
        size = model.config.eval_statements
        found = self.ask(model, self.statements, latents, vision, list(named.values()), size, quiet=False)
        self.logits.update({key: found[condition] for key, condition in named.items()})


def score_all(
    checkpoints: Checkpoints,
    data: HeldOut,
    cache: Path | None,
    image_folder: Path | None,
    conditions: Sequence[str],
    overrides: dict[str, Any],
    gemma: Gemma | None = None,
    ask: Ask = predict,
) -> tuple[list[Row], dict[str, Any]]:
    """Return the records of several checkpoints on the same statements, and their provenance. `gemma`: the published
    Gemma of the first checkpoint, where it is loaded already. `ask` answers statements.

    "baseline" is always Gemma as it was published: the answers without world tokens of a checkpoint that has a Gemma of
    its own are "without". Conditions that are the same for all checkpoints are asked once, and have no name before
    them. Gemma stays loaded from one checkpoint to the next that has the same.
    """
    for saved in checkpoints.values():  # before any model loads
        config = saved.config(overrides)
        if cache is not None:
            latents_for(saved.world["fingerprint"], config, cache)
        if "shuffled" in possible_conditions(conditions, True, config):
            shuffled_images(images_of(data.statements))
    keys = {name: gemma_key(saved, overrides) for name, saved in checkpoints.items()}
    shared = _shared(checkpoints, keys)
    answers = _Answers(data, cache, image_folder, shared, ask)
    provenance: dict[str, Any] = {}
    # The key of the published Gemma that is loaded.
    loaded = None if gemma is None else next(iter(keys.values()))
    for name, saved in checkpoints.items():
        world = saved.world
        if world["parts"] or keys[name] != loaded:
            gemma, loaded = None, None  # before another is loaded
        model = TheWorld.from_pretrained(saved, gemma, **overrides)
        set_up_torch(model.gemma.dtype)
        provenance[name] = checkpoint_provenance(model, saved, data.trained_on[name])
        possible = possible_conditions(conditions, model.gemma.is_multimodal, model.config)
        for reason in left_out(conditions, possible):
            logger.info("%s", reason)
        answers.add(
            model, name, {"without" if world["parts"] and c == "baseline" else c: c for c in possible}
        )
        if world["parts"] and "baseline" in possible and not shared & answers.logits.keys():
            config, fingerprint = model.config, model.fingerprint
            del model
            plain = load_gemma(config, revision=world["model_revision"])
            model = TheWorld.from_config(config, plain, fingerprint)
            answers.add(model, name, {"baseline": "baseline"})
        if not model.gemma.modified_parts:
            gemma, loaded = model.gemma, keys[name]
        del model  # before the next is loaded
    # Shared conditions first.
    logits = dict(sorted(answers.logits.items(), key=lambda item: bool(checkpoint_of(item[0]))))
    rows = records(answers.statements, logits, data.seen_images, data.in_train, data.dataset, data.split)
    return rows, results_provenance(data, cache, image_folder, provenance)


def _shared(checkpoints: Checkpoints, keys: dict[str, tuple[Any, ...]]) -> set[str]:
    """Return the conditions with the same answers for all checkpoints: those of one Gemma as it was published."""
    if len(set(keys.values())) > 1:
        return set()
    if any(saved.world["parts"] for saved in checkpoints.values()):
        return {"baseline"}
    return {"baseline", "text"}


def gemma_key(saved: SavedModel, overrides: dict[str, Any]) -> tuple[Any, ...]:
    """Return a key that two checkpoints share if and only if the published Gemma that they started from gives both the
    same answers without world tokens."""
    config = saved.config(overrides)
    fields = ("model_name", "dtype", "device", "compile", "fp8", "question_template", "max_seq_length")
    return (saved.world["model_revision"], *(getattr(config, field) for field in fields))


def _sources(
    model: TheWorld, cache: Path | None, image_folder: Path | None, statements: list[Statement]
) -> tuple[FeatureSource, FeatureSource | None, list[Statement]]:
    if cache is not None:
        return _from_cache(model, cache, statements)
    assert image_folder is not None
    return *from_photographs(model, image_folder), statements


def _from_cache(
    model: TheWorld, cache: Path, statements: list[Statement]
) -> tuple[FeatureSource, FeatureSource | None, list[Statement]]:
    latents = latents_for(model.fingerprint, model.config, cache)
    statements, note = in_cache(statements, latents, cache)
    logger.info("scoring %s", note)
    cached = cached_vision(model.config, cache)
    vision = vision_source(model.gemma, model.config, cached, latents.images, cache)
    for note in vision_note(model.gemma, cached):
        logger.info("%s", note)
    return latents, vision, statements


def from_photographs(model: TheWorld, folder: Path) -> tuple[FeatureSource, FeatureSource | None]:
    """Return latents and vision features of a model, the latter None for a text-only Gemma, from photographs alone.

    Raises ValueError for a model that needs more than them, such as predicted frames.
    """
    model.check_alone(NOT_ALONE)
    config = model.config
    pixels, links = config.max_image_pixels, config.follow_links
    latents = OnTheFlyLatents(model.encoder, folder, pixels, links)
    if not model.gemma.is_multimodal:
        return latents, None
    return latents, OnTheFlyVision(model.gemma, folder, pixels, follow_links=links)
