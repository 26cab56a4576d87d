"""Read JSON with `//`, `#` and `/* */` comments and trailing commas, and refuse duplicate keys in any JSON."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any


def read_json_with_comments(path: Path) -> dict[str, Any]:
    """Return the object that a file holds. Duplicate keys, NaN and infinity are refused.

    Raises ValueError with file:line:column for a syntax error; OSError for a file that cannot be read.
    """
    return parse_json_with_comments(path.read_bytes(), path)


def parse_json_with_comments(data: bytes, path: Path) -> dict[str, Any]:
    """Return the object in the content of the file `path`, as `read_json_with_comments` does."""

    def constant(text: str) -> Any:
        raise ValueError(f"{text} is not a finite number")

    try:
        text = _without_comments(data.decode("utf-8-sig"))
        values = json.loads(
            text, object_pairs_hook=unique_keys("key", json.dumps, is_comment), parse_constant=constant
        )
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{error.lineno}:{error.colno}: {error.msg}") from None
    except RecursionError:
        raise ValueError(f"{path}: nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: holds a {type(values).__name__}; wanted one object: {{...}}")
    return values


_STRING = r'"(?:[^"\\\n]|\\.)*"'
_COMMENT = re.compile(_STRING + r"|//[^\n]*|#[^\n]*|/\*.*?(?:\*/|\Z)", re.DOTALL)
_TRAILING_COMMA = re.compile(_STRING + r"|,(?=\s*[}\]])", re.DOTALL)


def _without_comments(text: str) -> str:
    """Return the text with spaces for comments and trailing commas, so that lines and columns of errors stay right."""

    def blank(match: re.Match[str]) -> str:
        token = match.group()
        if token.startswith('"'):
            return token
        if token.startswith("/*") and (len(token) < 4 or not token.endswith("*/")):
            raise json.JSONDecodeError("Comment without its end */", text, match.start())
        return re.sub(r"[^\n]", " ", token)

    return _TRAILING_COMMA.sub(blank, _COMMENT.sub(blank, text))


def unique_keys(
    noun: str, shown: Callable[[str], str] = ascii, may_repeat: Callable[[str], bool] = lambda key: False
) -> Callable[[list[tuple[str, Any]]], dict[str, Any]]:
    """Return an `object_pairs_hook` for json.loads that raises ValueError for a duplicate key: "key 'a' stands twice".

    By itself json.loads takes the last value silently. `noun` and `shown` word the message; keys for which `may_repeat`
    is true are not checked.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        seen: dict[str, Any] = {}
        for key, value in pairs:
            if key in seen and not may_repeat(key):
                raise ValueError(f"{noun} {shown(key)} stands twice")
            seen[key] = value
        return seen

    return unique


def is_comment(key: str) -> bool:
    """Return whether a key is a comment, such as "_comment" or "//"."""
    return key.startswith(("_", "//"))
