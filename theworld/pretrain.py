"""Makes the two embedded models from nothing: a small Gemma 3 with its processor, and a small Wan VAE.

Both are ordinary folders of the real classes. The Gemma learns to read drawn scenes through its own tower, in prompts
with one or two image blocks: some pictures are clear, most are as they are in the data sets, where its few pixels
lose the small things. So it knows what a sharp block of image tokens looks like, and has one only when it is given one.

Letters: B scenes of a batch, T tokens, V vocabulary, D width, S the Gemma's picture size and P the VAE's, in pixels.
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
from diffusers import AutoencoderKLWan
from PIL import Image
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Gemma3Config, Gemma3ForConditionalGeneration, GenerationConfig

from theworld.scenes import COLOURS, RELATIONS, SHAPES, draw_scene, make_scene

GEMMA_PIXELS = 8  # S: a side of the small Gemma's picture
VAE_PIXELS = 64  # P: a side of the small VAE's picture
TOKENS_PER_IMAGE = 16
VOCABULARY = 1024  # rows of the embedding; the tokenizer has fewer, as Gemma's has
POOL_SEED = 9_000_000  # the scenes to learn from are never those of a data set with a small seed
QUESTION = "Statement: {caption}\nAnswer (only '0' or '1'):"

SPECIAL_TOKENS = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<start_of_turn>", "<end_of_turn>"]
IMAGE_TOKENS = ["<start_of_image>", "<end_of_image>", "<image_soft_token>"]
NEWLINES = ["\n" * count for count in range(1, 9)]
# What the merges are learnt from, next to the scenes' own sentences: VSR's relations and things, and common words.
WORDS = """
The of a to in and is it on at with left right above below side front behind back under next beside near far from away
close inside outside beneath top touching facing parallel perpendicular opposite over around across along part contains
attached surrounding between among middle edge down up into off out by toward ahead against beyond connected detached
has enclosed within surrounded adjacent alongside consists congruent past center
person bicycle car motorcycle airplane bus train truck boat traffic light fire hydrant stop sign parking meter bench
bird cat dog horse sheep cow elephant bear zebra giraffe backpack umbrella handbag tie suitcase frisbee skis snowboard
sports kite baseball bat glove skateboard surfboard tennis racket bottle wine glass cup fork knife spoon bowl banana
apple sandwich orange broccoli carrot hot pizza donut cake chair couch potted plant bed dining table toilet tv laptop
mouse remote keyboard cell phone microwave oven toaster sink refrigerator book clock vase scissors teddy hair drier
toothbrush
user model system True False true false yes no not Question this that are was be have what which who where when how
picture image photograph scene colour color small large one two three white black brown pink grey purple
"""


@dataclass(frozen=True)
class PretrainSettings:
    """What the tool may change; the defaults made the embedded models."""

    seed: int = 0
    device: str = "cpu"
    num_scenes: int = 100_000  # scenes drawn to learn from
    num_vae_scenes: int = 20_000  # of these, scenes whose pictures the VAE sees
    gemma_steps: int = 12_000
    vae_steps: int = 8_000
    batch_size: int = 512  # statements a step of the Gemma
    vae_batch_size: int = 64  # pictures a step of the VAE
    learning_rate: float = 1e-3
    vae_learning_rate: float = 1e-3
    workers: int = 2


# --- the tokenizer and the processor -------------------------------------------------------------------------------


def build_tokenizer() -> tokenizers.Tokenizer:
    """A BPE tokenizer of Gemma's kind: spaces become "▁", whatever has no token of its own is spelt in bytes."""
    tokenizer = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    # Only while the merges are learnt: none crosses a word, and a digit is never part of a longer token.
    pieces = Regex(r"▁?\p{L}+|\p{N}|▁?[^\p{L}\p{N}▁\n]+|▁|\n")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(pieces, "isolated")
    scene_text = " ".join([*(f"The {c} {s} is {r} the" for c in COLOURS for s in SHAPES for r in RELATIONS)])
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - 64,
        special_tokens=SPECIAL_TOKENS + NEWLINES + [f"<0x{byte:02X}>" for byte in range(256)],
        initial_alphabet=[chr(code) for code in range(33, 127)] + ["▁"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(
        [scene_text, QUESTION, "user\nmodel\n"] * 20 + [" " + " ".join(WORDS.split())] * 2, trainer
    )
    learnt = json.loads(tokenizer.to_str())["model"]
    tokenizer.model = models.BPE(
        learnt["vocab"],
        [tuple(m) for m in learnt["merges"]],
        unk_token="<unk>",
        fuse_unk=True,
        byte_fallback=True,
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    for token in NEWLINES:
        tokenizer.add_tokens([tokenizers.AddedToken(token, normalized=False, special=False)])
    for token in SPECIAL_TOKENS + IMAGE_TOKENS:
        tokenizer.add_special_tokens([tokenizers.AddedToken(token, normalized=False, special=True)])
    bos = ("<bos>", tokenizer.token_to_id("<bos>"))
    tokenizer.post_processor = processors.TemplateProcessing("<bos> $A", "<bos> $A <bos> $B", [bos])
    return tokenizer


# The same text as google/gemma-3-4b-it's template makes.
CHAT_TEMPLATE = """{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
    {%- if messages[0]['content'] is string -%}
        {%- set first_user_prefix = messages[0]['content'] + '\n\n' -%}
    {%- else -%}
        {%- set first_user_prefix = messages[0]['content'][0]['text'] + '\n\n' -%}
    {%- endif -%}
    {%- set loop_messages = messages[1:] -%}
{%- else -%}
    {%- set first_user_prefix = '' -%}
    {%- set loop_messages = messages -%}
{%- endif -%}
{%- for message in loop_messages -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
    {%- endif -%}
    {%- set role = 'model' if message['role'] == 'assistant' else message['role'] -%}
    {{ '<start_of_turn>' + role + '\n' + (first_user_prefix if loop.first else '') }}
    {%- if message['content'] is string -%}
        {{ message['content'] | trim }}
    {%- else -%}
        {%- for item in message['content'] -%}
            {%- if item['type'] == 'image' -%}
                {{ '<start_of_image>' }}
            {%- elif item['type'] == 'text' -%}
                {{ item['text'] | trim }}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
    {{ '<end_of_turn>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{ '<start_of_turn>model\n' }}
{%- endif -%}
"""


def save_processor(folder: Path) -> None:
    """Writes tokenizer, image processor and chat template into `folder`, as save_pretrained would."""
    folder.mkdir(parents=True, exist_ok=True)
    build_tokenizer().save(str(folder / "tokenizer.json"))
    image_tokens = dict(zip(("boi_token", "eoi_token", "image_token"), IMAGE_TOKENS, strict=True))
    tokenizer = {
        "tokenizer_class": "GemmaTokenizer",
        "add_bos_token": True,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 8192,
        **{f"{role}_token": f"<{role}>" for role in ("pad", "eos", "bos", "unk", "mask")},
        "extra_special_tokens": image_tokens,
        **image_tokens,
    }
    images = {
        "image_processor_type": "Gemma3ImageProcessor",
        "processor_class": "Gemma3Processor",
        "do_convert_rgb": True,
        "do_pan_and_scan": False,
        "do_resize": True,
        "size": {"height": GEMMA_PIXELS, "width": GEMMA_PIXELS},
        "resample": int(Image.Resampling.BILINEAR),
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "image_seq_length": TOKENS_PER_IMAGE,
    }
    processor = {"processor_class": "Gemma3Processor", "image_seq_length": TOKENS_PER_IMAGE}
    for name, content in (("tokenizer", tokenizer), ("preprocessor", images), ("processor", processor)):
        (folder / f"{name}_config.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")


# --- the models ----------------------------------------------------------------------------------------------------


def make_gemma(tokenizer: tokenizers.Tokenizer) -> Gemma3ForConditionalGeneration:
    """The small Gemma with random weights: 4 layers of width 64, and a tower of 2 layers over 4 x 4 patches."""
    boi, eoi, image = (tokenizer.token_to_id(token) for token in IMAGE_TOKENS)
    end_of_turn = tokenizer.token_to_id("<end_of_turn>")
    text = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 192,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "query_pre_attn_scalar": 16,
        "sliding_window": 1024,
        "layer_types": ["sliding_attention", "sliding_attention", "sliding_attention", "full_attention"],
        "max_position_embeddings": 8192,
        "initializer_range": 0.1,
        "bos_token_id": 2,
        "eos_token_id": 1,
        "pad_token_id": 0,
    }
    vision = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": GEMMA_PIXELS,
        "patch_size": GEMMA_PIXELS // math.isqrt(TOKENS_PER_IMAGE),
        "vision_use_head": False,
    }
    config = Gemma3Config(
        text_config=text,
        vision_config=vision,
        mm_tokens_per_image=TOKENS_PER_IMAGE,
        boi_token_index=boi,
        eoi_token_index=eoi,
        image_token_index=image,
        initializer_range=0.1,
        eos_token_id=[1, end_of_turn],
        attn_implementation="sdpa",
    )
    model = Gemma3ForConditionalGeneration(config)
    with (
        torch.no_grad()
    ):  # transformers starts this one at zero; image tokens should come out as large as words
        nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight, std=64**-0.5)
        nn.init.normal_(model.model.language_model.embed_tokens.weight, std=64**-0.5)
    model.generation_config = GenerationConfig(
        bos_token_id=2, eos_token_id=[1, end_of_turn], pad_token_id=0, do_sample=False
    )
    return model


def make_vae() -> AutoencoderKLWan:
    """The small VAE with random weights: 8 times down in each direction, 16 channels, as the Wan and Cosmos VAE."""
    return AutoencoderKLWan(base_dim=8, z_dim=16, dim_mult=[1, 2, 4, 4], num_res_blocks=1)


# --- the scenes to learn from --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pool:
    """Drawn scenes as arrays; the thumbnails are what the Gemma's processor makes of the pictures."""

    thumbnails: Tensor  # uint8[N, 3, 3, S, S]: of each scene as written, at a random clarity, and clear; channels first
    colours: Tensor  # int64[N, 2]
    shapes: Tensor  # int64[N, 2]
    centres: Tensor  # float32[N, 2, 2]: of each thing x and y
    pictures: Tensor  # uint8[M, 3, P, P] of the first M scenes as written, for the VAE

    def pixels(self, scenes: Tensor, view: int) -> Tensor:
        """Thumbnails of int64[B] scenes as float32[B, 3, S, S] in [-1, 1]; view 0 as written, 1 between, 2 clear."""
        return self.thumbnails[scenes, view].float() / 127.5 - 1


def _draw_one(job: tuple[int, int, bool]) -> tuple[np.ndarray, np.ndarray | None]:
    """Thumbnails uint8[3, S, S, 3] of one scene and, if wanted, its picture uint8[P, P, 3]."""
    seed, index, wants_picture = job
    scene = make_scene(seed, "train", index)
    between = float(np.random.default_rng([seed, index]).random())
    pictures = [Image.fromarray(draw_scene(scene, clarity=clarity)) for clarity in (0.0, between, 1.0)]
    small = [np.asarray(p.resize((GEMMA_PIXELS, GEMMA_PIXELS), Image.Resampling.BILINEAR)) for p in pictures]
    picture = np.asarray(pictures[0].resize((VAE_PIXELS, VAE_PIXELS), Image.Resampling.BICUBIC))
    return np.stack(small), picture if wants_picture else None


def draw_pool(settings: PretrainSettings) -> Pool:
    """Draws the scenes in worker processes: about 10 ms each on one core."""
    seed = POOL_SEED + settings.seed
    jobs = [(seed, index, index < settings.num_vae_scenes) for index in range(settings.num_scenes)]
    with get_context("spawn").Pool(settings.workers) as workers:
        drawn = workers.map(_draw_one, jobs, chunksize=64)
    things = [make_scene(seed, "train", index).things for index in range(settings.num_scenes)]
    colours = torch.tensor([[list(COLOURS).index(t.colour) for t in pair] for pair in things])
    shapes = torch.tensor([[SHAPES.index(t.shape) for t in pair] for pair in things])
    centres = torch.tensor([[(t.x, t.y) for t in pair] for pair in things])
    thumbnails = torch.from_numpy(np.stack([small for small, _ in drawn])).permute(0, 1, 4, 2, 3)
    pictures = torch.from_numpy(np.stack([p for _, p in drawn if p is not None])).permute(0, 3, 1, 2)
    return Pool(
        *(t.contiguous().to(settings.device) for t in (thumbnails, colours, shapes, centres, pictures))
    )


# --- the Gemma's lessons -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Head:
    """What stands before a question: token ids with image blocks, and what follows from them."""

    ids: Tensor  # int64[T]
    image_at: Tensor  # int64: where the image tokens stand
    mask: Tensor  # bool[1, 1, T + Q, T + Q], Q tokens of a question: causal, and both ways within an image block


class Prompts:
    """Token ids of the prompts about scenes: heads with one or two image blocks, and a table of questions."""

    def __init__(self, tokenizer: tokenizers.Tokenizer, device: str) -> None:
        self.tokenizer, self.device = tokenizer, device
        self.answers = torch.tensor([tokenizer.token_to_id(digit) for digit in "01"], device=device)
        things = [f"{colour} {shape}" for colour in COLOURS for shape in SHAPES]
        questions = [self._question(a, r, b) for r in RELATIONS for a in things for b in things]
        self.lengths = torch.tensor([len(q) for q in questions], device=device)
        self.questions = nn.utils.rnn.pad_sequence(questions, batch_first=True)  # int64[4 * 12 * 12, Q]
        self.statement_at = len(self._ids("\n\nStatement:"))  # where in a question its first word stands
        self.relation_at = len(self._ids("\n\nStatement: The red ball is"))  # and the relation's first word
        boi, eoi, image = IMAGE_TOKENS
        block, start = f"{boi}{image * TOKENS_PER_IMAGE}{eoi}", "<bos><start_of_turn>user\n"
        self.heads = {
            "one": self._head(f"{start}\n\n{block}"),  # as the processor writes one picture
            "two": self._head(f"{start}\n\n{block}\n\n\n\n{block}"),  # as it writes two
            "beside": self._head(
                start, block, f"\n\n{block}"
            ),  # a block before the picture, without newlines
        }

    def _ids(self, text: str) -> Tensor:
        return torch.tensor(self.tokenizer.encode(text, add_special_tokens=False).ids, device=self.device)

    def _question(self, first: str, relation: str, second: str) -> Tensor:
        question = QUESTION.format(caption=f"The {first} is {relation} the {second}.")
        return self._ids(f"\n\n{question}<end_of_turn>\n<start_of_turn>model\n")

    def _head(self, *pieces: str) -> Head:
        ids = torch.cat([self._ids(piece) for piece in pieces])
        is_image = ids == self.tokenizer.token_to_id(IMAGE_TOKENS[2])
        return Head(ids, is_image.nonzero()[:, 0], block_mask(F.pad(is_image, (0, self.questions.shape[1]))))


def block_mask(is_image: Tensor) -> Tensor:
    """bool[T] -> bool[1, 1, T, T]: causal, and within a run of image tokens in both directions."""
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
    """One random statement about each scene, true or false evenly, as scenes.make_statements draws them."""
    first, axis, labels = torch.randint(2, (3, len(scenes)), device=scenes.device)
    rows = torch.arange(len(scenes), device=scenes.device)
    gap = pool.centres[scenes, first] - pool.centres[scenes, 1 - first]  # float32[B, 2]
    # RELATIONS is in the order left, right, above, below: 2 * axis + (is the first thing's coordinate greater).
    relation = 2 * axis + ((gap[rows, axis] > 0).long() ^ (1 - labels))
    things = pool.colours[scenes] * len(SHAPES) + pool.shapes[scenes]
    num_things = len(COLOURS) * len(SHAPES)
    statements = (relation * num_things + things[rows, first]) * num_things + things[rows, 1 - first]
    return Lesson(scenes, statements, labels)


def read_lesson(
    model: Gemma3ForConditionalGeneration, prompts: Prompts, lesson: Lesson, head: Head, images: list[Tensor]
) -> tuple[Tensor, Tensor]:
    """Runs the prompts: hidden states float32[B, Q, D] of the questions' tokens, and their ids int64[B, Q].

    `images` holds the image tokens of each block in order, float32[B, 16, D].
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
    """float32[B, V]: what follows the prompt's last token."""
    rows = torch.arange(len(states), device=states.device)
    return model.lm_head(states[rows, prompts.lengths[lesson.statements] - 1])


def lesson_loss(
    model: Gemma3ForConditionalGeneration, prompts: Prompts, lesson: Lesson, head: Head, images: list[Tensor]
) -> Tensor:
    """Cross-entropy of the answer, plus that of the statement's words where the statement is true.

    The answer alone has no first step downhill (it depends on things, relation and places together); the relation
    word after "The red ball is" has, so it counts most.
    """
    states, questions = read_lesson(model, prompts, lesson, head, images)
    answer = F.cross_entropy(answer_logits(model, prompts, lesson, states), prompts.answers[lesson.labels])
    start, relation = prompts.statement_at, prompts.relation_at
    logits = model.lm_head(states[:, start - 1 : relation + 3])
    words = F.cross_entropy(logits.transpose(1, 2), questions[:, start : relation + 4], reduction="none")
    words = (words * lesson.labels[:, None]).sum(0) / lesson.labels.sum().clamp(min=1)
    return 0.5 * answer + words.mean() + words[relation - start]


def gemma_curriculum(progress: float, rng: np.random.Generator) -> tuple[str, tuple[int, ...]]:
    """Which prompt the next batch has and the views in its blocks: first clear pictures alone, then all kinds."""
    if progress < 0.3:
        return "one", (2,)
    kinds: list[tuple[str, tuple[int, ...]]] = [
        *[("one", (0,))] * 2, ("one", (1,)), ("one", (2,)),
        *[("beside", (2, 0))] * 3, ("beside", (1, 0)), ("two", (2, 0)), ("two", (0, 2)),
    ]  # fmt: skip
    return kinds[int(rng.integers(len(kinds)))]


def see(model: Gemma3ForConditionalGeneration, pixels: Tensor) -> Tensor:
    """Pictures float32[B, 3, S, S] to image tokens float32[B, 16, D]."""
    return model.model.get_image_features(pixels).pooler_output


@torch.no_grad()
def gemma_accuracy(
    model: Gemma3ForConditionalGeneration,
    prompts: Prompts,
    pool: Pool,
    head: str,
    views: list[int],
    shift: int = 0,
) -> float:
    """Share of right answers on the pool's last scenes; `shift` shows the first block another scene."""
    scenes = held_out(pool)
    lesson = draw_lesson(pool, scenes)
    shown = [scenes.roll(shift if block == 0 else 0) for block in range(len(views))]
    images = [see(model, pool.pixels(s, view)) for s, view in zip(shown, views, strict=True)]
    states, _ = read_lesson(model, prompts, lesson, head, images)
    no, yes = answer_logits(model, prompts, lesson, states)[:, prompts.answers].unbind(1)
    return float(((yes > no) == (lesson.labels == 1)).float().mean())


def held_out(pool: Pool) -> Tensor:
    """int64: the last scenes of the pool, at most 4096 and a tenth, which no lesson shows."""
    total = len(pool.colours)
    return torch.arange(total - min(4096, max(1, total // 10)), total, device=pool.colours.device)


class Steps:
    """AdamW with clipping, warm-up and cosine decay. On CUDA each kind of step is captured once and replayed.

    The models are so small that starting kernels one by one would take most of the time.
    """

    def __init__(
        self, parameters: list[nn.Parameter], learning_rate: float, loss_of: Callable[[Any], Tensor]
    ) -> None:
        self.parameters, self.learning_rate, self.loss_of = parameters, learning_rate, loss_of
        self.on_cuda = parameters[0].is_cuda
        rate = torch.tensor(0.0, device=parameters[0].device)
        self.optimizer = torch.optim.AdamW(
            parameters, lr=rate, betas=(0.9, 0.98), weight_decay=0.01, capturable=self.on_cuda
        )
        self.graphs: dict[Any, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self.num_seen: dict[Any, int] = {}

    def run(self, steps: int, kind_at: Callable[[int], Any], report: Callable[[int, float], None]) -> None:
        """`kind_at(step)` names the step's kind, `report(step, mean loss)` is called twenty times."""
        losses = torch.zeros(steps, device=self.parameters[0].device)
        every = max(1, steps // 20)
        for step in range(steps):
            warm, left = min(1.0, (step + 1) / min(300, steps)), 0.5 * (1 + math.cos(math.pi * step / steps))
            self.optimizer.param_groups[0]["lr"].fill_(self.learning_rate * warm * max(0.01, left))
            losses[step] = self._step(kind_at(step))
            if (step + 1) % every == 0:
                report(step + 1, float(losses[step + 1 - every : step + 1].mean()))

    def _step(self, kind: Any) -> Tensor:
        self.num_seen[kind] = self.num_seen.get(kind, 0) + 1
        if (
            not self.on_cuda or self.num_seen[kind] <= 3
        ):  # three plain steps first: libraries allocate and choose
            return self._plain_step(kind)
        if kind not in self.graphs:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                loss = self._plain_step(kind)
            self.graphs[kind] = graph, loss
        graph, loss = self.graphs[kind]
        graph.replay()
        return loss

    def _plain_step(self, kind: Any) -> Tensor:
        loss = self.loss_of(kind)
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        return loss.detach()


def train_gemma(model: Gemma3ForConditionalGeneration, pool: Pool, settings: PretrainSettings) -> list[dict]:
    """Trains tower, projector and language model together; returns losses and accuracies over time."""
    prompts = Prompts(build_tokenizer(), settings.device)
    rng, history = np.random.default_rng(settings.seed), []
    num_scenes = len(pool.colours) - len(held_out(pool))

    def loss_of(kind: tuple[str, tuple[int, ...]]) -> Tensor:
        scenes = torch.randint(num_scenes, (settings.batch_size,), device=settings.device)
        images = [see(model, pool.pixels(scenes, view)) for view in kind[1]]
        return lesson_loss(model, prompts, draw_lesson(pool, scenes), prompts.heads[kind[0]], images)

    def report(step: int, loss: float) -> None:
        def accuracy(head: str, views: list[int], shift: int = 0) -> float:
            return round(gemma_accuracy(model, prompts, pool, prompts.heads[head], views, shift), 4)

        row = {
            "step": step,
            "loss": round(loss, 4),
            "as_written": accuracy("one", [0]),
            "clear": accuracy("one", [2]),
        }
        row |= {
            "clear_beside": accuracy("beside", [2, 0]),
            "wrong_beside": accuracy("beside", [2, 0], shift=1),
        }
        history.append(row)
        print("gemma", row, flush=True)

    steps = Steps(list(model.parameters()), settings.learning_rate, loss_of)
    steps.run(settings.gemma_steps, lambda step: gemma_curriculum(step / settings.gemma_steps, rng), report)
    return history


# --- the VAE's lessons ---------------------------------------------------------------------------------------------


def train_vae(vae: AutoencoderKLWan, pool: Pool, settings: PretrainSettings) -> list[dict]:
    """Trains the autoencoder (squared error and a small KL term), then writes its latents' mean and std into it."""
    history: list[dict] = []
    # The convolutions over time are never run for one frame, so they have no gradient and stay as they were.
    parameters = [p for name, p in vae.named_parameters() if "time_conv" not in name]

    def loss_of(_: None) -> Tensor:
        chosen = torch.randint(len(pool.pictures), (settings.vae_batch_size,), device=settings.device)
        pixels = (pool.pictures[chosen].float() / 127.5 - 1)[:, :, None]
        posterior = vae.encode(pixels).latent_dist
        return F.mse_loss(vae.decode(posterior.sample()).sample, pixels) + 1e-6 * posterior.kl().mean()

    def report(step: int, loss: float) -> None:
        history.append({"step": step, "loss": round(loss, 6)})
        print("vae", history[-1], flush=True)

    Steps(parameters, settings.vae_learning_rate, loss_of).run(settings.vae_steps, lambda _: None, report)
    latents = encode(vae, pool.pictures[: min(2048, len(pool.pictures))])
    mean, std = latents.mean(dim=(0, 2, 3)), latents.std(dim=(0, 2, 3))
    vae.register_to_config(latents_mean=mean.tolist(), latents_std=std.tolist())
    return history


@torch.no_grad()
def encode(vae: AutoencoderKLWan, pictures: Tensor) -> Tensor:
    """uint8[N, 3, P, P] to the posterior's mean, float32[N, 16, P / 8, P / 8]."""
    parts = [
        vae.encode((p.float() / 127.5 - 1)[:, :, None]).latent_dist.mode()[:, :, 0]
        for p in pictures.split(256)
    ]
    return torch.cat(parts)
