"""The picture of what `theworld.align` measures: tokens by PCA and t-SNE, their cosines, their norms."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE

from theworld.align import Measured

MAX_POINTS = 1500  # of all kinds together in PCA and t-SNE, where more are slow and hide each other
COLOURS = {"world": "#d55e00", "image": "#0072b2", "text": "#222222"}  # Okabe and Ito's, for all eyes
MARKERS = {"world": "o", "image": "s", "text": "^"}


def draw(measured: dict[str, Measured], result: dict[str, Any], path: Path) -> None:
    """A row for each projection that `theworld.align.align` gives; the folder of `path` is made where it is not there.

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
