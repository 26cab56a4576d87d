"""What counts as text, and in which form files have it."""

import pytest

from theworld.utils.text import byte_size, check_texts, counted, decoded, flaw, folded, is_filled, is_text


@pytest.mark.parametrize(
    ("value", "text", "filled"),
    [
        ("a", True, True),
        ("\ufeffa\u2028é😀", True, True),
        (" \n", True, False),
        ("", True, False),
        ("a\0", False, False),
        ("a\ud83d", False, False),
        (None, False, False),
        (b"a", False, False),
    ],
)
def test_text_is_unicode_without_nul(value: object, text: bool, filled: bool) -> None:
    assert (is_text(value), is_filled(value)) == (text, filled)


def test_what_a_caller_gives_is_refused_with_its_number() -> None:
    check_texts(["a", "b"], "statement")
    check_texts([""], "question", filled=False)
    for wrong, says in (
        (3, "statement 2 is a value of type int; give text"),
        ("\udcff", "statement 2 holds half a character (a lone surrogate); remove it"),
        ("\0", "statement 2 holds NUL, the character of number 0; remove it"),
        (" ", "statement 2 is empty; leave it out, or say what it states"),
    ):
        with pytest.raises(ValueError, match=r"^statement 2") as error:
            check_texts(["a", wrong], "statement")
        assert str(error.value) == says
    assert flaw("a") == ""


@pytest.mark.parametrize("form", ["utf-8", "utf-8-sig"])
def test_a_file_is_utf_8_with_or_without_a_mark(form: str) -> None:
    assert decoded("é\r\n".encode(form), "a.json") == "é\r\n"


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ("{é}".encode("utf-16"), "a.json: is UTF-16, and wanted is utf-8; convert it: iconv -f UTF-16 -t UTF-8 FILE"),
        ("{é}".encode("utf-16-le"), "a.json: is UTF-16,"),
        ("{é}".encode("utf-16-be"), "a.json: is UTF-16,"),
        ("{é}".encode("utf-32"), "a.json: is UTF-32,"),
        (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "a.json: is a binary file, and wanted is text in utf-8; name another file"),
        (b"{\n\n\xe9}", "a.json:3: byte 0xe9 is not utf-8 (invalid continuation byte); save the file as UTF-8"),
    ],
)  # fmt: skip
def test_another_encoding_is_named_with_what_converts_it(data: bytes, says: str) -> None:
    with pytest.raises(ValueError, match=r"^a\.json") as error:
        decoded(data, "a.json")
    assert str(error.value).startswith(says)


def test_names_are_compared_without_case_and_unicode_form() -> None:
    assert folded("E\u0301te.JPG") == folded("\u00e9te.jpg") == "\u00e9te.jpg"


def test_a_number_of_things_is_counted_in_words() -> None:
    assert [counted(number, "image") for number in (0, 1, 2195)] == ["0 images", "1 image", "2,195 images"]
    assert [counted(number, "batch", "batches") for number in (1, 2)] == ["1 batch", "2 batches"]


@pytest.mark.parametrize(
    ("size", "words"),
    [
        (25_232_932_864, "23.5 GiB"),
        (1_500 * 2**30, "1,500.0 GiB"),
        (107_374_183, "0.1 GiB"),  # a tenth, rounded up
        (107_374_182, "102.4 MiB"),
        (7_759_462.4, "7.4 MiB"),
        (104_858, "0.1 MiB"),
        (104_857, "102.4 KiB"),
        (103, "0.1 KiB"),
        (102, "102 bytes"),
        (1, "1 byte"),
        (0, "0 bytes"),
    ],
)
def test_a_size_is_in_a_unit_that_shows_it(size: float, words: str) -> None:
    assert byte_size(size) == words
