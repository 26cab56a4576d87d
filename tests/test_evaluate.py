"""What the controls are given to see."""

import pytest

from theworld.evaluate import shuffled_images


def test_shuffled_gives_every_image_another_one_and_each_once() -> None:
    images = [f"{i}.jpg" for i in range(20)]
    other = shuffled_images(images)
    assert sorted(other) == sorted(other.values()) == sorted(images)
    assert all(image != given for image, given in other.items())
    assert other == shuffled_images(images[::-1])
    with pytest.raises(ValueError, match="at least two images"):
        shuffled_images(["a.jpg"])
