"""The decoder against transformers' own, layer weights shared, compiled and not."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from benchmark.models import TINY, make_gemma_folder
from constants import EMBEDDED_GEMMA
from tiny_model import gradients, latents_of, make_model, vision_of
from torch.utils._pytree import tree_leaves, tree_map_only
from transformers import Gemma3ForCausalLM, Gemma3ForConditionalGeneration

from theworld.data.vsr import Statement
from theworld.models.attention import FULL, SLIDING, attention_masks, block_lists
from theworld.models.decoder import Decoder, Layer, Shape, attention, attention_of, layer
from theworld.models.fp8 import to_fp8
from theworld.models.gemma import Gemma
from theworld.models.packing import Batch, Packer


@pytest.fixture(params=["multimodal", "text-only"])
def own_gemma(request: pytest.FixtureRequest, text_gemma_folder: Path) -> Gemma:
    return Gemma(str(EMBEDDED_GEMMA if request.param == "multimodal" else text_gemma_folder))


def test_hidden_states_and_input_gradients_are_transformers_own(
    own_gemma: Gemma, statements: list[Statement]
) -> None:
    batch = make_model(own_gemma).packer().pack(statements)
    masks = attention_masks(batch, own_gemma.sliding_window, "sdpa")
    x = torch.randn(*batch.token_ids.shape, own_gemma.width, generator=torch.Generator().manual_seed(0))
    x.requires_grad_()
    everything = own_gemma.text_model(
        inputs_embeds=x, attention_mask=masks, position_ids=batch.position_ids, use_cache=False
    ).last_hidden_state
    wanted = torch.tensor([5, 40, int(batch.label_rows[1])])
    theirs = everything.flatten(0, 1)[wanted]
    (their_gradient,) = torch.autograd.grad(theirs.square().sum(), x)
    ours = Decoder(own_gemma)(x, batch, wanted)
    (our_gradient,) = torch.autograd.grad(ours.square().sum(), x)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(our_gradient, their_gradient, atol=1e-4, rtol=1e-5)


def test_two_models_on_one_gemma_share_its_weights_and_leave_its_parameters_as_they_were(
    own_gemma: Gemma,
) -> None:
    def addresses() -> dict[str, int]:
        return {name: p.data_ptr() for name, p in own_gemma.model.named_parameters()}

    before, values = addresses(), {name: p.clone() for name, p in own_gemma.model.named_parameters()}
    first, second = make_model(own_gemma).decoder, make_model(own_gemma).decoder
    assert addresses() == before
    for name, parameter in own_gemma.model.named_parameters():
        assert torch.equal(parameter, values[name])
    for one, other, theirs in zip(first.layers, second.layers, own_gemma.text_model.layers, strict=True):
        for mine, yours in zip(one, other, strict=True):
            assert mine.data_ptr() == yours.data_ptr()
        published = theirs.self_attn
        assert one.qkv.data_ptr() == published.q_proj.weight.data_ptr()
        storage = one.qkv.untyped_storage().data_ptr()
        assert published.k_proj.weight.untyped_storage().data_ptr() == storage
        assert published.v_proj.weight.untyped_storage().data_ptr() == storage


def test_merged_weights_are_the_published_ones_and_transformers_goes_on_with_them(own_gemma: Gemma) -> None:
    kind = Gemma3ForConditionalGeneration if own_gemma.is_multimodal else Gemma3ForCausalLM
    published = kind.from_pretrained(own_gemma.name)
    own = dict(own_gemma.model.named_parameters())
    for name, parameter in published.named_parameters():
        assert torch.equal(own[name], parameter), name
    ids = torch.arange(12)[None]
    with torch.no_grad():
        assert torch.equal(own_gemma.model(input_ids=ids).logits, published(input_ids=ids).logits)


def test_a_model_that_computes_something_else_is_refused(own_gemma: Gemma) -> None:
    own_gemma.text_config.attn_logit_softcapping = 50.0
    with pytest.raises(ValueError, match=r"attn_logit_softcapping is 50\.0; this is built for None"):
        Decoder(own_gemma)


def test_a_config_without_a_field_that_is_relied_on_is_refused(own_gemma: Gemma) -> None:
    whole = own_gemma.text_config
    for field in (
        "attention_bias hidden_activation attn_logit_softcapping use_bidirectional_attention num_attention_heads "
        "num_key_value_heads head_dim query_pre_attn_scalar rms_norm_eps layer_types"
    ).split():
        values = {k: getattr(whole, k) for k in dir(type(whole)()) if not k.startswith("_") and k != field}
        own_gemma.text_config = SimpleNamespace(**values)
        with pytest.raises(ValueError, match=f"its config has no {field}, which Gemma 3 has"):
            Decoder(own_gemma)
    own_gemma.text_config = whole
    assert Decoder(own_gemma).layers


@pytest.mark.heavy
def test_compiled_code_gives_the_same_at_every_length_and_does_not_compile_for_each(
    photographs: Path, statements: list[Statement]
) -> None:
    gemma = Gemma(str(EMBEDDED_GEMMA))
    plain, compiled = make_model(gemma), make_model(gemma, compile=True)
    torch._dynamo.reset()
    graphs = []
    for chosen in (statements, statements[:2], statements[2:5], statements[:4], statements[1:3]):
        found = []
        for model in (plain, compiled):
            batch = model.packer().pack(chosen)
            vision = vision_of(gemma, photographs, batch.images)
            loss = model.losses(batch, latents_of(batch.worlds), vision)["total"]
            loss.backward()
            found.append((loss.detach(), gradients(model)))
        (loss, wanted), (fast, ours) = found
        torch.testing.assert_close(fast, loss, atol=1e-5, rtol=1e-5)
        for name in wanted:
            scale = wanted[name].abs().max()
            torch.testing.assert_close(ours[name] / scale, wanted[name] / scale, atol=1e-5, rtol=0)
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs[-1] == graphs[-2] == graphs[-3]  # lengths that were not seen before, and no new code


@pytest.mark.parametrize("position", ["before", "after"])
def test_flex_attention_compiles_once_for_all_lengths_and_kinds_of_layers(
    monkeypatch: pytest.MonkeyPatch, statements: list[Statement], position: str, tmp_path: Path
) -> None:
    """As torch.compile traces it; a CPU has no kernels to make of that."""
    kinds = {"num_hidden_layers": 4, "layer_types": [SLIDING, FULL, SLIDING, FULL]}
    shapes = replace(TINY, text=TINY.text | kinds)
    make_gemma_folder(tmp_path / "gemma", shapes, EMBEDDED_GEMMA, torch.float32, "cpu")
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **options: compile(f, backend="eager", **options))
    dense = make_model(Gemma(str(tmp_path / "gemma")), world_position=position)
    gemma = Gemma(str(tmp_path / "gemma"), attention="flex_attention")
    flex = make_model(gemma, compile=True, world_position=position)
    torch._dynamo.reset()
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for chosen in (statements * 3, statements, statements[:2], statements[2:5]):
        found = []
        for model in (dense, flex):
            batch = model.packer().pack(chosen)
            vision = torch.ones(len(batch.images), gemma.num_image_tokens, TINY.vision["hidden_size"])
            with torch.no_grad():
                found.append(model(batch, latents_of(batch.worlds), vision))
        torch.testing.assert_close(found[1], found[0], atol=1e-4, rtol=1e-4)
        # A layer, and the queries, keys and values of the last one.
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before + 2


@pytest.mark.parametrize("position", ["before", "after"])
@pytest.mark.parametrize("row_tokens", [None, 1], ids=["one row", "several rows"])
def test_the_wanted_tokens_alone_attend_as_they_do_among_all(
    statements: list[Statement], position: str, row_tokens: int | None
) -> None:
    gemma = Gemma(str(EMBEDDED_GEMMA), weights=False)
    options: Any = {"world_position": position, "row_tokens": row_tokens, "flex": True}
    batch = Packer(gemma, "{caption}", 9, **options).pack(statements * 3)
    rows, length = batch.token_ids.shape
    assert (rows > 1) == (row_tokens is not None)
    start, window, generator = batch.num_prefix_tokens, 40, torch.Generator().manual_seed(0)
    assert (start > 0) == (position == "after")
    query, key, value = (
        torch.randn(rows, heads, tokens, 8, generator=generator)
        for heads, tokens in ((4, length - start), (2, length), (2, length))
    )
    wanted = torch.randint(0, rows * (length - start), (50,), generator=generator)
    shape = Shape(4, 2, 8, 8**-0.5, 1e-6, ())
    for kind, lists in (
        (FULL, block_lists(batch, None, start, length)),
        (SLIDING, block_lists(batch, window, start, length)),
    ):
        dense = attention_masks(batch, window, "sdpa", (start, length))[kind]
        mask = torch.zeros(dense.shape).masked_fill(~dense, -torch.inf)
        theirs = attention(query, key, value, mask, shape)[wanted]
        ours = attention_of(wanted, query, key, value, lists, shape)
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("position", ["before", "after"])
def test_a_model_that_was_trained_evaluates_with_the_code_of_its_steps(
    monkeypatch: pytest.MonkeyPatch, statements: list[Statement], position: str
) -> None:
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **options: compile(f, backend="eager", **options))
    gemma = Gemma(str(EMBEDDED_GEMMA))
    model = make_model(gemma, compile=True, world_position=position)

    def inputs(chosen: list[Statement]) -> tuple[Batch, torch.Tensor, torch.Tensor]:
        batch = model.packer().pack(chosen)
        return batch, latents_of(batch.worlds), torch.ones(len(batch.images), gemma.num_image_tokens, 64)

    def graphs() -> int:
        return torch._dynamo.utils.counters["stats"]["unique_graphs"]

    torch._dynamo.reset()
    for chosen in (statements, statements[:2]):
        model.losses(*inputs(chosen))["total"].backward()
    compiled = graphs()
    for chosen in (statements[2:5], statements * 2):
        with torch.no_grad():
            found = model(*inputs(chosen))
        assert not found.requires_grad
        torch.testing.assert_close(found, model(*inputs(chosen)).detach(), atol=0, rtol=0)
    assert graphs() == compiled


@pytest.mark.parametrize("position", ["before", "after"])
def test_no_layer_gets_a_view_which_would_compile_once_more(
    monkeypatch: pytest.MonkeyPatch, statements: list[Statement], position: str
) -> None:
    """As the layers after the first one get what compiled code returns, which is no view."""
    views: list[list[bool]] = []

    def recorded(function: Callable[..., Any], **_: Any) -> Callable[..., Any]:
        def call(*given: Any) -> Any:
            count = 1 + isinstance(given[1], torch.Tensor)  # of the rest of the rows, after a prefix
            views.append([one._is_view() for one in given[:count]])
            return tree_map_only(torch.Tensor, torch.clone, function(*given))

        return call

    monkeypatch.setattr(torch, "compile", recorded)
    gemma = Gemma(str(EMBEDDED_GEMMA))
    model = make_model(gemma, compile=True, world_position=position)
    batch = model.packer().pack(statements)
    with torch.no_grad():
        model(batch, latents_of(batch.worlds), torch.ones(len(batch.images), gemma.num_image_tokens, 64))
    # Of a layer what stands before the world too, if anything; of the last one queries, keys and values alone.
    parts = 1 + (position == "after")
    assert views == [[False] * parts] * (gemma.text_config.num_hidden_layers - 1) + [[False]] * parts


@pytest.mark.parametrize("in_8_bits", [False, True])
def test_what_a_compiled_layer_keeps(in_8_bits: bool, eight_bits_anywhere: None) -> None:
    """Of its weights no copies, which would take as much as the weights do; queries and keys once; and in 8 bits a byte
    of each value of gate and up. What is kept depends on torch's compiler, so it compiles here."""
    hidden, inner, heads, groups, width, length = 64, 256, 4, 2, 16, 128
    outputs = ((heads + 2 * groups) * width, hidden), (hidden, heads * width)
    matrices = [torch.randn(*size).bfloat16() for size in (*outputs, *[(inner, hidden)] * 2, (hidden, inner))]
    weights = [to_fp8(one) for one in matrices] if in_8_bits else matrices
    norms = [torch.zeros(size).bfloat16() for size in (*[hidden] * 4, width, width)]
    own, shape = Layer(*norms, *weights), Shape(heads, groups, width, width**-0.5, 1e-6, ())
    x = torch.randn(length, hidden).bfloat16().requires_grad_()
    cos = torch.randn(1, length, width).bfloat16()
    mask = torch.zeros(1, 1, length, length).bfloat16()
    options: Any = {"fullgraph": True}
    out = torch.compile(layer, **options)(x, own, cos, cos, mask, shape)
    saved = [one for one in out.grad_fn.saved_tensors if isinstance(one, torch.Tensor)]
    weights_at = {one.data_ptr() for one in tree_leaves(own)}
    kept = [one for one in saved if one.data_ptr() not in weights_at]
    assert all(length in one.shape for one in kept if one.numel() >= length)  # of tokens, not of weights
    gate_and_up = sum(one.nbytes for one in kept if inner in one.shape)
    assert gate_and_up == length * 2 * inner * (1 if in_8_bits else 2)
    # Queries and attention's output; keys and values as attention reads them, for every head; keys before their norm.
    of_heads = sum(one.nbytes for one in kept if one.ndim == 4 and one.shape[-1] == width)
    assert of_heads == length * width * 2 * (4 * heads + groups)


def test_a_model_wants_a_gemma_in_as_many_bits(own_gemma: Gemma) -> None:
    with pytest.raises(
        ValueError, match="fp8 is true, but the linear layers of this Gemma are in 16 bits; load"
    ):
        make_model(own_gemma, fp8=True)
