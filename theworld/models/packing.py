"""Statements become packed sequences: tokens, positions, what sees what, and label rows.

A Batch has R rows of L tokens, which hold trees of segments. A token sees the segments on its own
path and nothing else, so a statement has the positions and sees the tokens that it would have alone. That is two
numbers a token: its `place` in the order of its row's trees, and the `end` of its segment's subtree there; k is seen by
q if place[k] <= place[q] < end[k]. The image tokens also see each other ahead, and so do the world tokens unless
`world_attention` is "causal". The label sits nowhere in the input: it is what the last token of a statement's segment
has to predict, in Gemma's own format the newline after `<start_of_turn>model`.

The trees that prompts are: a prompt is a path of segments, and prompts that begin alike share them.

A row of a batch holds trees, each laid out parent first, children after one another:

    <bos><start_of_turn>user\n [W] w1 ... wN [/W]                                  the world of an image
        \n\n<boi> i1 ... i256 <eoi>                                               the image
            \n\nStatement: ...<end_of_turn>\n<start_of_turn>model\n              statement 0
            \n\nStatement: ...<end_of_turn>\n<start_of_turn>model\n              statement 1
            \n\nStatement: ...                                                  a caption, up to its last word

With `world_position` "after" the image is the parent and the world its child; without world tokens the first two are
one segment.

Segments above a world in its tree (an image, where the world stands after it) depend on nothing that trains. They
stand in the first columns of a row, `num_frozen` of them, so that no gradient is computed for them.

What a batch is to predict, and where: labels, and the words of the true statements and of their relations.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from theworld.data.vsr import Statement, relation_span
from theworld.models.gemma import Gemma, Prompt


@dataclass(frozen=True)
class Segment:
    """Tokens that stand together; below the same parent, segments of the same key are one."""

    key: Any
    token_ids: Sequence[int]
    ahead: tuple[int, int] = (0, 0)  # from where to where its tokens see each other both ways
    world: tuple[str, int, int] | None = None  # whose latents stand from where to where, brackets included
    image: tuple[str, int, int] | None = None  # whose image tokens stand from where to where


@dataclass
class Node:
    """A segment in its tree."""

    segment: Segment
    position: int  # of its first token
    children: "dict[Any, Node]" = field(default_factory=dict)
    row: int = 0
    column: int = 0
    place: int = 0

    @property
    def is_frozen(self) -> bool:
        """Whether world tokens stand below it, and none in it or above."""
        worlds = any(child.segment.world is not None for child in self.children.values())
        return worlds and self.segment.world is None

    def size(self) -> int:
        """Tokens of the whole subtree."""
        return len(self.segment.token_ids) + sum(child.size() for child in self.children.values())

    def walk(self) -> "Iterator[Node]":
        """The subtree, parents first."""
        yield self
        for child in self.children.values():
            yield from child.walk()


def add_path(roots: dict[Any, Node], path: Sequence[Segment]) -> Node:
    """Adds what is new of a path and returns its last node."""
    level, position = roots, 0
    for segment in path:
        node = level.setdefault(segment.key, Node(segment, position))
        level, position = node.children, position + len(segment.token_ids)
    return node


def lay_out(roots: list[Node], capacity: int, multiple: int, freeze: bool) -> tuple[int, int]:
    """Gives every node its row, column and place; returns how many columns are frozen, and how many there are."""
    rows = [
        [node for index in members for node in roots[index].walk()]
        for members in _fill_rows([root.size() for root in roots], capacity)
    ]
    frozen = [sum(len(n.segment.token_ids) for n in nodes if freeze and n.is_frozen) for nodes in rows]
    num_frozen = -(-max(frozen) // multiple) * multiple
    longest = 0
    for row, nodes in enumerate(rows):
        place, columns = 0, {True: 0, False: num_frozen}
        for node in nodes:
            kept = freeze and node.is_frozen
            node.row, node.place, node.column = row, place, columns[kept]
            place += len(node.segment.token_ids)
            columns[kept] += len(node.segment.token_ids)
        longest = max(longest, columns[False])
    return num_frozen, -(-longest // multiple) * multiple


def _fill_rows(lengths: list[int], capacity: int) -> list[list[int]]:
    """Which trees stand in which row: first fit, longest first, so that rows come out few and full."""
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


ROW_MULTIPLE = 128  # rows for flex attention are padded to a multiple of its block
# In the place of an image path, as none can be:
ZERO = ""  # world tokens of the mean latent, which says nothing
TEXT = "/"  # neither world tokens nor the photograph, for a Gemma that sees one otherwise


@dataclass(frozen=True)
class Batch:
    """S statements packed into R rows of L tokens; flat indices count through the R x L tokens."""

    statements: tuple[Statement, ...]  # S, in the order given
    worlds: tuple[str, ...]  # whose latents each block of world tokens holds: an image path or ZERO
    images: tuple[str, ...]  # whose features each block of image tokens holds
    token_ids: Tensor  # int64[R, L]; 0 where a world token, a bracket or padding stands
    position_ids: Tensor  # int64[R, L]
    place: Tensor  # int64[R, L]: the place in the order of the row's trees; below 0, all different: padding
    end: Tensor  # int64[R, L]: the place at which the subtree of a token's segment ends
    block: Tensor  # int64[R, L]: the same number for tokens that see each other both ways; -1: causal
    world_slots: Tensor  # int64[W, N + 2]: flat indices of [W], w1 ... wN, [/W]; W worlds, which may be none
    image_slots: Tensor  # int64[G, I]: flat indices of the image tokens of G images, which may be none
    label_rows: Tensor  # int64[S]: flat index of the token that predicts the label
    labels: Tensor  # int64[S]: the token id of '0' or '1'
    # Of true statements or, where captions are given, of those:
    word_rows: Tensor  # int64[T]: flat indices of tokens that predict one of their tokens
    words: Tensor  # int64[T]: those tokens
    word_counts: Tensor  # int64[T]: how many tokens the text of each has
    # The same of true statements' relations alone, where the statement has their words once:
    relation_rows: Tensor  # int64[U]
    relations: Tensor  # int64[U]
    relation_counts: Tensor  # int64[U]: how many tokens the relation of each has
    num_frozen: int  # columns of each row that nothing trained has part in
    masks: Any = None  # see `theworld.models.attention.prepare_masks`; None: made where they are needed

    def _map(self, change: Any) -> "Batch":
        moved: dict[str, Any] = {k: change(v) for k, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(self, **moved, masks=tree_map_only(Tensor, change, self.masks))

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on another device; the copy overlaps with other work if the batch is pinned."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        """The same batch in page-locked memory."""
        return self._map(lambda tensor: tensor.pin_memory())


class Packer:
    """Makes batches for one Gemma. Prompts are tokenised once and remembered."""

    def __init__(
        self,
        gemma: Gemma,
        question_template: str,
        num_world_tokens: int,
        world_attention: str = "bidirectional",
        world_position: str = "before",
        row_tokens: int | None = None,
        max_length: int | None = None,
    ) -> None:
        """`num_world_tokens` 0 leaves the world part out, brackets too. `row_tokens`: a row takes trees while
        they fit into so many tokens; None: as many as the longest tree of the batch needs (good where masks
        are dense), and one row for all where attention is flex. `max_length`: a statement that takes more
        tokens with its image is an error; nothing is ever cut."""
        if world_attention not in ("bidirectional", "causal"):
            raise ValueError(f"world_attention {world_attention!r}: wanted 'bidirectional' or 'causal'")
        if world_position not in ("before", "after"):
            raise ValueError(f"world_position {world_position!r}: wanted 'before' or 'after' the image")
        self.gemma = gemma
        self.question_template = question_template
        self.num_world_tokens = num_world_tokens
        self.world_attention = world_attention
        self.world_position = world_position
        self.row_tokens = row_tokens
        self.max_length = max_length
        self.frozen_columns = not (gemma.trained or gemma.plain_decoder)
        self.flex = gemma.attention == "flex_attention"
        self._prompts: dict[tuple[str, bool, bool], Prompt] = {}

    def prompt(self, caption: str, with_world: bool, with_image: bool = True) -> Prompt:
        """The tokenised prompt of one caption. ValueError if it is longer than `max_length`."""
        key = (caption, with_world, with_image)
        if key not in self._prompts:
            template, position = self.question_template, self.world_position
            prompt = self.gemma.prompt(template, caption, with_world, position, with_image)
            length = len(prompt.shared) + len(prompt.branch) + with_world * (self.num_world_tokens + 2)
            if self.max_length is not None and length > self.max_length:
                raise ValueError(
                    f"{caption!r} takes {length} tokens with its image; max_seq_length is {self.max_length}"
                )
            self._prompts[key] = prompt
        return self._prompts[key]

    def pack(
        self,
        statements: Sequence[Statement],
        worlds: Sequence[str | None] | None = None,
        captions: Mapping[str, str] | None = None,
    ) -> Batch:
        """One batch of these statements. `worlds`: for each the image whose latents are its world tokens, ZERO for
        latents that say nothing, None for no world tokens at all, TEXT for no photograph either; by default its
        own image's. `captions`: of an image a text that is to be predicted in place of its true statements, up to its
        last word, behind world and image like a statement; None: the words of true statements are."""
        if worlds is None:
            worlds = [s.image if self.num_world_tokens else None for s in statements]
        roots: dict[Any, Node] = {}
        leaves = []
        for index, (statement, world) in enumerate(zip(statements, worlds, strict=True)):
            prompt = self.prompt(statement.caption, world not in (None, TEXT), world != TEXT)
            path = [*self._shared(prompt, statement.image, world), Segment(index, prompt.branch)]
            leaves.append((add_path(roots, path), prompt))
        told = None if captions is None else [self._caption(roots, *one) for one in captions.items()]
        nodes = list(roots.values())
        multiple = ROW_MULTIPLE if self.flex else 1
        capacity = self._capacity([node.size() for node in nodes])
        num_frozen, length = lay_out(nodes, capacity, multiple, self.frozen_columns)
        return _assemble(nodes, leaves, told, statements, self.gemma.answer_ids, num_frozen, length)

    def _caption(self, roots: "dict[Any, Node]", image: str, text: str) -> "tuple[Node, Prompt]":
        """Adds the branch of a caption."""
        world = image if self.num_world_tokens else None
        prompt = self.prompt(text, world is not None)
        prompt = replace(prompt, branch=prompt.branch[: prompt.caption[1]])  # nothing is asked
        path = [*self._shared(prompt, image, world), Segment(("caption", image), prompt.branch)]
        return add_path(roots, path), prompt

    def _capacity(self, sizes: list[int]) -> int:
        if self.row_tokens is not None:
            return max(self.row_tokens, *sizes)
        return sum(sizes) if self.flex else max(sizes)

    def _shared(self, prompt: Prompt, image: str, world: str | None) -> "list[Segment]":
        """The path down to a statement: what an image's world, the image, and all of its statements share."""
        tokens, at = prompt.shared, prompt.world_at
        if world is None:
            return [self._segment(("image", image), tokens, image)]
        # In dense rows a tree is as long as a row, so there nothing that says nothing is shared by all images.
        if world == TEXT:
            return [Segment(("text", None if self.flex else image), tokens)]
        assert at is not None
        key = ("world", world, image if world == ZERO and not self.flex else None)
        slots = [0] * (self.num_world_tokens + 2)
        ahead = (1, len(slots) - 1) if self.world_attention == "bidirectional" else (0, 0)
        if at == len(tokens) and self.gemma.is_multimodal:  # after the image
            head, tail = [self._segment(("image", image), tokens, image)], []
            start = 0
        else:
            slots, start = [*tokens[:at], *slots], at
            head, tail = [], [self._segment(("image", image), tokens[at:], image)] if tokens[at:] else []
        # The brackets are ordinary causal tokens, as the tokens around an image are.
        ahead = (ahead[0] + start, ahead[1] + start)
        own = Segment(key, slots, ahead, world=(world, start, len(slots)))
        return [*head, own, *tail]

    def _segment(self, key: Any, tokens: Sequence[int], image: str) -> "Segment":
        token = self.gemma.image_token_id
        if token is None or token not in tokens:
            return Segment(key, tokens)
        start = tokens.index(token)
        stop = start + self.gemma.num_image_tokens
        return Segment(key, tokens, (start, stop), image=(image, start, stop))


def _assemble(
    roots: list[Node],
    leaves: list[tuple[Node, Prompt]],
    told: list[tuple[Node, Prompt]] | None,
    statements: Sequence[Statement],
    answer_ids: Sequence[int],
    num_frozen: int,
    length: int,
) -> Batch:
    nodes = [node for root in roots for node in root.walk()]
    shape = (1 + max(node.row for node in nodes), length)
    token_ids, positions = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    block = np.full(shape, -1, np.int64)
    place = np.tile(-2 - np.arange(length), (shape[0], 1))
    end = place + 1  # a padding token sees itself, so that no row of scores is empty
    worlds: list[str] = []
    images: list[str] = []
    slots: dict[str, list[np.ndarray]] = {"world": [], "image": []}
    for node in nodes:
        segment, row, column = node.segment, node.row, node.column
        stop = column + len(segment.token_ids)
        token_ids[row, column:stop] = segment.token_ids
        positions[row, column:stop] = np.arange(node.position, node.position + stop - column)
        place[row, column:stop] = np.arange(node.place, node.place + stop - column)
        end[row, column:stop] = node.place + node.size()
        block[row, column + segment.ahead[0] : column + segment.ahead[1]] = (
            column  # a number of its own in the row
        )
        for names, kind, span in ((worlds, "world", segment.world), (images, "image", segment.image)):
            if span is not None:
                names.append(span[0])
                slots[kind].append(np.arange(*span[1:]) + row * length + column)

    def placed(leaves: list[tuple[Node, Prompt]]) -> list[tuple[int, Prompt]]:
        return [(node.row * length + node.column, prompt) for node, prompt in leaves]

    return Batch(
        statements=tuple(statements),
        worlds=tuple(worlds),
        images=tuple(images),
        token_ids=integers(token_ids),
        position_ids=integers(positions),
        place=integers(place),
        end=integers(end),
        block=integers(block),
        world_slots=integers(slots["world"]).view(len(worlds), -1 if worlds else 0),
        image_slots=integers(slots["image"]).view(len(images), -1 if images else 0),
        **targets(placed(leaves), statements, answer_ids, None if told is None else placed(told)),
        num_frozen=num_frozen,
    )


Found = tuple[int, Sequence[int], Sequence[int]]  # where a branch starts, its tokens, places in it


def targets(
    branches: Sequence[tuple[int, Prompt]],
    statements: Sequence[Statement],
    answer_ids: Sequence[int],
    captions: Sequence[tuple[int, Prompt]] | None = None,
) -> dict[str, Tensor]:
    """Fields of a `Batch`. `branches`: of each statement the flat index at which its branch starts, and its prompt.
    `captions`: the same of captions, whose words then count in place of those of true statements."""
    true = [branch for branch, s in zip(branches, statements, strict=True) if s.label == 1]
    told = true if captions is None else captions
    texts: list[Found] = [(start, prompt.branch, range(*prompt.caption)) for start, prompt in told]
    relations: list[Found] = []
    for (start, prompt), statement in zip(branches, statements, strict=True):
        if statement.label == 0:
            continue
        span = relation_span(statement.caption, statement.relation)
        if span is not None:
            relations.append((start, prompt.branch, prompt.tokens_of(*span)))
    return {
        "label_rows": integers([start + len(prompt.branch) - 1 for start, prompt in branches]),
        "labels": integers([answer_ids[s.label] for s in statements]),
        **dict(zip(("word_rows", "words", "word_counts"), _words(texts), strict=True)),
        **dict(zip(("relation_rows", "relations", "relation_counts"), _words(relations), strict=True)),
    }


def _words(found: Sequence[Found]) -> tuple[Tensor, Tensor, Tensor]:
    """The rows that predict these tokens, the tokens, and of how many in its branch each is one."""
    rows = [start + i - 1 for start, _, places in found for i in places]
    words = [branch[i] for _, branch, places in found for i in places]
    return integers(rows), integers(words), integers([len(own) for _, _, own in found for _ in own])


def integers(values: Any) -> Tensor:
    """int64 of numbers, or of an array."""
    return torch.from_numpy(np.asarray(values, np.int64))
