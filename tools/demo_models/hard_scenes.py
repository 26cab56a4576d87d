"""Drawn scenes that are hard to see: clutter in the colours of the things, coloured light, and noise.

They are for the positive control of a study and for nothing else: an encoder that was trained on such scenes knows what
they look like, and pixels do not, so there a study has an effect to find. The clutter lies over ground and things alike
(overlap) and has the colours of the things (camouflage), so no colour by itself says where a thing is.
"""

import numpy as np
from PIL import Image, ImageDraw

from theworld.data.scenes import COLOURS, Scene, draw_scene

PIECES = 100  # of clutter in a picture; together they cover about a quarter of it
PIECE = (0.018, 0.04)  # smallest and largest radius of a piece, as a share of the picture's width
LIGHT = 0.2  # of the light's colour: the standard deviation of each channel's logarithm
NOISE = 30.0  # standard deviation of each value, of 255


def draw_hard_scene(scene: Scene) -> np.ndarray:
    """Return the picture of the same scene as `draw_scene`, hard to see, uint8[H, W, 3]."""
    rng = np.random.default_rng([*scene.key, 3])
    picture = _clutter(draw_scene(scene), rng) * np.exp(LIGHT * rng.standard_normal(3))
    picture += NOISE * rng.standard_normal(picture.shape, dtype=np.float32)
    return np.clip(np.rint(picture), 0, 255).astype(np.uint8)


def _clutter(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return the picture under pieces of the things' colours, float32[H, W, 3]."""
    image, size = Image.fromarray(picture), len(picture)
    pen, colours = ImageDraw.Draw(image), np.array([*COLOURS.values()])
    for x, y, radius in zip(
        *rng.uniform(0, size, (2, PIECES)), rng.uniform(*PIECE, PIECES) * size, strict=True
    ):
        colour = colours[rng.integers(len(colours))] * rng.uniform(0.75, 1.2)
        box = (x - radius, y - radius, x + radius, y + radius)
        pen.ellipse(box, fill=tuple(int(value) for value in np.clip(colour, 0, 255)))
    return np.asarray(image).astype(np.float32)
