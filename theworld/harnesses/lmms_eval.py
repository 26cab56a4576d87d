"""TheWorld in lmms-eval: `lmms_eval --model theworld --model_args pretrained=CHECKPOINT --tasks vsr_random`.

lmms-eval finds the class through an entry point: see `theworld.harnesses.manifest`.
"""

import json
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from lmms_eval.api.instance import GenerationResult
from lmms_eval.api.model import lmms
from PIL import Image

from theworld.harnesses.answers import Answers, Asked
from theworld.utils.console import progress

DEFAULTS = {"max_new_tokens": 128}  # as lmms-eval has it for Gemma 3


class TheWorldModel(lmms):
    """A checkpoint as lmms-eval asks it.

    `loglikelihood` returns losses, as the models of lmms-eval do: its multiple choice takes the smallest.
    """

    is_simple = True

    def __init__(
        self,
        pretrained: str,
        batch_size: int | str = 1,
        device: str | None = None,
        max_batch_size: int | None = None,
        **options: Any,
    ) -> None:
        """`pretrained`: a checkpoint, a run of which the newest one is taken, or user/name. `options` are those of
        `Answers`: dtype, enable_world, and settings such as cosmos_model_name. Raises ValueError for others."""
        super().__init__()
        if not str(batch_size).isdecimal():
            raise ValueError(f"batch_size is {batch_size!r}; give a number, such as 8")
        self.accelerator = Accelerator()
        if self.accelerator.num_processes > 1:  # one device each
            device = str(self.accelerator.device)
            self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        self.answers = Answers(pretrained, int(batch_size), device, **options)

    @property
    def batch_size(self) -> int:
        """The number of questions at a time."""
        return self.answers.batch_size

    @property
    def device(self) -> torch.device:
        """The device of the model."""
        return self.answers.model.device

    def loglikelihood(self, requests: list[Any]) -> list[GenerationResult]:
        """Return the loss of each request's continuation, in nats, and whether greedy generation would give it.

        The pair is wrapped, because lmms-eval 0.7 would make a text of a bare one, which its metrics cannot read.
        """
        rows: dict[tuple[Any, ...], list[int]] = {}  # requests of one question, such as its choices
        for index, request in enumerate(requests):
            context, _, _, *place = request.args
            rows.setdefault((context, *place), []).append(index)
        found: dict[int, tuple[float, bool]] = {}
        for members in self._batches(list(rows.values())):
            asked = [self._asked(requests[own[0]]) for own in members]
            continuations = [[self._continuation(requests[i]) for i in own] for own in members]
            losses = self.answers.losses(asked, continuations)
            found |= {
                i: one
                for own, each in zip(members, losses, strict=True)
                for i, one in zip(own, each, strict=True)
            }
        return [GenerationResult(found[index]) for index in range(len(requests))]

    def generate_until(self, requests: list[Any]) -> list[str]:
        """Return the answer to each request in words, up to the first of its strings `until`."""
        groups: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True, default=str), []).append(index)
        found: dict[int, str] = {}
        for members in groups.values():
            options = DEFAULTS | requests[members[0]].args[1]
            for batch in self._batches(members):
                texts = self.answers.generate([self._asked(requests[i]) for i in batch], **options)
                for index, text in zip(batch, texts, strict=True):
                    found[index] = _until(text, options.get("until"))
                    self.cache_hook.add_partial("generate_until", requests[index].args[:2], found[index])
        return [found[index] for index in range(len(requests))]

    def generate_until_multi_round(self, requests: list[Any]) -> list[str]:
        """Raises ValueError: TheWorld was trained on single questions."""
        raise ValueError("TheWorld answers single questions; leave out tasks of several rounds")

    def _batches(self, rows: list[Any]) -> Iterator[list[Any]]:
        parts = [rows[start : start + self.batch_size] for start in range(0, len(rows), self.batch_size)]
        yield from progress(parts, total=len(parts), desc="answer", unit=" batches", disable=self.rank != 0)

    def _asked(self, request: Any) -> Asked:
        context, _, visuals, doc_id, task, split = request.args
        images = visuals(self.task_dict[task][split][doc_id]) if visuals is not None else []
        for image in images or []:
            if not isinstance(image, Image.Image):
                kind = type(image).__name__
                raise ValueError(
                    f"task {task}, document {doc_id}: a visual of type {kind}; TheWorld takes images alone"
                )
        return Asked(tuple(images or ()), self.answers.trained(context))

    def _continuation(self, request: Any) -> str:
        _, continuation, _, doc_id, task, split = request.args
        if isinstance(continuation, str):
            return continuation
        return str(continuation(self.task_dict[task][split][doc_id]))


def _until(text: str, stops: Sequence[str] | str | None) -> str:
    """Return a text up to the first stop string. As for the Gemma 3 of lmms-eval an empty line, which is its default,
    is none: Gemma ends its answer by a token."""
    for stop in [stops] if isinstance(stops, str) else stops or ():
        if stop and stop != "\n\n":
            text = text.split(stop)[0]
    return text
