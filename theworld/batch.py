"""Statements become packed sequences: tokens, positions, masks and label rows.

One row of a batch (a `Batch` has R rows of L tokens) holds one or more images, each with its statements:

    <bos><start_of_turn>user\\n [W] w1 ... wN [/W] \\n\\n<boi> i1 ... i256 <eoi>      shared by the image's statements
        \\n\\nStatement: ...<end_of_turn>\\n<start_of_turn>model\\n                      branch 0
        \\n\\nStatement: ...<end_of_turn>\\n<start_of_turn>model\\n                      branch 1

A token sees its own image's shared part and its own branch, and nothing else, so a branch has the positions
and sees the tokens that it would have alone. It looks back (causal); the image tokens also see each other
ahead, and so do the world tokens unless `world_attention` is "causal". The label sits nowhere in the input: it
is what the last token of a branch, the newline after `<start_of_turn>model`, has to predict.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask

from theworld.gemma import Gemma, Prompt
from theworld.vsr import Statement

FLEX_BLOCK = 128  # rows for flex attention are padded to a multiple of its block


@dataclass(frozen=True)
class Batch:
    """S statements about G images, packed into R rows of L tokens; flat indices count through the R x L tokens."""

    statements: tuple[Statement, ...]  # in the order of label_rows
    images: tuple[str, ...]  # G paths
    token_ids: Tensor  # int64[R, L]; 0 where a world token, a bracket or padding stands
    position_ids: Tensor  # int64[R, L]
    group: Tensor  # int32[R, L]: which image a token belongs to; -1: padding
    branch: Tensor  # int32[R, L]: which statement; -1: the shared part
    block: Tensor  # int32[R, L]: bidirectional block (2 x image, + 1 for world tokens); -1: causal
    world_slots: Tensor  # int64[G, N + 2]: flat indices of [W], w1 ... wN, [/W]; [G, 0] without world tokens
    image_slots: Tensor  # int64[G, I]: flat indices of the image tokens; [G, 0] without
    label_rows: Tensor  # int64[S]: flat index of the token that predicts the label
    labels: Tensor  # int64[S]: the token id of '0' or '1'
    word_rows: Tensor  # int64[T]: flat indices of tokens that predict a caption token of a true statement
    words: Tensor  # int64[T]: those caption tokens
    word_counts: Tensor  # int64[T]: how many tokens the caption of each has

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on another device."""
        moved: dict[str, Any] = {k: v.to(device) for k, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(self, **moved)


class Packer:
    """Makes batches for one Gemma. Prompts are tokenised once and remembered."""

    def __init__(
        self,
        gemma: Gemma,
        question_template: str,
        num_world_tokens: int,
        world_attention: str = "bidirectional",
        row_tokens: int | None = None,
        max_length: int | None = None,
    ) -> None:
        """`num_world_tokens` 0 leaves the world part out, brackets too. `row_tokens`: a row takes images while
        they fit into so many tokens; None: as many as the longest image of the batch needs (good where masks
        are dense), and one row for all where attention is flex. `max_length`: a statement that takes more
        tokens with its image is an error; nothing is ever cut."""
        if world_attention not in ("bidirectional", "causal"):
            raise ValueError(f"world_attention {world_attention!r}: wanted 'bidirectional' or 'causal'")
        self.gemma = gemma
        self.question_template = question_template
        self.num_world_tokens = num_world_tokens
        self.world_attention = world_attention
        self.row_tokens = row_tokens
        self.max_length = max_length
        self.flex = gemma.attention == "flex_attention"
        self._prompts: dict[str, Prompt] = {}

    def prompt(self, caption: str) -> Prompt:
        """The tokenised prompt of one caption."""
        if caption not in self._prompts:
            with_world = self.num_world_tokens > 0
            prompt = self.gemma.prompt(self.question_template, caption, with_world)
            length = (
                len(prompt.shared) + len(prompt.branch) + (self.num_world_tokens + 2 if with_world else 0)
            )
            if self.max_length is not None and length > self.max_length:
                raise ValueError(
                    f"{caption!r} takes {length} tokens with its image; max_seq_length is {self.max_length}"
                )
            self._prompts[caption] = prompt
        return self._prompts[caption]

    def pack(self, statements: Sequence[Statement]) -> Batch:
        """One batch of these statements; those of one image share its prefix, in the order given."""
        by_image: dict[str, list[Statement]] = {}
        for statement in statements:
            by_image.setdefault(statement.image, []).append(statement)
        groups = [self._group(index, own) for index, own in enumerate(by_image.values())]
        rows = _fill_rows([len(g.token_ids) for g in groups], self._capacity(groups))
        length = max(sum(len(groups[i].token_ids) for i in row) for row in rows)
        if self.flex:
            length = -(-length // FLEX_BLOCK) * FLEX_BLOCK
        return _assemble(groups, rows, length, tuple(by_image))

    def _capacity(self, groups: list["_Group"]) -> int:
        lengths = [len(g.token_ids) for g in groups]
        if self.row_tokens is not None:
            return max(self.row_tokens, *lengths)
        return sum(lengths) if self.flex else max(lengths)

    def _group(self, index: int, statements: list[Statement]) -> "_Group":
        prompts = [self.prompt(s.caption) for s in statements]
        group = _Group(index)
        self._add_shared(group, prompts[0])
        shared_length = len(group.token_ids)
        for number, (statement, prompt) in enumerate(zip(statements, prompts, strict=True)):
            assert prompt.shared == prompts[0].shared
            start = len(group.token_ids)
            group.add(prompt.branch, range(shared_length, shared_length + len(prompt.branch)), number, -1)
            group.statements.append(statement)
            group.label_rows.append(len(group.token_ids) - 1)
            group.labels.append(self.gemma.answer_ids[statement.label])
            if statement.label == 1:
                caption = range(*prompt.caption)
                group.word_rows += [start + i - 1 for i in caption]
                group.words += [prompt.branch[i] for i in caption]
                group.word_counts += [len(caption)] * len(caption)
        return group

    def _add_shared(self, group: "_Group", prompt: Prompt) -> None:
        image_token = self.gemma.image_token_id
        num_slots = self.num_world_tokens + 2
        for i in range(len(prompt.shared) + 1):
            if i == prompt.world_at:
                start = len(group.token_ids)
                group.world_slots = list(range(start, start + num_slots))
                # The brackets are ordinary causal tokens, as the tokens around an image are.
                group.add([0], [start], -1, -1)
                block = 2 * group.index + 1 if self.world_attention == "bidirectional" else -1
                group.add([0] * (num_slots - 2), range(start + 1, start + num_slots - 1), -1, block)
                group.add([0], [start + num_slots - 1], -1, -1)
            if i < len(prompt.shared):
                is_image = prompt.shared[i] == image_token
                if is_image:
                    group.image_slots.append(len(group.token_ids))
                group.add([prompt.shared[i]], [len(group.token_ids)], -1, 2 * group.index if is_image else -1)


class _Group:
    """One image and its statements while they are laid out; indices count from the group's first token."""

    def __init__(self, index: int) -> None:
        self.index = index
        self.statements: list[Statement] = []
        self.token_ids: list[int] = []
        self.positions: list[int] = []
        self.branch: list[int] = []
        self.block: list[int] = []
        self.world_slots: list[int] = []
        self.image_slots: list[int] = []
        self.label_rows: list[int] = []
        self.labels: list[int] = []
        self.word_rows: list[int] = []
        self.words: list[int] = []
        self.word_counts: list[int] = []

    def add(self, token_ids: Sequence[int], positions: Sequence[int], branch: int, block: int) -> None:
        self.token_ids += token_ids
        self.positions += positions
        self.branch += [branch] * len(token_ids)
        self.block += [block] * len(token_ids)


def _fill_rows(lengths: list[int], capacity: int) -> list[list[int]]:
    """Which groups stand in which row: first fit, longest first, so that rows come out few and full."""
    rows: list[list[int]] = []
    free: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        row = next((r for r, room in enumerate(free) if room >= lengths[index]), None)
        if row is None:
            rows.append([])
            free.append(capacity)
            row = len(rows) - 1
        rows[row].append(index)
        free[row] -= lengths[index]
    return rows


def _assemble(groups: list[_Group], rows: list[list[int]], length: int, images: tuple[str, ...]) -> Batch:
    num_rows = len(rows)
    filled = {name: torch.zeros(num_rows, length, dtype=torch.int64) for name in ("token_ids", "positions")}
    marks = {
        name: torch.full((num_rows, length), -1, dtype=torch.int32) for name in ("group", "branch", "block")
    }
    offsets: dict[int, int] = {}
    for r, row in enumerate(rows):
        column = 0
        for index in row:
            group, end = groups[index], column + len(groups[index].token_ids)
            for name in ("token_ids", "positions"):
                filled[name][r, column:end] = torch.tensor(getattr(group, name))
            for name in ("branch", "block"):
                marks[name][r, column:end] = torch.tensor(getattr(group, name), dtype=torch.int32)
            marks["group"][r, column:end] = index
            offsets[index] = r * length + column
            column = end

    def flat(name: str) -> Tensor:
        """All groups' indices, counted through the whole batch."""
        return torch.tensor(
            [offsets[g.index] + i for g in groups for i in getattr(g, name)], dtype=torch.int64
        )

    return Batch(
        statements=tuple(s for g in groups for s in g.statements),
        images=images,
        token_ids=filled["token_ids"],
        position_ids=filled["positions"],
        **marks,
        world_slots=flat("world_slots").view(len(groups), -1),
        image_slots=flat("image_slots").view(len(groups), -1),
        label_rows=flat("label_rows"),
        labels=torch.tensor([i for g in groups for i in g.labels], dtype=torch.int64),
        word_rows=flat("word_rows"),
        words=torch.tensor([i for g in groups for i in g.words], dtype=torch.int64),
        word_counts=torch.tensor([i for g in groups for i in g.word_counts], dtype=torch.int64),
    )


def attention_masks(batch: Batch, sliding_window: int, attention: str) -> dict[str, Any]:
    """The masks that `Gemma3TextModel.forward` takes, by layer type: bool[R, 1, L, L] (True: may see), or flex
    attention's BlockMask of the same rule."""
    rules = {
        "full_attention": _rule(batch, None),
        "sliding_attention": _rule(batch, sliding_window),
    }
    rows, length = batch.token_ids.shape
    device = batch.token_ids.device
    if attention == "flex_attention":
        return {k: create_block_mask(f, rows, None, length, length, device=device) for k, f in rules.items()}
    r = torch.arange(rows, device=device)[:, None, None]
    q = torch.arange(length, device=device)[None, :, None]
    k = torch.arange(length, device=device)[None, None, :]
    return {name: rule(r, 0, q, k)[:, None] for name, rule in rules.items()}


def _rule(batch: Batch, window: int | None) -> Callable[[Any, Any, Any, Any], Tensor]:
    """May query q of row r see key k? Padding tokens see padding before them, so that no row of scores is empty."""
    group, branch, block, position = batch.group, batch.branch, batch.block, batch.position_ids

    def may_see(r: Any, head: Any, q: Any, k: Any) -> Tensor:
        same_sequence = (group[r, q] == group[r, k]) & ((branch[r, k] < 0) | (branch[r, k] == branch[r, q]))
        same_block = (block[r, q] >= 0) & (block[r, q] == block[r, k])
        seen = same_sequence & ((k <= q) | same_block)
        return seen if window is None else seen & (position[r, q] - position[r, k] < window)

    return may_see
