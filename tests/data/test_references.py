"""What was published stands beside nothing but what it was measured on, with its setting and its source."""

import re
from datetime import date

import pytest

from theworld.data.references import footnotes, marks, quoted, references
from theworld.data.vsr import OWN, RELEASES


def test_published_results_belong_to_the_split_they_were_measured_on() -> None:
    random, zeroshot = ({one.name: one for one in quoted(f"vsr_{r}", "test")} for r in ("random", "zeroshot"))
    assert {name: round(100 * one.accuracy, 2) for name, one in random.items()} == {
        "human": 95.4,
        "PaliGemma 2 10B, fine-tuned": 86.8,
        "PaliGemma 2 3B, fine-tuned": 81.6,
        "Qwen2-VL-7B with LoRA, fine-tuned": 84.7,
        "Qwen2-VL-7B, zero-shot": 80.9,
        "LXMERT, fine-tuned": 70.1,
        "ViLT, fine-tuned": 69.3,
        "CLIP, frozen": 56.0,
    }
    assert {name: round(100 * one.accuracy, 2) for name, one in zeroshot.items()} == {
        "human": 95.4,
        "PaliGemma 2 10B, fine-tuned": 79.8,
        "PaliGemma 2 3B, fine-tuned": 74.8,
        "Perceptron 1.7B MoE": 80.6,
        "Prism-DINOSigLIP 13B, zero-shot": 72.2,
        "LLaVA-1.5 13B, zero-shot": 69.1,
        "InstructBLIP T5-XL, zero-shot": 64.8,
        "LLaVA-1.5 7B, zero-shot": 51.47,
        "Gemma 3 4B, zero-shot": 66.28,
        "LXMERT, fine-tuned": 61.2,
        "ViLT, fine-tuned": 63.0,
        "CLIP, frozen": 54.5,
    }
    assert zeroshot["LLaVA-1.5 7B, zero-shot"].measured == "1,222 statements, by likelihood"
    assert zeroshot["Gemma 3 4B, zero-shot"].measured == "1,222 statements, generated"
    assert zeroshot["PaliGemma 2 3B, fine-tuned"].measured == ""
    assert quoted("vsr_random", "dev") == quoted(OWN, "test") == quoted("", "test") == []


def test_each_result_names_data_setting_and_source_as_the_file_allows() -> None:
    for one in references():
        assert one.dataset.removeprefix("vsr_") in RELEASES.values()
        assert one.split == "test"
        assert 0.5 <= one.accuracy <= 1
        assert one.setting in (None, "zero-shot", "fine-tuned", "frozen")
        assert one.answers in (None, "likelihood", "generated")
        assert one.source.address is None or re.fullmatch(
            r"https://arxiv\.org/abs/[\d.]+", one.source.address
        )
        assert date.fromisoformat(one.source.as_of) >= date(2026, 11, 1)
    assert len({(one.name, one.dataset) for one in references()}) == len(references())


def test_footnotes_are_numbered_and_say_what_is_doubtful() -> None:
    found = quoted("vsr_zeroshot", "test")
    notes = footnotes(found)
    by_system = {one.system: marks(one, notes) for one in found}
    assert (by_system["human"], by_system["LXMERT"], by_system["ViLT"], by_system["CLIP"]) == (
        "[1][2]",
        *["[2]"] * 3,
    )
    assert (by_system["LLaVA-1.5 7B"], by_system["Gemma 3 4B"], by_system["LLaVA-1.5 13B"]) == (
        "[3]",
        "[4]",
        "",
    )
    assert "616" in notes[1]
    assert notes[3].startswith("Measured by a third party and not published")


@pytest.mark.parametrize("number", [0, -1])
def test_a_source_is_shown_with_its_address_and_the_day_of_the_quote(number: int) -> None:
    source = references()[number].source
    assert str(source).startswith(
        "Liu, Emerson, Collier: Visual Spatial Reasoning, TACL 2023 (arXiv 2205.00363) (https:"
    )
    assert str(source).endswith(f"as of {source.as_of})")
