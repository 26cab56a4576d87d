"""TheWorld: packed sequences in, answer logits out. Gemma is frozen; the projection is all that trains.

Dimensions: R rows of L tokens, W worlds, G images, S statements, N world tokens, D the width of the language model.
"""

import json
import re
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from huggingface_hub import snapshot_download
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from theworld.batch import ZERO, Batch, Packer
from theworld.cache import check_meaning
from theworld.config import Config, load_config, save_config
from theworld.decoder import Decoder
from theworld.gemma import Gemma
from theworld.generation import Photograph, generate_ids
from theworld.projection import ProjectionShape, WorldProjection
from theworld.weights import model_id, resolve_device, resolve_dtype, wants_compile

FORMAT_VERSION = 1
PROJECTION_FILE, WORLD_FILE, CONFIG_FILE = "projection.safetensors", "world.json", "config.json"


class TheWorld(nn.Module):
    """A frozen Gemma with world tokens. Its parameters, as torch sees them, are those of the projection alone:
    what `parameters()` gives to an optimiser is what trains, and `state_dict()` is what is saved."""

    def __init__(
        self, gemma: Gemma, projection: WorldProjection, config: Config, fingerprint: dict[str, Any]
    ) -> None:
        """`fingerprint` is that of the latents the projection is for."""
        super().__init__()
        object.__setattr__(self, "gemma", gemma)  # not a submodule: frozen, and saved by whoever published it
        self.gemma: Gemma
        channels = projection.latents_mean.cpu()
        self.mean_latent = channels.expand(
            projection.shape.latent_shape
        )  # on the CPU, where batches are made
        self.projection = projection.to(gemma.device)
        self.config = config
        self.fingerprint = fingerprint
        self.enable_world = True
        compiled = wants_compile(config.compile, gemma.device)
        decoder = Decoder(gemma, compiled, config.fp8, config.use_gradient_checkpointing)
        object.__setattr__(self, "decoder", decoder)
        self.decoder: Decoder

    @classmethod
    def from_config(cls, config: Config, gemma: Gemma, fingerprint: dict[str, Any]) -> "TheWorld":
        """A new, untrained projection for the latents that `fingerprint` describes, at Gemma's scale."""
        shape = ProjectionShape(
            latent_shape=tuple(fingerprint["latent_shape"]),
            width=gemma.width,
            mode=config.world_mode,
            patch=config.world_patch,
            architecture=config.projection,
            hidden=config.projection_hidden,
            positions=config.world_positions,
        )
        torch.manual_seed(config.seed)
        projection = WorldProjection(
            shape,
            fingerprint["latents_mean"],
            fingerprint["latents_std"],
            scale=gemma.embedding_scale(),
            brackets=gemma.bracket_embeddings(),
        )
        return cls(gemma, projection, config, fingerprint)

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        gemma: Gemma | None = None,
        *,
        dtype: str | torch.dtype | None = None,
        device_map: str | torch.device | None = None,
        enable_world: bool = True,
        revision: str | None = None,
        **overrides: Any,
    ) -> "TheWorld":
        """What `save_pretrained` wrote, from a folder or the hub ("user/name"), with the Gemma that it was trained for,
        in the same revision, unless one is handed in.

        `dtype` and `device_map` ("auto", "cpu", "cuda" or "cuda:N") are transformers' words for the settings `dtype`
        and `device`; `overrides` are other settings. `enable_world` False: `generate` leaves the world tokens out.
        Raises ValueError naming file and field if anything is missing or of another shape: a projection is loaded
        whole or not at all.
        """
        if dtype is not None:
            overrides["dtype"] = str(dtype).removeprefix("torch.")
        if device_map is not None:
            overrides["device"] = str(device_map)
        folder = _folder(name_or_path, revision)
        for name in (PROJECTION_FILE, WORLD_FILE, CONFIG_FILE):
            if not (folder / name).is_file():
                raise ValueError(
                    f"{folder}: no {name} in it; name a folder such as checkpoints/vsr/checkpoint-500"
                )
        config = load_config(folder / CONFIG_FILE, overrides)
        world = json.loads((folder / WORLD_FILE).read_text())
        if world.get("format") != FORMAT_VERSION:
            raise ValueError(
                f"{folder / WORLD_FILE}: format {world.get('format')!r}; wanted {FORMAT_VERSION}"
            )
        if gemma is None:
            gemma = load_gemma(config, revision=world.get("model_revision"))
        fingerprint = world["fingerprint"]
        shape = ProjectionShape.from_dict(world["projection"])
        if shape.width != gemma.width:
            raise ValueError(
                f"{folder}: the projection is {shape.width} wide, {gemma.name} {gemma.width}; it was trained for "
                f"{world['model_name']}"
            )
        projection = WorldProjection(shape, fingerprint["latents_mean"], fingerprint["latents_std"])
        model = cls(gemma, projection, config, fingerprint)
        model.load_projection(folder / PROJECTION_FILE)
        model.enable_world = enable_world
        return model

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes projection.safetensors (what trains and nothing else), world.json and config.json."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        state = {k: v.detach().cpu().contiguous() for k, v in self.trainable().items()}
        save_file(state, folder / PROJECTION_FILE, metadata={"format": "pt"})
        world = {
            "format": FORMAT_VERSION,
            "model_name": model_id(self.gemma.name),
            "model_revision": self.gemma.revision,
            "projection": self.projection.shape.to_dict(),
            "fingerprint": self.fingerprint,
        }
        (folder / WORLD_FILE).write_text(json.dumps(world, indent=2, sort_keys=True) + "\n")
        save_config(self.config, folder / CONFIG_FILE)

    def trainable(self) -> dict[str, nn.Parameter]:
        """The one rule for what trains, what is optimised and what is saved: parameters that ask for a gradient."""
        return {name: p for name, p in self.projection.named_parameters() if p.requires_grad}

    def load_projection(self, path: Path) -> None:
        """Loads trained weights strictly; ValueError names what is missing, unknown or of another shape."""
        state = load_file(path, device=str(self.gemma.device))
        wanted = self.trainable()
        for name in sorted(wanted.keys() | state.keys()):
            have = tuple(state[name].shape) if name in state else "nothing"
            want = tuple(wanted[name].shape) if name in wanted else "nothing"
            if have != want:
                raise ValueError(f"{path}: {name} has shape {have}; this projection wants {want}")
        with torch.no_grad():
            for name, parameter in wanted.items():
                parameter.copy_(state[name])

    @cached_property
    def encoder(self) -> Any:
        """The `CosmosEncoder` that the settings name, loaded when it is first asked for: training never does."""
        from theworld.vae import CosmosEncoder

        encoder = CosmosEncoder(
            self.config.cosmos_model_name,
            self.gemma.dtype,
            self.gemma.device,
            revision=self.fingerprint.get("cosmos_revision"),
        )
        self.check_encoder(encoder.identity())
        return encoder

    def check_encoder(self, identity: dict[str, Any]) -> None:
        """StoreMismatch if latents of an encoder of that identity are others than those the projection is for."""
        trained = {key: self.fingerprint.get(key) for key in identity}
        check_meaning(Path(self.config.cosmos_model_name), identity, trained)

    def packer(self, with_world: bool = True) -> Packer:
        """Packs statements the way this model was trained; without world tokens as Gemma's own prompts."""
        config, shape = self.config, self.projection.shape
        return Packer(
            self.gemma,
            config.question_template,
            num_world_tokens=shape.num_tokens if with_world else 0,
            world_attention=config.world_attention,
            world_position=config.world_position,
            max_length=config.max_seq_length,
        )

    def embed(self, batch: Batch, latents: Tensor | None, vision: Tensor | None) -> Tensor:
        """Token embeddings with the world tokens and image features in their slots: dtype[R, L, D]."""
        with torch.no_grad():
            embeddings = self.gemma.embed(batch.token_ids)
            flat = embeddings.flatten(0, 1)
            if batch.image_slots.numel():
                assert vision is not None, "a multimodal Gemma needs the photographs' features"
                features = self.gemma.image_features(vision)
                flat = flat.index_copy(0, batch.image_slots.flatten(), features.flatten(0, 1).to(flat.dtype))
        if batch.worlds:
            assert latents is not None, "the batch has world tokens, so it needs latents"
            tokens = self.projection(latents)
            opening, closing = self.projection.brackets[:, None].expand(2, len(tokens), -1).unsqueeze(2)
            world = torch.cat([opening, tokens, closing], 1)  # float32[W, N + 2, D]
            flat = flat.index_copy(0, batch.world_slots.flatten(), world.flatten(0, 1).to(flat.dtype))
        return flat.view_as(embeddings)

    def latents(self, batch: Batch, fetch: Callable[[Sequence[str]], Tensor]) -> Tensor | None:
        """float[W, C, H, W] on the CPU: what `fetch` has for each world of the batch, the mean latent for ZERO."""
        if not batch.worlds:
            return None
        named = [world for world in batch.worlds if world != ZERO]
        if not named:
            return self.mean_latent.expand(len(batch.worlds), -1, -1, -1).clone()
        rows = fetch(named)
        if len(named) == len(batch.worlds):
            return rows
        found = iter(rows)
        return torch.stack(
            [self.mean_latent if w == ZERO else next(found).float().cpu() for w in batch.worlds]
        )

    def hidden(
        self, batch: Batch, latents: Tensor | None, vision: Tensor | None, wanted: Tensor | None = None
    ) -> Tensor:
        """The language model's last hidden states, dtype[K, D], of the tokens with the flat indices `wanted`
        (int64[K]; None: all R x L, where no columns are frozen). `batch` lies on Gemma's device.

        latents: float[W, C, H, W] as the VAE gives them; vision: float[G, I, V] from `Gemma.vision_features`.
        """
        if wanted is None:
            wanted = torch.arange(batch.token_ids.numel(), device=batch.token_ids.device)
        return self.decoder(self.embed(batch, latents, vision), batch, wanted)

    def forward(self, batch: Batch, latents: Tensor | None = None, vision: Tensor | None = None) -> Tensor:
        """float32[S, vocabulary]: what follows each statement's prompt."""
        return self.gemma.logits(self.hidden(batch, latents, vision, batch.label_rows))

    @torch.no_grad()
    def generate(
        self,
        images: Photograph | Sequence[Photograph],
        questions: str | Sequence[str],
        enable_world: bool | None = None,
        **options: Any,
    ) -> list[str]:
        """The answers to any questions, one about each image (a file, a PIL image or uint8[H, W, 3]); a single image
        serves them all.

        `enable_world` False leaves the world tokens out, which is plain Gemma; None: as the model was loaded. `options`
        are those of transformers' `generate`, such as `max_new_tokens=40` or `do_sample=False`. Raises ValueError if
        images and questions do not pair up, ImageError for a photograph that cannot be read, StoreMismatch if the VAE
        that the settings name is not the one that the projection was trained for.
        """
        with_world = self.enable_world if enable_world is None else enable_world
        ids = generate_ids(self, images, questions, with_world, **options)
        return [t.strip() for t in self.gemma.tokenizer.batch_decode(ids, skip_special_tokens=True)]

    def losses(
        self, batch: Batch, latents: Tensor | None, vision: Tensor | None, statement_loss_weight: float = 0.0
    ) -> dict[str, Tensor]:
        """Sums over the batch, to be divided by the statements of an optimizer step.

        `label`: cross-entropy over the whole vocabulary at the label token. `statement`: for each true
        statement the mean next-word cross-entropy over its caption, 0 where the weight is 0. `total`: label +
        weight x statement. `logits`: float32[S, 2], of '0' and '1'.
        """
        with_words = statement_loss_weight > 0 and len(batch.words) > 0
        wanted = torch.cat([batch.label_rows, batch.word_rows]) if with_words else batch.label_rows
        hidden = self.hidden(batch, latents, vision, wanted)
        logits = self.gemma.logits(hidden[: len(batch.labels)])
        label = F.cross_entropy(logits, batch.labels, reduction="sum")
        statement = torch.zeros_like(label)
        if with_words:
            words = self.gemma.logits(hidden[len(batch.labels) :])
            weights = 1 / batch.word_counts.to(words.dtype)
            statement = (F.cross_entropy(words, batch.words, reduction="none") * weights).sum()
        answers = torch.stack([logits[:, token] for token in self.gemma.answer_ids], 1).detach()
        total = label + statement_loss_weight * statement
        return {"total": total, "label": label.detach(), "statement": statement.detach(), "logits": answers}


def _folder(name_or_path: str | Path, revision: str | None) -> Path:
    """The folder itself, or the three files of a hub model in a local one. ValueError for neither."""
    if Path(name_or_path).is_dir():
        return Path(name_or_path)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(name_or_path)):
        raise ValueError(f"{name_or_path}: neither a folder nor a name on the hub, such as user/name")
    files = [PROJECTION_FILE, WORLD_FILE, CONFIG_FILE]
    return Path(snapshot_download(str(name_or_path), revision=revision, allow_patterns=files))


def load_gemma(config: Config, device: torch.device | None = None, revision: str | None = None) -> Gemma:
    """The Gemma that the settings name, as they want it computed; `device` goes before theirs."""
    device = device or resolve_device(config.device)
    # Flex attention is only fast, and only small, in compiled code.
    fast = device.type == "cuda" and wants_compile(config.compile, device)
    attention = "flex_attention" if fast else "sdpa"
    dtype = resolve_dtype(config.dtype, device)
    if dtype == torch.bfloat16:
        # What stays in float32 is the projection: TF32 rounds its products to 10 bits, the frozen models have 7.
        torch.set_float32_matmul_precision("high")
    return Gemma(config.model_name, dtype, device, attention, revision)
