"""Answers in words: with a key-value cache as without one, without world tokens as plain Gemma."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from constants import EMBEDDED_GEMMA, EMBEDDED_VAE
from PIL import Image
from tiny_model import make_model

from theworld.data.images import ImageError, read_image
from theworld.models.cosmos import CosmosLatents
from theworld.models.gemma import Gemma
from theworld.models.packing import Question
from theworld.models.theworld import TheWorld
from theworld.store.format import StoreMismatch

QUESTIONS = ["Where is the red ball?", "What is on the table, and what is beneath it? Say it.", "Is it so?"]
GREEDY = {"do_sample": False, "max_new_tokens": 20, "min_new_tokens": 20}


@pytest.fixture(params=["multimodal", "text-only"])
def model(request: pytest.FixtureRequest, text_gemma_folder: Path) -> TheWorld:
    gemma = Gemma(str(EMBEDDED_GEMMA if request.param == "multimodal" else text_gemma_folder))
    if gemma.is_multimodal:  # which by itself says one word again and again: its head reads out what it sees
        head = torch.randn(gemma.model.lm_head.weight.shape, generator=torch.Generator().manual_seed(0))
        gemma.model.lm_head.weight = torch.nn.Parameter(head, requires_grad=False)
    made = make_model(gemma, cosmos_model_name=str(EMBEDDED_VAE), latent_size=64)
    made.fingerprint = CosmosLatents(made.config).spec.fingerprint()
    return made


def without_cache(model: TheWorld, pixels: np.ndarray, question: str, with_world: bool) -> list[int]:
    """20 greedy tokens, the whole sequence read again for each, by the packed rows that training uses."""
    gemma, ends = model.gemma, model.gemma.model.generation_config.eos_token_id
    packer = model.packer(with_world, question_template="{caption}")
    prompt = packer.prompt(question, with_world)
    latents = model.encoder.encode(torch.from_numpy(pixels)[None]) if with_world else None
    vision = gemma.vision_features(gemma.pixel_values([pixels])) if gemma.is_multimodal else None
    found: list[int] = []
    for _ in range(20):
        grown = replace(prompt, branch=(*prompt.branch, *found))
        packer._prompts[question, with_world, True, False] = grown
        with torch.no_grad():
            logits = model(packer.pack([Question("a", question)]), latents, vision)[0]
        logits[ends] = -torch.inf
        found.append(int(logits.argmax()))
    return found


@pytest.mark.parametrize("with_world", [True, False])
def test_twenty_greedy_tokens_are_those_of_a_run_without_a_cache(
    model: TheWorld, photographs: Path, with_world: bool
) -> None:
    names = ["a.png", "b.png", "c.png"]
    pixels = [np.array(Image.fromarray(read_image(photographs, n)).resize((64, 64))) for n in names]
    wanted = [without_cache(model, p, q, with_world) for p, q in zip(pixels, QUESTIONS, strict=True)]
    assert len({tuple(tokens) for tokens in wanted}) == 3
    # In one batch, where the shorter prompts are padded, and each by itself.
    assert model.generate_ids(pixels, QUESTIONS, with_world, **GREEDY).tolist() == wanted
    alone = [
        model.generate_ids(p, q, with_world, **GREEDY)[0].tolist()
        for p, q in zip(pixels, QUESTIONS, strict=True)
    ]
    assert alone == wanted


def test_without_world_tokens_the_answer_is_plain_gemmas(photographs: Path) -> None:
    gemma = Gemma(str(EMBEDDED_GEMMA))
    model = make_model(gemma)
    content = [
        {"type": "image", "image": Image.open(photographs / "a.png")},
        {"type": "text", "text": QUESTIONS[1]},
    ]
    inputs = gemma.processor.apply_chat_template(
        [{"role": "user", "content": content}],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        add_generation_prompt=True,
    )
    theirs = gemma.model.generate(**inputs, **GREEDY)[0, inputs["input_ids"].shape[1] :]
    ours = model.generate_ids(photographs / "a.png", QUESTIONS[1], False, **GREEDY)[0]
    assert ours.tolist() == theirs.tolist()
    text = gemma.tokenizer.decode(theirs, skip_special_tokens=True).strip()
    assert model.generate(photographs / "a.png", QUESTIONS[1], enable_world=False, **GREEDY) == [text]
    model.enable_world = False
    assert model.generate(photographs / "a.png", QUESTIONS[1], **GREEDY) == [text]


def test_a_file_a_picture_and_an_array_are_the_same_photograph(model: TheWorld, photographs: Path) -> None:
    path = photographs / "a.png"
    given = [path, str(path), Image.open(path), read_image(photographs, "a.png")]
    answers = model.generate(given, QUESTIONS[:1] * 4, **GREEDY)
    assert len(set(answers)) == 1
    assert model.generate(path, QUESTIONS[:1] * 4, **GREEDY) == answers  # one image for all


def test_what_does_not_fit_is_refused(model: TheWorld, photographs: Path) -> None:
    with pytest.raises(ValueError, match="2 images and 3 questions: give as many, or one image for all"):
        model.generate([photographs / "a.png"] * 2, QUESTIONS)
    with pytest.raises(ImageError, match=r"d\.png: no such file"):
        model.generate(photographs / "d.png", QUESTIONS[0])
    with pytest.raises(ValueError, match=r"wanted uint8\[H, W, 3\]"):
        model.generate(np.zeros((4, 4)), QUESTIONS[0])
    model.__dict__.pop("encoder", None)
    model.fingerprint = {**model.fingerprint, "cosmos_weights_sha256": "0" * 64}
    with pytest.raises(StoreMismatch, match="cosmos_weights_sha256"):
        model.generate(photographs / "a.png", QUESTIONS[0])
