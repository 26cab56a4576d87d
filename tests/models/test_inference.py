"""P(true) of given photographs: as an evaluation gives it, and without world tokens as plain Gemma does.

P(true) from two logits.

Photographs as callers hand them over.
"""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from constants import EMBEDDED_GEMMA, EMBEDDED_VAE
from PIL import Image
from tiny_model import make_model, transformers_logits

from theworld.data.images import ImageError, read_image
from theworld.data.vsr import Statement
from theworld.evaluation.predict import predict
from theworld.evaluation.records import records
from theworld.extraction.features import OnTheFlyLatents, OnTheFlyVision
from theworld.models.cosmos import CosmosLatents
from theworld.models.gemma import Gemma
from theworld.models.inference import CONDITIONS, p_true, pair_up
from theworld.models.projection import ProjectionShape
from theworld.models.theworld import TheWorld
from theworld.store.format import StoreMismatch


def test_it_is_the_softmax_of_the_two() -> None:
    assert p_true(0.0, 0.0) == 0.5
    assert p_true(0.0, math.log(3)) == pytest.approx(0.75, abs=1e-15)
    assert p_true(math.log(3), 0.0) == pytest.approx(0.25, abs=1e-15)
    assert p_true(7.0 + 1.5, 7.0) == pytest.approx(p_true(1.5, 0.0), abs=1e-15)


def test_far_apart_it_is_sure_and_does_not_overflow() -> None:
    assert p_true(-1e4, 1e4) == 1.0
    assert 0.0 <= p_true(1e4, -1e4) < 1e-300


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_is_no_answer(bad: float) -> None:
    with pytest.raises(ValueError, match="logits of '0' and '1' are "):
        p_true(bad, 0.0)
    with pytest.raises(ValueError, match="wanted two numbers"):
        p_true(0.0, bad)


PIXELS = np.zeros((2, 3, 3), np.uint8)


@pytest.mark.parametrize("one", ["a.png", Path("a.png"), PIXELS, Image.fromarray(PIXELS)])
def test_one_image_stands_for_all(one: object) -> None:
    pictures, texts = pair_up(one, ("So.", "Or so."), "statements")  # type: ignore[arg-type]
    assert len(pictures) == 1
    assert pictures[0] is one
    assert texts == ["So.", "Or so."]


def test_as_many_images_as_texts_pair_up() -> None:
    assert pair_up(["a.png", PIXELS], ["So.", "Or so."], "statements")[0][0] == "a.png"
    assert pair_up(["a.png"], "So.", "statements") == (["a.png"], ["So."])


@pytest.mark.parametrize(("images", "texts"), [(2, 3), (3, 2), (0, 1), (1, 0), (0, 0)])
def test_others_do_not(images: int, texts: int) -> None:
    message = f"{images} images and {texts} statements: give as many, or one image for all"
    with pytest.raises(ValueError, match=message):
        pair_up(["a.png"] * images, ["So."] * texts, "statements")


@pytest.fixture(params=["multimodal", "text-only"])
def model(request: pytest.FixtureRequest, text_gemma_folder: Path) -> TheWorld:
    gemma = Gemma(str(EMBEDDED_GEMMA if request.param == "multimodal" else text_gemma_folder))
    made = make_model(gemma, cosmos_model_name=str(EMBEDDED_VAE), latent_size=64)
    made.fingerprint = CosmosLatents(made.config).spec.fingerprint()
    return made


def evaluated(model: TheWorld, statements: list[Statement], photographs: Path) -> dict[str, list[float]]:
    """P(true) of each system as the records of an evaluation from photographs have it."""
    limit = model.config.max_image_pixels
    latents = OnTheFlyLatents(model.encoder, photographs, limit)
    vision = OnTheFlyVision(model.gemma, photographs, limit) if model.gemma.is_multimodal else None
    logits = predict(model, statements, latents, vision, CONDITIONS, batch_size=8)
    rows = records(statements, logits, set())
    return {system: [row["systems"][system]["p_true"] for row in rows] for system in CONDITIONS}


@pytest.mark.parametrize("batch_size", [None, 1, 4])
def test_it_is_what_an_evaluation_records(
    model: TheWorld, statements: list[Statement], photographs: Path, batch_size: int | None
) -> None:
    wanted = evaluated(model, statements, photographs)
    assert len({round(p, 4) for own in wanted.values() for p in own}) > 6  # they do tell statements apart
    images = [photographs / s.image for s in statements]
    captions = [s.caption for s in statements]
    # float32 sums in another order where the batches are others
    assert model.score(images, captions, batch_size=batch_size) == pytest.approx(wanted["world"], abs=1e-5)
    without = model.score(images, captions, enable_world=False, batch_size=batch_size)
    assert without == pytest.approx(wanted["baseline"], abs=1e-5)
    together = model.ask(images, captions, CONDITIONS, batch_size)
    for system in CONDITIONS:
        assert together[system] == pytest.approx(wanted[system], abs=1e-5)


def test_the_order_is_the_one_given(model: TheWorld, statements: list[Statement], photographs: Path) -> None:
    turned = [statements[i] for i in (4, 0, 5, 2, 1, 3)]
    found = model.score([photographs / s.image for s in turned], [s.caption for s in turned], batch_size=2)
    assert found == pytest.approx(evaluated(model, turned, photographs)["world"], abs=1e-5)


def test_without_world_tokens_it_is_plain_gemma(
    model: TheWorld, statements: list[Statement], photographs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = []
    for statement in statements:
        logits = transformers_logits(model.gemma, statement, photographs)
        wanted.append(float(logits[list(model.gemma.answer_ids)].softmax(0)[1]))
    images, captions = [photographs / s.image for s in statements], [s.caption for s in statements]
    monkeypatch.setattr(TheWorld, "encoder", None)  # nothing of the VAE is needed
    assert model.score(images, captions, enable_world=False) == pytest.approx(wanted, abs=1e-5)
    model.enable_world = False
    assert model.score(images, captions) == pytest.approx(wanted, abs=1e-5)


def counted(
    model: TheWorld, monkeypatch: pytest.MonkeyPatch
) -> tuple[list[int], list[int], Callable[[], None]]:
    """How many photographs the VAE and the vision tower were given in each call, from now on."""
    latents: list[int] = []
    vision: list[int] = []
    encode, features = model.encoder.encode, model.gemma.vision_features

    def count(into: list[int], call: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., torch.Tensor]:
        return lambda pixels: (into.append(len(pixels)), call(pixels))[1]

    monkeypatch.setattr(model.encoder, "encode", count(latents, encode))
    monkeypatch.setattr(model.gemma, "vision_features", count(vision, features))
    return latents, vision, lambda: (latents.clear(), vision.clear())[0]


def test_each_different_photograph_is_encoded_once(
    model: TheWorld, photographs: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    latents, vision, forget = counted(model, monkeypatch)
    by_tower = [1] if model.gemma.is_multimodal else []
    path = photographs / "a.png"
    (tmp_path / "copy.png").write_bytes(path.read_bytes())
    pixels = read_image(photographs, "a.png")
    same = [path, str(path), tmp_path / "copy.png", Image.open(path), pixels, pixels.copy()]
    found = model.score(same, ["The cat is here."] * 6, batch_size=2)
    assert (latents, vision) == ([1], by_tower)
    assert found == pytest.approx([found[0]] * 6, abs=1e-6)
    forget()
    one_for_all = model.score(path, ["The cat is here."] * 5)
    assert (latents, vision) == ([1], by_tower)
    assert one_for_all == pytest.approx(found[:5], abs=1e-6)
    forget()
    model.score([path, photographs / "b.png", path], ["The cat is here."] * 3)
    assert (latents, vision) == ([1, 1], by_tower * 2)
    forget()
    model.score(path, "The cat is here.", enable_world=False)
    assert (latents, vision) == ([], by_tower)


def test_a_file_named_twice_is_read_once(
    model: TheWorld, photographs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[object] = []

    def photograph(image: object, limit: int) -> np.ndarray:
        read.append(image)
        return read_image(photographs, Path(str(image)).name)

    monkeypatch.setattr("theworld.models.inference.photograph", photograph)
    a, b = photographs / "a.png", photographs / "b.png"
    model.score([a, b, str(a), a], ["So."] * 4)
    assert read == [a, b]


def test_one_statement_is_a_list_of_one_float(model: TheWorld, photographs: Path) -> None:
    found = model.score(photographs / "a.png", "The cat is left of the dog.")
    assert [type(p) for p in found] == [float]
    assert 0 < found[0] < 1


def test_what_does_not_fit_is_refused(model: TheWorld, photographs: Path) -> None:
    a = photographs / "a.png"
    with pytest.raises(ValueError, match="2 images and 3 statements: give as many, or one image for all"):
        model.score([a, a], ["One.", "Two.", "Three."])
    with pytest.raises(ValueError, match="1 images and 0 statements"):
        model.score(a, [])
    with pytest.raises(ValueError, match="statement 2 is empty"):
        model.score(a, ["The cat is here.", " \n"])
    with pytest.raises(ValueError, match="statement 1 holds half a character"):
        model.score(a, "The cat is \ud83d.")
    with pytest.raises(ValueError, match="question 1 holds NUL"):
        model.generate(a, "What is this?\0")
    with pytest.raises(ValueError, match="statement 1 is a value of type NoneType; give text"):
        model.score(a, [None])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="batch_size is 0; give 1 or more"):
        model.score(a, "The cat is here.", batch_size=0)
    with pytest.raises(ValueError, match="condition 'shuffled': wanted one of world, baseline, zero"):
        model.ask(a, "The cat is here.", ["shuffled"])
    with pytest.raises(ValueError, match="holds Gemma's control token '<end_of_turn>'"):
        model.score(a, "The cat.<end_of_turn>")
    with pytest.raises(ImageError, match=r"d\.png: no such file"):
        model.score(photographs / "d.png", "The cat is here.")
    with pytest.raises(ValueError, match=r"wanted uint8\[H, W, 3\]"):
        model.score(np.zeros((4, 4)), "The cat is here.")
    model.__dict__.pop("encoder", None)
    model.fingerprint = {**model.fingerprint, "cosmos_weights_sha256": "0" * 64}
    with pytest.raises(StoreMismatch, match="cosmos_weights_sha256"):
        model.score(a, "The cat is here.")


def test_predicted_moments_cannot_be_had_on_the_spot(model: TheWorld, photographs: Path) -> None:
    trained = model.projection.shape
    values = {**trained.to_dict(), "steps": 2, "max_steps": 2}
    model.projection.shape = ProjectionShape.from_dict(values)
    a = photographs / "a.png"
    with pytest.raises(ValueError, match=r"trained on 2 predicted frames .* only a cache holds; "):
        model.score(a, "The cat is here.")
    with pytest.raises(ValueError, match="with enable_world=False, nor does score"):
        model.score(a, "The cat is here.")
    found = model.score(a, "The cat is here.", enable_world=False)
    model.projection.shape = trained
    assert found == pytest.approx(model.score(a, "The cat is here.", enable_world=False), abs=1e-6)
