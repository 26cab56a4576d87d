"""What has to be true of the model: equalities with transformers, with padding, with one statement at a time."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from constants import QUESTION
from tiny_model import gradients, latents_of, make_model, transformers_logits, vision_of

from theworld.config.config import Config
from theworld.data.images import read_image
from theworld.data.vsr import Statement, images_of
from theworld.models.attention import attention_masks
from theworld.models.gemma import Gemma, load_gemma
from theworld.models.packing import Control, Packer
from theworld.models.theworld import TheWorld


@pytest.fixture(params=["multimodal", "text-only"])
def any_gemma(request: pytest.FixtureRequest, gemma: Gemma, text_gemma_folder: Path) -> Gemma:
    return gemma if request.param == "multimodal" else Gemma(str(text_gemma_folder))


def test_without_world_tokens_the_logits_are_transformers_own(
    any_gemma: Gemma, photographs: Path, statements: list[Statement]
) -> None:
    model = make_model(any_gemma)
    batch = model.packer(with_world=False).pack(statements)
    with torch.no_grad():
        ours = model(batch, None, vision_of(any_gemma, photographs, batch.images))
    assert batch.statements == tuple(statements)
    theirs = torch.stack([transformers_logits(any_gemma, s, photographs) for s in statements])
    assert theirs.std() > 0.1
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_without_the_photograph_the_logits_are_transformers_own_of_the_text(
    gemma: Gemma, photographs: Path, statements: list[Statement]
) -> None:
    model = make_model(gemma)
    for packer in (model.packer(), model.packer(with_world=False)):
        batch = packer.pack(statements, [Control.TEXT] * 6)
        assert batch.images == batch.worlds == ()
        with torch.no_grad():
            ours = model(batch, None, None)
        theirs = torch.stack(
            [transformers_logits(gemma, s, photographs, with_image=False) for s in statements]
        )
        assert theirs.std() > 0.1
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def reference_logits(model: TheWorld, statement: Statement, photographs: Path) -> torch.Tensor:
    """One statement alone, written out plainly: concatenated embeddings and a mask by transformers' own rules."""
    gemma = model.gemma
    prompt = gemma.prompt(QUESTION, statement.caption, True, model.config.world_position)
    ids = torch.tensor([*prompt.shared, *prompt.branch])
    at = prompt.world_at
    assert at is not None
    embeddings = gemma.embed(ids)
    if gemma.is_multimodal:
        features = gemma.model.get_image_features(
            gemma.pixel_values([read_image(photographs, statement.image)])
        ).pooler_output[0]
        embeddings = embeddings.masked_scatter((ids == gemma.image_token_id)[:, None], features)
    world = model.projection(latents_of([statement.image]))[0]
    opening, closing = model.projection.brackets
    row = torch.cat([embeddings[:at], opening[None], world, closing[None], embeddings[at:]])[None]
    length, n = row.shape[1], len(world)
    sees = torch.ones(length, length).tril().bool()
    sees[at + 1 : at + 1 + n, at + 1 : at + 1 + n] = True
    if gemma.is_multimodal:
        image = (ids == gemma.image_token_id).nonzero().flatten()
        image = image + n + 2 if image[0] >= at else image
        sees[image[0] : image[-1] + 1, image[0] : image[-1] + 1] = True
    distance = torch.arange(length)[:, None] - torch.arange(length)[None]
    near = sees & (distance < gemma.sliding_window)
    masks = {"full_attention": sees[None, None], "sliding_attention": near[None, None]}
    hidden = gemma.text_model(
        inputs_embeds=row, attention_mask=masks, position_ids=torch.arange(length)[None], use_cache=False
    ).last_hidden_state
    return gemma.model.lm_head(hidden[0, -1])


@pytest.mark.parametrize("position", ["before", "after"])
def test_packed_rows_equal_each_statement_alone_in_loss_and_every_gradient(
    any_gemma: Gemma, photographs: Path, statements: list[Statement], position: str
) -> None:
    model = make_model(any_gemma, world_position=position)
    loss = torch.stack(
        [
            F.cross_entropy(
                reference_logits(model, s, photographs), torch.tensor(any_gemma.answer_ids[s.label])
            )
            for s in statements
        ]
    ).sum()
    loss.backward()
    wanted = gradients(model)
    batch = model.packer().pack(statements)
    vision = vision_of(any_gemma, photographs, batch.images)
    losses = model.losses(batch, latents_of(batch.worlds), vision)
    losses["total"].backward()
    found = gradients(model)
    torch.testing.assert_close(losses["total"], loss, atol=1e-5, rtol=1e-5)
    assert found.keys() == wanted.keys()
    assert all(g.abs().max() > 0 for g in wanted.values())
    for name in wanted:
        scale = wanted[name].abs().max()  # gradients are compared at the size of the largest of a tensor
        torch.testing.assert_close(found[name] / scale, wanted[name] / scale, atol=1e-5, rtol=0)


@pytest.mark.parametrize("row_tokens", [None, 200])
def test_how_images_are_laid_into_rows_does_not_change_the_logits(
    gemma: Gemma, photographs: Path, statements: list[Statement], row_tokens: int | None
) -> None:
    model = make_model(gemma)
    batch = Packer(gemma, QUESTION, 16, row_tokens=row_tokens).pack(statements)
    assert batch.token_ids.shape[0] == (3 if row_tokens is None else 2)
    with torch.no_grad():
        ours = model(batch, latents_of(batch.worlds), vision_of(gemma, photographs, batch.images))
        alone = torch.stack([reference_logits(model, s, photographs) for s in batch.statements])
    torch.testing.assert_close(ours, alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("position", ["before", "after"])
def test_all_systems_in_one_batch_answer_as_each_in_its_own(
    any_gemma: Gemma, photographs: Path, statements: list[Statement], position: str
) -> None:
    """Worlds of other images, worlds that say nothing and none at all share what they can, and change nothing."""
    model = make_model(any_gemma, world_position=position)
    packer = model.packer()
    other = {"a.png": "b.png", "b.png": "c.png", "c.png": "a.png"}
    systems = [
        [s.image for s in statements],
        [other[s.image] for s in statements],
        [Control.ZERO] * 6,
        [None] * 6,
    ]
    if any_gemma.is_multimodal:
        systems.append([Control.TEXT] * 6)

    def answers(asked: list[Statement], worlds: list[str | None]) -> torch.Tensor:
        batch = packer.pack(asked, worlds)
        with torch.no_grad():
            return model(
                batch, model.latents(batch, latents_of), vision_of(any_gemma, photographs, batch.images)
            )

    apart = [answers(statements, worlds) for worlds in systems]
    together = answers(statements * len(systems), [world for worlds in systems for world in worlds])
    torch.testing.assert_close(together, torch.cat(apart), atol=1e-5, rtol=1e-5)
    assert all((apart[i] - apart[j]).abs().max() > 1e-2 for i in range(len(systems)) for j in range(i))
    own = torch.stack([reference_logits(model, s, photographs) for s in statements])
    torch.testing.assert_close(apart[0], own, atol=1e-5, rtol=1e-5)


def test_causal_world_tokens_do_not_see_ahead(gemma: Gemma, statements: list[Statement]) -> None:
    for attention, ahead in (("bidirectional", True), ("causal", False)):
        model = make_model(gemma, world_attention=attention)
        batch = model.packer().pack(statements[:1])
        mask = attention_masks(batch, gemma.sliding_window, "sdpa")["full_attention"][0, 0]
        first, last = int(batch.world_slots[0, 1]), int(batch.world_slots[0, -2])
        assert bool(mask[first, last]) is ahead
        assert bool(mask[last, first])


def test_the_loss_depends_on_the_label_token_alone(
    gemma: Gemma, photographs: Path, statements: list[Statement]
) -> None:
    model = make_model(gemma)
    batch = model.packer().pack(statements[:2])
    vision = vision_of(gemma, photographs, batch.images)
    latents = latents_of(batch.worlds)
    with torch.no_grad():
        logits = model(batch, latents, vision)
        loss = model.losses(batch, latents, vision)["total"]
    wanted = -logits.log_softmax(-1)[torch.arange(2), batch.labels].sum()
    torch.testing.assert_close(loss, wanted)
    assert batch.labels.tolist() == [gemma.answer_ids[1], gemma.answer_ids[0]]
    # The label itself is nowhere in the input, and nothing else of the batch enters the loss.
    flipped = model.packer().pack([Statement(**{**vars(s), "label": 1 - s.label}) for s in statements[:2]])
    assert torch.equal(flipped.token_ids, batch.token_ids)
    with torch.no_grad():
        assert not torch.isclose(model.losses(flipped, latents, vision)["total"], loss)


def test_the_statement_loss_is_the_mean_next_word_loss_over_true_captions(
    gemma: Gemma, photographs: Path, statements: list[Statement]
) -> None:
    model = make_model(gemma)
    batch = model.packer().pack(statements)
    vision, latents = vision_of(gemma, photographs, batch.images), latents_of(batch.worlds)
    with torch.no_grad():
        losses = model.losses(batch, latents, vision, statement_loss_weight=0.5)
        hidden = model.hidden(batch, latents, vision)
    wanted = 0.0
    for statement, label_row in zip(batch.statements, batch.label_rows, strict=True):
        if statement.label == 0:
            continue
        prompt = gemma.prompt(QUESTION, statement.caption, with_world=True)
        first, last = prompt.caption
        assert gemma.tokenizer.decode(prompt.branch[first:last]).strip() == statement.caption
        start = int(label_row) - len(prompt.branch) + 1
        rows = gemma.logits(hidden[start + first - 1 : start + last - 1])
        wanted += float(F.cross_entropy(rows, torch.tensor(prompt.branch[first:last])))
    assert float(losses["statement"]) == pytest.approx(wanted, rel=1e-5)
    assert float(losses["total"]) == pytest.approx(float(losses["label"]) + 0.5 * wanted, rel=1e-5)


def test_the_relation_loss_is_the_mean_next_word_loss_over_its_words(
    gemma: Gemma, photographs: Path, statements: list[Statement]
) -> None:
    model = make_model(gemma)
    batch = model.packer().pack(statements)
    vision, latents = vision_of(gemma, photographs, batch.images), latents_of(batch.worlds)
    with torch.no_grad():
        losses = model.losses(batch, latents, vision, 0.5, 0.25, label_loss_weight=0.0)
        alone = model.losses(batch, latents, vision, relation_loss_weight=1.0)
        plain = model.losses(batch, latents, vision, statement_loss_weight=0.5)
        hidden = model.hidden(batch, latents, vision)
    wanted = 0.0
    for statement, label_row in zip(batch.statements, batch.label_rows, strict=True):
        if statement.label == 0:
            continue
        prompt = gemma.prompt(QUESTION, statement.caption, with_world=True)
        start = statement.caption.index(statement.relation)
        places = torch.tensor(prompt.tokens_of(start, start + len(statement.relation)))
        assert gemma.tokenizer.decode([prompt.branch[i] for i in places]).strip() == statement.relation
        rows = gemma.logits(hidden[int(label_row) - len(prompt.branch) + places])
        wanted += float(F.cross_entropy(rows, torch.tensor(prompt.branch)[places]))
    assert float(losses["relation"]) == pytest.approx(wanted, rel=1e-5)
    assert float(alone["relation"]) == pytest.approx(wanted, rel=1e-5)
    assert float(alone["total"]) == pytest.approx(float(alone["label"]) + wanted, rel=1e-5)
    assert float(alone["statement"]) == float(plain["relation"]) == 0
    total = 0.5 * float(plain["statement"]) + 0.25 * wanted
    assert float(losses["total"]) == pytest.approx(total, rel=1e-5)


def test_the_loss_of_a_caption_is_that_of_a_true_statement_of_its_words(
    photographs: Path, statements: list[Statement], gemma: Gemma
) -> None:
    model = make_model(gemma)
    texts = {"a.png": "Two balls and a cat.", "c.png": "A cup."}
    packer = model.packer()
    beside = packer.pack(statements, captions=texts)
    alone = packer.pack([Statement(image, text, 1, "none", 0) for image, text in texts.items()])
    found = []
    for batch in (beside, alone, packer.pack(statements)):
        vision, latents = vision_of(gemma, photographs, batch.images), latents_of(batch.worlds)
        with torch.no_grad():
            found.append(model.losses(batch, latents, vision, 0.5, 0.25))
    assert float(found[0]["statement"]) == pytest.approx(float(found[1]["statement"]), rel=1e-5)
    assert float(found[0]["label"]) == pytest.approx(float(found[2]["label"]), rel=1e-5)
    assert float(found[0]["relation"]) == pytest.approx(float(found[2]["relation"]), rel=1e-5)
    total = float(found[0]["label"] + 0.5 * found[0]["statement"] + 0.25 * found[0]["relation"])
    assert float(found[0]["total"]) == pytest.approx(total, rel=1e-5)


def test_gradient_checkpointing_changes_nothing(
    photographs: Path, statements: list[Statement], gemma: Gemma
) -> None:
    found = []
    for checkpointing in (False, True):
        own = Gemma(gemma.name)
        model = make_model(own, use_gradient_checkpointing=checkpointing)
        batch = model.packer().pack(statements)
        model.losses(batch, latents_of(batch.worlds), vision_of(own, photographs, batch.images))[
            "total"
        ].backward()
        found.append(gradients(model))
        assert model.decoder.checkpointed is checkpointing
    for name in found[0]:
        assert torch.equal(found[0][name], found[1][name])


def test_what_trains_is_what_is_optimised_is_what_is_saved(gemma: Gemma, tmp_path: Path) -> None:
    model = make_model(gemma)
    names = {
        "brackets", "positions", "norm.weight",
        "layers.0.weight", "layers.0.bias", "layers.2.weight", "layers.2.bias",
    }  # fmt: skip
    assert set(model.trainable()) == names
    assert {id(p) for p in model.parameters()} == {id(p) for p in model.trainable().values()}
    assert not any(p.requires_grad for p in gemma.model.parameters())
    model.save_pretrained(tmp_path)
    from safetensors import safe_open

    with safe_open(tmp_path / "projection.safetensors", "pt") as file:
        assert set(file.keys()) == names
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "config.json",
        "projection.safetensors",
        "world.json",
    ]


def test_making_a_model_sets_no_state_of_the_process(gemma: Gemma) -> None:
    def state() -> tuple[object, ...]:
        limit = torch._dynamo.config.recompile_limit
        return torch.get_rng_state().tolist(), torch.get_float32_matmul_precision(), limit

    before = state()
    config = Config(world_patch=2, compile=True, model_name=gemma.name, device="cpu", dtype="bfloat16")
    fingerprint = {"latent_shape": [16, 8, 8], "latents_mean": [0.0] * 16, "latents_std": [1.0] * 16}
    model = TheWorld.from_config(config, load_gemma(config), fingerprint)
    assert model.gemma.dtype == torch.bfloat16
    assert state() == before


def test_the_first_weights_are_a_function_of_the_seed(gemma: Gemma) -> None:
    fingerprint = {"latent_shape": [16, 8, 8], "latents_mean": [0.0] * 16, "latents_std": [1.0] * 16}
    found = []
    for seed, before in ((3, 0), (3, 1), (4, 0)):
        torch.manual_seed(before)
        found.append(TheWorld.from_config(Config(world_patch=2, seed=seed), gemma, fingerprint).projection)
    torch.manual_seed(3)  # as a generator of that seed gives them
    wanted = torch.nn.Linear(64, 64).weight
    first, again, other = (projection.layers[0].weight for projection in found)
    assert torch.equal(first, wanted)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_the_size_of_world_tokens_at_the_start_is_a_setting(gemma: Gemma) -> None:
    fingerprint = {"latent_shape": [16, 8, 8], "latents_mean": [0.0] * 16, "latents_std": [1.0] * 16}
    for scale in (1.0, 0.25):
        config = Config(world_patch=2, projection_scale=scale)
        model = TheWorld.from_config(config, gemma, fingerprint)
        size = model.projection(latents_of(["a"])).detach().pow(2).mean().sqrt()
        assert float(size) == pytest.approx(scale * gemma.embedding_scale(), rel=1e-3)


@pytest.mark.parametrize("kind", ["conv", "transformer"])
def test_a_projection_that_sees_further_is_saved_and_loaded(gemma: Gemma, tmp_path: Path, kind: str) -> None:
    statistics = {"latents_mean": [0.1] * 16, "latents_std": [0.9] * 16}
    config = Config(world_patch=2, projection=kind, projection_layers=3, projection_hidden=32)
    model = TheWorld.from_config(config, gemma, {"latent_shape": [16, 8, 8], **statistics})
    assert model.projection.shape.depth == 3
    model.save_pretrained(tmp_path)
    loaded = TheWorld.from_pretrained(tmp_path, gemma=gemma)
    latents = latents_of(["a", "b"])
    assert torch.equal(loaded.projection(latents), model.projection(latents))


def test_a_saved_model_loads_equal_and_a_foreign_one_is_refused(gemma: Gemma, tmp_path: Path) -> None:
    model = make_model(gemma)
    model.fingerprint = {"latents_mean": [0.1] * 16, "latents_std": [0.9] * 16}
    model.save_pretrained(tmp_path)
    loaded = TheWorld.from_pretrained(tmp_path, gemma=gemma)
    assert loaded.config == model.config
    latents = latents_of(["a", "b"])
    assert torch.equal(loaded.projection(latents), model.projection(latents))
    other = make_model(gemma, positions=False)
    with pytest.raises(
        ValueError, match=r"projection\.safetensors: positions of shape \(16, 64\) is not one of this"
    ):
        other.load_projection(tmp_path / "projection.safetensors")
    (tmp_path / "world.json").unlink()
    with pytest.raises(ValueError, match=r"no world\.json in it"):
        TheWorld.from_pretrained(tmp_path, gemma=gemma)


def test_images_of_a_batch_are_those_of_its_statements(gemma: Gemma, statements: list[Statement]) -> None:
    batch = make_model(gemma).packer().pack(statements)
    assert sorted(batch.images) == images_of(statements)
    assert batch.world_slots.shape == (3, 18)
    assert batch.image_slots.shape == (3, 16)
    assert np.array_equal(batch.labels.tolist(), [gemma.answer_ids[s.label] for s in statements])
