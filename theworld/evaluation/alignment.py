"""Where world tokens lie, compared with what Gemma's layers are used to: its own image tokens and text.

Each world token has a partner, and what is measured of it has a control: the same with another image's tokens.

    same place            the image token on the world token's place in the picture, where there is one for each
    nearest image token   otherwise: the image token of the same image with the highest cosine
    nearest text token    for a text-only Gemma: the token with the highest cosine in statements about that image

Tokens are made and measured image by image, and of each image only some stay in memory to be drawn: 4,096 tokens of a
hundred images would be 4 GB.

Dimensions: I images, N world tokens and M image tokens an image, T text tokens, D the width of the language model.

What `theworld.evaluation.alignment` measures as text for a terminal.

The picture of what `theworld.evaluation.alignment` measures: tokens by PCA and t-SNE, their cosines, their norms.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE
from torch import Tensor

from theworld.config.config import Config
from theworld.data.vsr import Statement, images_of, load_statements
from theworld.extraction.batches import Fetch
from theworld.extraction.features import Rows, cached_vision, in_cache, vision_for
from theworld.models.gemma import Gemma
from theworld.models.projection import ProjectionShape, WorldProjection
from theworld.models.serialization import SavedModel
from theworld.models.theworld import TheWorld
from theworld.store.format import LATENTS, check_meaning

SAME_PLACE, NEAREST_IMAGE, NEAREST_TEXT = "same place", "nearest image token", "nearest text token"
KEPT = 2000  # tokens of a kind that are kept to be drawn
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


@dataclass(frozen=True)
class Sample:
    """Some images of a split in random order, and the tokens that their world tokens are compared with."""

    images: list[str]
    latents: Tensor  # float[I, *row_shape] as the VAE gives them
    image: (
        Sequence[Tensor] | None
    )  # for each image float32[M, D], Gemma's own tokens; None for a text-only Gemma
    text: Tensor  # float32[T, D], the different tokens of all statements, as the first layer sees them
    text_of: list[Tensor]  # for each image float32[_, D], the different tokens of the statements about it


class ImageTokens(Sequence[Tensor]):
    """What Gemma puts into its own prompts for some images, made when asked for: float32[M, D] each, on the CPU."""

    def __init__(self, gemma: Gemma, vision: Fetch, images: Sequence[str]) -> None:
        self.gemma, self.vision, self.images = gemma, vision, images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: Any) -> Any:
        return self.gemma.image_features(self.vision([self.images[i]])).float().cpu()[0]


class Tokens:
    """Tokens of one kind as they come: how many, the length of each, their mean, and some of them to be drawn."""

    def __init__(self) -> None:
        self._norms: list[Tensor] = []
        self._some: list[Tensor] = []
        self._sum = torch.zeros(0, dtype=torch.float64)

    def add(self, tokens: Tensor, most: int) -> "Tokens":
        """Counts float32[_, D], and keeps at most so many of them: those of the same places at every call."""
        total = tokens.sum(0, dtype=torch.float64)
        self._sum = total if not self._norms else self._sum + total
        self._norms.append(tokens.norm(dim=-1))
        chosen = np.sort(np.random.default_rng(len(self._norms)).permutation(len(tokens))[:most])
        self._some.append(tokens[torch.from_numpy(chosen)])
        return self

    @property
    def norms(self) -> Tensor:
        """float32[_], of every token."""
        return torch.cat(self._norms)

    @property
    def mean(self) -> Tensor:
        """float64[D], of all tokens."""
        return self._sum / len(self.norms)

    @property
    def some(self) -> Tensor:
        """float32[_, D], those that were kept."""
        return torch.cat(self._some)


@dataclass(frozen=True)
class Measured:
    """What is measured of one projection, on the CPU."""

    cosine: Tensor  # float32[I N], of each world token and its partner
    control: Tensor  # float32[I N], the same with the tokens of another image
    distance: Tensor  # float32[I N], L2, to the partner
    kinds: dict[str, Tokens]  # world, image (unless text-only), text

    @property
    def vectors(self) -> dict[str, Tensor]:
        """kind -> float32[_, D], some tokens of it."""
        return {kind: tokens.some for kind, tokens in self.kinds.items()}


def align(
    checkpoint: Path | SavedModel, cache: Path, split: str, num_samples: int, overrides: dict[str, Any]
) -> tuple[dict[str, Measured], dict[str, Any]]:
    """A checkpoint, "trained", and a projection of the same settings and seed as a run starts with, "untrained":
    what is measured of both, and all figures as JSON.

    Raises ValueError for fewer than two images or a cache without image features, StoreMismatch for a cache of other
    settings than the checkpoint's.
    """
    # Gemma's layers have no part in this, so they need no copy in 8 bits.
    saved = SavedModel.open_folder(checkpoint)
    model = TheWorld.from_pretrained(saved, **overrides | {"fp8": False})
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
        "world_tokens": model.projection.shape.tokens_per_moment,
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


def load_sample(model: TheWorld, cache: Path, split: str, num_samples: int) -> Sample:
    """`num_samples` images of the split (or all, if those are fewer) from the cache, the same at every call.
    Prints what the cache holds of the split. Raises as `align` does."""
    latents = Rows(cache / LATENTS, LATENTS)
    check_meaning(latents.reader.root, latents.reader.fingerprint, model.fingerprint)
    config = model.config
    statements = load_statements(config.annotations, split, config.dataset_name)
    statements, note = in_cache(statements, latents, cache)
    print(f"{split}: {note}")
    images = chosen_images(statements, split, num_samples)
    image = _image_tokens(model, cache, images) if model.gemma.is_multimodal else None
    text, text_of = _text_tokens(model.gemma, statements, images)
    return Sample(images, latents(images), image, text, text_of)


def chosen_images(statements: Sequence[Statement], split: str, num_samples: int) -> list[str]:
    """So many of the images, the same at every call. ValueError for fewer than two."""
    every = images_of(statements)
    count = min(num_samples, len(every))
    if count < 2:
        raise ValueError(
            f"--num_samples {num_samples}, {len(every)} images in {split}: the control needs at least two images"
        )
    return [every[i] for i in np.random.default_rng(0).permutation(len(every))[:count]]


def vision_to_compare(config: Config, cache: Path, changed: Sequence[str]) -> Rows | None:
    """Gemma's vision features of the cache; None where they are another's, as parts of this Gemma are `changed`.
    ValueError where the cache should have some and has none."""
    cached = cached_vision(config, cache)
    if cached is None and not changed:
        raise ValueError(
            f"{cache} has no vision features to compare with; extract them with tools/extract_latents.py --gemma_vision"
        )
    return cached


def _image_tokens(model: TheWorld, cache: Path, images: Sequence[str]) -> ImageTokens:
    cached = vision_to_compare(model.config, cache, model.gemma.changed)
    vision = vision_for(model.gemma, model.config, cached, [])
    assert vision is not None
    return ImageTokens(model.gemma, vision, images)


@torch.no_grad()
def _text_tokens(
    gemma: Gemma, statements: Sequence[Statement], images: Sequence[str]
) -> tuple[Tensor, list[Tensor]]:
    """`Sample.text` and `Sample.text_of`."""
    ids: dict[str, set[int]] = {image: set() for image in images}
    for statement in statements:
        if statement.image in ids:
            ids[statement.image] |= set(gemma.tokenizer.encode(statement.caption, add_special_tokens=False))
    every = sorted(set().union(*ids.values()))
    table = gemma.embed(torch.tensor(every, device=gemma.device)).float().cpu()
    place = {token: row for row, token in enumerate(every)}
    return table, [table[[place[token] for token in sorted(ids[image])]] for image in images]


def comparison(shape: ProjectionShape, num_image_tokens: int) -> str:
    """What a world token's partner is. Equal numbers of patches lie on the same places, since both grids are square
    and cover the whole picture; a latent channel has no place."""
    if num_image_tokens == 0:
        return NEAREST_TEXT
    same = shape.mode == "patch" and shape.tokens_per_moment == num_image_tokens
    return SAME_PLACE if same else NEAREST_IMAGE


@torch.no_grad()
def project(projection: WorldProjection, latents: Tensor) -> Iterator[Tensor]:
    """float[I, *row_shape] -> float32[N, D] on the CPU for each image: the photographs' own world tokens. Those of
    moments that were predicted from them have no place in the photograph, and are left out."""
    device, num_own = projection.brackets.device, projection.shape.tokens_per_moment
    for row in latents:
        yield projection(row[None].to(device))[0, :num_own].cpu()


@torch.no_grad()
def measure(world: Iterable[Tensor], sample: Sample, kind: str) -> Measured:
    """World tokens, float32[N, D] of each of the sample's images, beside their partners; `kind` is that of
    `comparison`. The control of an image is the one before it in the sample's random order.
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
    """float32[N, D] and float32[M, D] -> float32[N] each: cosine and L2 distance of the world tokens and
    their partners."""
    if kind != SAME_PLACE:
        cosines = F.normalize(world, dim=-1) @ F.normalize(target, dim=-1).T
        target = target[cosines.argmax(1)]
    return F.cosine_similarity(world, target, dim=-1), (world - target).norm(dim=-1)


def figures(measured: Measured) -> dict[str, Any]:
    """The JSON form: distributions, and the cosines between the mean vectors of two kinds of tokens."""
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


GOOD, POOR = 0.5, 0.3  # the guide's reading of a mean cosine
CAUTION = """\
What this does not show: whether world tokens are of use. Tokens that resemble image tokens can hold nothing about the
picture, and tokens that do not can be read well; accuracy beside its controls tells (tools/eval.py). Where all tokens
point one way, unrelated ones have high cosines too: only what lies above the control depends on the picture."""

_PARTNER = {
    SAME_PLACE: "each world token is compared with the image token of the same place",
    NEAREST_IMAGE: "they do not lie on the same places: each world token is compared with the nearest image token of\n"
    "the same image (the highest cosine of many, so higher than at the same place)",
    NEAREST_TEXT: "a text-only Gemma: each world token is compared with the nearest token, by cosine, of the\n"
    "statements about its image",
}


def report(result: dict[str, Any]) -> str:
    """The figures as text for a terminal, with the guide's reading and its limits."""
    both, kind = [result["untrained"], result["trained"]], result["comparison"]
    later = result.get("predicted_moments_left_out", 0)
    left_out = [f"those of {later} predicted moments have no place in the photograph and are left out"]
    lines = [
        f"{result['images']} images of {result['split']}: {result['world_tokens']} world tokens each, "
        f"{result['image_tokens']} image tokens",
        *(left_out if later else []),
        _PARTNER[kind],
        "",
        f"{'':<46}{'untrained':>11}{'trained':>11}{'n':>9}",
    ]
    for key, label in (
        ("cosine", f"cosine, {kind}"),
        ("control_cosine", "control: the same of another image"),
        ("distance", "distance (L2)"),
    ):
        lines.append(_row(label, [one[key]["mean"] for one in both], both[0][key]["n"]))
        if key != "distance":
            for q in (str(QUANTILES[0]), str(QUANTILES[-1])):
                lines.append(
                    _row(f"  {float(q):.0%} of them are below", [o[key]["quantiles"][q] for o in both])
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
        f"mean cosine {mean:.2f}, {above:+.2f} against the control. The guide's reading: {word} "
        f"(above {GOOD} good, below {POOR} poor)."
    )


MAX_POINTS = 1500  # of all kinds together in PCA and t-SNE, where more are slow and hide each other
COLOURS = {"world": "#d55e00", "image": "#0072b2", "text": "#222222"}  # Okabe and Ito's, for all eyes
MARKERS = {"world": "o", "image": "s", "text": "^"}


def draw(measured: dict[str, Measured], result: dict[str, Any], path: Path) -> None:
    """Draw a row for each projection that `align` gives; the folder of `path` is made if it is missing.

    Needs no screen. Raises ValueError for a picture of another kind than matplotlib writes.
    """
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
    for column in (2, 3):  # one scale, so that the rows can be compared
        limits = [rows[row, column].get_ylim() for row in range(len(measured))]
        for axis in rows[:, column]:
            axis.set_ylim(min(low for low, _ in limits), max(high for _, high in limits))
    figure.suptitle(
        f"World tokens of {result['images']} images of {result['split']}, untrained (above) and trained (below)",
        fontsize=15,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def draw_tokens(left: Axes, right: Axes, measured: Measured, name: str) -> None:
    """The same number of each kind of tokens, on their first two principal components and by t-SNE."""
    generator = np.random.default_rng(0)
    most = MAX_POINTS // len(measured.kinds)
    chosen = {
        kind: some[np.sort(generator.permutation(len(some))[:most])].numpy()
        for kind, some in measured.vectors.items()
    }
    points = np.concatenate(list(chosen.values()))
    pca = PCA(min(50, *points.shape), random_state=0)
    components = pca.fit_transform(points)
    perplexity = min(30.0, (len(points) - 1) / 3)  # has to be below the number of points
    # From fewer dimensions, as scikit-learn advises: faster, and less noise in the distances.
    neighbours = TSNE(perplexity=perplexity, init="pca", random_state=0).fit_transform(components)
    kinds = np.repeat(list(chosen), [len(vectors) for vectors in chosen.values()])
    for axis, places in ((left, components), (right, neighbours)):
        for kind in sorted(chosen, key=["image", "world", "text"].index):  # the last on top
            x, y = places[kinds == kind, :2].T
            size, alpha = (30, 0.9) if len(x) < 100 else (11, 0.5)  # few would not be seen among many
            colour, marker = COLOURS[kind], MARKERS[kind]
            axis.scatter(x, y, s=size, c=colour, marker=marker, alpha=alpha, linewidths=0)
    shares = pca.explained_variance_ratio_
    left.set(title=f"{name}: PCA, {shares[:2].sum():.0%} of the variance")
    left.set(xlabel=f"first component, {shares[0]:.0%}", ylabel=f"second component, {shares[1]:.0%}")
    right.set(title=f"{name}: t-SNE, perplexity {perplexity:.0f}", xticks=[], yticks=[])
    right.set(xlabel="neighbours mean something, distances do not")
    for kind, vectors in chosen.items():
        left.scatter([], [], color=COLOURS[kind], marker=MARKERS[kind], label=f"{kind} ({len(vectors)})")
    left.legend(fontsize=9)


def draw_cosines(axis: Axes, measured: Measured, edges: list[float], kind: str) -> None:
    """How the cosines with the partner lie, and those with another image's tokens."""
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
    """The lengths of the tokens of each kind: box from 25 to 75 %, whiskers from 5 to 95 %."""
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
