"""A checkpoint as an evaluation harness asks it: photographs and a text, answered in words or by likelihood.

Dimensions: B rows of a batch, L tokens, K tokens of a continuation.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from theworld.config.config import Config
from theworld.models.transformers_model import TheWorldForConditionalGeneration
from theworld.models.transformers_processor import TheWorldProcessor

# The default setting with a group in place of the statement.
_HEAD, _TAIL = map(re.escape, Config().question_template.split("{caption}"))
_AS_BY_DEFAULT = re.compile(f"{_HEAD}(.+){_TAIL}", re.DOTALL)
# Of a harness's options of generation, those that transformers' `generate` takes.
_OF_GENERATE = ("max_new_tokens", "do_sample", "temperature", "top_p", "top_k", "num_beams")


@dataclass(frozen=True)
class Asked:
    """A text about photographs (files, PIL images or uint8[H, W, 3])."""

    images: tuple[Any, ...]
    text: str


class Answers:
    """A loaded checkpoint, and its answers to lists of questions in batches."""

    def __init__(
        self,
        checkpoint: str,
        batch_size: int = 1,
        device: str | None = None,
        dtype: str | None = None,
        enable_world: bool = True,
        **settings: Any,
    ) -> None:
        """`settings` take precedence over the checkpoint's. `enable_world` False asks plain Gemma.

        Raises ValueError as `TheWorld.from_pretrained` does.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; give 1 or more")
        self.batch_size = batch_size
        options = {"device_map": device, "dtype": dtype, **settings}
        self.model = TheWorldForConditionalGeneration.from_pretrained(checkpoint, **options)
        self.processor = TheWorldProcessor.from_pretrained(checkpoint, enable_world, **settings)
        self.tokenizer = self.processor.tokenizer

    def statement(self, caption: str) -> str:
        """Return the question about a statement, as the checkpoint was trained."""
        return self.processor.config.question_template.replace("{caption}", caption)

    def trained(self, text: str) -> str:
        """Return a question about a statement in the words of this checkpoint; other texts as they are.

        Task files have the default template, and a checkpoint may have been trained with another one.
        """
        found = _AS_BY_DEFAULT.fullmatch(text.strip())
        return self.statement(found[1]) if found else text

    @torch.inference_mode()
    def is_true(self, asked: Sequence[Asked]) -> list[bool]:
        """Return whether '1' is likelier than '0' after each text, as an evaluation decides."""
        found = []
        for batch in self._batches(asked):
            last = self._logits(batch, [()] * len(batch), 1)[:, -1]
            zero, one = last[:, list(self.model.theworld.gemma.answer_ids)].T
            found += (one > zero).tolist()
        return found

    @torch.inference_mode()
    def losses(
        self, asked: Sequence[Asked], continuations: Sequence[Sequence[str]]
    ) -> list[list[tuple[float, bool]]]:
        """Return for each continuation of each text the loss, in nats, and whether greedy generation would give it.

        Leading spaces of a continuation are left out: the chat template separates the answer. Continuations of one
        token share one row. Raises ValueError for an empty one.
        """
        wanted = [[self._continuation(c) for c in own] for own in continuations]
        rows = [(i, start) for i, own in enumerate(wanted) for start in dict.fromkeys(c[:-1] for c in own)]
        found: dict[tuple[int, tuple[int, ...]], tuple[float, bool]] = {}
        for batch in self._batches(rows):
            starts = [start for _, start in batch]
            longest = max(map(len, starts)) + 1
            every = self._logits([asked[i] for i, _ in batch], starts, longest).log_softmax(-1)
            for (i, start), logs in zip(batch, every, strict=True):
                logs = logs[longest - len(start) - 1 :]  # float32[K, vocabulary]
                for tokens in (c for c in wanted[i] if c[:-1] == start):
                    ids = torch.tensor(tokens, device=logs.device)
                    loss = -logs.gather(1, ids[:, None]).sum().item()
                    found[i, tokens] = loss, bool((logs.argmax(-1) == ids).all())
        return [[found[i, tokens] for tokens in own] for i, own in enumerate(wanted)]

    @torch.inference_mode()
    def generate(self, asked: Sequence[Asked], **options: Any) -> list[str]:
        """Return an answer in words to each text.

        `options` are those of a harness: a temperature of 0 or none is greedy, and those that transformers' `generate`
        does not know are left out.
        """
        known = {k: v for k, v in options.items() if k in _OF_GENERATE and v is not None}
        if not known.get("temperature"):
            known = {k: v for k, v in known.items() if k not in ("temperature", "top_p", "top_k")}
            known["do_sample"] = False
        else:
            known.setdefault("do_sample", True)
        found = []
        for batch in self._batches(asked):
            inputs = self._inputs(batch, [()] * len(batch))
            answers = self.model.generate(**inputs, **known)[:, inputs["input_ids"].shape[1] :]
            texts = self.tokenizer.batch_decode(answers, skip_special_tokens=True)
            found += [text.strip() for text in texts]
        return found

    def _batches(self, rows: Sequence[Any]) -> Iterator[Sequence[Any]]:
        for start in range(0, len(rows), self.batch_size):
            yield rows[start : start + self.batch_size]

    def _continuation(self, text: str) -> tuple[int, ...]:
        tokens = tuple(self.tokenizer(text.lstrip(" "), add_special_tokens=False)["input_ids"])
        if not tokens:
            raise ValueError(f"continuation {text!r}: no token in it; its likelihood cannot be told")
        return tokens

    def _logits(self, asked: Sequence[Asked], starts: Sequence[Sequence[int]], keep: int) -> Tensor:
        """Return the last `keep` logits of prompts that go on with these tokens, float32[B, keep, vocabulary]."""
        return self.model(**self._inputs(asked, starts), logits_to_keep=keep).logits.float()

    def _inputs(self, asked: Sequence[Asked], starts: Sequence[Sequence[int]]) -> dict[str, Tensor]:
        """Return the inputs of the model for prompts that go on with these tokens, padded on the left."""
        texts = [self._prompt(one) for one in asked]
        inputs = dict(
            self.processor(images=[one.images for one in asked], text=texts, add_special_tokens=False)
        )
        padded = self.tokenizer.pad(
            {
                "input_ids": [a + list(b) for a, b in zip(inputs["input_ids"], starts, strict=True)],
                "token_type_ids": [
                    a + [0] * len(b) for a, b in zip(inputs["token_type_ids"], starts, strict=True)
                ],
            },
            padding=True,
            return_attention_mask=True,
            return_tensors="pt",
        )
        inputs |= dict(padded)
        return {name: value.to(self.model.device) for name, value in inputs.items()}

    def _prompt(self, asked: Asked) -> str:
        content = [*({"type": "image"} for _ in asked.images), {"type": "text", "text": asked.text}]
        messages = [{"role": "user", "content": content}]
        return self.processor.apply_chat_template(messages, add_generation_prompt=True)
