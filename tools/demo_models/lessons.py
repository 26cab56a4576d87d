"""The training data of the small Gemma: drawn scenes, prompts about them, and the loss.

Dimensions: N scenes of a pool, B scenes of a batch, T and Q tokens, V vocabulary, D hidden size; S and P, side of the
Gemma's and of the VAE's picture in pixels.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing import get_context
from typing import TypeVar

import numpy as np
import tokenizers
import torch
from demo_models.small_models import GEMMA_PIXELS, IMAGE_TOKENS, QUESTION, TOKENS_PER_IMAGE, VAE_PIXELS
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Gemma3ForConditionalGeneration

from theworld.data.scenes import COLOURS, RELATIONS, SHAPES, draw_scene, make_scene
from theworld.utils.starting import starting_workers

T = TypeVar("T")

# of things in training, a little larger than in the demo, so that its few patches show more of them
SCHOOL_RADIUS = (
    0.085,
    0.115,
)
POOL_SEED = 9_000_000  # so that training scenes are never those of a data set with a small seed


@dataclass(frozen=True)
class Pool:
    """Drawn scenes as tensors, with their pictures in the sizes of the Gemma and the VAE."""

    thumbnails: Tensor  # uint8[N, 3, S, S]
    pictures: Tensor  # uint8[N, 3, P, P]
    things: Tensor  # int64[N, 2]: colour * len(SHAPES) + shape
    centres: Tensor  # float32[N, 2, 2]: x and y of each thing


def _draw_one(key: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Return the scene (seed, index) as uint8[S, S, 3] and uint8[P, P, 3], resized as in Gemma and TheWorld."""
    picture = Image.fromarray(draw_scene(make_scene(key[0], "train", key[1], SCHOOL_RADIUS)))
    thumbnail = picture.resize((GEMMA_PIXELS, GEMMA_PIXELS), Image.Resampling.NEAREST)
    return np.asarray(thumbnail), np.asarray(
        picture.resize((VAE_PIXELS, VAE_PIXELS), Image.Resampling.BICUBIC)
    )


def draw_all(
    draw: Callable[[tuple[int, int]], T], keys: Sequence[tuple[int, int]], num_workers: int
) -> list[T]:
    """Return what is drawn of each (seed, index), in so many processes; 1: in this one."""
    if num_workers == 1:
        return list(map(draw, keys))
    with starting_workers():
        pool = get_context("spawn").Pool(num_workers)
    with pool as workers:
        return workers.map(draw, keys, chunksize=64)


def draw_pool(seed: int, num_scenes: int, num_workers: int, device: str) -> Pool:
    """Draw the scenes in worker processes, a few milliseconds each on one core."""
    keys = [(POOL_SEED + seed, index) for index in range(num_scenes)]
    drawn = draw_all(_draw_one, keys, num_workers)
    scenes = [make_scene(key[0], "train", key[1], SCHOOL_RADIUS).things for key in keys]
    names = [f"{colour} {shape}" for colour in COLOURS for shape in SHAPES]
    things = torch.tensor([[names.index(thing.name) for thing in pair] for pair in scenes])
    centres = torch.tensor([[(thing.x, thing.y) for thing in pair] for pair in scenes])
    sizes = [torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2) for images in zip(*drawn, strict=True)]
    return Pool(*(t.contiguous().to(device) for t in (*sizes, things, centres)))


def to_pixels(pictures: Tensor) -> Tensor:
    """Return uint8 pictures as float32 in [-1, 1], the input of both models."""
    return pictures.float() / 127.5 - 1


@dataclass(frozen=True)
class Head:
    """The part of a prompt before the question: token ids with blocks of image tokens, and their mask."""

    ids: Tensor  # int64[T]
    image_at: Tensor  # int64: positions of the image tokens
    mask: Tensor  # bool[1, 1, T + Q, T + Q] with Q tokens of a question: causal, bidirectional within an image block


class Prompts:
    """Token ids of the prompts about scenes: heads with one or two blocks of image tokens, and a table of questions."""

    def __init__(self, tokenizer: tokenizers.Tokenizer, device: str) -> None:
        self.tokenizer, self.device = tokenizer, device
        self.answers = torch.tensor([tokenizer.token_to_id(digit) for digit in "01"], device=device)
        things = [f"{colour} {shape}" for colour in COLOURS for shape in SHAPES]
        questions = [self._question(a, r, b) for r in RELATIONS for a in things for b in things]
        self.lengths = torch.tensor([len(q) for q in questions], device=device)
        self.questions = nn.utils.rnn.pad_sequence(questions, batch_first=True)  # int64[4 * 12 * 12, Q]
        # position of the statement's first word in a question
        self.statement_at = len(self._ids("\n\nStatement:"))
        # position of the relation's first word
        self.relation_at = len(self._ids("\n\nStatement: The red ball is"))
        boi, eoi, image = IMAGE_TOKENS
        block, start = f"{boi}{image * TOKENS_PER_IMAGE}{eoi}", "<bos><start_of_turn>user\n"
        self.heads = {
            "one": self._head(f"{start}\n\n{block}"),  # like the processor's prompt of one picture
            "two": self._head(f"{start}\n\n{block}\n\n\n\n{block}"),  # of two
            # a block before the picture, without newlines
            "beside": self._head(start, block, f"\n\n{block}"),
        }

    def token_ids(self) -> Tensor:
        """Return the ids of all tokens in the prompts, int64[_]."""
        return torch.cat(
            [self.questions.flatten(), self.answers, *(head.ids for head in self.heads.values())]
        ).unique()

    def _ids(self, text: str) -> Tensor:
        return torch.tensor(self.tokenizer.encode(text, add_special_tokens=False).ids, device=self.device)

    def _question(self, first: str, relation: str, second: str) -> Tensor:
        question = QUESTION.format(caption=f"The {first} is {relation} the {second}.")
        return self._ids(f"\n\n{question}<end_of_turn>\n<start_of_turn>model\n")

    def _head(self, *pieces: str) -> Head:
        ids = torch.cat([self._ids(piece) for piece in pieces])
        is_image = ids == self._ids(IMAGE_TOKENS[2])
        return Head(ids, is_image.nonzero()[:, 0], block_mask(F.pad(is_image, (0, self.questions.shape[1]))))


def block_mask(is_image: Tensor) -> Tensor:
    """Return the mask, bool[1, 1, T, T], for bool[T]: causal, and bidirectional within a run of image tokens."""
    starts = is_image & ~F.pad(is_image, (1, 0))[:-1]
    block = torch.where(is_image, starts.cumsum(0), 0)
    causal = torch.ones(len(is_image), len(is_image), dtype=torch.bool, device=is_image.device).tril()
    return (causal | ((block[:, None] == block) & is_image))[None, None]


@dataclass(frozen=True)
class Lesson:
    """Statements about a batch of scenes."""

    scenes: Tensor  # int64[B]
    statements: Tensor  # int64[B]: rows of Prompts.questions
    labels: Tensor  # int64[B]


def draw_lesson(pool: Pool, scenes: Tensor) -> Lesson:
    """Return a random statement about each scene, distributed as those of `make_statements`."""
    first, axis, labels = torch.randint(2, (3, len(scenes)), device=scenes.device)
    rows = torch.arange(len(scenes), device=scenes.device)
    gap = pool.centres[scenes, first] - pool.centres[scenes, 1 - first]  # float32[B, 2]
    # RELATIONS is in the order left, right, above, below: 2 * axis + (is the first thing's coordinate greater).
    relation = 2 * axis + ((gap[rows, axis] > 0).long() ^ (1 - labels))
    things = pool.things[scenes]
    num_things = len(COLOURS) * len(SHAPES)
    statements = (relation * num_things + things[rows, first]) * num_things + things[rows, 1 - first]
    return Lesson(scenes, statements, labels)


def read_lesson(
    model: Gemma3ForConditionalGeneration, prompts: Prompts, lesson: Lesson, head: Head, images: list[Tensor]
) -> tuple[Tensor, Tensor]:
    """Return the hidden states of the questions' tokens, float32[B, Q, D], and their ids, int64[B, Q].

    `images` are the image tokens of each block in order, float32[B, 16, D].
    """
    questions = prompts.questions[lesson.statements]
    ids = torch.cat([head.ids.expand(len(questions), -1), questions], dim=1)
    embeds = model.model.language_model.embed_tokens(ids).index_copy(
        1, head.image_at, torch.cat(images, dim=1)
    )
    states = model.model.language_model(
        inputs_embeds=embeds,
        attention_mask={"full_attention": head.mask, "sliding_attention": head.mask},  # the window is longer
        position_ids=torch.arange(ids.shape[1], device=ids.device)[None],
        use_cache=False,
    ).last_hidden_state
    return states[:, len(head.ids) :], questions


def answer_logits(
    model: Gemma3ForConditionalGeneration, prompts: Prompts, lesson: Lesson, states: Tensor
) -> Tensor:
    """Return the logits of the token after the prompt, float32[B, V]."""
    rows = torch.arange(len(states), device=states.device)
    return model.lm_head(states[rows, prompts.lengths[lesson.statements] - 1])


def lesson_loss(
    model: Gemma3ForConditionalGeneration, prompts: Prompts, lesson: Lesson, head: Head, images: list[Tensor]
) -> Tensor:
    """Return the cross-entropy of the answer, plus that of the statement's words for true statements.

    The gradient of the answer alone is near zero at first, since the answer depends on things, relation and places
    together. That of the relation after "The red ball is" is not, so it has the largest weight.
    """
    states, questions = read_lesson(model, prompts, lesson, head, images)
    answer = F.cross_entropy(answer_logits(model, prompts, lesson, states), prompts.answers[lesson.labels])
    start, relation = prompts.statement_at, prompts.relation_at
    logits = model.lm_head(states[:, start - 1 : relation + 3])
    words = F.cross_entropy(logits.transpose(1, 2), questions[:, start : relation + 4], reduction="none")
    words = (words * lesson.labels[:, None]).sum(0) / lesson.labels.sum().clamp(min=1)
    return 0.5 * answer + words.mean() + words[relation - start]


def held_out(pool: Pool) -> Tensor:
    """Return the held-out scenes, int64[_]: the last tenth of the pool, at most 4096."""
    total = len(pool.things)
    return torch.arange(total - min(4096, max(2, total // 10)), total, device=pool.things.device)
