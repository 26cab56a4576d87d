"""What counts as text, wherever it comes from: a file, a page, a flag or a call.

Text is valid Unicode without NUL, so that it can be written to files, read by a tokenizer and used as a path. Files are
UTF-8, with or without a byte order mark; lines end in \\n or \\r\\n.
"""

import codecs
import re
import unicodedata
from collections.abc import Sequence

_MARKS = (  # UTF-32's begins with that of UTF-16
    (codecs.BOM_UTF32_LE, "UTF-32"),
    (codecs.BOM_UTF32_BE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"),
    (codecs.BOM_UTF16_BE, "UTF-16"),
)


def flaw(text: str) -> str:
    """Return in words what a string holds that text does not; nothing if it is text."""
    if "\0" in text:
        return "NUL, the character of number 0"
    return "half a character (a lone surrogate)" if re.search("[\ud800-\udfff]", text) else ""


def is_text(value: object) -> bool:
    """Return whether a value is a string that can be written to files and used in paths."""
    return isinstance(value, str) and not flaw(value)


def is_filled(value: object) -> bool:
    """Return whether a value is text with more than white space."""
    return isinstance(value, str) and not flaw(value) and bool(value.strip())


def check_texts(texts: Sequence[object], kind: str, filled: bool = True) -> None:
    """Raise ValueError for the first of the texts of a caller that is none, or, if `filled`, that is empty.

    `kind`: the word for one of them in the message, which has its number.
    """
    for number, text in enumerate(texts, 1):
        if not isinstance(text, str):
            raise ValueError(f"{kind} {number} is a value of type {type(text).__name__}; give text")
        if found := flaw(text):
            raise ValueError(f"{kind} {number} holds {found}; remove it")
        if filled and not text.strip():
            raise ValueError(f"{kind} {number} is empty; leave it out, or say what it states")


def decoded(data: bytes, where: object) -> str:
    """Return the text of a file, or of a request, without its byte order mark; `where` names it in messages.

    Raises ValueError, with the line, for bytes that are not UTF-8.
    """
    other = next((name for mark, name in _MARKS if data.startswith(mark)), "")
    if not other and data[:2].count(0) == 1:  # without a mark: one of the two bytes of an ASCII character
        other = "UTF-16"
    if other:
        command = f"iconv -f {other} -t UTF-8 FILE > NEW_FILE"
        raise ValueError(f"{where}: is {other}, and wanted is utf-8; convert it: {command}")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        if b"\0" in data:  # which no text holds
            raise ValueError(
                f"{where}: is a binary file, and wanted is text in utf-8; name another file"
            ) from None
        line = data.count(b"\n", 0, error.start) + 1
        byte = data[error.start]
        raise ValueError(
            f"{where}:{line}: byte {byte:#x} is not utf-8 ({error.reason}); save the file as UTF-8"
        ) from None


def counted(number: int, noun: str, plural: str = "") -> str:
    """Return a number of things in words: "1 image", "2,195 images". `plural`: of a noun that takes more than an s."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


def byte_size(size: float) -> str:
    """Return a number of bytes in the largest unit of which it is a tenth: "23.5 GiB", "61.3 MiB", "12 bytes"."""
    for unit, power in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if size >= 2**power / 10:
            return f"{size / 2**power:,.1f} {unit}"
    return counted(round(size), "byte")


def composed(text: str) -> str:
    """Return a text in the Unicode form in which a letter and its accent are one character (NFC)."""
    return unicodedata.normalize("NFC", text)


def folded(text: str) -> str:
    """Return a text without the differences of upper and lower case and of the Unicode form."""
    return composed(composed(text).casefold())


def difference(one: str, other: str) -> str:
    """Return in words what two names that are `folded` to the same differ in."""
    same_letters = composed(one) == composed(other)
    return "Unicode form (NFC or NFD)" if same_letters else "upper and lower case"


def same_words(text: str) -> str:
    """Return a sentence without what its spellings differ in: case, Unicode form, spaces and the full stop."""
    return " ".join(folded(text).split()).rstrip(" .")
