"""Alignment: the world tokens of a projection compared with the image tokens and text tokens of its Gemma.

Each world token is compared with one token, by cosine and L2 distance:

    same place            the image token at the same place in the picture, if there are as many as world tokens
    nearest image token   otherwise the image token of the same image with the highest cosine
    nearest text token    for a text-only Gemma, the token with the highest cosine in the statements about the image

The control is the same comparison with the tokens of another image. Tokens are computed and measured image by image,
and only some of each image are kept to be drawn: 4,096 tokens of a hundred images would take 4 GB.

`align` measures, `report` returns the figures as text, and `draw` draws them: tokens by PCA and t-SNE, cosines, norms.
matplotlib and scikit-learn take a second to load, and only `draw` needs them, so it loads them.

Dimensions: I images; N world tokens and M image tokens of an image; T text tokens; D hidden size of the language model.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from theworld.config.cli import extraction_command
from theworld.config.config import Config, split_name
from theworld.data.vsr import Statement, images_of, load_statements
from theworld.evaluation.score import from_photographs
from theworld.extraction.batches import FeatureSource
from theworld.extraction.features import CachedFeatures, cached_vision, in_cache, latents_for, vision_source
from theworld.models.gemma import Gemma
from theworld.models.projection import ProjectionShape, WorldProjection
from theworld.models.serialization import SavedModel
from theworld.models.theworld import TheWorld
from theworld.utils.device import set_up_torch
from theworld.utils.files import naming
from theworld.utils.text import counted

if TYPE_CHECKING:
    from matplotlib.axes import Axes

logger = logging.getLogger(__name__)

SAME_PLACE, NEAREST_IMAGE, NEAREST_TEXT = "same place", "nearest image token", "nearest text token"
KEPT = 2000  # tokens of each kind that are kept to be drawn
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


@dataclass(frozen=True)
class Sample:
    """Images of a split in random order, and the tokens that their world tokens are compared with."""

    images: list[str]
    latents: Tensor  # float[I, *row_shape], as the VAE returns them
    # float32[M, D] for each image, the image tokens; None for a text-only Gemma
    image: Sequence[Tensor] | None
    text: Tensor  # float32[T, D], the embeddings of the distinct tokens of all statements
    text_of: list[Tensor]  # float32[_, D] for each image, those of the statements about it


class ImageTokens(Sequence[Tensor]):
    """The image tokens of images, float32[M, D] each, on the CPU, computed when one is indexed."""

    def __init__(self, gemma: Gemma, vision: FeatureSource, images: Sequence[str]) -> None:
        self.gemma, self.vision, self.images = gemma, vision, images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: Any) -> Any:
        return self.gemma.image_features(self.vision([self.images[i]])).float().cpu()[0]


class Tokens:
    """Tokens of one kind, added in parts: the norm of each, their mean, and a sample to be drawn."""

    def __init__(self) -> None:
        self._norms: list[Tensor] = []
        self._some: list[Tensor] = []
        self._sum = torch.zeros(0, dtype=torch.float64)

    def add(self, tokens: Tensor, most: int) -> Tokens:
        """Add tokens, float32[_, D], and keep a random sample of at most `most`, the same one for every such object."""
        total = tokens.sum(0, dtype=torch.float64)
        self._sum = total if not self._norms else self._sum + total
        self._norms.append(tokens.norm(dim=-1))
        chosen = np.sort(np.random.default_rng(len(self._norms)).permutation(len(tokens))[:most])
        self._some.append(tokens[torch.from_numpy(chosen)])
        return self

    @property
    def norms(self) -> Tensor:
        """Return the L2 norm of every token, float32[_]."""
        return torch.cat(self._norms)

    @property
    def mean(self) -> Tensor:
        """Return the mean of all tokens, float64[D]."""
        return self._sum / len(self.norms)

    @property
    def some(self) -> Tensor:
        """Return the sample that was kept, float32[_, D]."""
        return torch.cat(self._some)


@dataclass(frozen=True)
class Measured:
    """The measurements of one projection, on the CPU."""

    cosine: Tensor  # float32[I N], of each world token and the token that it is compared with
    control: Tensor  # float32[I N], the same with the tokens of another image
    distance: Tensor  # float32[I N], the L2 distance of the two
    kinds: dict[str, Tokens]  # world, image (unless Gemma is text-only), text

    @property
    def vectors(self) -> dict[str, Tensor]:
        """Return a sample of the tokens of each kind, float32[_, D]."""
        return {kind: tokens.some for kind, tokens in self.kinds.items()}


def align(
    checkpoint: Path | SavedModel,
    cache: Path | None,
    split: str,
    num_samples: int,
    overrides: dict[str, Any],
) -> tuple[dict[str, Measured], dict[str, Any]]:
    """Measure the projection of a checkpoint, "trained", and one as its run started with, "untrained".

    Without a `cache` the photographs of image_folder are encoded. Returns the measurements of both, and all figures as
    JSON. Raises ValueError for fewer than two images, for a cache without vision features, and without a cache as
    `photographs_of` does; ImageError for a photograph that cannot be read; StoreMismatch for a cache that was made with
    other settings than the checkpoint's.
    """
    # Gemma's layers are not computed, so they need no copy in 8 bits.
    saved, split = SavedModel.open_folder(checkpoint), split_name(split)
    model = TheWorld.from_pretrained(saved, **overrides | {"fp8": False})
    set_up_torch(model.gemma.dtype)
    start = TheWorld.from_config(model.config, model.gemma, model.fingerprint)
    sample = load_sample(model, cache, split, num_samples)
    kind = comparison(model.projection.shape, model.gemma.num_image_tokens)
    measured = {
        "untrained": measure(project(start.projection, sample.latents), sample, kind),
        "trained": measure(project(model.projection, sample.latents), sample, kind),
    }
    result = {
        "checkpoint": str(saved.folder),
        "split": split,
        "images": len(sample.images),
        "world_tokens": model.projection.shape.tokens_per_frame,
        "image_tokens": model.gemma.num_image_tokens,
        "comparison": kind,
        **(
            {"predicted_moments_left_out": model.projection.shape.steps}
            if model.projection.shape.steps
            else {}
        ),
        **{name: figures(one) for name, one in measured.items()},
    }
    return measured, result


def load_sample(model: TheWorld, cache: Path | None, split: str, num_samples: int) -> Sample:
    """Return `num_samples` images of the split (or all of them), from the cache or else from their photographs.

    They are the same at every call. Raises the errors of `align`.
    """
    config = model.config
    latents: FeatureSource
    if cache is None:
        folder = photographs_of(config)
        latents, vision = from_photographs(model, folder)
        statements = load_statements(config.annotations, split, config.dataset_name)
        logger.info("%s: photographs in %s", split, folder)
    else:
        latents = cached = latents_for(model.fingerprint, config, cache)
        statements = load_statements(config.annotations, split, config.dataset_name)
        statements, note = in_cache(statements, cached, cache)
        logger.info("%s: %s", split, note)
        vision = _vision(model, cache) if model.gemma.is_multimodal else None
    images = chosen_images(statements, split, num_samples)
    image = None if vision is None else ImageTokens(model.gemma, vision, images)
    text, text_of = _text_tokens(model.gemma, statements, images)
    return Sample(images, latents(images), image, text, text_of)


def photographs_of(config: Config) -> Path:
    """Return the folder of the photographs. Raises ValueError if none is set, or none is there."""
    if config.image_folder is None:
        raise ValueError("neither a cache nor photographs: give --cache, or --image_folder")
    folder = Path(config.image_folder)
    if not folder.is_dir():
        raise ValueError(f"image_folder {folder}: not a folder; give --cache, or --image_folder")
    return folder


def chosen_images(statements: Sequence[Statement], split: str, num_samples: int) -> list[str]:
    """Return `num_samples` images of the statements, the same at every call. Raises ValueError for fewer than two."""
    every = images_of(statements)
    count = min(num_samples, len(every))
    if count < 2:
        raise ValueError(
            f"--num_samples {num_samples}, {counted(len(every), 'image')} in {split}; the control needs at least two "
            "images"
        )
    return [every[i] for i in np.random.default_rng(0).permutation(len(every))[:count]]


def vision_to_compare(config: Config, cache: Path, changed: Sequence[str]) -> CachedFeatures | None:
    """Return the vision features in the cache, or None if they are not those of this Gemma, parts of which `changed`.

    Raises ValueError if the cache has none and should have them.
    """
    cached = cached_vision(config, cache)
    if cached is None and not changed:
        raise ValueError(
            f"{cache} has no vision features to compare with; extract them with: "
            f"{extraction_command(config, cache, '--gemma_vision')}"
        )
    return cached


def _vision(model: TheWorld, cache: Path) -> FeatureSource | None:
    cached = vision_to_compare(model.config, cache, model.gemma.modified_parts)
    return vision_source(model.gemma, model.config, cached, cache=cache)


@torch.no_grad()
def _text_tokens(
    gemma: Gemma, statements: Sequence[Statement], images: Sequence[str]
) -> tuple[Tensor, list[Tensor]]:
    """Return `Sample.text` and `Sample.text_of`."""
    ids: dict[str, set[int]] = {image: set() for image in images}
    for statement in statements:
        if statement.image in ids:
            ids[statement.image] |= set(gemma.tokenizer.encode(statement.caption, add_special_tokens=False))
    every = sorted(set().union(*ids.values()))
    table = gemma.embed(torch.tensor(every, device=gemma.device)).float().cpu()
    row_of = {token: row for row, token in enumerate(every)}
    return table, [table[[row_of[token] for token in sorted(ids[image])]] for image in images]


def comparison(shape: ProjectionShape, num_image_tokens: int) -> str:
    """Return which token a world token is compared with.

    Equal numbers of patches and image tokens lie at the same places, since both grids are square and cover the whole
    picture. A latent channel has no place.
    """
    if num_image_tokens == 0:
        return NEAREST_TEXT
    same = shape.mode == "patch" and shape.tokens_per_frame == num_image_tokens
    return SAME_PLACE if same else NEAREST_IMAGE


@torch.no_grad()
def project(projection: WorldProjection, latents: Tensor) -> Iterator[Tensor]:
    """Yield the world tokens of each image, float32[N, D] on the CPU, for latents, float[I, *row_shape].

    World tokens of predicted frames have no place in the photograph and are left out.
    """
    device, num_own = projection.brackets.device, projection.shape.tokens_per_frame
    for row in latents:
        yield projection(row[None].to(device))[0, :num_own].cpu()


@torch.no_grad()
def measure(world: Iterable[Tensor], sample: Sample, kind: str) -> Measured:
    """Compare the world tokens of each image of the sample, float32[N, D], with its tokens.

    `kind` is what `comparison` returns. The control of an image is the one before it in the sample's random order.
    """
    targets = sample.text_of if sample.image is None else sample.image
    kinds = {"world": Tokens()} | ({} if sample.image is None else {"image": Tokens()})
    most = -(-KEPT // len(sample.images))
    own: list[tuple[Tensor, Tensor]] = []
    control: list[Tensor] = []
    before = targets[len(sample.images) - 1]
    for tokens, target in zip(world, targets, strict=True):
        own.append(compare(tokens, target, kind))
        control.append(compare(tokens, before, kind)[0])
        kinds["world"].add(tokens, most)
        if sample.image is not None:
            kinds["image"].add(target, most)
        before = target
    return Measured(
        cosine=torch.cat([cosine for cosine, _ in own]),
        control=torch.cat(control),
        distance=torch.cat([distance for _, distance in own]),
        kinds=kinds | {"text": Tokens().add(sample.text, KEPT)},
    )


def compare(world: Tensor, target: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """Return cosine and L2 distance, float32[N] each, of world tokens, float32[N, D], and tokens, float32[M, D]."""
    if kind != SAME_PLACE:
        cosines = F.normalize(world, dim=-1) @ F.normalize(target, dim=-1).T
        target = target[cosines.argmax(1)]
    cosine = F.cosine_similarity(world, target, dim=-1).clamp(-1, 1)  # of equal tokens it rounds to more
    return cosine, (world - target).norm(dim=-1)


def figures(measured: Measured) -> dict[str, Any]:
    """Return the figures as JSON: distributions, and cosines between the mean vectors of two kinds of tokens."""
    kinds = measured.kinds
    norms = {kind: _distribution(tokens.norms) for kind, tokens in kinds.items()}
    pairs = [(a, b) for a, b in (("world", "image"), ("world", "text"), ("image", "text")) if a in kinds]
    pairs = [(a, b) for a, b in pairs if b in kinds]
    return {
        "cosine": _distribution(measured.cosine),
        "control_cosine": _distribution(measured.control),
        "distance": _distribution(measured.distance),
        "norm": norms,
        "norm_ratio": {
            f"world_{k}": norms["world"]["mean"] / norms[k]["mean"] for k in norms if k != "world"
        },
        "mean_vector_cosine": {
            f"{a}_{b}": {
                "n": [len(kinds[a].norms), len(kinds[b].norms)],
                "cosine": float(F.cosine_similarity(kinds[a].mean, kinds[b].mean, dim=0)),
            }
            for a, b in pairs
        },
    }


def _distribution(values: Tensor) -> dict[str, Any]:
    quantiles = np.quantile(values.numpy(), QUANTILES)
    return {
        "n": len(values),
        "mean": float(values.double().mean()),
        "quantiles": {str(q): float(value) for q, value in zip(QUANTILES, quantiles, strict=True)},
    }


GOOD, POOR = 0.5, 0.3  # mean cosines above and below which an alignment is called so: a rule of thumb
CAUTION = """\
Alignment does not show whether world tokens help. Tokens that resemble image tokens may carry no information about the
image, and tokens that do not resemble them may be used well; accuracy beside its controls shows it (tools/eval.py). If
all tokens point in similar directions, unrelated ones have high cosines too: only what exceeds the control depends on
the image."""

_COMPARISONS = {
    SAME_PLACE: "each world token is compared with the image token at the same place",
    NEAREST_IMAGE: "they do not lie at the same places: each world token is compared with the nearest image token of\n"
    "the same image (the highest cosine of many, so higher than at the same place)",
    NEAREST_TEXT: "this Gemma is text-only: each world token is compared with the nearest token, by cosine, of the\n"
    "statements about its image",
}


def report(result: dict[str, Any]) -> str:
    """Return the figures as text for a terminal, with a rule of thumb and its limits."""
    both, kind = [result["untrained"], result["trained"]], result["comparison"]
    num_predicted = result.get("predicted_moments_left_out", 0)
    left_out = [
        f"world tokens of {counted(num_predicted, 'predicted frame')} have no place in the photograph and are left out"
    ]
    lines = [
        f"{result['images']} images of {result['split']}: {counted(result['world_tokens'], 'world token')} each, "
        f"{counted(result['image_tokens'], 'image token')}",
        *(left_out if num_predicted else []),
        _COMPARISONS[kind],
        "",
        f"{'':<46}{'untrained':>11}{'trained':>11}{'n':>9}",
    ]
    for key, label in (
        ("cosine", f"cosine, {kind}"),
        ("control_cosine", "control: the same with another image"),
        ("distance", "distance (L2)"),
    ):
        lines.append(_row(label, [one[key]["mean"] for one in both], both[0][key]["n"]))
        if key != "distance":
            for q in (str(QUANTILES[0]), str(QUANTILES[-1])):
                lines.append(
                    _row(f"  {float(q):.0%} of the tokens are below", [o[key]["quantiles"][q] for o in both])
                )
    for name in both[0]["norm"]:
        lines.append(
            _row(f"norm, {name}", [o["norm"][name]["mean"] for o in both], both[0]["norm"][name]["n"])
        )
    for name in both[0]["norm_ratio"]:
        label = name.replace("_", " / ")
        lines.append(_row(f"ratio of norms, {label}", [o["norm_ratio"][name] for o in both]))
    for name in both[0]["mean_vector_cosine"]:
        label = name.replace("_", ", ")
        values = [o["mean_vector_cosine"][name]["cosine"] for o in both]
        lines.append(_row(f"cosine of mean vectors, {label}", values))
    return "\n".join([*lines, "", _reading(result), CAUTION])


def _row(label: str, values: Sequence[float], n: int | None = None) -> str:
    return f"{label:<46}{values[0]:>11.3f}{values[1]:>11.3f}" + (f"{n:>9,}" if n else "")


def _reading(result: dict[str, Any]) -> str:
    mean = result["trained"]["cosine"]["mean"]
    above = mean - result["trained"]["control_cosine"]["mean"]
    if result["comparison"] == NEAREST_TEXT:
        return f"mean cosine {mean:.2f}, {above:+.2f} against the control."
    word = "good" if mean > GOOD else "poor" if mean < POOR else "in between"
    return (
        f"mean cosine {mean:.2f}, {above:+.2f} against the control. By a rule of thumb: {word} "
        f"(above {GOOD} good, below {POOR} poor)."
    )


MAX_POINTS = 1500  # points of all kinds together in PCA and t-SNE: more would be slow and hide each other
# Okabe and Ito's, safe for colour blindness
COLOURS = {
    "world": "#d55e00",
    "image": "#0072b2",
    "text": "#222222",
}
MARKERS = {"world": "o", "image": "s", "text": "^"}


def draw(measured: dict[str, Measured], result: dict[str, Any], path: Path) -> None:
    """Draw a row of four panels for each projection that `align` returns, and make the folder of `path`.

    Needs no screen. Raises ValueError for a suffix that matplotlib does not write.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(18, 9), layout="constrained")
    rows = figure.subplots(len(measured), 4)
    every = torch.cat([torch.cat([one.cosine, one.control]) for one in measured.values()])
    edges = np.linspace(float(every.min()), float(every.max()) + 1e-6, 41).tolist()
    for axes, (name, one) in zip(rows, measured.items(), strict=True):
        draw_tokens(axes[0], axes[1], one, name)
        draw_cosines(axes[2], one, edges, result["comparison"])
        draw_norms(axes[3], one, result[name])
        for axis in axes:
            axis.spines[["top", "right"]].set_visible(False)
    for column in (2, 3):  # a common scale, so that the rows can be compared
        limits = [rows[row, column].get_ylim() for row in range(len(measured))]
        for axis in rows[:, column]:
            axis.set_ylim(min(low for low, _ in limits), max(high for _, high in limits))
    figure.suptitle(
        f"World tokens of {result['images']} images of {result['split']}, untrained (above) and trained (below)",
        fontsize=15,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    with naming(path):
        figure.savefig(path, dpi=120)


def draw_tokens(left: Axes, right: Axes, measured: Measured, name: str) -> None:
    """Draw the same number of tokens of each kind on their first two principal components and by t-SNE."""
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    generator = np.random.default_rng(0)
    most = MAX_POINTS // len(measured.kinds)
    chosen = {
        kind: some[np.sort(generator.permutation(len(some))[:most])].numpy()
        for kind, some in measured.vectors.items()
    }
    points = np.concatenate(list(chosen.values()))
    pca = PCA(min(50, *points.shape), random_state=0)
    components = pca.fit_transform(points)
    perplexity = min(30.0, (len(points) - 1) / 3)  # must be below the number of points
    # From 50 dimensions, as scikit-learn advises: faster, with less noise in the distances.
    neighbours = TSNE(perplexity=perplexity, init="pca", random_state=0).fit_transform(components)
    kinds = np.repeat(list(chosen), [len(vectors) for vectors in chosen.values()])
    for axis, places in ((left, components), (right, neighbours)):
        for kind in sorted(chosen, key=["image", "world", "text"].index):  # the last one is on top
            x, y = places[kinds == kind, :2].T
            size, alpha = (30, 0.9) if len(x) < 100 else (11, 0.5)  # few small points would not be seen
            colour, marker = COLOURS[kind], MARKERS[kind]
            axis.scatter(x, y, s=size, c=colour, marker=marker, alpha=alpha, linewidths=0)
    shares = pca.explained_variance_ratio_
    left.set(title=f"{name}: PCA, {shares[:2].sum():.0%} of the variance")
    left.set(xlabel=f"first component, {shares[0]:.0%}", ylabel=f"second component, {shares[1]:.0%}")
    right.set(title=f"{name}: t-SNE, perplexity {perplexity:.0f}", xticks=[], yticks=[])
    right.set(xlabel="neighbours are meaningful, distances are not")
    for kind, vectors in chosen.items():
        left.scatter([], [], color=COLOURS[kind], marker=MARKERS[kind], label=f"{kind} ({len(vectors)})")
    left.legend(fontsize=9)


def draw_cosines(axis: Axes, measured: Measured, edges: list[float], kind: str) -> None:
    """Draw histograms of the cosines and of those of the control."""
    share = np.full(len(measured.cosine), 1 / len(measured.cosine))
    own, control = measured.cosine.numpy(), measured.control.numpy()
    axis.hist(own, edges, weights=share, color=COLOURS["world"], alpha=0.65, label=kind)
    axis.hist(
        control, edges, weights=share, color="black", histtype="step", label="another image's (control)"
    )
    axis.axvline(own.mean(), color=COLOURS["world"], linewidth=1.6, linestyle="--")
    axis.axvline(control.mean(), color="black", linewidth=1.2, linestyle="--")
    axis.set(xlabel="cosine; dashed: means", ylabel="share of world tokens")
    axis.set_title(f"mean cosine {own.mean():.2f}, control {control.mean():.2f}")
    axis.legend(fontsize=9)


def draw_norms(axis: Axes, measured: Measured, numbers: dict[str, Any]) -> None:
    """Draw the norms of the tokens of each kind: box from 25 to 75 %, whiskers from 5 to 95 %."""
    norms = {kind: tokens.norms.numpy() for kind, tokens in measured.kinds.items()}
    boxes = axis.boxplot(list(norms.values()), whis=(5, 95), showfliers=False, patch_artist=True, widths=0.5)
    for box, kind in zip(boxes["boxes"], norms, strict=True):
        box.set(facecolor=COLOURS[kind], alpha=0.6)
    for line in boxes["medians"]:
        line.set_color("black")
    axis.set_xticks(range(1, len(norms) + 1), list(norms))
    axis.set_ylim(bottom=0)
    axis.set(ylabel="L2 norm; box 25–75 %, whiskers 5–95 %")
    axis.set_title("mean norm: " + ", ".join(f"{k} {n['mean']:.1f}" for k, n in numbers["norm"].items()))
