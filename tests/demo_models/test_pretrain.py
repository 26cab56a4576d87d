"""The embedded models: what is in their folders, and that the tool makes such folders from nothing."""

import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from constants import ROOT
from demo_models.lessons import Prompts
from demo_models.pretrain import encode, one_frame
from demo_models.small_models import IMAGE_TOKENS, NEWLINES, SPECIAL_TOKENS, build_tokenizer
from diffusers import AutoencoderKLWan
from PIL import Image
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    Gemma3ForConditionalGeneration,
)

from theworld.data.scenes import draw_scene, make_scene

EMBEDDED = ROOT / "theworld" / "embedded"
GEMMA_FILES = [
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "preprocessor_config.json",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
]
QUESTION = "Statement: The red ball is left of the blue box.\nAnswer (only '0' or '1'):"


@pytest.fixture(scope="module")
def processor() -> AutoProcessor:
    return AutoProcessor.from_pretrained(EMBEDDED / "gemma")


@pytest.fixture(scope="module")
def gemma() -> Gemma3ForConditionalGeneration:
    return AutoModelForImageTextToText.from_pretrained(EMBEDDED / "gemma").eval()


@pytest.fixture(scope="module")
def vae() -> AutoencoderKLWan:
    return AutoencoderKLWan.from_pretrained(EMBEDDED / "vae").eval()


def picture(index: int) -> Image.Image:
    return Image.fromarray(draw_scene(make_scene(0, "test", index)))


def vae_pictures(num_pictures: int) -> torch.Tensor:
    resized = [picture(i).resize((64, 64), Image.Resampling.BICUBIC) for i in range(num_pictures)]
    return torch.from_numpy(np.stack([np.asarray(p) for p in resized])).permute(0, 3, 1, 2)


def test_the_folders_hold_these_files_and_are_small() -> None:
    assert sorted(p.name for p in (EMBEDDED / "gemma").iterdir()) == GEMMA_FILES
    vae_files = sorted(p.name for p in (EMBEDDED / "vae").iterdir())
    assert vae_files == ["config.json", "diffusion_pytorch_model.safetensors"]
    assert sum(p.stat().st_size for p in EMBEDDED.rglob("*") if p.is_file()) < 5_000_000


def test_the_models_are_of_the_real_classes_with_these_sizes(gemma, vae) -> None:
    assert type(gemma) is Gemma3ForConditionalGeneration
    assert sum(p.numel() for p in gemma.parameters()) == 335_872
    assert sum(p.numel() for p in gemma.model.vision_tower.parameters()) == 68_352
    assert sum(p.numel() for p in vae.parameters()) == 668_043
    assert sum(p.numel() for p in vae.encoder.parameters()) == 271_120
    assert {p.dtype for p in (*gemma.parameters(), *vae.parameters())} == {torch.float32}


@pytest.mark.parametrize(
    "text",
    [
        "The cat's bicycle -- at the right side of 2 (two) dogs; e.g. 50 % of them?!",
        "  spaces   stay,\ttabs and\r\nlines\n\n\n\nand " + "\n" * 20 + "too ",
        "Grüße, naïve café, 漢字 and 🙂👩‍🚀 \u0000 \ufffd",
        "<b>no special token</b> <bos < eos>",
    ],
)
def test_any_text_survives_the_tokenizer(text: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED / "gemma")
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert tokenizer.decode(ids) == text
    assert tokenizer.unk_token_id not in ids


def test_tokens_have_the_roles_of_gemmas(processor, gemma) -> None:
    tokenizer = processor.tokenizer
    ids = [tokenizer.convert_tokens_to_ids(t) for t in SPECIAL_TOKENS]
    assert ids == list(range(7))
    names = (tokenizer.pad_token, tokenizer.eos_token, tokenizer.bos_token, tokenizer.unk_token)
    assert names == ("<pad>", "<eos>", "<bos>", "<unk>")
    assert [tokenizer.boi_token, tokenizer.eoi_token, tokenizer.image_token] == IMAGE_TOKENS
    config = gemma.config
    indices = [config.boi_token_index, config.eoi_token_index, config.image_token_index]
    assert indices == tokenizer.convert_tokens_to_ids(IMAGE_TOKENS)
    assert len(tokenizer) < config.text_config.vocab_size == 1024
    for single in ["0", "1", *NEWLINES]:
        assert len(tokenizer(single, add_special_tokens=False).input_ids) == 1


def test_digits_are_never_part_of_a_longer_token(processor) -> None:
    vocabulary = processor.tokenizer.get_vocab()
    byte_tokens = {f"<0x{byte:02X}>" for byte in range(256)}
    longer = [t for t in vocabulary if len(t) > 1 and any(c.isdigit() for c in t) and t not in byte_tokens]
    assert longer == []


def test_the_chat_template_gives_gemmas_prompt(processor) -> None:
    content = [{"type": "image", "image": picture(0)}, {"type": "text", "text": f" {QUESTION} "}]
    messages = [{"role": "user", "content": content}]
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    start = "<bos><start_of_turn>user\n"
    end = f"{QUESTION}<end_of_turn>\n<start_of_turn>model\n"
    assert text == f"{start}<start_of_image>{end}"
    inputs = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    image = f"\n\n<start_of_image>{'<image_soft_token>' * 16}<end_of_image>\n\n"
    assert processor.tokenizer.decode(inputs["input_ids"][0]) == f"{start}{image}{end}"
    assert inputs["pixel_values"].shape == (1, 3, 4, 4)
    assert int(inputs["token_type_ids"].sum()) == 16


def test_a_conversation_with_a_system_message_and_an_answer_has_gemmas_form(processor) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "True?"},
        {"role": "assistant", "content": "1"},
    ]
    text = processor.apply_chat_template(messages)
    turns = "<start_of_turn>user\nBe brief.\n\nTrue?<end_of_turn>\n<start_of_turn>model\n1<end_of_turn>\n"
    assert text == "<bos>" + turns


def test_the_embedded_gemma_has_finite_logits(processor, gemma) -> None:
    content = [{"type": "image", "image": picture(0)}, {"type": "text", "text": QUESTION}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
    )  # fmt: skip
    with torch.no_grad():
        logits = gemma(**inputs).logits[0, -1]
    assert logits.isfinite().all()
    answers = processor.tokenizer.convert_tokens_to_ids(["0", "1"])
    assert logits.softmax(0)[answers].sum() > 0.95


def test_lessons_are_tokenised_as_the_processor_does(processor) -> None:
    prompts = Prompts(build_tokenizer(), "cpu")
    content = [{"type": "image", "image": picture(0)}, {"type": "text", "text": QUESTION}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=True, return_dict=True
    )
    # left of, red ball, blue box: relation 0, things 0 and 7 of 12.
    question = prompts.questions[7][: prompts.lengths[7]].tolist()
    assert prompts.heads["one"].ids.tolist() + question == list(inputs["input_ids"][0])
    # Image tokens see each other both ways, nothing else sees ahead.
    mask = prompts.heads["beside"].mask[0, 0]
    at = prompts.heads["beside"].image_at.tolist()
    ahead = mask.triu(1).nonzero().tolist()
    assert {(i, j) for i, j in ahead} == {
        (i, j) for block in (at[:16], at[16:]) for i in block for j in block if j > i
    }


def test_the_latent_statistics_match_drawn_scenes(vae) -> None:
    """They were measured on 4,096 pictures of the scenes that the VAE learnt from."""
    latents = encode(vae, vae_pictures(200))
    assert latents.shape == (200, 16, 8, 8)
    std, mean = torch.std_mean(latents, dim=(0, 2, 3))
    expected_mean, expected_std = torch.tensor(vae.config.latents_mean), torch.tensor(vae.config.latents_std)
    # A picture's ground is mostly one colour, so a channel's mean over 200 pictures still wavers.
    assert ((mean - expected_mean).abs() / expected_std).max() < 0.25
    assert ((std / expected_std).log().abs()).max() < 0.25


def test_one_frame_convolutions_change_nothing(vae) -> None:
    pictures = vae_pictures(4)
    plain = encode(vae, pictures)
    with one_frame():
        flat = encode(vae, pictures)
    assert (plain - flat).abs().max() < 1e-5  # float32, sums in another order
    assert torch.equal(plain, encode(vae, pictures))  # and it is undone


def test_the_vae_gives_a_scene_back(vae) -> None:
    pixels = vae_pictures(20).float() / 127.5 - 1
    with torch.no_grad(), one_frame():
        back = vae.decode(vae.encode(pixels[:, :, None]).latent_dist.mode()).sample[:, :, 0]
    assert float((back - pixels).pow(2).mean()) < 0.003  # 0.0021 while it learnt, with noise in the latents


@pytest.mark.parametrize("model", ["gemma", "vae"])
def test_the_record_has_the_command_and_settings_of_the_models(model: str) -> None:
    record = json.loads((EMBEDDED / "training.json").read_text())
    made = record["models"][model]
    assert made["command"].startswith("python tools/make_demo_models.py --output theworld/embedded")
    assert record["parameters"] == {"gemma": 335_872, "vae": 668_043}
    assert record["history"][model][-1]["step"] == made["settings"][f"{model}_steps"]


def test_the_tool_makes_both_folders_from_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = (
        "--seed 3 --num_scenes 40 --gemma_steps 3 --vae_steps 2 --batch_size 4 --vae_batch_size 2 --workers 1"
    )
    monkeypatch.setattr(sys, "argv", ["make_demo_models.py", "--output", str(tmp_path), *tiny.split()])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "tools" / "make_demo_models.py"), run_name="__main__")
    assert ended.value.code == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["gemma", "training.json", "vae"]
    record = json.loads((tmp_path / "training.json").read_text())
    assert record["models"]["vae"]["settings"]["seed"] == 3
    assert [row["step"] for row in record["history"]["gemma"]] == [1, 2, 3]
    assert [row["step"] for row in record["history"]["vae"]] == [1, 2]
    assert sorted(p.name for p in (tmp_path / "gemma").iterdir()) == GEMMA_FILES
    tokenizers = [(folder / "gemma" / "tokenizer.json").read_bytes() for folder in (tmp_path, EMBEDDED)]
    assert tokenizers[0] == tokenizers[1]
    made = AutoencoderKLWan.from_pretrained(tmp_path / "vae")
    assert len(made.config.latents_mean) == len(made.config.latents_std) == 16
