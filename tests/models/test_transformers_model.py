"""Checkpoints through transformers: auto classes, chats, generate, the pipeline and peft, equal to TheWorld's own."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from constants import EMBEDDED_GEMMA, EMBEDDED_VAE, ROOT
from PIL import Image
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor, pipeline

from theworld.config.config import Config
from theworld.data.images import ImageError
from theworld.models.gemma import Gemma
from theworld.models.packing import Question
from theworld.models.theworld import TheWorld
from theworld.models.transformers_config import TheWorldConfig
from theworld.models.transformers_model import TheWorldForConditionalGeneration
from theworld.models.transformers_processor import BRACKET, WORLD, TheWorldProcessor
from theworld.models.world_encoder import describe, encoder_class

QUESTIONS = ["Where is the red ball?", "What is on the table, and what is beneath it? Say it.", "Is it so?"]
GREEDY = {"do_sample": False, "max_new_tokens": 8, "min_new_tokens": 8}
N = 16  # world tokens: 8 x 8 places in patches of 2 x 2


def save(folder: Path, gemma: Gemma, **settings: Any) -> Path:
    """A checkpoint with an untrained projection, for the rows of the world encoder in its settings."""
    config = Config(
        model_name=gemma.name, cosmos_model_name=str(EMBEDDED_VAE), latent_size=64, world_patch=2, **settings
    )
    fingerprint = {**encoder_class(config)(config).spec.fingerprint(), **describe(config).use.fields}
    channels = fingerprint["latent_shape"][0]
    fingerprint = {"latents_mean": [0.1] * channels, "latents_std": [0.9] * channels, **fingerprint}
    TheWorld.from_config(config, gemma, fingerprint).save_pretrained(folder)
    return folder


def shake(model: TheWorldForConditionalGeneration) -> TheWorldForConditionalGeneration:
    """Give a model a random head, since by itself it says one word again and again."""
    shape, generator = model.gemma.lm_head.weight.shape, torch.Generator().manual_seed(0)
    model.gemma.lm_head.weight = torch.nn.Parameter(
        torch.randn(shape, generator=generator), requires_grad=False
    )
    return model


@pytest.fixture(scope="module")
def folders(text_gemma_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A checkpoint of a multimodal and of a text-only Gemma."""
    places = {"multimodal": EMBEDDED_GEMMA, "text-only": text_gemma_folder}
    return {kind: save(tmp_path_factory.mktemp(kind) / "run", Gemma(str(g))) for kind, g in places.items()}


@pytest.fixture(scope="module", params=["multimodal", "text-only"])
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def model(kind: str, folders: dict[str, Path]) -> TheWorldForConditionalGeneration:
    return shake(AutoModelForImageTextToText.from_pretrained(folders[kind], dtype="float32"))


@pytest.fixture(scope="module")
def processor(kind: str, folders: dict[str, Path]) -> TheWorldProcessor:
    return AutoProcessor.from_pretrained(folders[kind])


def chat(image: Any, text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": text}]}]


def encode(processor: TheWorldProcessor, images: list[Any], texts: list[str]) -> Any:
    return processor.apply_chat_template(
        [chat(image, text) for image, text in zip(images, texts, strict=True)],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        add_generation_prompt=True,
        processor_kwargs={"padding": True},
    )


def pictures(photographs: Path) -> list[str]:
    return [str(photographs / name) for name in ("a.png", "b.png", "c.png")]


def test_the_auto_classes_know_a_checkpoint(
    kind: str, folders: dict[str, Path], model: Any, processor: Any
) -> None:
    config = AutoConfig.from_pretrained(folders[kind])
    assert type(config) is TheWorldConfig
    assert config.model_type == "theworld"
    assert config.settings == json.loads((folders[kind] / "config.json").read_text())
    assert config.get_text_config().model_type == "gemma3_text"
    assert (config.vision_config is None) is (kind == "text-only")
    assert type(model) is type(AutoModel.from_pretrained(folders[kind])) is TheWorldForConditionalGeneration
    assert type(processor) is TheWorldProcessor


def test_a_prompt_has_the_tokens_and_slots_of_training(
    kind: str, model: Any, processor: Any, photographs: Path
) -> None:
    inputs = encode(processor, pictures(photographs)[:1], QUESTIONS[:1])
    world = model.theworld
    batch = world.packer(question_template="{caption}").pack([Question("a", QUESTIONS[0])])
    assert inputs["input_ids"].tolist() == batch.token_ids.tolist()
    types = inputs["token_type_ids"][0]
    assert types[batch.world_slots[0]].tolist() == [BRACKET, *[WORLD] * N, BRACKET]
    assert torch.nonzero(types == 1).flatten().tolist() == batch.image_slots.flatten().tolist()
    assert inputs["world_pixels"].shape == (1, 64, 64, 3)
    assert ("pixel_values" in inputs) is (kind == "multimodal")


def test_logits_are_those_of_theworld(model: Any, processor: Any, photographs: Path) -> None:
    _compare_logits(model, processor, pictures(photographs))


def _compare_logits(model: Any, processor: Any, images: list[str]) -> None:
    """Compare the logits after padded prompts with those of TheWorld's own decoder on packed rows."""
    inputs = encode(processor, images, QUESTIONS)
    with torch.no_grad():
        have = model(**inputs).logits[:, -1]
        world = model.theworld
        encoded, names = world._encode_images(images, True, 3)
        batch = world.packer(question_template="{caption}").pack(
            [Question(*one) for one in zip(names, QUESTIONS, strict=True)]
        )
        latents = torch.cat([encoded[name].latent for name in batch.worlds])
        vision = torch.cat([encoded[name].vision for name in batch.images]) if batch.images else None
        want = world(batch, latents, vision)
    # Float32 sums in another order: up to 1e-6 of logits that reach 30 with the random head.
    torch.testing.assert_close(have, want, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    "settings",
    [
        {"world_position": "after"},
        {"world_attention": "causal"},
        {"world_encoder": "pixels"},
        {"world_encoder": "none"},
        {"world_encoder": "noise"},
        {"world_encoder": "gemma_vision"},
    ],
    ids=lambda settings: "-".join(settings.values()),
)
def test_logits_are_those_of_theworld_with_other_settings(
    settings: dict[str, str], gemma: Gemma, photographs: Path, tmp_path: Path
) -> None:
    folder = save(tmp_path / "run", gemma, **settings)
    model = AutoModel.from_pretrained(folder, dtype="float32")
    _compare_logits(model, AutoProcessor.from_pretrained(folder), pictures(photographs))


@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}, {"use_cache": False}], ids=str)
def test_generate_gives_the_tokens_of_theworld(
    options: dict[str, Any], model: Any, processor: Any, photographs: Path
) -> None:
    images = pictures(photographs)
    inputs = encode(processor, images, QUESTIONS)
    assert inputs["attention_mask"][:, 0].tolist() == [0, 1, 0]  # padded on the left
    have = model.generate(**inputs, **GREEDY, **options)[:, inputs["input_ids"].shape[1] :]
    want = model.theworld.generate_ids(images, QUESTIONS, True, **GREEDY)
    assert have.tolist() == want.tolist()
    assert len(set(have.flatten().tolist())) > 8  # no word again and again


def test_beams_have_the_photograph_of_their_prompt(model: Any, processor: Any, photographs: Path) -> None:
    images = pictures(photographs)

    def beams(chosen: slice) -> list[list[int]]:
        inputs = encode(processor, images[chosen], QUESTIONS[chosen])
        answers = model.generate(**inputs, **GREEDY, num_beams=2, num_return_sequences=2)
        return answers[:, inputs["input_ids"].shape[1] :].tolist()

    assert beams(slice(3)) == [*beams(slice(1)), *beams(slice(1, 2)), *beams(slice(2, 3))]


def test_the_pipeline_answers_chats_as_theworld_does(
    kind: str, model: Any, folders: dict[str, Path], photographs: Path
) -> None:
    pipe = pipeline("image-text-to-text", model=str(folders[kind]), device="cpu", dtype=torch.float32)
    assert type(pipe.model) is TheWorldForConditionalGeneration
    shake(pipe.model)
    images = [Image.open(path) for path in pictures(photographs)]
    chats = [chat(*one) for one in zip(images, QUESTIONS, strict=True)]
    found = pipe(text=chats, generate_kwargs=GREEDY, return_full_text=False)
    have = [one["generated_text"].strip() for (one,) in found]
    assert have == model.theworld.generate(images, QUESTIONS, **GREEDY)


def test_without_world_tokens_it_is_gemma(
    kind: str, model: Any, folders: dict[str, Path], photographs: Path
) -> None:
    plain = AutoProcessor.from_pretrained(folders[kind], enable_world=False)
    images = pictures(photographs)
    inputs = encode(plain, images, QUESTIONS)
    assert "world_pixels" not in inputs
    have = model.generate(**inputs, **GREEDY)[:, inputs["input_ids"].shape[1] :]
    assert have.tolist() == model.theworld.generate_ids(images, QUESTIONS, False, **GREEDY).tolist()


def test_several_photographs_have_world_tokens_each(model: Any, processor: Any, photographs: Path) -> None:
    first, second, _ = pictures(photographs)
    message = chat(first, "Which is larger?")
    message[0]["content"].insert(1, {"type": "image", "image": second})
    inputs = processor.apply_chat_template(message, tokenize=True, return_dict=True, return_tensors="pt")
    assert inputs["token_type_ids"].flatten().tolist().count(WORLD) == 2 * N
    assert inputs["token_type_ids"].flatten().tolist().count(BRACKET) == 4
    assert model(**inputs).logits.shape == (
        *inputs["input_ids"].shape,
        model.config.get_text_config().vocab_size,
    )


def test_in_16_bits_it_answers_as_theworld_does(folders: dict[str, Path], photographs: Path) -> None:
    folder, images = folders["multimodal"], pictures(photographs)
    pipe = pipeline("image-text-to-text", model=str(folder), device="cpu", dtype=torch.bfloat16)
    model = shake(pipe.model)
    model.gemma.lm_head.bfloat16()
    assert {p.dtype for p in model.gemma.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in model.projection.parameters()} == {torch.float32}
    message = chat(images[0], QUESTIONS[0])
    (found,) = pipe(text=message, generate_kwargs=GREEDY, return_full_text=False)
    assert [found["generated_text"].strip()] == model.theworld.generate(images[:1], QUESTIONS[:1], **GREEDY)


def test_the_projection_trains_and_gemma_does_not(model: Any, processor: Any, photographs: Path) -> None:
    inputs = encode(processor, pictures(photographs)[:1], QUESTIONS[:1])
    labels = torch.full_like(inputs["input_ids"], -100)
    labels[:, -1] = model.theworld.gemma.answer_ids[1]
    output = model(**inputs, labels=labels)
    # The label is the last token, which the token before it predicts.
    wanted = -output.logits[0, -2].log_softmax(-1)[labels[0, -1]]
    assert output.loss.item() == pytest.approx(wanted.item(), rel=1e-6)
    output.loss.backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None}
    assert trained == {f"projection.{name}" for name, _ in model.projection.named_parameters()}
    model.zero_grad()


def test_peft_finds_the_layers_of_gemma(
    kind: str, folders: dict[str, Path], photographs: Path, tmp_path: Path
) -> None:
    peft = pytest.importorskip("peft")
    model = AutoModelForImageTextToText.from_pretrained(folders[kind], dtype="float32")
    inputs = encode(AutoProcessor.from_pretrained(folders[kind]), pictures(photographs)[:1], QUESTIONS[:1])
    with torch.no_grad():
        before = model(**inputs).logits
    targets = (
        r".*layers\.\d+\.self_attn\.(q|v)_proj" if kind == "text-only" else r".*language_model.*(q|v)_proj"
    )
    settings = peft.LoraConfig(r=2, target_modules=targets, task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(model, settings)
    labels = torch.full_like(inputs["input_ids"], -100)
    labels[:, -1] = model.theworld.gemma.answer_ids[1]
    output = adapted(**inputs, labels=labels)
    torch.testing.assert_close(output.logits, before)  # a new adapter changes nothing
    output.loss.backward()
    trained = [name for name, p in adapted.named_parameters() if p.requires_grad]
    layers = model.config.get_text_config().num_hidden_layers
    assert len(trained) == 4 * layers
    assert all("lora_" in name for name in trained)
    torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=10.0).step()
    with torch.no_grad():
        after = adapted(**inputs).logits
    assert not torch.allclose(after, before)
    assert adapted.generate(**inputs, **GREEDY).shape == (1, inputs["input_ids"].shape[1] + 8)
    with pytest.raises(
        ValueError, match=r"parameters train that a checkpoint does not hold, such as gemma\."
    ):
        model.save_pretrained("nowhere")


def test_what_is_saved_is_the_same_checkpoint(kind: str, folders: dict[str, Path], tmp_path: Path) -> None:
    model = AutoModel.from_pretrained(folders[kind])
    with torch.no_grad():
        model.projection.brackets += 1
    model.save_pretrained(tmp_path / "saved")
    names = {"config.json", "projection.safetensors", "world.json"}
    assert {path.name for path in (tmp_path / "saved").iterdir()} == names
    again = AutoModel.from_pretrained(tmp_path / "saved")
    assert torch.equal(again.projection.brackets, model.projection.brackets)
    assert torch.equal(
        TheWorld.from_pretrained(tmp_path / "saved").projection.brackets, model.projection.brackets
    )


# ---- bad input


def test_options_that_cannot_be_followed_are_refused(folders: dict[str, Path]) -> None:
    folder = folders["multimodal"]
    with pytest.raises(
        ValueError, match="attn_implementation 'flash_attention_2': TheWorld has 'sdpa' alone"
    ):
        AutoModel.from_pretrained(folder, attn_implementation="flash_attention_2")
    with pytest.raises(ValueError, match=r"tp_plan: not an option; leave it out"):
        AutoModel.from_pretrained(folder, tp_plan="auto")
    with pytest.raises(ValueError, match="load a checkpoint with from_pretrained"):
        AutoModel.from_config(AutoConfig.from_pretrained(folder))


def test_texts_and_images_have_to_pair_up(processor: Any, photographs: Path) -> None:
    image, *_ = pictures(photographs)
    with pytest.raises(ValueError, match=r"\[2\] images and \[1\] times <start_of_image> in the texts"):
        processor(images=[[image, image]], text="<start_of_image>What is it?")
    with pytest.raises(ValueError, match=r"\[2, 1\] images and \[1, 2\] times"):
        processor(images=[[image, image], [image]], text=["<start_of_image>", "<start_of_image>" * 2])
    with pytest.raises(ValueError, match="truncation: not an option"):
        processor(images=image, text="<start_of_image>", truncation=True)
    with pytest.raises(ValueError, match="text is None"):
        processor(images=image)


def test_a_damaged_photograph_is_named(processor: Any, photographs: Path, tmp_path: Path) -> None:
    half = tmp_path / "half.png"
    half.write_bytes((photographs / "a.png").read_bytes()[:2000])
    with pytest.raises(ImageError, match=r"half\.png"):
        processor(images=half, text="<start_of_image>")


def test_inputs_of_another_checkpoint_are_refused(model: Any, processor: Any, photographs: Path) -> None:
    inputs = encode(processor, pictures(photographs)[:1], QUESTIONS[:1])
    with pytest.raises(ValueError, match="18 slots for world tokens in input_ids, and 36 of them"):
        model(**inputs | {"world_pixels": inputs["world_pixels"].repeat(2, 1, 1, 1)})


# ---- registration

SCRIPT = """
import sys, theworld
assert "transformers" not in sys.modules
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
print("theworld" in CONFIG_MAPPING, "theworld.models.transformers_model" in sys.modules)
"""


def test_transformers_knows_of_checkpoints_without_loading_the_model() -> None:
    call = [sys.executable, "-c", SCRIPT]
    done = subprocess.run(call, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "True False\n"), done.stderr


def test_other_models_are_recognised_as_ever(tmp_path: Path) -> None:
    assert AutoConfig.from_pretrained(EMBEDDED_GEMMA).model_type == "gemma3"
    shutil.copy(EMBEDDED_GEMMA / "config.json", tmp_path / "config.json")
    config = json.loads((tmp_path / "config.json").read_text())
    del config["model_type"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="Should have a `model_type` key"):
        AutoConfig.from_pretrained(tmp_path)
