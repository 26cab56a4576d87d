"""Read JSON, lines of JSON, and JSON with `//`, `#` and `/* */` comments and trailing commas; refuse duplicate keys."""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from theworld.utils.text import decoded

ONE_A_LINE = "one JSON object a line"


def json_bytes(value: object, indent: int | None = None) -> bytes:
    """Return JSON in UTF-8. Half a character, as an argument that is not UTF-8 has, is written as \\udcXX."""
    return json.dumps(value, indent=indent, ensure_ascii=False).encode("utf-8", "backslashreplace")


def json_lines(path: Path, wanted: str = ONE_A_LINE) -> Iterator[tuple[str, Any]]:
    """Yield the place (file:line) and the value of each line of a JSONL file that is not blank.

    Only \\n ends a line: captions may contain other separators. Raises ValueError for a bad line, with `wanted`.
    """
    for number, line in enumerate(decoded(path.read_bytes(), path).split("\n"), 1):
        if line.strip():
            yield f"{path}:{number}", parsed_json(line, f"{path}:{number}", wanted)


def parsed_json(text: str, where: str, wanted: str) -> Any:
    """Return the value of one JSON text. Raises ValueError that names `where`, the column and what is `wanted`."""
    try:
        return json.loads(text, object_pairs_hook=unique_keys("field"))
    except json.JSONDecodeError as error:
        place = f"{error.lineno}:{error.colno}" if error.lineno > 1 else str(error.colno)
        raise ValueError(f"{where}:{place}: {error.msg}; wanted {wanted}") from None
    except RecursionError:
        raise ValueError(f"{where}: nested too deeply; wanted {wanted}") from None
    except ValueError as error:
        raise ValueError(f"{where}: {error}; wanted {wanted}") from None


def read_json_with_comments(path: Path) -> dict[str, Any]:
    """Return the object that a file holds. Duplicate keys, NaN and infinity are refused.

    Raises ValueError with file:line:column for a syntax error; OSError for a file that cannot be read.
    """
    return parse_json_with_comments(path.read_bytes(), path)


def parse_json_with_comments(data: bytes, path: Path) -> dict[str, Any]:
    """Return the object in the content of the file `path`, as `read_json_with_comments` does."""

    def constant(text: str) -> Any:
        raise ValueError(f"{text} is not a finite number")

    text = decoded(data, path)
    if not text.strip():
        raise ValueError(f"{path}:1:1: the file is empty; wanted one object: {{...}}")
    try:
        text = _without_comments(text)
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
