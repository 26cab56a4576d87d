"""Photographs as callers hand them over."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from theworld.given import paired

PIXELS = np.zeros((2, 3, 3), np.uint8)


@pytest.mark.parametrize("one", ["a.png", Path("a.png"), PIXELS, Image.fromarray(PIXELS)])
def test_one_image_stands_for_all(one: object) -> None:
    pictures, texts = paired(one, ("So.", "Or so."), "statements")  # type: ignore[arg-type]
    assert len(pictures) == 1
    assert pictures[0] is one
    assert texts == ["So.", "Or so."]


def test_as_many_images_as_texts_pair_up() -> None:
    assert paired(["a.png", PIXELS], ["So.", "Or so."], "statements")[0][0] == "a.png"
    assert paired(["a.png"], "So.", "statements") == (["a.png"], ["So."])


@pytest.mark.parametrize(("images", "texts"), [(2, 3), (3, 2), (0, 1), (1, 0), (0, 0)])
def test_others_do_not(images: int, texts: int) -> None:
    message = f"{images} images and {texts} statements: give as many, or one image for all"
    with pytest.raises(ValueError, match=message):
        paired(["a.png"] * images, ["So."] * texts, "statements")
