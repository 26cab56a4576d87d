"""A cut vocabulary tokenises the texts that it was cut for as before."""

import json

import pytest
from conftest import CAPTIONS, EMBEDDED_GEMMA
from tokenizers import Tokenizer

from theworld.vocabulary import cut_tokenizer, passed_through

ALWAYS = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]
WHOLE = json.loads((EMBEDDED_GEMMA / "tokenizer.json").read_text())


def test_tokens_on_the_way_are_found_by_hand() -> None:
    ranks = {("a", "b"): 1, ("c", "d"): 0, ("ab", "cd"): 2, ("b", "c"): 3}
    assert passed_through("abcd", ranks) == {*"abcd", "ab", "cd", "abcd"}
    assert passed_through("bcx", ranks) == {*"bcx", "bc"}
    assert passed_through("", ranks) == set()


def test_the_texts_have_the_same_tokens_and_the_ids_are_renumbered_in_order() -> None:
    texts = [caption for _, caption, _, _ in CAPTIONS]
    cut, former = cut_tokenizer(WHOLE, texts, ALWAYS)
    assert former == sorted(former)
    assert sorted(cut["model"]["vocab"].values()) == list(range(len(former)))
    assert len(former) < len(WHOLE["model"]["vocab"])
    before, after = Tokenizer.from_str(json.dumps(WHOLE)), Tokenizer.from_str(json.dumps(cut))
    for text in texts:
        encoded = after.encode(text)
        assert [former[i] for i in encoded.ids] == before.encode(
            text
        ).ids  # <bos>, which the template adds, too
        assert encoded.tokens == before.encode(text).tokens
    for name in ALWAYS:
        assert former[after.token_to_id(name)] == before.token_to_id(name)
    assert len({f"<0x{n:02X}>" for n in range(256)} - set(cut["model"]["vocab"])) == 0


def test_what_was_not_kept_falls_apart_into_bytes() -> None:
    cut, _ = cut_tokenizer(WHOLE, ["The cat"], ALWAYS)
    tokens = Tokenizer.from_str(json.dumps(cut)).encode("zö", add_special_tokens=False).tokens
    assert tokens == ["<0x7A>", "<0xC3>", "<0xB6>"]


def test_another_kind_of_tokenizer_is_refused() -> None:
    with pytest.raises(ValueError, match="another kind than Gemma's"):
        cut_tokenizer(WHOLE | {"normalizer": None}, [], ALWAYS)
