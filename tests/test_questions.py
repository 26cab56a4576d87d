"""What the page's requests may hold."""

import base64
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from theworld.images import ImageError, read_image
from theworld.questions import MAX_CHARACTERS, MAX_STATEMENTS, Limits


def body(photograph: Any, statements: Any) -> bytes:
    coded = base64.b64encode(photograph).decode() if isinstance(photograph, bytes) else photograph
    return json.dumps({"photograph": coded, "statements": statements}).encode()


def test_a_photograph_and_statements_come_out_as_they_went_in(photographs: Path) -> None:
    statements = ["The cat is on the mat.", "Die Katze – “links” \u0000 😀"]
    pixels, found = Limits().read(body((photographs / "a.png").read_bytes(), statements))
    assert found == statements
    np.testing.assert_array_equal(pixels, read_image(photographs, "a.png"))


@pytest.mark.parametrize(
    ("sent", "message"),
    [
        (b"", "the request is no JSON"),
        (b"\xff\xfe{}", "the request is no JSON"),
        (b"[" * 100_000, "the request is no JSON"),
        (b"[]", "wanted a JSON object of photograph and statements"),
        (b'{"photograph": ""}', "wanted a JSON object of photograph and statements"),
        (b'{"photograph": "", "statements": [], "path": "/etc/passwd"}', "wanted a JSON object of"),
        (body("", "So."), "statements: wanted a list of texts"),
        (body("", ["So.", 1]), "statements: wanted a list of texts"),
        (body("", []), "0 statements; wanted 1 to 32 at once"),
        (body("", ["So."] * (MAX_STATEMENTS + 1)), "33 statements; wanted 1 to 32 at once"),
        (body("", ["So.", "o" * (MAX_CHARACTERS + 1)]), "statement 2 has 1,001 characters; at most 1,000"),
        (body(None, ["So."]), "photograph: wanted a file in base64"),
        (body("/etc/passwd!", ["So."]), "photograph: wanted a file in base64"),
        (body("é", ["So."]), "photograph: wanted a file in base64"),
        (body("", ["So."]), "the photograph: zero bytes"),
        (body(b"<!doctype html>", ["So."]), "the photograph: an HTML or XML page, not a photograph"),
    ],
)
def test_anything_else_is_refused_in_words(sent: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Limits().read(sent)


def test_the_file_and_its_pixels_have_limits(photographs: Path) -> None:
    data = (photographs / "b.png").read_bytes()  # 64 x 64
    Limits(max_bytes=len(data), max_pixels=4096).read(body(data, ["So."]))
    with pytest.raises(
        ValueError, match=f"the photograph has {len(data):,} bytes; at most {len(data) - 1:,}"
    ):
        Limits(max_bytes=len(data) - 1).read(body(data, ["So."]))
    with pytest.raises(ImageError, match="64 x 64 pixels; at most 4095 are decoded"):
        Limits(max_pixels=4095).read(body(data, ["So."]))
    bomb = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(bomb, "PNG")
    with pytest.raises(ImageError, match="the photograph: more than 89478485 pixels"):
        Limits().read(body(bomb.getvalue(), ["So."]))


def test_the_largest_request_that_is_allowed_fits() -> None:
    limits = Limits(max_bytes=1000)
    largest = body(bytes(1000), ["😀" * MAX_CHARACTERS] * MAX_STATEMENTS)  # 12 bytes a character in JSON
    assert len(largest) <= limits.max_body < len(largest) + 50_000
