"""The answers of a model under each condition."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_model import latents_of, make_model, vision_of

from theworld.data.vsr import Statement
from theworld.evaluation.conditions import CONDITIONS
from theworld.evaluation.predict import label_loss, predict, shuffled_images, word_losses
from theworld.models.gemma import Gemma


def test_shuffled_gives_each_image_another_one_and_uses_each_once() -> None:
    images = [f"{i}.jpg" for i in range(20)]
    other = shuffled_images(images)
    assert sorted(other) == sorted(other.values()) == sorted(images)
    assert all(image != given for image, given in other.items())
    assert other == shuffled_images(images[::-1])
    with pytest.raises(ValueError, match="at least two images"):
        shuffled_images(["a.jpg"])


def test_answers_are_two_logits_and_the_logsumexp_over_the_vocabulary(
    gemma: Gemma, photographs: Path, statements: list[Statement]
) -> None:
    model = make_model(gemma)
    seen = {}

    def vision(images: tuple[str, ...]) -> torch.Tensor:
        seen[images] = True
        return vision_of(gemma, photographs, images)

    found = predict(model, statements, latents_of, vision, CONDITIONS, batch_size=4)
    assert list(found) == list(CONDITIONS)
    batch = model.packer().pack(statements, [None] * 6)
    with torch.no_grad():
        logits = model(batch, None, vision_of(gemma, photographs, batch.images)).double()
    zero, one = gemma.answer_ids
    wanted = torch.stack([logits[:, zero], logits[:, one], logits.exp().sum(1).log()], 1)
    torch.testing.assert_close(torch.from_numpy(found["baseline"]).double(), wanted, atol=1e-5, rtol=1e-5)
    for values in found.values():
        assert values.shape == (6, 3)
        assert (values[:, 2] > np.logaddexp(values[:, 0], values[:, 1])).all()
    assert np.abs(found["text"] - found["baseline"]).max() > 1e-2


@pytest.mark.parametrize("batch_size", [1, 4, 6])
def test_word_losses_equal_those_of_training_for_any_batch_size(
    gemma: Gemma, photographs: Path, statements: list[Statement], batch_size: int
) -> None:
    model = make_model(gemma)

    def vision(images: tuple[str, ...]) -> torch.Tensor:
        return vision_of(gemma, photographs, images)

    batch = model.packer().pack(statements)
    given = latents_of(batch.worlds), vision(batch.images)
    with torch.no_grad():
        wanted = model.losses(batch, *given, statement_loss_weight=0.3, relation_loss_weight=0.7)
    found = word_losses(model, statements, latents_of, vision, ["statement", "relation"], batch_size)
    assert found == pytest.approx({k: float(wanted[k]) / 6 for k in ("statement", "relation")}, rel=1e-4)
    assert found["statement"] != pytest.approx(found["relation"], rel=0.1)
    alone = word_losses(model, statements, latents_of, vision, ["relation"], batch_size)
    assert alone == pytest.approx({"relation": found["relation"]}, rel=1e-4)
    false = [s for s in statements if not s.label]
    assert word_losses(model, false, latents_of, vision, ["relation"], batch_size) == {"relation": 0.0}


def test_the_condition_text_needs_no_photograph(gemma: Gemma, statements: list[Statement]) -> None:
    def nothing(images: tuple[str, ...]) -> torch.Tensor:
        raise AssertionError(f"asked for {images}")

    found = predict(make_model(gemma), statements, nothing, nothing, ("text",))
    assert found["text"].shape == (6, 3)


def test_the_condition_text_is_refused_for_a_text_only_gemma(
    text_gemma_folder: Path, statements: list[Statement]
) -> None:
    model = make_model(Gemma(str(text_gemma_folder)))
    with pytest.raises(ValueError, match="sees no photograph, so it is the same as 'baseline'; leave it out"):
        predict(model, statements, latents_of, None, ("baseline", "text"))


def test_label_loss_is_the_cross_entropy_of_the_two_answers() -> None:
    logits = np.array([[0.0, 2.0], [1.0, 0.0]], dtype=np.float32)
    wanted = (math.log(1 + math.exp(-2)) + math.log(1 + math.exp(1))) / 2
    assert label_loss(logits, np.array([1, 1])) == pytest.approx(wanted)
