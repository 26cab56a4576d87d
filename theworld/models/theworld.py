"""TheWorld: packed sequences in, answer logits out. The projection trains; Gemma is frozen unless a stage sets parts
of it free (`theworld.models.gemma`).

Dimensions: R rows of L tokens, W worlds, G images, S statements, N world tokens, D the width of the language model.

The losses of a packed batch, from the hidden states of the tokens that predict something.
"""

from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from theworld.config.config import Config, load_config, save_config
from theworld.models.decoder import Decoder, TrainedDecoder, checkpoint_layers
from theworld.models.fsdp import asked, shard, whole
from theworld.models.gemma import Gemma, load_gemma, load_parts, parameters_of, restore_parts
from theworld.models.inference import Photograph, ask, generate_ids, load_encoder
from theworld.models.packing import ZERO, Batch, Packer
from theworld.models.projection import ProjectionShape, WorldProjection
from theworld.models.serialization import (
    CONFIG_FILE,
    PROJECTION_FILE,
    VISION,
    copy_strictly,
    part_file,
    read_world,
    saved_folder,
    write_world,
)
from theworld.utils.device import device_setting, wants_compile
from theworld.utils.hub import model_id


def weighted_losses(
    gemma: Gemma, hidden: Callable[[Tensor], Tensor], batch: Batch, weights: dict[str, float]
) -> dict[str, Tensor]:
    """See `TheWorld.losses`. `hidden` gives dtype[K, D] for flat indices int64[K]; `weights`: of label, statement and
    relation. Words without a weight are not asked for."""
    words = {
        "statement": (batch.word_rows, batch.words, batch.word_counts),
        "relation": (batch.relation_rows, batch.relations, batch.relation_counts),
    }
    asked = {name: own for name, own in words.items() if weights[name] > 0 and len(own[0]) > 0}
    wanted = [batch.label_rows, *(rows for rows, _, _ in asked.values())]
    states = hidden(torch.cat(wanted)).split([len(rows) for rows in wanted])
    logits = gemma.logits(states[0])
    losses = {"label": F.cross_entropy(logits, batch.labels, reduction="sum")}
    losses |= dict.fromkeys(words, torch.zeros_like(losses["label"]))
    for (name, (_, ids, counts)), own in zip(asked.items(), states[1:], strict=True):
        each = F.cross_entropy(gemma.logits(own), ids, reduction="none")
        losses[name] = (each * (1 / counts.to(each.dtype))).sum()
    total = torch.stack([weights[name] * loss for name, loss in losses.items()]).sum()
    answers = torch.stack([logits[:, token] for token in gemma.answer_ids], 1).detach()
    return {"total": total, "logits": answers} | {name: loss.detach() for name, loss in losses.items()}


class TheWorld(nn.Module):
    """A Gemma with world tokens. `trainable()` is what trains; torch's own `parameters()` are the projection's alone,
    since Gemma is no submodule: it is saved by whoever published it, and here only where it differs."""

    def __init__(
        self, gemma: Gemma, projection: WorldProjection, config: Config, fingerprint: dict[str, Any]
    ) -> None:
        """`fingerprint` is that of the latents the projection is for."""
        super().__init__()
        object.__setattr__(self, "gemma", gemma)
        self.gemma: Gemma
        self.shell: nn.Module | None
        object.__setattr__(self, "shell", None)  # what all computing goes through where Gemma is sharded
        channels = projection.latents_mean.cpu()
        self.mean_latent = channels.expand(projection.shape.row_shape)  # on the CPU, where batches are made
        self.projection = projection.to(gemma.device)
        self.config = config
        self.fingerprint = fingerprint
        self.enable_world = True
        compiled, checkpointed = (
            wants_compile(config.compile, gemma.device),
            config.use_gradient_checkpointing,
        )
        if gemma.plain_decoder:
            # FSDP puts a layer together around its call, which compiled code would take in.
            compiled = compiled and not asked()
            self.decoder: Decoder | TrainedDecoder = TrainedDecoder(gemma, compiled, checkpointed)
        else:
            self.decoder = Decoder(gemma, compiled, config.fp8, checkpointed)
        if checkpointed and VISION in gemma.trained:
            checkpoint_layers(gemma.model.model.vision_tower)

    @classmethod
    def from_config(cls, config: Config, gemma: Gemma, fingerprint: dict[str, Any]) -> "TheWorld":
        """A new, untrained projection for the latents that `fingerprint` describes, at Gemma's scale."""
        shape = ProjectionShape.from_settings(config, fingerprint, gemma.width)
        torch.manual_seed(config.seed)
        projection = WorldProjection(
            shape,
            fingerprint["latents_mean"],
            fingerprint["latents_std"],
            scale=gemma.embedding_scale() * config.projection_scale,
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
        device_map: str | int | torch.device | dict[str, Any] | None = None,
        enable_world: bool = True,
        revision: str | None = None,
        **overrides: Any,
    ) -> "TheWorld":
        """What `save_pretrained` wrote, from a folder or the hub ("user/name"), with the Gemma that it was trained for,
        in the same revision, unless one is handed in.

        `dtype` and `device_map` ("auto", "cpu", "cuda", "cuda:N" or N) are transformers' words for the settings `dtype`
        and `device`; `overrides` are other settings. `enable_world` False: `generate` and `score` leave them out.
        Raises ValueError naming file and field if anything is missing or of another shape: a projection is loaded
        whole or not at all.
        """
        if dtype is not None:
            overrides["dtype"] = str(dtype).removeprefix("torch.")
        if device_map is not None:
            overrides["device"] = device_setting(device_map)
        folder = saved_folder(name_or_path, revision)
        config = load_config(folder / CONFIG_FILE, overrides)
        world = read_world(folder)
        if gemma is None:
            gemma = load_gemma(config, revision=world.get("model_revision"))
        elif world["parts"] or gemma.changed:
            raise ValueError(
                f"{folder} goes with a Gemma of its own (of it {world['parts']} are in the folder, and of the one that "
                f"was handed in {list(gemma.changed)} are changed); leave `gemma` out"
            )
        restore_parts(gemma, folder, world)
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

    def save_pretrained(
        self, folder: str | Path, weights: dict[str, dict[str, Tensor]] | None = None
    ) -> None:
        """Writes projection.safetensors, a file for each part of Gemma that is not as it was published, world.json and
        config.json. `weights`: those of `weights()`, where they had to be put together before."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for name, state in (weights or self.weights()).items():
            save_file(state, folder / name, metadata={"format": "pt"})
        world = {
            "model_name": model_id(self.gemma.name),
            "model_revision": self.gemma.revision,
            "projection": self.projection.shape.to_dict(),
            "parts": list(self.gemma.changed),
            "lora_rank": self.gemma.lora_rank,
            "fingerprint": self.fingerprint,
        }
        write_world(folder, world)
        save_config(self.config, folder / CONFIG_FILE)

    def trainable(self) -> dict[str, nn.Parameter]:
        """The one rule for what trains and is optimised: parameters that ask for a gradient."""
        named = dict(self.projection.named_parameters())
        named |= {f"gemma.{name}": p for name, p in self.gemma.model.named_parameters()}
        return {name: p for name, p in named.items() if p.requires_grad}

    def weights(self) -> dict[str, dict[str, Tensor]]:
        """By file what a checkpoint holds: the projection, and the parts of Gemma that are not as they were published.
        On the CPU, and whole: where Gemma is sharded, all processes have to call this."""
        wanted = {PROJECTION_FILE: dict(self.projection.named_parameters())}
        wanted |= {part_file(part): parameters_of(self.gemma, part) for part in self.gemma.changed}
        return {
            file: {name: whole(p.detach()).cpu().contiguous() for name, p in own.items()}
            for file, own in wanted.items()
        }

    def load_projection(self, path: Path) -> None:
        """Loads trained weights strictly; ValueError names what is missing, unknown or of another shape."""
        copy_strictly(path, dict(self.projection.named_parameters()))

    def load_weights(self, folder: Path) -> None:
        """Loads what `save_pretrained` wrote into a model that has the same parts, strictly."""
        parts = read_world(folder)["parts"]
        if set(parts) - set(self.gemma.changed):
            raise ValueError(f"{folder} holds {parts} of Gemma; this model has {list(self.gemma.changed)}")
        self.load_projection(folder / PROJECTION_FILE)
        load_parts(self.gemma, folder, parts)

    @cached_property
    def encoder(self) -> Any:
        """The encoder that the settings name (`theworld.models.encoder.Encoder`), loaded at its first use, which is
        never in training."""
        return load_encoder(self)

    def check_no_steps(self, instead: str) -> None:
        """ValueError where world tokens take more than a photograph; `instead` is what to do."""
        self.projection.shape.check_no_steps(instead)

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
        embeddings = self.gemma.embed(batch.token_ids)
        flat = embeddings.flatten(0, 1)
        if batch.image_slots.numel():
            assert vision is not None, "a multimodal Gemma needs the photographs or their features"
            if vision.ndim == 4:
                vision = self.gemma.vision_features(vision)
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
        """float[W, *row_shape] on the CPU: what `fetch` has for each world of the batch, the mean latent for ZERO."""
        if not batch.worlds:
            return None
        named = [world for world in batch.worlds if world != ZERO]
        if not named:
            return self.mean_latent.expand(len(batch.worlds), *self.mean_latent.shape).clone()
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

        latents: float[W, *row_shape] as the VAE gives them; vision: float[G, I, V] from `Gemma.vision_features`, or the
        photographs themselves, float[G, 3, S, S] from `Gemma.pixel_values`.
        """
        if wanted is None:
            wanted = torch.arange(batch.token_ids.numel(), device=batch.token_ids.device)
        return self.decoder(self.embed(batch, latents, vision), batch, wanted)

    def forward(self, batch: Batch, latents: Tensor | None = None, vision: Tensor | None = None) -> Tensor:
        """float32[S, vocabulary]: what follows each statement's prompt."""
        return self._compute(lambda: self.gemma.logits(self.hidden(batch, latents, vision, batch.label_rows)))

    def shard(self) -> None:
        """Shards Gemma among the processes of the run, before an optimiser is made: see `theworld.models.fsdp`."""
        object.__setattr__(self, "shell", shard(self.gemma.model, self.gemma.dtype))

    def _compute(self, compute: Callable[[], Any]) -> Any:
        return compute() if self.shell is None else self.shell(compute)

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

    def score(
        self,
        images: Photograph | Sequence[Photograph],
        statements: str | Sequence[str],
        enable_world: bool | None = None,
        batch_size: int | None = None,
    ) -> list[float]:
        """P(true), 0 to 1, of each statement, by the two answers' logits as in an evaluation: a list in the order
        given, also for a single statement. `images` and `enable_world` are as for `generate`, and so is what is raised.

        Each different photograph is encoded once. `batch_size`: statements at a time; None: as in an evaluation.
        """
        with_world = self.enable_world if enable_world is None else enable_world
        system = "world" if with_world else "baseline"
        return ask(self, images, statements, [system], batch_size)[system]

    def losses(
        self,
        batch: Batch,
        latents: Tensor | None,
        vision: Tensor | None,
        statement_loss_weight: float = 0.0,
        relation_loss_weight: float = 0.0,
        label_loss_weight: float = 1.0,
    ) -> dict[str, Tensor]:
        """Sums over the batch, to be divided by the statements of an optimizer step.

        `label`: cross-entropy over the whole vocabulary at the label token. `statement`: for each true
        statement or, where the batch has captions, for each of those the mean next-word cross-entropy over its
        words, 0 where the weight is 0; `relation`: the same over the words of a true statement's relation. `total`:
        their sum by the weights. `logits`: float32[S, 2], of '0' and '1'.
        """
        weights = {
            "label": label_loss_weight,
            "statement": statement_loss_weight,
            "relation": relation_loss_weight,
        }

        def hidden(wanted: Tensor) -> Tensor:
            return self.hidden(batch, latents, vision, wanted)

        return self._compute(lambda: weighted_losses(self.gemma, hidden, batch, weights))
