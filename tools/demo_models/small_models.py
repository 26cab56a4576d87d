"""The two embedded models before training: sizes, tokenizer, processor, random weights.

Both have the real classes, so TheWorld loads them exactly like the published models.
"""

import json
import math
from pathlib import Path

import tokenizers
import torch
from diffusers import AutoencoderKLWan
from PIL import Image
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import nn
from transformers import Gemma3Config, Gemma3ForConditionalGeneration, GenerationConfig

from theworld.data.scenes import COLOURS, RELATIONS, SHAPES

GEMMA_PIXELS = 4  # S: side of the small Gemma's picture
VAE_PIXELS = 64  # P: side of the small VAE's picture
TOKENS_PER_IMAGE = 16
VOCABULARY = 1024  # rows of the embedding; the tokenizer has fewer, as Gemma's has
QUESTION = "Statement: {caption}\nAnswer (only '0' or '1'):"

SPECIAL_TOKENS = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<start_of_turn>", "<end_of_turn>"]
IMAGE_TOKENS = ["<start_of_image>", "<end_of_image>", "<image_soft_token>"]
NEWLINES = ["\n" * count for count in range(1, 9)]
# Text for the tokenizer's merges, beside the scenes' sentences: VSR's relations and things, and common words.
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


def build_tokenizer() -> tokenizers.Tokenizer:
    """Return a BPE tokenizer like Gemma's: spaces become "▁", and text without tokens falls back to bytes."""
    tokenizer = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    # Only for training the merges: none crosses a word, and a digit is never part of a longer token.
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


# Renders the same text as the template of google/gemma-3-4b-it.
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
    """Write tokenizer, image processor and chat template into `folder`, as save_pretrained would."""
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
        "resample": int(Image.Resampling.NEAREST),
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


def make_gemma(tokenizer: tokenizers.Tokenizer) -> Gemma3ForConditionalGeneration:
    """Return the small Gemma with random weights: 4 layers of width 64, a tower of 2 layers over 4 x 4 patches."""
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
    # transformers initialises this weight to zero; image tokens should be as large as words
    with torch.no_grad():
        nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight, std=64**-0.5)
        nn.init.normal_(model.model.language_model.embed_tokens.weight, std=64**-0.5)
    model.generation_config = GenerationConfig(
        bos_token_id=2, eos_token_id=[1, end_of_turn], pad_token_id=0, do_sample=False
    )
    return model


def make_vae() -> AutoencoderKLWan:
    """Return the small VAE with random weights: 8 times smaller on each side, 16 channels, like the Cosmos VAE."""
    return AutoencoderKLWan(base_dim=8, z_dim=16, dim_mult=[1, 2, 4, 4], num_res_blocks=1)
