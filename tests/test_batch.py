"""The packed layout, position by position."""

import pytest
import torch
from conftest import CAPTIONS, QUESTION

from theworld.batch import Packer, attention_masks
from theworld.gemma import Gemma
from theworld.vsr import Statement


def pack(gemma: Gemma, statements: list[Statement], num_world_tokens: int = 4):
    return Packer(gemma, QUESTION, num_world_tokens).pack(statements)


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
    assert batch.branch.tolist() == [[-1] * prefix + [0] * first + [1] * second]
    assert batch.group.unique().tolist() == [0]
    assert batch.world_slots.tolist() == [[4, 5, 6, 7, 8, 9]]
    assert batch.image_slots.tolist() == [list(range(12, 28))]  # after two tokens: \n\n and <start_of_image>
    assert batch.label_rows.tolist() == [prefix + first - 1, prefix + first + second - 1]
    # Only the first statement is true: its caption alone is to be predicted, each token from the one before.
    start, end = prompts[0].caption
    assert batch.words.tolist() == list(prompts[0].branch[start:end])
    assert batch.word_rows.tolist() == list(range(prefix + start - 1, prefix + end - 1))
    assert batch.word_counts.unique().tolist() == [end - start]


def test_blocks_see_ahead_within_themselves_and_nowhere_else(
    gemma: Gemma, statements: list[Statement]
) -> None:
    batch = pack(gemma, statements[:2])
    sees = attention_masks(batch, 1024, "sdpa")["full_attention"][0, 0]
    length = sees.shape[0]
    ahead = [(q, k) for q in range(length) for k in range(q + 1, length) if sees[q, k]]
    world, image = range(5, 9), range(12, 28)
    assert ahead == [(q, k) for block in (world, image) for q in block for k in block if k > q]
    prefix = int((batch.branch == -1).sum())
    first = int((batch.branch == 0).sum())
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


def test_images_never_see_each_other_and_padding_sees_only_padding(
    gemma: Gemma, statements: list[Statement]
) -> None:
    packer = Packer(gemma, QUESTION, 4, row_tokens=200)
    batch = packer.pack(statements)
    assert (batch.group == -1).any()
    sees = attention_masks(batch, 1024, "sdpa")["full_attention"][:, 0]
    same = batch.group[:, :, None] == batch.group[:, None, :]
    assert not (sees & ~same).any()
    assert sees.any(-1).all()  # no row of scores is empty, so none becomes NaN


def test_order_of_statements_and_labels_agree(gemma: Gemma) -> None:
    mixed = [
        Statement(image=i, caption=c, label=y, relation=r, index=n) for n, (i, c, y, r) in enumerate(CAPTIONS)
    ]
    mixed = [mixed[n] for n in (3, 0, 2, 5, 1, 4)]
    batch = pack(gemma, mixed)
    assert [s.index for s in batch.statements] == [3, 5, 4, 0, 1, 2]
    assert batch.images == ("c.png", "a.png", "b.png")
    assert batch.labels.tolist() == [gemma.answer_ids[s.label] for s in batch.statements]


def test_flex_rows_are_padded_to_whole_blocks(gemma: Gemma, statements: list[Statement]) -> None:
    packer = Packer(gemma, QUESTION, 4)
    packer.flex = True
    batch = packer.pack(statements)
    assert batch.token_ids.shape[0] == 1
    assert batch.token_ids.shape[1] % 128 == 0
    masks = attention_masks(batch, 1024, "flex_attention")
    dense = attention_masks(batch, 1024, "sdpa")["full_attention"][0, 0]
    mask_mod = masks["full_attention"].mask_mod
    q, k = torch.meshgrid(torch.arange(len(dense)), torch.arange(len(dense)), indexing="ij")
    assert torch.equal(mask_mod(torch.tensor(0), torch.tensor(0), q, k), dense)


def test_a_statement_longer_than_the_limit_is_an_error(gemma: Gemma, statements: list[Statement]) -> None:
    length = len(gemma.prompt(QUESTION, CAPTIONS[0][1], with_world=True).shared) + 6
    packer = Packer(gemma, QUESTION, 4, max_length=length)
    with pytest.raises(
        ValueError, match=rf"'The red ball .*' takes \d+ tokens with its image; max_seq_length is {length}"
    ):
        packer.pack(statements[:1])


def test_unknown_world_attention_is_refused(gemma: Gemma) -> None:
    with pytest.raises(ValueError, match="world_attention 'both'"):
        Packer(gemma, QUESTION, 4, world_attention="both")
