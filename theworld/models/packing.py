"""Statements become packed sequences: tokens, positions, the tokens that each token sees, and label rows.

A prompt is a path of segments, and prompts that begin alike share the segments that they begin with, so the prompts of
a batch are trees. Each row of a batch holds trees, laid out parent first, children after one another:

    <bos><start_of_turn>user\n [W] w1 ... wN [/W]                                  the world of an image
        \n\n<boi> i1 ... i256 <eoi>                                               the image
            \n\nStatement: ...<end_of_turn>\n<start_of_turn>model\n              statement 0
            \n\nStatement: ...<end_of_turn>\n<start_of_turn>model\n              statement 1
            \n\nStatement: ...                                                  a caption, up to its last word

With `world_position` "after" the image is the parent and the world its child; without world tokens the first two are
one segment.

A token sees the segments on its own path and nothing else, so a statement has the positions and sees the tokens that
it would have alone. Two numbers a token say so: its `preorder` index in the trees of its row, and the `subtree_end` of
its segment, the preorder index behind the last token of the segment's subtree. Query q sees key k if
preorder[k] <= preorder[q] < subtree_end[k]. The image tokens of an image also see each other in both directions, and
so do its world tokens unless `world_attention` is "causal": they are a bidirectional group.

The label is not part of the input: the last token of a statement's segment, in Gemma's own format the newline after
`<start_of_turn>model`, has to predict it.

Segments above a world in its tree (an image, where the world follows it) depend on nothing that trains. They are the
prefix of a row, its first `num_prefix_tokens` columns, for which no gradient is computed.

Dimensions: R rows of L tokens, S statements, W worlds of N world tokens, G images of I image tokens.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from theworld.data.vsr import Statement, relation_span
from theworld.models.gemma import Gemma, Prompt
from theworld.utils.device import pin

# The prompt of a yes/no question, in place of question_template: "1" answers yes, "0" no.
YES_NO_TEMPLATE = "Question: {caption}\nAnswer (only '0' or '1'):"
ROW_MULTIPLE = 128  # rows for flex attention are padded to a multiple of its block


class Control(Enum):
    """A packed statement's substitute for the world tokens of an image."""

    ZERO = "zero"  # world tokens of the mean latent, which carries no information
    TEXT = "text"  # neither world tokens nor the photograph, for a Gemma that takes one otherwise


WorldSource = str | Control | None  # the image whose latents become the world tokens; None: no world tokens


@dataclass(frozen=True)
class Question:
    """A text about an image whose answer is not known."""

    image: str  # any name; equal names share a prefix
    caption: str
    is_question: bool = False  # as a statement's


@dataclass(frozen=True)
class Segment:
    """Tokens that stand together; below the same parent, segments of the same key are one."""

    key: Any
    token_ids: Sequence[int]
    # (start, end) of the tokens that see each other in both directions
    bidirectional: tuple[int, int] = (0, 0)
    world: tuple[str | Control, int, int] | None = None  # (source of latents, start, end), brackets included
    image: tuple[str, int, int] | None = None  # (image, start, end) of its image tokens


@dataclass
class Node:
    """A segment in its tree, and where it stands in the batch."""

    segment: Segment
    position: int  # of its first token
    children: "dict[Any, Node]" = field(default_factory=dict)
    row: int = 0
    column: int = 0
    preorder: int = 0

    @property
    def is_prefix(self) -> bool:
        """Whether world tokens stand below it, and none in it or above."""
        worlds = any(child.segment.world is not None for child in self.children.values())
        return worlds and self.segment.world is None

    def size(self) -> int:
        """Return the number of tokens in the whole subtree."""
        return len(self.segment.token_ids) + sum(child.size() for child in self.children.values())

    def walk(self) -> "Iterator[Node]":
        """Yield the nodes of the subtree, parents first."""
        yield self
        for child in self.children.values():
            yield from child.walk()


def add_path(roots: dict[Any, Node], path: Sequence[Segment]) -> Node:
    """Add the segments of a path that are not there yet, and return its last node."""
    level, position = roots, 0
    for segment in path:
        node = level.setdefault(segment.key, Node(segment, position))
        level, position = node.children, position + len(segment.token_ids)
    return node


def lay_out(roots: list[Node], capacity: int, multiple: int, with_prefix: bool) -> tuple[int, int]:
    """Give every node its row, column and preorder index; return the lengths of the prefix and of the whole rows."""
    rows = [
        [node for index in members for node in roots[index].walk()]
        for members in _fill_rows([root.size() for root in roots], capacity)
    ]
    prefix = [sum(len(n.segment.token_ids) for n in nodes if with_prefix and n.is_prefix) for nodes in rows]
    num_prefix_tokens = -(-max(prefix) // multiple) * multiple
    longest = 0
    for row, nodes in enumerate(rows):
        preorder, columns = 0, {True: 0, False: num_prefix_tokens}
        for node in nodes:
            in_prefix = with_prefix and node.is_prefix
            node.row, node.preorder, node.column = row, preorder, columns[in_prefix]
            preorder += len(node.segment.token_ids)
            columns[in_prefix] += len(node.segment.token_ids)
        longest = max(longest, columns[False])
    return num_prefix_tokens, -(-longest // multiple) * multiple


def _fill_rows(lengths: list[int], capacity: int) -> list[list[int]]:
    """Return the indices of the trees in each row: first fit, longest first, so that rows come out few and full."""
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


@dataclass(frozen=True)
class Batch:
    """S statements or questions packed into R rows of L tokens; flat indices count through the R x L tokens."""

    statements: tuple[Statement | Question, ...]  # S, in the order given
    worlds: tuple[str | Control, ...]  # W, the sources of the latents of each group of world tokens
    images: tuple[str, ...]  # G, the images of each group of image tokens
    token_ids: Tensor  # int64[R, L]; 0 where a world token, a bracket or padding stands
    position_ids: Tensor  # int64[R, L]
    preorder: Tensor  # int64[R, L]: index in the preorder of the row's trees; below 0, all different: padding
    subtree_end: Tensor  # int64[R, L]: preorder index behind the subtree of a token's segment
    bidirectional_group: Tensor  # int64[R, L]: equal numbers see each other in both directions; -1: causal
    world_slots: Tensor  # int64[W, N + 2]: flat indices of [W], w1 ... wN, [/W]; W may be 0
    image_slots: Tensor  # int64[G, I]: flat indices of the image tokens; G may be 0
    label_rows: Tensor  # int64[S]: flat index of the token that predicts the label
    labels: Tensor  # int64[S]: the token id of '0' or '1'; int64[0] for questions
    # The words of true statements or, where captions are given, of the captions:
    word_rows: Tensor  # int64[T]: flat indices of the tokens that predict them
    words: Tensor  # int64[T]: their token ids
    word_counts: Tensor  # int64[T]: the number of tokens in the text of each
    # The words of true statements' relations, where the statement contains them exactly once:
    relation_rows: Tensor  # int64[U]
    relations: Tensor  # int64[U]
    relation_counts: Tensor  # int64[U]: the number of tokens in the relation of each
    num_prefix_tokens: int  # columns of each row that depend on nothing that trains
    masks: Any = None  # from `theworld.models.attention.prepare_masks`; None: the decoder makes them

    def _map(self, change: Any) -> "Batch":
        moved: dict[str, Any] = {k: change(v) for k, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(self, **moved, masks=tree_map_only(Tensor, change, self.masks))

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on another device; the copy overlaps with other work if the batch is pinned."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        """The same batch in page-locked memory."""
        return self._map(pin)


class Packer:
    """Packs statements for one Gemma. Prompts are tokenised once and kept."""

    def __init__(
        self,
        gemma: Gemma,
        question_template: str,
        num_world_tokens: int,
        world_attention: str = "bidirectional",
        world_position: str = "before",
        row_tokens: int | None = None,
        max_length: int | None = None,
        flex: bool | None = None,
    ) -> None:
        """`num_world_tokens`: 0 leaves out the world tokens and their brackets.

        `row_tokens`: a row takes trees while they fit into this number of tokens; None is the size of the longest tree
        of a batch (good where masks are dense), and with flex attention the size of all of them.
        `max_length`: a statement that takes more tokens with its image is an error; nothing is ever cut.
        `flex`: pad rows to whole blocks of flex attention; None where Gemma's attention is flex.
        """
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
        self.with_prefix = not (gemma.trainable_parts or gemma.uses_hf_decoder)
        self.flex = gemma.attention == "flex_attention" if flex is None else flex
        self._prompts: dict[tuple[str, bool, bool, bool], Prompt] = {}

    def prompt(
        self, caption: str, with_world: bool, with_image: bool = True, is_question: bool = False
    ) -> Prompt:
        """Return the tokenised prompt of a caption. Raises ValueError if it is longer than `max_length`."""
        key = (caption, with_world, with_image, is_question)
        if key not in self._prompts:
            position = self.world_position
            template = YES_NO_TEMPLATE if is_question else self.question_template
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
        statements: Sequence[Statement | Question],
        worlds: Sequence[WorldSource] | None = None,
        captions: Mapping[str, str] | None = None,
    ) -> Batch:
        """Return one batch of these statements.

        `worlds`: the source of each statement's world tokens; by default its own image.
        `captions`: image -> a text to predict in place of the image's true statements. It stands behind world and
        image like a statement, up to its last word. None: the words of true statements are to be predicted.
        """
        if worlds is None:
            worlds = [s.image if self.num_world_tokens else None for s in statements]
        roots: dict[Any, Node] = {}
        leaves: list[tuple[Node, Prompt]] = []
        for index, (statement, world) in enumerate(zip(statements, worlds, strict=True)):
            with_world, with_image = world not in (None, Control.TEXT), world != Control.TEXT
            prompt = self.prompt(statement.caption, with_world, with_image, statement.is_question)
            path = [*self._shared(prompt, statement.image, world), Segment(index, prompt.branch)]
            leaves.append((add_path(roots, path), prompt))
        caption_leaves = (
            None if captions is None else [self._add_caption(roots, *item) for item in captions.items()]
        )
        nodes = list(roots.values())
        multiple = ROW_MULTIPLE if self.flex else 1
        capacity = self._capacity([node.size() for node in nodes])
        num_prefix_tokens, length = lay_out(nodes, capacity, multiple, self.with_prefix)
        fields = targets(leaves, caption_leaves, statements, self.gemma.answer_ids, length)
        return _assemble(nodes, statements, fields, num_prefix_tokens, length)

    def _add_caption(self, roots: dict[Any, Node], image: str, text: str) -> tuple[Node, Prompt]:
        world = image if self.num_world_tokens else None
        prompt = self.prompt(text, world is not None)
        prompt = replace(prompt, branch=prompt.branch[: prompt.caption[1]])  # nothing is asked
        path = [*self._shared(prompt, image, world), Segment(("caption", image), prompt.branch)]
        return add_path(roots, path), prompt

    def _capacity(self, sizes: list[int]) -> int:
        if self.row_tokens is not None:
            return max(self.row_tokens, *sizes)
        return sum(sizes) if self.flex else max(sizes)

    def _shared(self, prompt: Prompt, image: str, world: WorldSource) -> list[Segment]:
        """Return the path down to a statement: its world and its image, which other statements share."""
        tokens, at = prompt.shared, prompt.world_at
        if world is None:
            return [self._segment(("image", image), tokens, image)]
        # In dense rows a tree is as long as a row, so there segments without an image are not shared by all images.
        if world == Control.TEXT:
            return [Segment(("text", None if self.flex else image), tokens)]
        assert at is not None
        key = ("world", world, image if world == Control.ZERO and not self.flex else None)
        slots = [0] * (self.num_world_tokens + 2)
        # The brackets are ordinary causal tokens, as the tokens around an image are.
        first, last = (1, len(slots) - 1) if self.world_attention == "bidirectional" else (0, 0)
        if at == len(tokens) and self.gemma.is_multimodal:  # after the image
            head, tail, start = [self._segment(("image", image), tokens, image)], [], 0
        else:
            slots, start = [*tokens[:at], *slots], at
            head, tail = [], [self._segment(("image", image), tokens[at:], image)] if tokens[at:] else []
        own = Segment(key, slots, (first + start, last + start), world=(world, start, len(slots)))
        return [*head, own, *tail]

    def _segment(self, key: Any, tokens: Sequence[int], image: str) -> Segment:
        token = self.gemma.image_token_id
        if token is None or token not in tokens:
            return Segment(key, tokens)
        start = tokens.index(token)
        stop = start + self.gemma.num_image_tokens
        return Segment(key, tokens, (start, stop), image=(image, start, stop))


def _assemble(
    roots: list[Node],
    statements: Sequence[Statement | Question],
    fields: dict[str, Tensor],
    num_prefix_tokens: int,
    length: int,
) -> Batch:
    """Write the nodes into rows of `length` tokens; `fields` are those of `targets`."""
    nodes = [node for root in roots for node in root.walk()]
    shape = (1 + max(node.row for node in nodes), length)
    token_ids, positions = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    group = np.full(shape, -1, np.int64)
    preorder = np.tile(-2 - np.arange(length), (shape[0], 1))
    subtree_end = preorder + 1  # a padding token sees itself, so that no row of scores is empty
    worlds: list[str | Control] = []
    images: list[str] = []
    world_slots: list[np.ndarray] = []
    image_slots: list[np.ndarray] = []
    for node in nodes:
        segment, row, column = node.segment, node.row, node.column
        stop = column + len(segment.token_ids)
        token_ids[row, column:stop] = segment.token_ids
        positions[row, column:stop] = np.arange(node.position, node.position + stop - column)
        preorder[row, column:stop] = np.arange(node.preorder, node.preorder + stop - column)
        subtree_end[row, column:stop] = node.preorder + node.size()
        first, last = segment.bidirectional
        group[row, column + first : column + last] = column  # a number of its own in the row
        start = row * length + column
        if segment.world is not None:
            worlds.append(segment.world[0])
            world_slots.append(start + np.arange(*segment.world[1:]))
        if segment.image is not None:
            images.append(segment.image[0])
            image_slots.append(start + np.arange(*segment.image[1:]))
    return Batch(
        statements=tuple(statements),
        worlds=tuple(worlds),
        images=tuple(images),
        token_ids=integers(token_ids),
        position_ids=integers(positions),
        preorder=integers(preorder),
        subtree_end=integers(subtree_end),
        bidirectional_group=integers(group),
        world_slots=integers(world_slots).view(len(worlds), -1 if worlds else 0),
        image_slots=integers(image_slots).view(len(images), -1 if images else 0),
        **fields,
        num_prefix_tokens=num_prefix_tokens,
    )


# The tokens of a branch that are to be predicted: its flat start index, its token ids, indices in the branch.
Predicted = tuple[int, Sequence[int], Sequence[int]]


def targets(
    leaves: Sequence[tuple[Node, Prompt]],
    caption_leaves: Sequence[tuple[Node, Prompt]] | None,
    statements: Sequence[Statement | Question],
    answer_ids: Sequence[int],
    length: int,
) -> dict[str, Tensor]:
    """Return the fields of a `Batch` that say what is to be predicted, and where.

    `leaves` are the statements' nodes in rows of `length` tokens, with their prompts; `caption_leaves` those of
    captions, whose words then count in place of true statements' words.
    """
    texts: list[Predicted] = []
    relations: list[Predicted] = []
    label_rows, labels = [], []
    for (node, prompt), statement in zip(leaves, statements, strict=True):
        start = node.row * length + node.column
        label_rows.append(start + len(prompt.branch) - 1)
        if isinstance(statement, Question):
            continue
        labels.append(answer_ids[statement.label])
        if statement.label == 1 and not statement.is_question:
            texts.append((start, prompt.branch, range(*prompt.caption)))
            span = relation_span(statement.caption, statement.relation)
            if span is not None:
                relations.append((start, prompt.branch, prompt.tokens_of(*span)))
    if caption_leaves is not None:
        texts = [
            (node.row * length + node.column, prompt.branch, range(*prompt.caption))
            for node, prompt in caption_leaves
        ]
    word_rows, words, word_counts = _words(texts)
    relation_rows, relation_words, relation_counts = _words(relations)
    return {
        "label_rows": integers(label_rows),
        "labels": integers(labels),
        "word_rows": word_rows,
        "words": words,
        "word_counts": word_counts,
        "relation_rows": relation_rows,
        "relations": relation_words,
        "relation_counts": relation_counts,
    }


def _words(predicted: Sequence[Predicted]) -> tuple[Tensor, Tensor, Tensor]:
    """Return the rows that predict these tokens, their ids, and the number of predicted tokens in their branch."""
    rows = [start + i - 1 for start, _, indices in predicted for i in indices]
    words = [branch[i] for _, branch, indices in predicted for i in indices]
    counts = [len(indices) for _, _, indices in predicted for _ in indices]
    return integers(rows), integers(words), integers(counts)


def integers(values: Any) -> Tensor:
    """Return numbers or an array as int64."""
    return torch.from_numpy(np.asarray(values, np.int64))
