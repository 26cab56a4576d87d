"""The packed layout, position by position.

What prompts share, and where it stands in the rows of a batch.
"""

import pytest
import torch
from constants import CAPTIONS, QUESTION
from torch.nn.attention.flex_attention import BlockMask
from torch.utils._pytree import tree_leaves

from theworld.data.vsr import Statement
from theworld.models.attention import BLOCK, attention_masks, block_mask, prepare_masks, visible_blocks
from theworld.models.gemma import Gemma
from theworld.models.packing import (
    YES_NO_TEMPLATE,
    Control,
    Node,
    Packer,
    Question,
    Segment,
    add_path,
    lay_out,
)


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
    assert lay_out(roots, capacity, 1, with_prefix=False) == (0, length)
    assert [root.row for root in roots] == rows
    assert [root.column for root in roots] == columns
    for root in roots:
        (child,) = root.children.values() or [root]
        assert child.preorder - root.preorder == child.column - root.column


def test_what_stands_above_a_world_is_kept_in_columns_of_its_own() -> None:
    image, world = segment("a.png", 5), segment("world", 3, world=True)
    roots, (leaf,) = grown([image, world, segment("statement", 2)])
    assert [node.is_prefix for node in roots[0].walk()] == [True, False, False]
    assert lay_out(roots, 10, 4, with_prefix=True) == (8, 16)  # both padded to multiples of 4
    assert [node.column for node in roots[0].walk()] == [0, 8, 11]
    assert [node.preorder for node in roots[0].walk()] == [0, 5, 8]  # its order is as ever
    assert lay_out(roots, 10, 4, with_prefix=False) == (0, 12)
    assert (leaf.column, leaf.preorder) == (8, 8)


def test_a_question_has_a_prompt_of_its_own_and_a_statement_the_one_it_had(gemma: Gemma) -> None:
    asked = [
        Statement("a.png", "Is it so?", 1, "(none)", 0, is_question=True),
        Statement("a.png", "Is it so?", 1, "(none)", 1),
    ]
    packer = Packer(gemma, QUESTION, 4)
    batch = packer.pack(asked)
    assert YES_NO_TEMPLATE == "Question: {caption}\nAnswer (only '0' or '1'):"
    question, statement = (packer.prompt("Is it so?", True, True, kind) for kind in (True, False))
    assert question == gemma.prompt(YES_NO_TEMPLATE, "Is it so?", with_world=True)
    assert (
        statement == gemma.prompt(QUESTION, "Is it so?", with_world=True) == packer.prompt("Is it so?", True)
    )
    assert question.shared == statement.shared
    for row, prompt in zip(batch.label_rows.tolist(), (question, statement), strict=True):
        branch = batch.token_ids.flatten()[row + 1 - len(prompt.branch) : row + 1]
        assert tuple(branch.tolist()) == prompt.branch
    assert batch.labels.tolist() == [gemma.answer_ids[1]] * 2
    # Words of a true statement are predicted; a question says nothing about the picture.
    assert len(batch.words) == statement.caption[1] - statement.caption[0]


def pack(gemma: Gemma, statements: list[Statement], num_world_tokens: int = 4):
    return Packer(gemma, QUESTION, num_world_tokens).pack(statements)


def shared_of(gemma: Gemma) -> tuple[int, ...]:
    return gemma.prompt(QUESTION, "It is so.", with_world=True).shared


def test_two_statements_share_one_prefix(gemma: Gemma, statements: list[Statement]) -> None:
    batch = pack(gemma, statements[:2])
    prompts = [gemma.prompt(QUESTION, s.caption, with_world=True) for s in statements[:2]]
    shared, at = prompts[0].shared, prompts[0].world_at
    assert at == 4
    ids = [*shared[:4], *[0] * 6, *shared[4:], *prompts[0].branch, *prompts[1].branch]
    assert batch.token_ids.tolist() == [ids]
    prefix, first, second = len(shared) + 6, len(prompts[0].branch), len(prompts[1].branch)
    positions = [*range(prefix), *range(prefix, prefix + first), *range(prefix, prefix + second)]
    assert batch.position_ids.tolist() == [positions]
    total = prefix + first + second
    assert batch.subtree_end.tolist() == [[total] * prefix + [prefix + first] * first + [total] * second]
    assert batch.world_slots.tolist() == [[4, 5, 6, 7, 8, 9]]
    assert batch.image_slots.tolist() == [list(range(12, 28))]  # after two tokens: \n\n and <start_of_image>
    assert batch.label_rows.tolist() == [prefix + first - 1, prefix + first + second - 1]
    # Only the first statement is true: its caption alone is to be predicted, each token from the one before.
    start, end = prompts[0].caption
    assert batch.words.tolist() == list(prompts[0].branch[start:end])
    assert batch.word_rows.tolist() == list(range(prefix + start - 1, prefix + end - 1))
    assert batch.word_counts.unique().tolist() == [end - start]


def test_the_words_of_the_relation_of_true_statements_are_found(
    gemma: Gemma, statements: list[Statement]
) -> None:
    batch = pack(gemma, statements)
    flat, found = batch.token_ids.flatten(), []
    for statement, label_row in zip(batch.statements, batch.label_rows.tolist(), strict=True):
        branch = gemma.prompt(QUESTION, statement.caption, True).branch
        rows = range(label_row + 1 - len(branch), label_row + 1)
        found.append([r for r in batch.relation_rows.tolist() if r in rows])
        if statement.label == 1:
            words = flat[[r + 1 for r in found[-1]]]
            assert gemma.tokenizer.decode(words).strip() == statement.relation
            counts = batch.relation_counts[[batch.relation_rows.tolist().index(r) for r in found[-1]]]
            assert counts.tolist() == [len(found[-1])] * len(found[-1])
    assert [bool(rows) for rows in found] == [s.label == 1 for s in batch.statements]
    assert torch.equal(flat[batch.relation_rows + 1], batch.relations)
    assert set(batch.relation_rows.tolist()) < set(batch.word_rows.tolist())


def test_a_statement_without_the_words_of_its_relation_has_none(gemma: Gemma) -> None:
    statement = Statement("a.png", "The cup is on the book.", 1, "next to", 0)
    batch = pack(gemma, [statement])
    assert (len(batch.words) > 0, len(batch.relations), len(batch.relation_counts)) == (True, 0, 0)


def test_captions_stand_beside_the_statements_and_their_words_count_in_place_of_theirs(
    gemma: Gemma, statements: list[Statement]
) -> None:
    packer = Packer(gemma, QUESTION, 4)
    text = "Two balls and a cat."
    plain, batch = packer.pack(statements[:2]), packer.pack(statements[:2], captions={"a.png": text})
    prompt = gemma.prompt(QUESTION, text, with_world=True)
    start, end = prompt.caption
    old = plain.token_ids.shape[1]
    assert batch.token_ids.tolist() == [plain.token_ids[0].tolist() + list(prompt.branch[:end])]
    assert torch.equal(batch.label_rows, plain.label_rows)
    assert torch.equal(batch.labels, plain.labels)
    assert torch.equal(batch.relation_rows, plain.relation_rows)
    assert batch.words.tolist() == list(prompt.branch[start:end])
    assert batch.word_rows.tolist() == list(range(old + start - 1, old + end - 1))
    assert batch.word_counts.unique().tolist() == [end - start]
    shared = len(prompt.shared) + 6
    assert batch.position_ids[0, old:].tolist() == list(range(shared, shared + end))
    sees = attention_masks(batch, 1024, "sdpa")["full_attention"][0, 0]
    assert sees[old:, :shared].all()  # the world and the image, and no statement
    assert not sees[old:, shared:old].any()
    assert not sees[:old, old:].any()
    assert len(packer.pack(statements[:2], captions={}).words) == 0


def test_blocks_see_ahead_within_themselves_and_nowhere_else(
    gemma: Gemma, statements: list[Statement]
) -> None:
    batch = pack(gemma, statements[:2])
    sees = attention_masks(batch, 1024, "sdpa")["full_attention"][0, 0]
    length = sees.shape[0]
    ahead = [(q, k) for q in range(length) for k in range(q + 1, length) if sees[q, k]]
    world, image = range(5, 9), range(12, 28)
    assert ahead == [(q, k) for block in (world, image) for q in block for k in block if k > q]
    prefix, first = len(shared_of(gemma)) + 6, len(gemma.prompt(QUESTION, CAPTIONS[0][1], True).branch)
    assert not sees[prefix + first :, prefix : prefix + first].any()  # one statement never sees another
    assert sees[prefix + first :, :prefix].all()


def test_the_sliding_window_counts_positions_not_places_in_the_row(
    gemma: Gemma, statements: list[Statement]
) -> None:
    batch = pack(gemma, statements[:2])
    masks = attention_masks(batch, 8, "sdpa")
    last = int(batch.label_rows[1])
    position = batch.position_ids[0]
    seen = position[masks["sliding_attention"][0, 0, last]]
    assert seen.tolist() == list(range(int(position[last]) - 7, int(position[last]) + 1))


def test_images_never_see_each_other_and_padding_sees_only_itself(
    gemma: Gemma, statements: list[Statement]
) -> None:
    packer = Packer(gemma, QUESTION, 4, row_tokens=200)
    batch = packer.pack(statements)
    sees = attention_masks(batch, 1024, "sdpa")["full_attention"][:, 0]
    of_image = torch.full_like(batch.token_ids, -1).flatten()
    for number, slots in enumerate(batch.world_slots):
        start = int(slots[0]) - 4
        of_image[start : int(batch.subtree_end.flatten()[start]) + start // sees.shape[1] * sees.shape[1]] = (
            number
        )
    of_image = of_image.view_as(batch.token_ids)
    padding = of_image == -1
    assert padding.any()
    assert set(of_image.unique().tolist()) == {-1, 0, 1, 2}
    same = of_image[:, :, None] == of_image[:, None, :]
    assert not (sees & ~same).any()
    assert torch.equal(sees[padding].nonzero()[:, 1], padding.nonzero()[:, 1])
    assert sees.any(-1).all()  # no row of scores is empty, so none becomes NaN


def test_statements_and_labels_keep_the_order_given(gemma: Gemma) -> None:
    mixed = [
        Statement(image=i, caption=c, label=y, relation=r, index=n) for n, (i, c, y, r) in enumerate(CAPTIONS)
    ]
    mixed = [mixed[n] for n in (3, 0, 2, 5, 1, 4)]
    batch = pack(gemma, mixed)
    assert [s.index for s in batch.statements] == [3, 0, 2, 5, 1, 4]
    assert batch.images == batch.worlds == ("c.png", "a.png", "b.png")
    assert batch.labels.tolist() == [gemma.answer_ids[s.label] for s in mixed]
    branches = [gemma.prompt(QUESTION, s.caption, True).branch for s in mixed]
    flat = batch.token_ids.flatten()
    for row, branch in zip(batch.label_rows.tolist(), branches, strict=True):
        assert flat[row + 1 - len(branch) : row + 1].tolist() == list(branch)


def test_worlds_may_come_from_other_images_or_say_nothing(gemma: Gemma, statements: list[Statement]) -> None:
    own, other, zero, none = [statements[2]] * 4
    packer = Packer(gemma, QUESTION, 4, row_tokens=10_000)
    batch = packer.pack(
        [own, other, zero, none, statements[3]], ["b.png", "a.png", Control.ZERO, None, "b.png"]
    )
    # The last statement's image is another one, but its world is that of the first statement, so they share it.
    assert batch.worlds == ("b.png", "a.png", Control.ZERO)
    assert batch.images == ("b.png", "c.png", "b.png", "b.png", "b.png")
    shared = len(shared_of(gemma))
    plain = gemma.prompt(QUESTION, statements[2].caption, with_world=False)
    dog, cup = (len(gemma.prompt(QUESTION, s.caption, True).branch) for s in statements[2:4])
    lengths = [
        10 + 2 * (shared - 4) + dog + cup,
        2 * (shared + 6 + dog),
        len(plain.shared) + len(plain.branch),
    ]
    assert batch.token_ids.numel() == sum(lengths)


@pytest.mark.parametrize("flex", [False, True])
def test_text_alone_shares_no_more_than_the_beginning(
    gemma: Gemma, statements: list[Statement], flex: bool
) -> None:
    packer = Packer(gemma, QUESTION, 4, flex=flex)
    batch = packer.pack(statements[:3], [Control.TEXT, Control.TEXT, Control.TEXT])
    assert batch.images == batch.worlds == ()
    assert batch.image_slots.numel() == batch.world_slots.numel() == 0
    prompts = [gemma.prompt(QUESTION, s.caption, False, with_image=False) for s in statements[:3]]
    first, second, third = (list(p.branch) for p in prompts)
    rows = [[2, *first, *second, *third]] if flex else [[2, *first, *second], [2, *third]]
    for ids, wanted in zip(batch.token_ids.tolist(), rows, strict=True):
        assert ids[: len(wanted)] == wanted
        assert not any(ids[len(wanted) :])
    last = [row % batch.token_ids.shape[1] for row in batch.label_rows.tolist()]
    assert last == [len(first), len(first) + len(second), len(rows[-1]) - 1]


def test_after_the_image_the_world_is_one_of_its_children(gemma: Gemma, statements: list[Statement]) -> None:
    packer = Packer(gemma, QUESTION, 4, world_position="after")
    batch = packer.pack([statements[0], statements[0]], ["a.png", None])
    assert batch.num_prefix_tokens == len(gemma.prompt(QUESTION, statements[0].caption, True, "after").shared)
    prompt = gemma.prompt(QUESTION, statements[0].caption, True, "after")
    shared, branch = prompt.shared, prompt.branch
    assert prompt.world_at == len(shared)
    assert batch.token_ids.tolist() == [[*shared, *[0] * 6, *branch, *branch]]
    n, b = len(shared), len(branch)
    assert batch.position_ids.tolist() == [[*range(n + 6 + b), *range(n, n + b)]]
    assert batch.world_slots.tolist() == [list(range(n, n + 6))]
    assert batch.images == ("a.png",)
    sees = attention_masks(batch, 1024, "sdpa")["full_attention"][0, 0]
    assert sees[-1, :n].all()  # the statement without world tokens shares the image
    assert not sees[-1, n : n + 6 + b].any()  # and sees nothing of the world


def test_flex_rows_are_padded_to_whole_blocks(gemma: Gemma, statements: list[Statement]) -> None:
    packer = Packer(gemma, QUESTION, 4, flex=True)
    batch = packer.pack(statements)
    assert batch.token_ids.shape[0] == 1
    assert batch.token_ids.shape[1] % 128 == 0
    masks = attention_masks(batch, 1024, "flex_attention")
    dense = attention_masks(batch, 1024, "sdpa")["full_attention"][0, 0]
    mask_mod = masks["full_attention"].mask_mod
    q, k = torch.meshgrid(torch.arange(len(dense)), torch.arange(len(dense)), indexing="ij")
    assert torch.equal(mask_mod(torch.tensor(0), torch.tensor(0), q, k), dense)


def test_what_nothing_trained_reaches_stands_in_the_first_columns(
    gemma: Gemma, statements: list[Statement]
) -> None:
    packer = Packer(gemma, QUESTION, 4, world_position="after", row_tokens=200)
    batch = packer.pack(statements)
    shared = len(gemma.prompt(QUESTION, statements[0].caption, True, "after").shared)
    assert batch.num_prefix_tokens == 2 * shared  # two images in the fuller row
    columns = torch.cat([batch.world_slots.flatten(), batch.label_rows]) % batch.token_ids.shape[1]
    assert int(columns.min()) >= batch.num_prefix_tokens
    assert int((batch.image_slots % batch.token_ids.shape[1]).max()) < batch.num_prefix_tokens
    sees = attention_masks(batch, 1024, "sdpa")["full_attention"][:, 0]
    assert not sees[:, : batch.num_prefix_tokens, batch.num_prefix_tokens :].any()
    assert packer.pack(statements, [None] * 6).num_prefix_tokens == 0
    assert Packer(gemma, QUESTION, 4).pack(statements).num_prefix_tokens == 0


@pytest.mark.parametrize("attention", ["bidirectional", "causal"])
@pytest.mark.parametrize("position", ["before", "after"])
@pytest.mark.parametrize("world_tokens", [4, 300, 700])
@pytest.mark.parametrize("window", [None, 24, 200])
def test_blocks_leave_nothing_out_and_whole_ones_are_whole(
    gemma: Gemma,
    statements: list[Statement],
    world_tokens: int,
    window: int | None,
    attention: str,
    position: str,
) -> None:
    packer = Packer(gemma, QUESTION, world_tokens, attention, position, flex=True)
    worlds = (
        [s.image for s in statements]
        + [Control.ZERO] * 6
        + ["b.png", "b.png", "c.png", "a.png", "a.png", "a.png"]
    )
    batch = packer.pack(statements * 4, [*worlds, *[Control.TEXT] * 6])
    frozen, length = batch.num_prefix_tokens, batch.token_ids.shape[1]
    assert (frozen > 0) is (position == "after")
    for part in [(0, length), (0, frozen), (frozen, length)] if frozen else [(0, length)]:
        sees = attention_masks(batch, window or 1 << 30, "sdpa", part)["sliding_attention"][0, 0]
        blocks = sees.to(torch.uint8).unflatten(1, (-1, BLOCK)).unflatten(0, (-1, BLOCK))
        any_seen, all_seen = blocks.amax((1, 3)).bool(), blocks.amin((1, 3)).bool()
        some, every = (found[0] for found in visible_blocks(batch, window, *part))
        assert not (any_seen & ~some).any()
        assert not (every & ~all_seen).any()
        assert not (every & ~some).any()
        if window is None or window >= 2 * BLOCK:  # and little more is looked at than has to be
            assert int(some.sum()) <= (1.4 if window is None else 1.6) * int(any_seen.sum())
        mask = attention_masks(batch, window or 1 << 30, "flex_attention", part)["sliding_attention"]
        listed = torch.zeros_like(some)
        for kind in ("kv", "full_kv"):
            count, which = getattr(mask, f"{kind}_num_blocks")[0, 0], getattr(mask, f"{kind}_indices")[0, 0]
            for q in range(len(count)):
                assert not listed[q, which[q, : count[q]].long()].any()
                listed[q, which[q, : count[q]].long()] = True
        assert torch.equal(listed, some)


def test_a_statement_longer_than_the_limit_is_an_error(gemma: Gemma, statements: list[Statement]) -> None:
    length = len(gemma.prompt(QUESTION, CAPTIONS[0][1], with_world=True).shared) + 6
    packer = Packer(gemma, QUESTION, 4, max_length=length)
    with pytest.raises(
        ValueError, match=rf"'The red ball .*' takes \d+ tokens with its image; max_seq_length is {length}"
    ):
        packer.pack(statements[:1])


def test_questions_are_packed_like_statements_and_have_no_labels_or_words(
    gemma: Gemma, statements: list[Statement]
) -> None:
    packer = Packer(gemma, QUESTION, 4)
    wanted = packer.pack(statements)
    batch = packer.pack([Question(s.image, s.caption) for s in statements])
    same = (
        "token_ids position_ids preorder subtree_end bidirectional_group world_slots image_slots label_rows"
    )
    for name in same.split():
        assert torch.equal(getattr(batch, name), getattr(wanted, name)), name
    assert (batch.worlds, batch.images) == (wanted.worlds, wanted.images)
    assert len(wanted.labels) == 6
    assert [len(batch.labels), len(batch.words), len(batch.relations)] == [0, 0, 0]


def test_no_name_of_an_image_is_a_control(gemma: Gemma) -> None:
    packer = Packer(gemma, QUESTION, 4)
    named = packer.pack([Statement(name, "It is so.", 1, "is", 0) for name in ("", "/", "zero", "text")])
    assert named.worlds == named.images == ("", "/", "zero", "text")


def test_unknown_world_attention_is_refused(gemma: Gemma) -> None:
    with pytest.raises(ValueError, match="world_attention 'both'"):
        Packer(gemma, QUESTION, 4, world_attention="both")


@pytest.mark.parametrize("position", ["before", "after"])
def test_masks_made_in_advance_are_those_that_flex_attention_makes(
    gemma: Gemma, statements: list[Statement], position: str
) -> None:
    packer = Packer(gemma, QUESTION, 300, world_position=position)
    packer.flex = True
    batch = prepare_masks(packer.pack(statements), 24)
    frozen, length = batch.num_prefix_tokens, batch.token_ids.shape[1]
    parts = [(0, frozen), (frozen, length)] if frozen else [(0, length)]
    assert list(batch.masks) == parts
    for start, stop in parts:
        for kind, window in (("full_attention", 1 << 30), ("sliding_attention", 24)):
            lists = batch.masks[start, stop][kind]
            mask = block_mask(lists, stop - start, stop)
            theirs = BlockMask.from_kv_blocks(
                *mask.as_tuple()[2:6], BLOCK, mask.mask_mod, (stop - start, stop)
            )
            for name in ("q_num_blocks", "q_indices", "full_q_num_blocks", "full_q_indices"):
                assert torch.equal(getattr(mask, name), getattr(theirs, name))
            *blocks, rule = lists
            assert all(x.is_contiguous() and x.dtype == torch.int32 for x in (*blocks, *rule))
            sees = attention_masks(batch, window, "sdpa", (start, stop))["sliding_attention"][0, 0]
            q, k = torch.meshgrid(torch.arange(stop - start), torch.arange(stop), indexing="ij")
            assert torch.equal(mask.mask_mod(torch.tensor(0), None, q, k), sees)
    moved = batch.to("meta")
    assert {x.device.type for x in tree_leaves(moved.masks)} == {"meta"}
