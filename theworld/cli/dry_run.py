"""What phases 1 and 3 would do, found out by the runs' own checks: no model is loaded, nothing downloaded or written.

Each function yields lines for a terminal and raises ValueError or OSError where the run itself would stop, with its
message. Checks that take longer than seconds are left to the run: decoding photographs, reading every byte of a cache,
hashing weights.
"""

import os
from collections.abc import Generator, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from theworld.config.cli import extraction_command
from theworld.config.config import Config, split_name
from theworld.data.images import missing_photographs
from theworld.data.vsr import NotDownloaded, Statement, images_of, split_at_hand, statements_at_hand
from theworld.evaluation.alignment import chosen_images, photographs_of, vision_to_compare
from theworld.evaluation.predict import possible_conditions, shuffled_images
from theworld.evaluation.records import read_results
from theworld.evaluation.score import NOT_ALONE, check_results, default_output, held_out, short_names
from theworld.extraction.encoders import specs_to_extract
from theworld.extraction.extract import amount, check_models, check_readable, check_start
from theworld.extraction.features import cached_vision, in_cache, latents_for
from theworld.extraction.reading import Source
from theworld.models import world_encoder
from theworld.models.encoder import EncoderSpec, NotYetKnown
from theworld.models.fp8 import check_fp8
from theworld.models.gemma import is_multimodal
from theworld.models.inference import check_alone
from theworld.models.projection import ProjectionShape
from theworld.models.serialization import VISION as VISION_PART
from theworld.models.serialization import SavedModel
from theworld.store.format import (
    Plan,
    StoreMismatch,
    image_differences,
    paths,
    read_failures,
    read_manifest,
)
from theworld.utils.console import line
from theworld.utils.device import resolve_device, resolve_dtype, wants_compile
from theworld.utils.distributed import Part, num_launched
from theworld.utils.files import check_output, companion
from theworld.utils.hub import GEMMA_FILE, locate
from theworld.utils.locks import check_unlocked
from theworld.utils.text import counted

Split = dict[str, list[Statement]]


# ---- phase 1


def extraction(
    config: Config, cache: Path, with_vision: bool, allow_missing: bool, part: Part | None
) -> Iterator[str]:
    """Yield what `theworld.extraction.extract.extract` would do with the same arguments."""
    part = part or Part(count=num_launched())
    source = check_start(config, cache, part, specs_to_extract(config, with_vision))
    splits = statements_at_hand(config.annotations, config.dataset_name)
    names, said = _photographs(config, splits, source, allow_missing)
    yield from said
    device = resolve_device(config.device)
    compiled = ", compiled" if wants_compile(config.compile, device) else ""
    yield line("device", f"{device}, {resolve_dtype(config.dtype, device)}{compiled}")
    check_models(config, with_vision)
    for spec in specs_to_extract(config, with_vision):
        if spec.weights is not None:
            place = locate(spec.weights.model, spec.weights.file)
            yield line("model", f"{spec.weights.topic}, {spec.weights.model}: {place.words}")
        yield from store_lines(spec, cache / spec.name, config, names, splits is not None, part)


def _photographs(
    config: Config, splits: Split | None, source: Source, allow_missing: bool
) -> tuple[list[str], list[str]]:
    """Return the names of the photographs that would be encoded, and lines about them."""
    folder = source.folder
    if splits is None:
        names = sorted(path.name for path in folder.iterdir() if path.suffix == ".jpg")
        message = f"{config.dataset_name}, from the hub when the run starts; not counted here"
        return names, [
            line("statements", message),
            line("photographs", f"{counted(len(names), '.jpg file')} in {folder}"),
        ]
    said = [statement_line(splits)]
    names = images_of([statement for own in splits.values() for statement in own])
    missing = missing_photographs(names, folder, source.follow_links)
    note = check_readable(list(missing.items()), len(names), allow_missing)
    there = f"all {len(names):,} are in {folder}; the run finds out whether they can be decoded"
    return [name for name in names if name not in missing], [*said, line("photographs", note or there)]


def statement_line(splits: Split) -> str:
    """Return a line with the number of statements of each split, and of their photographs."""
    counts = ", ".join(f"{len(own):,} {split}" for split, own in splits.items())
    names = images_of([statement for own in splits.values() for statement in own])
    return line("statements", f"{counts}, about {counted(len(names), 'photograph')}")


def store_lines(
    spec: EncoderSpec, root: Path, config: Config, names: Sequence[str], all_known: bool, part: Part
) -> Iterator[str]:
    """Yield what would be written into one store. `all_known`: whether `names` are all that the statements name.

    Raises StoreMismatch where the store holds something else, StoreError if it is damaged, ValueError without room.
    """
    num_shards = -(-len(names) // config.shard_size)
    spec.check_store(root, config.shard_size)
    if (root / "store.json").exists():
        plan = Plan.load(root)
        left_out = read_failures(root.parent)
        listed = {name: plan.images.get(name, "not read yet") for name in names if name not in left_out}
        same = not all_known or listed.keys() == plan.images.keys()
        if read_manifest(root) is not None:
            if not same:
                raise StoreMismatch(root, image_differences(plan.images, listed))
            yield line(
                "cache", f"{root}: complete, {counted(len(plan.images), 'image')}, made with these settings"
            )
            return
        num_shards = plan.num_shards if same else num_shards
    own = [shard for shard in range(num_shards) if part.owns(shard) or part.count == num_launched()]
    pending = [shard for shard in own if not os.path.lexists(paths(root, shard)[1])]
    rows = sum(min(config.shard_size, len(names) - shard * config.shard_size) for shard in pending)
    state = f"{root}: {'goes on' if root.exists() else 'new'}"
    if isinstance(spec.row_shape, NotYetKnown):
        yield line("cache", f"{state}; the size of a row is {spec.row_shape.value}")
        return
    shape = " x ".join(map(str, spec.row_shape))
    yield line("cache", f"{state}, {shape} {spec.dtype} an image")
    size = rows * spec.array.row_nbytes
    yield line("", amount(root, rows, len(names), len(pending), num_shards, size))


# ---- phase 3


def evaluation(
    models: Sequence[Path],
    cache: Path | None,
    image_folder: Path | None,
    split: str,
    conditions: Sequence[str],
    output: Path | None,
    overrides: dict[str, Any],
    train_annotations: str | None = None,
    allow_trained: bool = False,
) -> Iterator[str]:
    """Yield what `theworld.evaluation.score.score_to_file` would do with the same arguments."""
    split = split_name(split)
    found = [SavedModel.open_folder(model) for model in models]
    checkpoints = dict(zip(short_names(models, [one.folder for one in found]), found, strict=True))
    saved = []
    for checkpoint in found:
        saved.append((checkpoint, *(yield from _saved_model(checkpoint, overrides))))
    try:
        given = (split, overrides, train_annotations, allow_trained, split_at_hand)
        data = held_out(checkpoints, *given, cache, image_folder)
    except NotDownloaded as error:
        yield line("statements", f"{split} of {error}, from the hub when the run starts; not counted here")
        data = None
    for checkpoint, config, world, sees in saved:
        statements = yield from _reads(
            checkpoint, config, world, sees, cache, image_folder, [] if data is None else data.statements
        )
        asked = possible_conditions(conditions, sees, config)
        if "shuffled" in asked and statements:
            shuffled_images(images_of(statements))
        batches = -(-len(statements) // config.eval_statements)
        words = f"{counted(len(asked), 'condition')} ({', '.join(asked)})"
        about = f"{counted(len(statements), 'statement')}, {counted(batches, 'batch', 'batches')}"
        yield line("asks", f"{words} about {about}")
    if data is not None:
        seen, all_images = len(data.seen_images), len(images_of(data.statements))
        shows = f"which shows {seen:,} of the {counted(all_images, 'image')} of {split}"
        yield line("trained on", f"{'; '.join(data.trained_on.values())}, {shows}")
    name = "the data" if data is None else data.dataset  # which counting will tell
    path = output or default_output(found, name, split)
    replaces = check_results(path)
    check_unlocked(path, "--output", is_file=True)
    yield line(
        "writes",
        f"{path}, {counted(len(statements), 'line')}{replaces}, and {companion(path, '.summary.json', '.jsonl')}",
    )


def _reads(
    saved: SavedModel,
    config: Config,
    world: dict[str, Any],
    sees: bool,
    cache: Path | None,
    photographs: Path | None,
    statements: list[Statement],
) -> Generator[str, None, list[Statement]]:
    """Yield what a model would read to answer statements, and return those that it can answer."""
    if cache is not None:
        statements, note = _cached(cache, config, world, statements)
        vision = sees and VISION_PART not in world["parts"] and cached_vision(config, cache) is not None
        if sees and not vision and config.image_folder is None:
            raise ValueError(
                f"{cache} has no vision features; score from photographs with --image_folder, or extract them with: "
                f"{extraction_command(config, cache, '--gemma_vision')}"
            )
        yield line("reads", f"{note}, from {cache}: latents{' and vision features' if vision else ''}")
        photographs = Path(str(config.image_folder)) if sees and not vision else None
    else:
        check_alone(ProjectionShape.from_dict(world["projection"]), config, NOT_ALONE)
        trained, alone = world["fingerprint"], replace(config, num_world_steps=0)
        spec = world_encoder.describe(alone, trained)
        if spec.weights is not None:
            place = saved.locate(alone, spec.weights.model, spec.weights.file)
            yield line(spec.weights.topic, f"{spec.weights.model}: {place.words}")
        spec.check_serves(trained)
    if photographs is not None:
        names = images_of(statements)
        missing = missing_photographs(names, photographs, config.follow_links)
        check_readable(list(missing.items()), len(names), None)
        yield line("reads", f"{counted(len(names), 'photograph')} in {photographs}")
    return statements


def recomputation(records: Path) -> Iterator[str]:
    """Yield what `tools/eval.py --from` would do."""
    rows, _ = read_results(records)
    yield line("reads", f"{records}: {counted(len(rows), 'statement')}, {', '.join(rows[0]['systems'])}")
    summary = companion(records, ".summary.json", ".jsonl")
    yield line("writes", f"{summary}{check_output(summary, '--from')}")


def alignment(
    model_name: Path,
    cache: Path | None,
    split: str,
    num_samples: int,
    output: Path,
    overrides: dict[str, Any],
) -> Iterator[str]:
    """Yield what `theworld.evaluation.alignment.align` would do with the same arguments, and the files it writes."""
    split = split_name(split)
    saved = SavedModel.open_folder(model_name)
    config, world, sees = yield from _saved_model(saved, overrides)
    statements = yield from _split(config, split)
    if cache is None:
        folder = photographs_of(config)
        chosen = chosen_images(statements, split, num_samples) if statements else []
        chosen_statements = [s for s in statements if s.image in chosen]
        yield from _reads(saved, config, world, sees, None, folder, chosen_statements)
    else:
        statements, note = _cached(cache, config, world, statements)
        if sees:
            vision_to_compare(config, cache, world["parts"])
        count = len(chosen_images(statements, split, num_samples)) if statements else num_samples
        yield line("reads", f"{counted(count, 'image')} of {split} ({note}), from {cache}")
    tokens = ProjectionShape.from_dict(world["projection"]).num_tokens
    yield line("measures", f"{counted(tokens, 'world token')} of each, untrained and trained")
    figures = companion(output, ".json", ".png")
    check_output(figures)
    yield line("writes", f"{output}{check_output(output)} and {figures}")


def _saved_model(
    saved: SavedModel, overrides: dict[str, Any]
) -> Generator[str, None, tuple[Config, dict[str, Any], bool]]:
    """Yield lines about a saved model; return its settings, world.json and whether its Gemma sees photographs."""
    config, world = saved.config(overrides), saved.world
    device = resolve_device(config.device)
    if config.fp8:
        check_fp8(device)
    yield line("projection", f"{saved.folder}, for {world['model_name']}")
    gemma = saved.locate(config, config.model_name, GEMMA_FILE)
    yield line(
        "Gemma", f"{config.model_name}: {gemma.words}; {device}, {resolve_dtype(config.dtype, device)}"
    )
    sees = gemma.config is None or is_multimodal(str(gemma.config.parent))
    return config, world, sees


def _cached(
    cache: Path, config: Config, world: dict[str, Any], statements: list[Statement]
) -> tuple[list[Statement], str]:
    """Return the statements whose image is in the cache, and a line about them. Raises StoreError if it does not serve
    the model."""
    return in_cache(statements, latents_for(world["fingerprint"], config, cache), cache)


def _split(config: Config, split: str) -> Generator[str, None, list[Statement]]:
    """Return the statements of a split as the alignment tool reads them; if only the hub has them, none, and yield a
    line."""
    try:
        return split_at_hand(config.annotations, split, config.dataset_name)
    except NotDownloaded as error:
        yield line("statements", f"{split} of {error}, from the hub when the run starts; not counted here")
        return []
