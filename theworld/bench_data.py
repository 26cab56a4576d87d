"""Statements and photographs that stand in for VSR and COCO where they are not at hand, for measuring only.

What costs time is as in the real data: how many statements an image has, in how many splits it stands, how large
its file is. What the statements say means nothing. Without torch, so that processes that draw start quickly.
"""

import io
import json
import multiprocessing
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from theworld.vsr import RELATIONS, images_of, load_statements

# VSR's random release: split -> {statements an image: images}, counted in its files.
PER_IMAGE = {
    "train": {1: 3382, 2: 969, 3: 350, 4: 155, 5: 44, 6: 31, 7: 26, 8: 6, 9: 3, 13: 1, 14: 1},
    "dev": {1: 941, 2: 72, 3: 4},
    "test": {1: 1609, 2: 217, 3: 41, 4: 6, 5: 1},
}
NUM_IMAGES = 6259  # of the three splits together
SEEN_TEST_STATEMENTS = 1226  # about an image that is also in train
THINGS = """person bicycle car motorcycle airplane bus train truck boat bench bird cat dog horse sheep cow elephant
bear zebra giraffe backpack umbrella handbag tie suitcase skateboard surfboard bottle cup fork knife spoon bowl banana
apple sandwich orange pizza donut cake chair couch bed toilet tv laptop mouse remote keyboard microwave oven toaster
sink refrigerator book clock vase scissors""".split()
SPLITS = tuple(PER_IMAGE)
PHOTOGRAPH = (640, 480)  # width and height of most COCO photographs, pixels
QUALITY = 87  # JPEG; with it a stand-in is about as large as a COCO photograph, 160 KB


def image_counts(split: str, share: float = 1.0) -> list[int]:
    """Statements of each image of a split, in a fixed random order; `share` of VSR's images, at least two."""
    counts: list[int] = []
    for number, images in PER_IMAGE[split].items():
        counts += [number] * (images if share == 1 else round(images * share))
    counts += [1] * (2 - len(counts))
    return [counts[i] for i in np.random.default_rng(len(split)).permutation(len(counts))]


def place_images(share: float = 1.0) -> dict[str, list[tuple[int, int]]]:
    """split -> (image, statements) of each of its images; images are numbered through the three splits.

    Test shares images with train until SEEN_TEST_STATEMENTS statements are about one; dev shares as many as it
    takes for NUM_IMAGES in all.
    """
    train, dev, test = (image_counts(split, share) for split in SPLITS)
    number, wanted = len(train), round(SEEN_TEST_STATEMENTS * share)
    placed: dict[str, list[tuple[int, int]]] = {"train": list(enumerate(train)), "dev": [], "test": []}
    seen_images, seen_statements = 0, 0
    for count in test:
        if seen_statements + count <= wanted and seen_images < len(train):
            placed["test"].append((seen_images, count))
            seen_images, seen_statements = seen_images + 1, seen_statements + count
        else:
            placed["test"].append((number, count))
            number += 1
    surplus = number + len(dev) - round(NUM_IMAGES * share)
    for index, count in enumerate(dev):
        shared = index < surplus
        placed["dev"].append((len(train) - 1 - index if shared else number, count))
        number += not shared
    return placed


def write_statements(folder: Path, share: float = 1.0) -> None:
    """train.jsonl, dev.jsonl and test.jsonl in VSR's form; half of the statements are called true."""
    folder.mkdir(parents=True, exist_ok=True)
    generator, relations = np.random.default_rng(0), sorted(RELATIONS)
    for split, images in place_images(share).items():
        lines = []
        for image, count in images:
            for _ in range(count):
                one, other = generator.choice(THINGS, 2, replace=False)
                relation = str(generator.choice(relations))
                row = {"image": f"{image:012}.jpg", "image_link": "", "relation": relation}
                row |= {"caption": f"The {one} is {relation} the {other}."}
                lines.append(json.dumps(row | {"label": int(generator.integers(2))}) + "\n")
        (folder / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")


def draw_photograph(seed: int, size: tuple[int, int] = PHOTOGRAPH) -> bytes:
    """A JPEG of coloured noise whose amplitude falls with the inverse of the frequency, as that of photographs does
    (Field 1987, doi 10.1364/JOSAA.4.002379). `size`: width and height, pixels."""
    width, height = size
    generator = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = 1.0
    # Three independent layers, mixed: channels of a photograph resemble each other.
    layers = np.fft.rfft2(generator.standard_normal((3, height, width))) / frequency**1.1
    fields = np.fft.irfft2(layers, s=(height, width))
    fields /= fields.std(axis=(1, 2), keepdims=True)
    mixed = fields[:1] + 0.25 * fields
    pixels = np.clip(mixed * 48 + 120, 0, 255).astype(np.uint8).transpose(1, 2, 0)
    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(file, "JPEG", quality=QUALITY)
    return file.getvalue()


def with_comment(jpeg: bytes, text: str) -> bytes:
    """The same picture as another file: a comment segment (FF FE, ITU T.81 section B.2.4.5) after the start marker."""
    content = text.encode()
    return jpeg[:2] + b"\xff\xfe" + (len(content) + 2).to_bytes(2, "big") + content + jpeg[2:]


def write_photographs(
    folder: Path, names: Sequence[str], distinct: int, workers: int, size: tuple[int, int] = PHOTOGRAPH
) -> None:
    """A JPEG file for every name, `distinct` pictures in turn, no two files of the same bytes; in processes."""
    folder.mkdir(parents=True, exist_ok=True)
    shares = [(folder, list(names)[seed::distinct], seed, size) for seed in range(min(distinct, len(names)))]
    if workers < 2:
        for share in shares:
            _write_share(share)
        return
    # A fork would carry a CUDA context of the parent along.
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        list(pool.map(_write_share, shares, chunksize=4))


def _write_share(share: tuple[Path, list[str], int, tuple[int, int]]) -> None:
    """All files of one picture."""
    folder, names, seed, size = share
    jpeg = draw_photograph(seed, size)
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(with_comment(jpeg, name))


def statement_images(annotations: Path) -> list[str]:
    """The photographs that the three splits name, each once, sorted."""
    return images_of([s for split in SPLITS for s in load_statements(annotations, split)])
