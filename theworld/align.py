"""Where world tokens lie, compared with what Gemma's layers are used to: its own image tokens and text.

Each world token has a partner, and what is measured of it has a control: the same with another image's tokens.

    same place            the image token on the world token's place in the picture, where there is one for each
    nearest image token   otherwise: the image token of the same image with the highest cosine
    nearest text token    for a text-only Gemma: the token with the highest cosine in statements about that image

Dimensions: I images, N world tokens and M image tokens an image, T text tokens, D the width of the language model.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from theworld.cache import LATENTS, Rows, check_meaning, in_cache
from theworld.data import cached_vision, vision_for
from theworld.gemma import Gemma
from theworld.model import TheWorld
from theworld.projection import ProjectionShape, WorldProjection
from theworld.vsr import Statement, images_of, load_statements

SAME_PLACE, NEAREST_IMAGE, NEAREST_TEXT = "same place", "nearest image token", "nearest text token"
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
GOOD, POOR = 0.5, 0.3  # the guide's reading of a mean cosine
CAUTION = """\
What this does not show: whether world tokens are of use. Tokens that resemble image tokens can hold nothing about the
picture, and tokens that do not can be read well; accuracy beside its controls tells (tools/eval.py). Where all tokens
point one way, unrelated ones have high cosines too: only what lies above the control depends on the picture."""


@dataclass(frozen=True)
class Sample:
    """Some images of a split in random order, and the tokens that their world tokens are compared with."""

    images: list[str]
    latents: Tensor  # float[I, *row_shape] as the VAE gives them
    image: Tensor | None  # float32[I, M, D], Gemma's own image tokens; None for a text-only Gemma
    text: Tensor  # float32[T, D], the different tokens of all statements, as the first layer sees them
    text_of: list[Tensor]  # for each image float32[_, D], the different tokens of the statements about it


@dataclass(frozen=True)
class Measured:
    """What is measured of one projection, on the CPU."""

    cosine: Tensor  # float32[I N], of each world token and its partner
    control: Tensor  # float32[I N], the same with the tokens of another image
    distance: Tensor  # float32[I N], L2, to the partner
    vectors: dict[str, Tensor]  # kind -> float32[_, D]: world, image (unless text-only), text


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
    every = images_of(statements)
    count = min(num_samples, len(every))
    if count < 2:
        raise ValueError(
            f"--num_samples {num_samples}, {len(every)} images in {split}: the control needs at least two images"
        )
    images = [every[i] for i in np.random.default_rng(0).permutation(len(every))[:count]]
    image = _image_tokens(model, cache, images) if model.gemma.is_multimodal else None
    text, text_of = _text_tokens(model.gemma, statements, images)
    return Sample(images, latents(images), image, text, text_of)


def _image_tokens(model: TheWorld, cache: Path, images: Sequence[str]) -> Tensor:
    """float32[I, M, D]: what Gemma puts into its own prompts for these images."""
    cached = cached_vision(model.config, cache)
    if cached is None and not model.gemma.changed:
        raise ValueError(
            f"{cache} has no vision features to compare with; extract them with tools/extract_latents.py --gemma_vision"
        )
    vision = vision_for(model.gemma, model.config, cached, [])
    assert vision is not None
    return torch.cat([model.gemma.image_features(vision([image])).float().cpu() for image in images])


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
def project(projection: WorldProjection, latents: Tensor) -> Tensor:
    """float[I, *row_shape] -> float32[I, N, D] on the CPU: the photographs' own world tokens. Those of moments that
    were predicted from them have no place in the photograph, and are left out."""
    device, num_own = projection.brackets.device, projection.shape.tokens_per_moment
    return torch.cat([projection(row[None].to(device))[:, :num_own].cpu() for row in latents])


def measure(world: Tensor, sample: Sample, kind: str) -> Measured:
    """World tokens float32[I, N, D] of the sample's images beside their partners; `kind` is that of `comparison`.

    The control of an image is the one before it in the sample's random order.
    """
    targets = sample.text_of if sample.image is None else list(sample.image)
    others = [targets[-1], *targets[:-1]]
    own = [compare(w, t, kind) for w, t in zip(world, targets, strict=True)]
    control = [compare(w, t, kind)[0] for w, t in zip(world, others, strict=True)]
    vectors = {"world": world.flatten(0, 1)}
    if sample.image is not None:
        vectors["image"] = sample.image.flatten(0, 1)
    return Measured(
        cosine=torch.cat([cosine for cosine, _ in own]),
        control=torch.cat(control),
        distance=torch.cat([distance for _, distance in own]),
        vectors=vectors | {"text": sample.text},
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
    vectors = measured.vectors
    norms = {kind: _distribution(v.norm(dim=-1)) for kind, v in vectors.items()}
    pairs = [(a, b) for a, b in (("world", "image"), ("world", "text"), ("image", "text")) if a in vectors]
    pairs = [(a, b) for a, b in pairs if b in vectors]
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
                "n": [len(vectors[a]), len(vectors[b])],
                "cosine": float(F.cosine_similarity(vectors[a].mean(0), vectors[b].mean(0), dim=0)),
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
    lines = [
        f"{result['images']} images of {result['split']}: {result['world_tokens']} world tokens each, "
        f"{result['image_tokens']} image tokens",
        *(
            [f"those of {later} predicted moments have no place in the photograph and are left out"]
            if later
            else []
        ),
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
