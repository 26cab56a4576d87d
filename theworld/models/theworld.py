"""TheWorld: packed sequences in, answer logits and losses out.

The projection trains; Gemma is frozen unless the settings let parts of it train (`theworld.models.gemma`).

Dimensions: R rows of L tokens, W worlds, G images, S statements, N world tokens, K wanted tokens, D the width of the
language model.
"""

import json
from collections.abc import Callable, Sequence
from functools import cached_property, partial, wraps
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from theworld.config.config import Config, save_config
from theworld.models.decoder import Decoder, HFDecoder
from theworld.models.encoder import Encoder
from theworld.models.fsdp import asked, gather_to_main, shard
from theworld.models.gemma import Gemma, load_gemma, load_parts, parameters_of, saved_parts
from theworld.models.inference import (
    CONDITIONS,
    EncodedImage,
    Photograph,
    check_alone,
    encode_images,
    generate_tokens,
    load_encoder,
    p_true,
    pair_up,
    world_source,
)
from theworld.models.packing import Batch, Control, Packer, Question
from theworld.models.projection import ProjectionShape, WorldProjection
from theworld.models.serialization import (
    CONFIG_FILE,
    PROJECTION_FILE,
    SavedModel,
    copy_strictly,
    part_file,
    write_world,
)
from theworld.utils.device import device_setting, seeded, wants_compile
from theworld.utils.hub import GEMMA_FILE, model_id

Method = TypeVar("Method", bound=Callable[..., Any])


def in_shell(method: Method) -> Method:
    """Let a method of `TheWorld` compute inside the FSDP shell, if there is one, which gathers sharded weights."""

    @wraps(method)
    def call(self: "TheWorld", *arguments: Any, **options: Any) -> Any:
        compute = partial(method, self, *arguments, **options)
        return compute() if self.shell is None else self.shell(compute)

    return call  # type: ignore[return-value]


class TheWorld(nn.Module):
    """A Gemma with world tokens.

    `trainable()` are the parameters that train; torch's own `parameters()` are the projection's alone, since Gemma is
    no submodule: its publisher has saved it, and a checkpoint holds only the parts that differ.
    """

    def __init__(
        self, gemma: Gemma, projection: WorldProjection, config: Config, fingerprint: dict[str, Any]
    ) -> None:
        """`fingerprint` identifies the latents that the projection takes. Raises ValueError for a Gemma that was not
        loaded as the setting `fp8` says."""
        super().__init__()
        if config.fp8 != gemma.fp8:
            bits = 8 if gemma.fp8 else 16
            raise ValueError(
                f"fp8 is {json.dumps(config.fp8)}, but the linear layers of this Gemma are in {bits} bits; load it "
                "with `load_gemma(config)`"
            )
        object.__setattr__(self, "gemma", gemma)
        self.gemma: Gemma
        self.shell: nn.Module | None
        object.__setattr__(self, "shell", None)  # the module to compute in where Gemma is sharded
        channels = projection.latents_mean.cpu()
        self.mean_latent = channels.expand(projection.shape.row_shape)  # on the CPU, where batches are made
        self.projection = projection.to(gemma.device)
        self.config = config
        self.fingerprint = fingerprint
        self.enable_world = True
        self.decoder: Decoder | HFDecoder
        if gemma.uses_hf_decoder:
            self.decoder = HFDecoder(gemma)
        else:
            compiled = wants_compile(config.compile, gemma.device)
            self.decoder = Decoder(gemma, compiled, config.use_gradient_checkpointing)

    @classmethod
    def from_config(cls, config: Config, gemma: Gemma, fingerprint: dict[str, Any]) -> "TheWorld":
        """Return a model with an untrained projection for the latents of `fingerprint`, at Gemma's scale.

        The initial weights are a function of the setting `seed`.
        """
        shape = ProjectionShape.from_settings(config, fingerprint, gemma.width)
        with seeded(config.seed):
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
        name_or_path: str | Path | SavedModel,
        gemma: Gemma | None = None,
        *,
        dtype: str | torch.dtype | None = None,
        device_map: str | int | torch.device | dict[str, Any] | None = None,
        enable_world: bool = True,
        revision: str | None = None,
        **overrides: Any,
    ) -> "TheWorld":
        """Load a model that `save_pretrained` wrote: from a folder, the newest checkpoint of a run, the hub (user/name)
        or an opened model.

        `gemma` is a Gemma as it was published; None loads the one that the model was trained for, in the same revision.
        `dtype` and `device_map` ("auto", "cpu", "cuda", "cuda:N" or N) are transformers' words for the settings `dtype`
        and `device`; `overrides` are other settings. `enable_world` False leaves world tokens out of `generate` and
        `score`.
        Raises ValueError naming file and field if anything is missing or of another shape: a projection is loaded
        whole or not at all.
        """
        if dtype is not None:
            overrides["dtype"] = str(dtype).removeprefix("torch.")
        if device_map is not None:
            overrides["device"] = device_setting(device_map)
        saved = SavedModel.open(name_or_path, revision)
        folder, world, config = saved.folder, saved.world, saved.config(overrides)
        if gemma is None:
            saved.locate(config, config.model_name, GEMMA_FILE)
            published, parts = world.get("model_revision"), saved_parts(world)
            gemma = load_gemma(config, revision=published, parts=parts, sharded=asked())
        elif world["parts"] or gemma.modified_parts:
            raise ValueError(
                f"{folder} goes with a Gemma of its own (of it {world['parts']} are in the folder, and of the one that "
                f"was handed in {list(gemma.modified_parts)} are changed); leave `gemma` out"
            )
        load_parts(gemma, folder, world["parts"])
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
        """Write projection.safetensors, a file for each part of Gemma that was modified, world.json and config.json.

        `weights` are those of `weights()`, if they have been put together already.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for name, state in (weights or self.weights()).items():
            save_file(state, folder / name, metadata={"format": "pt"})
        world = {
            "model_name": model_id(self.gemma.name),
            "model_revision": self.gemma.revision,
            "projection": self.projection.shape.to_dict(),
            "parts": list(self.gemma.modified_parts),
            "lora_rank": self.gemma.parts.lora_rank,
            "fingerprint": self.fingerprint,
        }
        write_world(folder, world)
        save_config(self.config, folder / CONFIG_FILE)

    def trainable(self) -> dict[str, nn.Parameter]:
        """Return the parameters that train, by name: those that require a gradient."""
        named = dict(self.projection.named_parameters())
        named |= {f"gemma.{name}": p for name, p in self.gemma.model.named_parameters()}
        return {name: p for name, p in named.items() if p.requires_grad}

    def weights(self) -> dict[str, dict[str, Tensor]]:
        """Return the weights in a checkpoint by file: the projection, and the modified parts of Gemma.

        They are whole and on the CPU. If Gemma is sharded all processes have to call this, and only the main one gets
        Gemma's.
        """
        wanted = {PROJECTION_FILE: dict(self.projection.named_parameters())}
        wanted |= {part_file(part): parameters_of(self.gemma, part) for part in self.gemma.modified_parts}
        return {
            file: {name: w for name, p in own.items() if (w := gather_to_main(p.detach())) is not None}
            for file, own in wanted.items()
        }

    def load_projection(self, path: Path) -> None:
        """Load trained weights strictly. Raises ValueError naming one that is missing, unknown or of another shape."""
        copy_strictly(path, dict(self.projection.named_parameters()))

    def load_weights(self, saved: SavedModel) -> None:
        """Load the weights of a saved model into a model with the same parts, strictly."""
        folder, parts = saved.folder, saved.world["parts"]
        if set(parts) - set(self.gemma.modified_parts):
            raise ValueError(
                f"{folder} holds {parts} of Gemma; this model has {list(self.gemma.modified_parts)}"
            )
        self.load_projection(folder / PROJECTION_FILE)
        load_parts(self.gemma, folder, parts)

    @cached_property
    def encoder(self) -> Encoder:
        """The encoder that the settings name, in the revision that the projection was trained for.

        It is loaded on first use, which is never in training. Raises ValueError where world tokens need predicted
        frames, StoreMismatch if it is another encoder.
        """
        self.check_alone("generate needs no cache with enable_world=False, nor does score")
        return load_encoder(self.config, self.fingerprint, self.gemma.device, self.gemma.dtype)

    def check_alone(self, instead: str) -> None:
        """Raise ValueError if world tokens need more than a photograph; `instead` is what to do then."""
        check_alone(self.projection.shape, self.config, instead)

    def packer(
        self, with_world: bool = True, question_template: str | None = None, flex: bool | None = None
    ) -> Packer:
        """Return a packer of statements as in this model's training; without world tokens, of Gemma's own prompts.

        `question_template` takes precedence over the setting; `flex` is as for `Packer`.
        """
        config, shape = self.config, self.projection.shape
        return Packer(
            self.gemma,
            question_template or config.question_template,
            num_world_tokens=shape.num_tokens if with_world else 0,
            world_attention=config.world_attention,
            world_position=config.world_position,
            max_length=config.max_seq_length,
            flex=flex,
        )

    def embed(self, batch: Batch, latents: Tensor | None, vision: Tensor | None) -> Tensor:
        """Return the token embeddings, dtype[R, L, D], with world tokens and image features in their slots."""
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
        """Return the latents of the batch's worlds, float[W, *row_shape], on the CPU.

        `fetch` gives those of images; `Control.ZERO` has the mean latent.
        """
        if not batch.worlds:
            return None
        named = [world for world in batch.worlds if isinstance(world, str)]
        if not named:
            return self.mean_latent.expand(len(batch.worlds), *self.mean_latent.shape).clone()
        rows = fetch(named)
        if len(named) == len(batch.worlds):
            return rows
        found = iter(rows)
        return torch.stack(
            [
                self.mean_latent if world is Control.ZERO else next(found).float().cpu()
                for world in batch.worlds
            ]
        )

    def hidden(
        self, batch: Batch, latents: Tensor | None, vision: Tensor | None, wanted: Tensor | None = None
    ) -> Tensor:
        """Return the language model's last hidden states, dtype[K, D], of the tokens with the flat indices `wanted`.

        `batch` lies on Gemma's device. `latents`: float[W, *row_shape] as the VAE gives them; `vision`: float[G, I, V]
        from `Gemma.vision_features`, or the photographs themselves, float[G, 3, S, S] from `Gemma.pixel_values`.
        `wanted`: int64[K]; None is all R x L, for a batch without a prefix.
        """
        if wanted is None:
            wanted = torch.arange(batch.token_ids.numel(), device=batch.token_ids.device)
        return self.decoder(self.embed(batch, latents, vision), batch, wanted)

    @in_shell
    def forward(self, batch: Batch, latents: Tensor | None = None, vision: Tensor | None = None) -> Tensor:
        """Return the logits after each statement's prompt, float32[S, vocabulary]; arguments are as for `hidden`."""
        return self.gemma.logits(self.hidden(batch, latents, vision, batch.label_rows))

    @in_shell
    def losses(
        self,
        batch: Batch,
        latents: Tensor | None,
        vision: Tensor | None,
        statement_loss_weight: float = 0.0,
        relation_loss_weight: float = 0.0,
        label_loss_weight: float = 1.0,
    ) -> dict[str, Tensor]:
        """Return sums over the batch, to be divided by the number of statements of an optimizer step.

        `label`: cross-entropy over the whole vocabulary at the label token.
        `statement`: the mean next-word cross-entropy of each true statement or, where the batch has captions, of each
        caption; 0 where the weight is 0. `relation`: the same over the words of true statements' relations.
        `total`: the sum of the three by the weights, which alone has a gradient.
        `logits`: float32[S, 2], of '0' and '1'; `correct`: the statements whose right answer has the higher one.
        """
        weights = {
            "label": label_loss_weight,
            "statement": statement_loss_weight,
            "relation": relation_loss_weight,
        }
        words = {
            "statement": (batch.word_rows, batch.words, batch.word_counts),
            "relation": (batch.relation_rows, batch.relations, batch.relation_counts),
        }
        words = {name: own for name, own in words.items() if weights[name] > 0 and len(own[0]) > 0}
        wanted = [batch.label_rows, *(rows for rows, _, _ in words.values())]
        hidden = self.hidden(batch, latents, vision, torch.cat(wanted)).split([len(rows) for rows in wanted])
        logits = self.gemma.logits(hidden[0])
        label = F.cross_entropy(logits, batch.labels, reduction="sum")
        losses = {"label": label, "statement": torch.zeros_like(label), "relation": torch.zeros_like(label)}
        for (name, (_, ids, counts)), states in zip(words.items(), hidden[1:], strict=True):
            each = F.cross_entropy(self.gemma.logits(states), ids, reduction="none")
            losses[name] = (each * (1 / counts.to(each.dtype))).sum()
        total = torch.stack([weights[name] * loss for name, loss in losses.items()]).sum()
        answers = torch.stack([logits[:, token] for token in self.gemma.answer_ids], 1).detach()
        said_true, is_true = answers[:, 1] > answers[:, 0], batch.labels == self.gemma.answer_ids[1]
        found = {"total": total, "logits": answers, "correct": (said_true == is_true).sum()}
        return found | {name: loss.detach() for name, loss in losses.items()}

    def shard(self) -> None:
        """Shard Gemma among the processes of the run, before an optimiser is made: see `theworld.models.fsdp`."""
        object.__setattr__(self, "shell", shard(self.gemma.model, self.gemma.dtype))

    @torch.no_grad()
    def generate(
        self,
        images: Photograph | Sequence[Photograph],
        questions: str | Sequence[str],
        enable_world: bool | None = None,
        **options: Any,
    ) -> list[str]:
        """Return the answers to questions, one about each image (a file, a PIL image or uint8[H, W, 3]).

        A single image serves all questions. `enable_world` False leaves the world tokens out, which is plain Gemma;
        None: as the model was loaded. `options` are those of transformers' `generate`, such as `max_new_tokens=40` or
        `do_sample=False`. Raises ValueError if images and questions do not pair up, ImageError for a photograph that
        cannot be read, StoreMismatch if the settings name another VAE than the projection was trained for.
        """
        with_world = self.enable_world if enable_world is None else enable_world
        ids = self.generate_ids(images, questions, with_world, **options)
        return [t.strip() for t in self.gemma.tokenizer.batch_decode(ids, skip_special_tokens=True)]

    @torch.no_grad()
    def generate_ids(
        self,
        images: Photograph | Sequence[Photograph],
        questions: str | Sequence[str],
        with_world: bool,
        **options: Any,
    ) -> Tensor:
        """Return the new tokens of `generate`, int64[B, longest answer]."""
        pictures, questions = pair_up(images, questions, "questions")
        encoded, names = self._encode_images(pictures, with_world, len(questions))
        packer, device = self.packer(with_world, question_template="{caption}", flex=False), self.gemma.device
        prompts = []
        for name, question in zip(names, questions, strict=True):
            batch, image = packer.pack([Question(name, question)]).to(device), encoded[name]
            latent = None if image.latent is None else image.latent.to(device)
            prompts.append((batch, self.embed(batch, latent, image.vision)))
        return generate_tokens(self.gemma, prompts, **options)

    def score(
        self,
        images: Photograph | Sequence[Photograph],
        statements: str | Sequence[str],
        enable_world: bool | None = None,
        batch_size: int | None = None,
    ) -> list[float]:
        """Return P(true), 0 to 1, of each statement, by the two answers' logits as in an evaluation.

        It is a list in the order given, also for a single statement. Each different photograph is encoded once.
        `images`, `enable_world` and what is raised are as for `generate`. `batch_size`: statements at a time; None: as
        in an evaluation.
        """
        with_world = self.enable_world if enable_world is None else enable_world
        condition = "world" if with_world else "baseline"
        return self.ask(images, statements, [condition], batch_size)[condition]

    @torch.no_grad()
    def ask(
        self,
        images: Photograph | Sequence[Photograph],
        statements: str | Sequence[str],
        conditions: Sequence[str] = ("world",),
        batch_size: int | None = None,
    ) -> dict[str, list[float]]:
        """Return P(true) of each statement, in the order given, under each of these CONDITIONS: see `score`.

        All conditions are in the same batches, where they share their tokens, as in `theworld.evaluation.predict`.
        """
        batch_size = self.config.eval_statements if batch_size is None else batch_size
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; give 1 or more")
        for condition in conditions:
            if condition not in CONDITIONS:
                raise ValueError(f"condition {condition!r}: wanted one of {', '.join(CONDITIONS)}")
        pictures, captions = pair_up(images, statements, "statements")
        encoded, names = self._encode_images(pictures, "world" in conditions, len(captions))
        first = {name: number for number, name in enumerate(encoded)}
        # those of one photograph together
        order = sorted(range(len(captions)), key=lambda i: first[names[i]])
        packer = self.packer()
        found: dict[str, list[float]] = {condition: [0.0] * len(captions) for condition in conditions}
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            questions = [Question(names[i], captions[i]) for i in chosen]
            logits = self._answer_logits(packer, questions, conditions, encoded).cpu()
            rows = logits.unflatten(0, (len(conditions), len(chosen))).tolist()
            for condition, answers in zip(conditions, rows, strict=True):
                for i, (zero, one) in zip(chosen, answers, strict=True):
                    found[condition][i] = p_true(zero, one)
        return found

    def _encode_images(
        self, pictures: Sequence[Photograph], with_world: bool, count: int
    ) -> tuple[dict[str, EncodedImage], list[str]]:
        """Return what `encode_images` does, with `count` names; a single picture serves all of them."""
        encoder = self.encoder if with_world else None
        encoded, names = encode_images(self.gemma, encoder, pictures, self.config.max_image_pixels)
        return encoded, names if len(names) == count else names * count

    def _answer_logits(
        self,
        packer: Packer,
        questions: list[Question],
        conditions: Sequence[str],
        encoded: dict[str, EncodedImage],
    ) -> Tensor:
        """Return the logits of '0' and '1', float32[conditions x questions, 2]."""

        def latents_of(names: Sequence[str]) -> Tensor:
            return torch.cat([latent for name in names if (latent := encoded[name].latent) is not None])

        worlds = [world_source(condition, q.image) for condition in conditions for q in questions]
        batch = packer.pack(questions * len(conditions), worlds)
        latents, device = self.latents(batch, latents_of), self.gemma.device
        vision = [features for name in batch.images if (features := encoded[name].vision) is not None]
        logits = self(
            batch.to(device),
            None if latents is None else latents.to(device),
            torch.cat(vision).to(device) if vision else None,
        )
        return logits[:, list(self.gemma.answer_ids)]
