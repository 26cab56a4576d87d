"""Where world tokens lie, compared with what Gemma's layers are used to: its own image tokens and text.

Each world token has a partner, and what is measured of it has a control: the same with another image's tokens.

    same place            the image token on the world token's place in the picture, where there is one for each
    nearest image token   otherwise: the image token of the same image with the highest cosine
    nearest text token    for a text-only Gemma: the token with the highest cosine in statements about that image

Tokens are made and measured image by image, and of each image only some stay in memory to be drawn: 4,096 tokens of a
hundred images would be 4 GB.

Dimensions: I images, N world tokens and M image tokens an image, T text tokens, D the width of the language model.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from theworld.cache import LATENTS, Rows, check_meaning, in_cache
from theworld.config import Config
from theworld.data import cached_vision, vision_for
from theworld.feed import Fetch
from theworld.gemma import Gemma
from theworld.model import TheWorld
from theworld.projection import ProjectionShape, WorldProjection
from theworld.vsr import Statement, images_of, load_statements

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
    checkpoint: Path, cache: Path, split: str, num_samples: int, overrides: dict[str, Any]
) -> tuple[dict[str, Measured], dict[str, Any]]:
    """A checkpoint, "trained", and a projection of the same settings and seed as a run starts with, "untrained":
    what is measured of both, and all figures as JSON.

    Raises ValueError for fewer than two images or a cache without image features, StoreMismatch for a cache of other
    settings than the checkpoint's.
    """
    # Gemma's layers have no part in this, so they need no copy in 8 bits.
    model = TheWorld.from_pretrained(checkpoint, **overrides | {"fp8": False})
    start = TheWorld.from_config(model.config, model.gemma, model.fingerprint)
    sample = load_sample(model, cache, split, num_samples)
    kind = comparison(model.projection.shape, model.gemma.num_image_tokens)
    measured = {
        "untrained": measure(project(start.projection, sample.latents), sample, kind),
        "trained": measure(project(model.projection, sample.latents), sample, kind),
    }
    result = {
        "checkpoint": str(checkpoint),
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
