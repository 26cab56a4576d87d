"""The baseline of the benchmark: an end-to-end training loop of plain transformers and diffusers calls.

Every step decodes photographs (in DataLoader workers) and runs diffusers' VAE (3-D convolutions), the SigLIP tower and
the language model with transformers' masks, one statement a row, padded on the right. The loss is that of transformers'
`labels=`: logits over the whole vocabulary at every position. Statements, world tokens, image tokens, projection and
loss are those of `TheWorld.losses`, which tests/benchmark/test_end_to_end.py asserts.

Dimensions: B statements, L tokens, N world tokens, D hidden size of the language model; S and P, sides of a picture.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers import AutoProcessor, Gemma3ForConditionalGeneration

from theworld.data.images import read_image
from theworld.data.square import square, to_unit_range
from theworld.data.vsr import Statement

Sample = dict[str, Tensor]
IGNORED = -100  # transformers' label for "no loss here"


class VaePixels(Dataset[Tensor]):
    """Photographs as the VAE's input, float32[3, S, S] in [-1, 1], decoded each time."""

    def __init__(self, images: Sequence[str], folder: str | Path, latent_size: int) -> None:
        self.images, self.folder, self.latent_size = list(images), folder, latent_size

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        pixels = read_image(self.folder, self.images[index])
        return torch.from_numpy(to_unit_range(square(pixels, self.latent_size)))


class Photographs(Dataset[Sample]):
    """Statements with their photographs, decoded for each statement by the workers of a DataLoader."""

    def __init__(
        self, statements: Sequence[Statement], folder: str | Path, latent_size: int, processor: Any
    ) -> None:
        self.statements, self.folder, self.latent_size = list(statements), folder, latent_size
        self.image_processor = processor.image_processor

    def __len__(self) -> int:
        return len(self.statements)

    def __getitem__(self, index: int) -> Sample:
        """Return index int64[], vae_pixels float32[3, S, S] in [-1, 1] and pixel_values float32[3, P, P]."""
        pixels = read_image(self.folder, self.statements[index].image)
        values = self.image_processor(images=[pixels], return_tensors="pt")["pixel_values"][0]
        vae_pixels = torch.from_numpy(to_unit_range(square(pixels, self.latent_size)))
        return {"index": torch.tensor(index), "vae_pixels": vae_pixels, "pixel_values": values}


@torch.inference_mode()
def extract_plainly(
    vae_name: str,
    photographs: VaePixels,
    target: Path,
    batch_size: int,
    workers: int,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """Write the latents of each photograph to a file in `target`, with a DataLoader, `vae.encode` and `torch.save`."""
    vae = AutoencoderKLWan.from_pretrained(vae_name, torch_dtype=dtype).to(device).eval()
    names = iter(photographs.images)
    for pixels in DataLoader(photographs, batch_size, num_workers=workers, pin_memory=device.type == "cuda"):
        latents = vae.encode(pixels[:, :, None].to(device, dtype)).latent_dist.mode()[:, :, 0].cpu()
        for latent in latents:
            torch.save(latent.clone(), target / f"{Path(next(names)).stem}.pt")


class EndToEnd:
    """A frozen VAE, a frozen Gemma and a trained projection, all computed in every step."""

    def __init__(
        self,
        model_name: str,
        vae_name: str,
        projection: nn.Module,
        question_template: str,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        """Load the models, named by folders or on the hub; `projection` is a `WorldProjection`."""
        self.device, self.dtype = torch.device(device), dtype
        self.gemma = Gemma3ForConditionalGeneration.from_pretrained(
            model_name, dtype=dtype, device_map=str(device), attn_implementation="sdpa"
        )
        self.gemma.eval().requires_grad_(False)
        self.processor = AutoProcessor.from_pretrained(model_name)
        vae = AutoencoderKLWan.from_pretrained(vae_name, torch_dtype=dtype)
        self.vae = vae.to(self.device).eval().requires_grad_(False)
        self.projection: Any = projection.to(self.device)
        self.question_template = question_template
        self.optimizer = torch.optim.AdamW(self.projection.parameters(), lr=1e-4)

    def batches(
        self, statements: Sequence[Statement], folder: str | Path, latent_size: int, size: int, workers: int
    ) -> Iterator[tuple[list[Statement], Sample]]:
        """Yield batches of `size` statements with their photographs without end, decoded in worker processes."""
        data = Photographs(statements, folder, latent_size, self.processor)
        loader = DataLoader(
            data,
            size,
            shuffle=True,
            drop_last=True,
            num_workers=workers,
            pin_memory=self.device.type == "cuda",
            persistent_workers=workers > 0,
        )
        while True:
            for sample in loader:
                yield [data.statements[i] for i in sample["index"].tolist()], sample

    def tokens(self, statements: Sequence[Statement]) -> dict[str, Tensor]:
        """Return the prompts with their answers, padded on the right, int64[B, L] each.

        input_ids: 0 for world tokens and padding. token_type_ids: 1 for tokens with bidirectional attention. world: the
        index of the vector at that position (bracket, N tokens, bracket), else -1. labels: the answer at its own
        position, else IGNORED; transformers shifts them.
        """
        num_world = self.projection.shape.num_tokens
        encoded = [self._prompt(s, num_world) for s in statements]
        length = max(len(row["input_ids"]) for row in encoded)
        fill = {"input_ids": 0, "token_type_ids": 0, "attention_mask": 0, "world": -1, "labels": IGNORED}
        padded = {k: [row[k] + [v] * (length - len(row[k])) for row in encoded] for k, v in fill.items()}
        return {key: torch.tensor(rows, device=self.device) for key, rows in padded.items()}

    def _prompt(self, statement: Statement, num_world: int) -> dict[str, list[int]]:
        question = self.question_template.replace("{caption}", statement.caption)
        content = [{"type": "image"}, {"type": "text", "text": question}]
        message = [{"role": "user", "content": content}]
        text = self.processor.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        before, after = text.split(self.processor.boi_token, 1)
        tokenizer = self.processor.tokenizer
        left, right, answer = (
            tokenizer(piece, add_special_tokens=False)["input_ids"]
            for piece in (before, self.processor.full_image_sequence + after, str(statement.label))
        )
        ids = left + [0] * (num_world + 2) + right + answer
        image = int(self.gemma.config.image_token_id)
        world = [-1] * len(left) + list(range(num_world + 2)) + [-1] * (len(right) + len(answer))
        ahead = [int(0 < w <= num_world or i == image) for w, i in zip(world, ids, strict=True)]
        labels = [IGNORED] * (len(ids) - 1) + answer
        ones = [1] * len(ids)
        return dict(input_ids=ids, token_type_ids=ahead, attention_mask=ones, world=world, labels=labels)

    def loss(self, statements: Sequence[Statement], vae_pixels: Tensor, pixel_values: Tensor) -> Tensor:
        """Return the mean cross-entropy at the answers, as transformers computes it.

        vae_pixels: float[B, 3, S, S] in [-1, 1]; pixel_values: float[B, 3, P, P].
        """
        tokens = self.tokens(statements)
        with torch.no_grad():
            frames = vae_pixels.to(self.device, self.dtype)[:, :, None]
            latents = self.vae.encode(frames).latent_dist.mode()[:, :, 0]
            pixel_values = pixel_values.to(self.device, self.dtype)
            image = self.gemma.model.get_image_features(pixel_values).pooler_output
            ids = tokens["input_ids"]
            is_image = ids == self.gemma.config.image_token_id
            embeddings = self.gemma.get_input_embeddings()(ids.masked_fill(is_image, 0))
            embeddings = embeddings.masked_scatter(is_image[..., None], image.to(embeddings.dtype))
        brackets = self.projection.brackets[:, None].expand(2, len(ids), -1).unsqueeze(2)
        world = torch.cat([brackets[0], self.projection(latents), brackets[1]], 1)  # float32[B, N + 2, D]
        is_world = (tokens["world"] >= 0)[..., None]
        embeddings = embeddings.masked_scatter(is_world, world.to(embeddings.dtype))
        masks = {k: tokens[k] for k in ("attention_mask", "token_type_ids")}
        output = self.gemma(inputs_embeds=embeddings, labels=tokens["labels"], use_cache=False, **masks)
        return output.loss

    def train_step(self, statements: Sequence[Statement], sample: Sample) -> float:
        """Take a step: forward, backward, clip, optimizer. Return the loss."""
        loss = self.loss(statements, sample["vae_pixels"], sample["pixel_values"])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.projection.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())
