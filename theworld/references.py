"""What others published on Visual Spatial Reasoning: quoted from their papers, measured by nobody here."""

from dataclasses import dataclass

from theworld.vsr import RELEASES


@dataclass(frozen=True)
class Reference:
    """One published system: accuracy on the test split of each release, in percent, and where that stands."""

    system: str
    random: float | None
    zeroshot: float | None
    source: str

    def accuracy(self, dataset: str) -> float | None:
        """As a share, on a data set by the name that `dataset_label` gives it; None for what was not published."""
        percent = {"vsr_random": self.random, "vsr_zeroshot": self.zeroshot}.get(dataset)
        return None if percent is None else percent / 100


VSR_PAPER = "Liu, Emerson, Collier: Visual Spatial Reasoning, TACL 2023 (arXiv 2205.00363)"
PALIGEMMA_PAPER = "Steiner et al.: PaliGemma 2, 2024 (arXiv 2412.03555)"
QUOTED = (
    Reference("human", 95.4, None, VSR_PAPER),
    Reference("PaliGemma 2 10B, fine-tuned", 86.8, 79.8, PALIGEMMA_PAPER),
    Reference("PaliGemma 2 3B, fine-tuned", 81.6, 74.8, PALIGEMMA_PAPER),
    Reference("LXMERT", 70.1, 61.2, VSR_PAPER),
    Reference("ViLT", 69.3, 63.0, VSR_PAPER),
    Reference("CLIP, frozen", 56.0, 54.5, VSR_PAPER),
)
# Statements of each split as published: what has another number of them is no release.
SIZES = {
    ("random", "train"): 7680,
    ("random", "dev"): 1097,
    ("random", "test"): 2195,
    ("zeroshot", "train"): 3489,
    ("zeroshot", "dev"): 340,
    ("zeroshot", "test"): 1222,
}
OWN = "own data"


def dataset_label(dataset_name: str, split: str, num_statements: int) -> str:
    """ "vsr_random" or "vsr_zeroshot" for a split as large as the release has it, else "own data": the setting alone
    does not say, since a folder of one's own has the same shape."""
    release = RELEASES[dataset_name]
    split = "dev" if split == "validation" else split
    return f"vsr_{release}" if SIZES[release, split] == num_statements else OWN


def quoted(dataset: str, split: str) -> list[tuple[Reference, float]]:
    """The published systems and their accuracies, as shares, that belong beside results on this data set; none but for
    the test split of a release."""
    if split != "test":
        return []
    return [(r, value) for r in QUOTED if (value := r.accuracy(dataset)) is not None]
