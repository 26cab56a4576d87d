"""Which statements are scored, and what of them the training of the scored checkpoints had."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from theworld.checkpoint import find_model
from theworld.config import Config, load_config
from theworld.references import dataset_label
from theworld.saved import CONFIG_FILE
from theworld.vsr import RELEASES, Statement, load_statements, seen_images

Load = Callable[[str | None, str, str], list[Statement]]  # as `load_statements`


@dataclass(frozen=True)
class HeldOut:
    """A split to score; the training data is that of all checkpoints together."""

    statements: list[Statement]
    split: str
    dataset: str  # see `theworld.references.dataset_label`
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
