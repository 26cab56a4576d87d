"""What prompts share, and where it stands in the rows of a batch."""

import pytest

from theworld.trees import Node, Segment, add_path, lay_out


def segment(key: str, tokens: int, world: bool = False) -> Segment:
    return Segment(key, [0] * tokens, world=(key, 0, tokens) if world else None)


def grown(*paths: list[Segment]) -> tuple[list[Node], list[Node]]:
    """The trees of these paths, and the last node of each path."""
    roots: dict[str, Node] = {}
    leaves = [add_path(roots, path) for path in paths]
    return list(roots.values()), leaves


def test_paths_share_what_they_begin_with_and_keep_their_own_positions() -> None:
    image, other = segment("a.png", 5), segment("b.png", 3)
    roots, leaves = grown(
        [image, segment("first", 2)], [image, segment("second", 4)], [other, segment("first", 2)]
    )
    assert [root.size() for root in roots] == [11, 5]
    assert [node.segment.key for node in roots[0].walk()] == ["a.png", "first", "second"]
    assert [leaf.position for leaf in leaves] == [5, 5, 3]
    assert leaves[0] is not leaves[2]
    assert add_path({root.segment.key: root for root in roots}, [image, segment("first", 2)]) is leaves[0]


@pytest.mark.parametrize(
    ("capacity", "rows", "columns", "length"),
    [
        (11, [0, 1, 1], [0, 0, 5], 11),  # the longest first, then what fits beside one another
        (16, [0, 0, 1], [0, 11, 0], 16),
        (20, [0, 0, 0], [0, 11, 16], 20),
    ],
)
def test_trees_fill_rows_longest_first(
    capacity: int, rows: list[int], columns: list[int], length: int
) -> None:
    roots, _ = grown(
        [segment("a", 11)], [segment("b", 2), segment("b0", 3)], [segment("c", 1), segment("c0", 3)]
    )
    assert lay_out(roots, capacity, 1, freeze=False) == (0, length)
    assert [root.row for root in roots] == rows
    assert [root.column for root in roots] == columns
    for root in roots:
        (child,) = root.children.values() or [root]
        assert child.place - root.place == child.column - root.column


def test_what_stands_above_a_world_is_kept_in_columns_of_its_own() -> None:
    image, world = segment("a.png", 5), segment("world", 3, world=True)
    roots, (leaf,) = grown([image, world, segment("statement", 2)])
    assert [node.is_frozen for node in roots[0].walk()] == [True, False, False]
    assert lay_out(roots, 10, 4, freeze=True) == (8, 16)  # both padded to multiples of 4
    assert [node.column for node in roots[0].walk()] == [0, 8, 11]
    assert [node.place for node in roots[0].walk()] == [0, 5, 8]  # its order is as ever
    assert lay_out(roots, 10, 4, freeze=False) == (0, 12)
    assert (leaf.column, leaf.place) == (8, 8)
