"""Which statements are scored, and what of them the training of the scored checkpoints had."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from theworld.config import Config, load_config
from theworld.model import CONFIG_FILE
from theworld.references import dataset_label
from theworld.vsr import RELEASES, Statement, load_statements, seen_images


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
) -> HeldOut:
    """The split that the checkpoints' settings name, with `overrides` on top, and what training had of it.

    What a checkpoint was trained on is in its own settings, whatever `overrides` say; `train_annotations` is where
    that lies now, if it moved. Raises ValueError where checkpoints name different splits, where training statements
    are not found, and, unless `allow_trained`, for a split of one release of VSR and a checkpoint of the other, since
    the releases share statements.
    """
    settings = {name: load_config(path / CONFIG_FILE, overrides) for name, path in checkpoints.items()}
    sources = {name: (c.annotations, c.dataset_name) for name, c in settings.items()}
    if len(set(sources.values())) > 1:
        found = "; ".join(f"{name}: {a or 'the hub'}, {d}" for name, (a, d) in sources.items())
        raise ValueError(
            f"the checkpoints' settings name different statements ({found}); give --annotations and --dataset_name"
        )
    annotations, dataset_name = next(iter(sources.values()))
    statements = load_statements(annotations, split, dataset_name)
    dataset = dataset_label(dataset_name, split, len(statements))
    in_train: set[tuple[str, str]] = set()
    seen: set[str] = set()
    trained_on = {}
    for name, path in checkpoints.items():
        own = load_config(path / CONFIG_FILE)
        train = _training_statements(own, path, train_annotations)
        had = {(s.image, s.caption) for s in train}
        overlap = sum((s.image, s.caption) in had for s in statements)
        _check_release(path, own, dataset_name, split, (overlap, len(statements)), allow_trained)
        in_train |= had
        seen |= seen_images(statements, train)
        release = dataset_label(own.dataset_name, "train", len(train))
        trained_on[name] = f"{len(train):,} statements of {release} train"
    image_folder = next(iter(settings.values())).image_folder
    return HeldOut(statements, split, dataset, annotations, image_folder, seen, in_train, trained_on)


def _training_statements(own: Config, path: Path, train_annotations: str | None) -> list[Statement]:
    source = own.annotations if train_annotations is None else train_annotations
    try:
        return load_statements(source, "train", own.dataset_name)[: own.num_samples]
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{path} was trained on train of {source or 'the hub'} ({own.dataset_name}), and which images it has seen "
            f"cannot be told: {error}; give --train_annotations, where those statements lie now"
        ) from error


def _check_release(
    path: Path, own: Config, dataset_name: str, split: str, overlap: tuple[int, int], allowed: bool
) -> None:
    """ValueError for a split that is not held out from the other release's training."""
    trained, scored = RELEASES[own.dataset_name], RELEASES[dataset_name]
    if allowed or trained == scored or not (overlap[0] or scored == "zeroshot"):
        return
    raise ValueError(
        f"{path} was trained on VSR {trained}, and {overlap[0]:,} of the {overlap[1]:,} statements of {scored} {split} "
        f"are among its training statements, so this would be no {scored} result; score a model that was trained with "
        f"--dataset_name vsr_{scored}, or give --allow_trained_statements: the records then mark them"
    )
