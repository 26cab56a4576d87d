"""What the local page sends: a photograph and statements, as JSON, which is read under limits."""

import base64
import json
from dataclasses import dataclass

import numpy as np

from theworld.images import MAX_BYTES, MAX_PIXELS, decode

MAX_STATEMENTS, MAX_CHARACTERS = 32, 1000  # at once; in one statement
NAME = "the photograph"


@dataclass(frozen=True)
class Limits:
    """How much is read."""

    max_bytes: int = MAX_BYTES  # of the photograph's file
    max_pixels: int = MAX_PIXELS

    @property
    def max_body(self) -> int:
        """Bytes of a whole request: the file in base64, the statements in JSON, where a character takes 12 at most."""
        return 4 * -(-self.max_bytes // 3) + 13 * MAX_STATEMENTS * MAX_CHARACTERS

    def read(self, body: bytes) -> tuple[np.ndarray, list[str]]:
        """Pixels uint8[H, W, 3] and statements of {"photograph": base64 of a file, "statements": [...]}.

        Raises ValueError, in words for who asked, for anything else; ImageError for a photograph that cannot be read.
        """
        try:
            asked = json.loads(body)
        except (ValueError, RecursionError):
            raise ValueError("the request is no JSON") from None
        if not isinstance(asked, dict) or set(asked) != {"photograph", "statements"}:
            raise ValueError("wanted a JSON object of photograph and statements")
        statements = _statements(asked["statements"])
        coded = asked["photograph"]
        try:
            if not isinstance(coded, str):
                raise ValueError
            data = base64.b64decode(coded, validate=True)
        except ValueError:
            raise ValueError("photograph: wanted a file in base64") from None
        if len(data) > self.max_bytes:
            raise ValueError(f"{NAME} has {len(data):,} bytes; at most {self.max_bytes:,} are read")
        return decode(data, NAME, self.max_pixels), statements


def _statements(given: object) -> list[str]:
    if not isinstance(given, list) or not all(isinstance(text, str) for text in given):
        raise ValueError("statements: wanted a list of texts")
    if not 1 <= len(given) <= MAX_STATEMENTS:
        raise ValueError(f"{len(given)} statements; wanted 1 to {MAX_STATEMENTS} at once")
    for number, text in enumerate(given, 1):
        if len(text) > MAX_CHARACTERS:
            raise ValueError(
                f"statement {number} has {len(text):,} characters; at most {MAX_CHARACTERS:,} are read"
            )
    return given
