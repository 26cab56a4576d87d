"""The square of pixels that world encoders take: exact at its ends, antialiased, of the whole picture."""

import numpy as np
import pytest

from theworld.data.square import square, to_unit_range


def test_a_square_is_the_whole_picture_stretched() -> None:
    pixels = np.zeros((4, 8, 3), np.uint8)
    pixels[:2, :4] = 255
    result = square(pixels, 4)
    assert result.shape == (4, 4, 3)
    assert result.dtype == np.uint8
    assert result[0, 0].tolist() == [255, 255, 255]
    assert result[3, 3].tolist() == result[3, 0].tolist() == result[0, 3].tolist() == [0, 0, 0]
    same = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    np.testing.assert_array_equal(square(same, 16), same)


def test_a_square_is_made_with_antialiasing() -> None:
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 255
    # Without antialiasing a quarter of the size would show single stripes. The border sees fewer columns.
    assert np.unique(square(stripes, 16)[:, 2:-2]).tolist() in ([127], [128], [127, 128])


def test_the_unit_range_is_exact_at_both_ends() -> None:
    pixels = np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3)
    result = to_unit_range(pixels)
    assert result.dtype == np.float32
    assert result.shape == (3, 16, 16)
    assert result.flags.c_contiguous
    assert (result[0, 0, 0], result[2, 15, 15]) == (-1.0, 1.0)
    # One rounding of a float32 division, one of a subtraction: at most 2^-23.
    np.testing.assert_allclose(result[1].ravel(), np.arange(256) / 127.5 - 1, rtol=0, atol=2**-23)


@pytest.mark.parametrize("shape", [(4, 4), (4, 4, 4), (3, 4, 4)])
def test_arrays_of_another_shape_or_type_are_refused(shape: tuple[int, ...]) -> None:
    for convert in (to_unit_range, lambda pixels: square(pixels, 2)):
        with pytest.raises(ValueError, match=r"wanted uint8\[H, W, 3\]"):
            convert(np.zeros(shape, np.uint8))
        with pytest.raises(ValueError, match="float32"):
            convert(np.zeros((4, 4, 3), np.float32))
