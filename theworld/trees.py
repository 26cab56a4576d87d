"""The trees that prompts are: a prompt is a path of segments, and prompts that begin alike share them.

A row of a batch holds trees, each laid out parent first, children after one another:

    <bos><start_of_turn>user\\n [W] w1 ... wN [/W]                                  the world of an image
        \\n\\n<boi> i1 ... i256 <eoi>                                               the image
            \\n\\nStatement: ...<end_of_turn>\\n<start_of_turn>model\\n              statement 0
            \\n\\nStatement: ...<end_of_turn>\\n<start_of_turn>model\\n              statement 1
            \\n\\nStatement: ...                                                  a caption, up to its last word

With `world_position` "after" the image is the parent and the world its child; without world tokens the first two are
one segment.

Segments above a world in its tree (an image, where the world stands after it) depend on nothing that trains. They
stand in the first columns of a row, `num_frozen` of them, so that no gradient is computed for them.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any


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
