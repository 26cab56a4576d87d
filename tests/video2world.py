"""A Video2World pipeline of the real classes with small random weights, and stand-ins for its guardrail."""

import json
from pathlib import Path

import numpy as np
import torch
from constants import EMBEDDED_VAE
from diffusers import AutoencoderKLWan, CosmosTransformer3DModel, FlowMatchEulerDiscreteScheduler
from transformers import T5Config, T5EncoderModel, T5TokenizerFast

WORDS = "The scene goes on as it is . camera does not move A ball rolls".split()


def make_pipeline(folder: Path, seed: int = 0) -> Path:
    """Writes the components as `save_pretrained` does, with the embedded VAE, and the index that names them."""
    torch.manual_seed(seed)
    transformer = CosmosTransformer3DModel(
        in_channels=16 + 1,
        out_channels=16,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        mlp_ratio=2,
        text_embed_dim=32,
        adaln_lora_dim=4,
        max_size=(8, 32, 32),
        patch_size=(1, 2, 2),
        rope_scale=(2.0, 1.0, 1.0),
        concat_padding_mask=False,  # True, as in the real one, takes torchvision, which its guardrail brings
        extra_pos_embed_type="learnable",
    )
    text = T5Config(vocab_size=128, d_model=32, d_kv=8, d_ff=37, num_layers=2, num_heads=4)
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -10.0)]
    vocabulary += [(f"▁{word}", -2.0) for word in dict.fromkeys(WORDS)]
    AutoencoderKLWan.from_pretrained(EMBEDDED_VAE).save_pretrained(folder / "vae")
    transformer.save_pretrained(folder / "transformer")
    T5EncoderModel(text).save_pretrained(folder / "text_encoder")
    T5TokenizerFast(vocab=vocabulary, extra_ids=0).save_pretrained(folder / "tokenizer")
    FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True).save_pretrained(folder / "scheduler")
    index = {
        "_class_name": "Cosmos2VideoToWorldPipeline",
        "safety_checker": [None, None],
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "T5EncoderModel"],
        "tokenizer": ["transformers", "T5TokenizerFast"],
        "transformer": ["diffusers", "CosmosTransformer3DModel"],
        "vae": ["diffusers", "AutoencoderKLWan"],
    }
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


class Guardrail:
    """Lets through what it is told to let through; remembers what it was asked."""

    def __init__(self) -> None:
        self.prompts: list[str] = []
        self.videos: list[np.ndarray] = []

    def to(self, device: object) -> None:
        pass

    def check_text_safety(self, prompt: str) -> bool:
        self.prompts.append(prompt)
        return "weapon" not in prompt

    def check_video_safety(self, frames: np.ndarray) -> np.ndarray | None:
        self.videos.append(frames.copy())
        return self.video(frames)

    def video(self, frames: np.ndarray) -> np.ndarray | None:
        return frames


class Refusing(Guardrail):
    """Lets no video through whose photograph, the first frame, is one of these."""

    def __init__(self, refused: list[int]) -> None:
        super().__init__()
        self.refused = refused  # counted from the first video that it sees

    def video(self, frames: np.ndarray) -> np.ndarray | None:
        return None if len(self.videos) - 1 in self.refused else frames


class Blurring(Guardrail):
    """Greys a corner of each frame, in the frames that it is given, as the real one does with faces."""

    def video(self, frames: np.ndarray) -> np.ndarray | None:
        frames[:, :16, :16] = 128
        return frames
