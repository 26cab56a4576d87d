"""A synthetic data set in the format of VSR: two coloured things on a marbled ground, and statements about them.

A scene is a pure function of (seed, split, index), so a data set is drawn where it is needed and never shipped. The
things are plain in the picture, and mostly invisible to a Gemma that sees it as 4 x 4 image tokens.

Dimensions: H = W = size, height and width of the picture in pixels.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from theworld.utils.files import naming

SPLITS = ("train", "dev", "test")
# Strong, well separated hues. A statement names a thing by colour and shape.
COLOURS = {"red": (214, 40, 46), "green": (36, 148, 66), "blue": (38, 84, 206), "yellow": (246, 196, 28)}
SHAPES = ("ball", "box", "cone")
# Relations of VSR, with the direction (x to the right, y down) of the first thing from the second.
RELATIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
PICTURE_SIZE = 192  # pixels

# Lengths as a share of the picture's width.
_MARGIN = 0.13  # smallest distance of a centre from an edge
RADIUS = (0.075, 0.105)  # smallest and largest radius
# smallest distance of the centres on each axis, so that every relation is clearly true or false
_APART_AXIS = 0.12
_APART = 0.27  # smallest distance of the centres, so that things do not touch
_CLOUDS = ((5, 9.0), (10, 4.0))  # (cells a side, amplitude of 255)


@dataclass(frozen=True)
class Thing:
    """One thing: its colour and shape, its centre and radius as a share of the picture's width."""

    colour: str
    shape: str
    x: float
    y: float
    radius: float

    @property
    def name(self) -> str:
        return f"{self.colour} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """Two things of different colours, and the random key of the ground and of the statements."""

    key: tuple[int, int, int]
    things: tuple[Thing, Thing]


@dataclass(frozen=True)
class SceneStatement:
    """A sentence about a scene, its relation, and its label: 1 if it is true."""

    caption: str
    relation: str
    label: int


def make_scene(seed: int, split: str, index: int, radius: tuple[float, float] = RADIUS) -> Scene:
    """Return the scene of (seed, split, index), the same at every call.

    `radius`: smallest and largest radius of a thing, as a share of the picture's width.
    """
    if split not in SPLITS:
        raise ValueError(f"split {split!r}: wanted one of {', '.join(SPLITS)}")
    key = (seed, SPLITS.index(split), index)
    rng = np.random.default_rng([*key, 0])
    colours = rng.permutation(list(COLOURS))[:2]
    shapes = [SHAPES[int(rng.integers(len(SHAPES)))] for _ in range(2)]
    radii = rng.uniform(*radius, size=2)
    while True:
        centres = rng.uniform(_MARGIN, 1 - _MARGIN, size=(2, 2))
        gap = np.abs(centres[0] - centres[1])
        if gap.min() >= _APART_AXIS and np.hypot(*gap) >= _APART:
            break
    first, second = (
        Thing(str(colours[k]), shapes[k], float(centres[k, 0]), float(centres[k, 1]), float(radii[k]))
        for k in range(2)
    )
    return Scene(key, (first, second))


def is_true(first: Thing, relation: str, second: Thing) -> bool:
    """Return whether "first is `relation` second" is true of the centres of the things."""
    x, y = RELATIONS[relation]
    return (first.x - second.x) * x + (first.y - second.y) * y > 0


def make_statements(scene: Scene, num_statements: int = 2) -> list[SceneStatement]:
    """Return statements in shuffled order, as many true as false ones, naming either thing first.

    The relation is drawn evenly from the two that give the wanted label, so that neither the relation nor the things
    predict the label without the picture.
    """
    rng = np.random.default_rng([*scene.key, 1])
    labels = rng.permutation([k % 2 for k in range(num_statements)])
    statements = []
    for label in labels:
        first, second = scene.things if rng.random() < 0.5 else scene.things[::-1]
        fitting = [r for r in RELATIONS if is_true(first, r, second) == bool(label)]
        relation = fitting[int(rng.integers(len(fitting)))]
        caption = f"The {first.name} is {relation} the {second.name}."
        statements.append(SceneStatement(caption, relation, int(label)))
    return statements


def draw_scene(scene: Scene, size: int = PICTURE_SIZE) -> np.ndarray:
    """Return the picture, uint8[H, W, 3]."""
    picture = _draw_ground(scene, size)
    for thing in scene.things:
        _draw_thing(picture, thing, thing.radius * size)
    return np.clip(np.rint(picture), 0, 255).astype(np.uint8)


def _draw_ground(scene: Scene, size: int) -> np.ndarray:
    """Return a pastel ground with coloured clouds of two sizes, float32[H, W, 3]."""
    rng = np.random.default_rng([*scene.key, 2])
    ground = np.full((size, size, 3), rng.uniform(150, 205, size=3), dtype=np.float32)
    for cells, amplitude in _CLOUDS:
        for channel in range(3):
            grid = Image.fromarray(rng.uniform(-1.7, 1.7, size=(cells, cells)).astype(np.float32))
            cloud = np.asarray(grid.resize((size, size), Image.Resampling.BICUBIC))
            ground[:, :, channel] += amplitude * cloud
    return ground


def _draw_thing(picture: np.ndarray, thing: Thing, radius: float) -> None:
    """Draw a shaded thing with a soft shadow into float32[H, W, 3], in place; `radius` in pixels."""
    size = len(picture)
    centre_x, centre_y, reach = thing.x * size - 0.5, thing.y * size - 0.5, 1.9 * radius + 2
    top, bottom = max(0, int(centre_y - reach)), min(size, int(centre_y + reach) + 2)
    left, right = max(0, int(centre_x - reach)), min(size, int(centre_x + reach) + 2)
    y, x = np.mgrid[top:bottom, left:right].astype(np.float32)
    x, y = (x - centre_x) / radius, (y - centre_y) / radius
    window = picture[top:bottom, left:right]
    window *= 1 - 0.45 * np.clip(1.4 - np.hypot(x - 0.15, (y - 0.75) / 0.55), 0, 1)[..., None]
    # Distance to the outline in pixels, negative inside; half a pixel on each side smooths the edge.
    distance = {"ball": _ball, "box": _box, "cone": _cone}[thing.shape](x, y) * radius
    cover = np.clip(0.5 - distance, 0, 1)[..., None]
    light = (1 - 0.28 * np.clip(0.6 * x + y, -1, 1))[..., None]
    shine = 120 * np.exp(-((x + 0.35) ** 2 + (y + 0.4) ** 2) / 0.06)[..., None]
    body = np.array(COLOURS[thing.colour], dtype=np.float32) * light + shine
    window += cover * (body - window)


def _ball(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.hypot(x, y) - 1


def _box(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.maximum(np.abs(x), np.abs(y)) - 0.88


def _cone(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.maximum(y - 0.8, 0.86 * np.abs(x) - 0.5 * y - 0.58)


def scene_rows(scene: Scene, image: str, num_statements: int = 2) -> list[dict[str, object]]:
    """Return the scene's statements as rows with VSR's fields; `image` is the file name of its picture."""
    return [
        {
            "image": image,
            "image_link": f"scene://{'/'.join(str(k) for k in scene.key)}",
            "caption": statement.caption,
            "label": statement.label,
            "relation": statement.relation,
            "annotator_id": 0,
            "vote_true_validator_id": "[]",
            "vote_false_validator_id": "[]",
            "reference_frame": None,
        }
        for statement in make_statements(scene, num_statements)
    ]


def write_scenes(
    folder: Path,
    sizes: dict[str, int],
    seed: int = 0,
    num_statements: int = 2,
    draw: Callable[[Scene], np.ndarray] = draw_scene,
) -> None:
    """Write `images/scene-train-000000.png` and so on, and `train.jsonl`, `dev.jsonl` and `test.jsonl`.

    `sizes` is the number of scenes of each split; each scene has `num_statements` rows. `draw` gives its picture.
    """
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for split, num_scenes in sizes.items():
        path = folder / f"{split}.jsonl"
        with naming(path), open(path, "w", encoding="utf-8") as file:
            for index in range(num_scenes):
                scene = make_scene(seed, split, index)
                image = f"scene-{split}-{index:06d}.png"
                Image.fromarray(draw(scene)).save(folder / "images" / image, compress_level=1)
                for row in scene_rows(scene, image, num_statements):
                    file.write(json.dumps(row) + "\n")
