"""The seam that every encoder fits: what its rows are and mean, and the way from a photograph to them.

An encoder is one class: `describe` says what it would store, from settings and config files alone; `prepare` makes its
input, in a process without a GPU; `encode` makes rows of a batch of these. `EncoderSpec` is the only source of a
fingerprint: extraction, training, evaluation, the dry run and the doctor ask it, so they cannot disagree.

Rows are a grid, [C, H, W], or tokens, [N, C]; with n predicted frames after the photograph, [1 + n, C, H, W].
"""

import enum
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple, Protocol, Self

import numpy as np
import torch
from torch import Tensor

from theworld.config.config import Config
from theworld.data.images import PREPROCESSING
from theworld.store.format import STORE_KEYS, Difference, StoreMismatch, fingerprint_differences
from theworld.store.shard import ArraySpec
from theworld.utils import files
from theworld.utils.device import resolve_device, resolve_dtype, wants_compile

# Fields of a fingerprint that say how exactly a number was computed, not what it means: a cache serves training
# whatever they are, and is extended only by an encoder that has the same.
PRECISION = frozenset(
    "arithmetic compute_dtype compiled storage_dtype encode_batch_size torch diffusers transformers cosmos_guardrail "
    "pillow".split()
)
# Fields of a projection's fingerprint that its run measured on its training images; the rows are the same whatever
# they are.
MEASURED = ("latents_mean", "latents_std", "standardized_on")
CHANNELS, CELL = 16, 8  # of a latent of the Cosmos VAE: its channels, and the side of a place in pixels


class NotYetKnown(enum.Enum):
    """The value of a field that is not known yet; it is compared as soon as it is."""

    UNTIL_DOWNLOADED = "known once the model's config file is on this machine"
    UNTIL_LOADED = "known once the model's weights are read"


UNTIL_DOWNLOADED, UNTIL_LOADED = NotYetKnown


class Weights(NamedTuple):
    """Where an encoder's weights are: `file` is a config file that lies beside them."""

    topic: str
    model: str  # a name on the hub or a local folder
    file: str


@dataclass(frozen=True)
class Use:
    """How a projection takes the rows of a store, where it does not take each image's own as they are."""

    # Fields of the projection's fingerprint beside those of the store; a value can be NotYetKnown.
    fields: Mapping[str, Any] = field(default_factory=dict)
    # dtype[B, *row_shape] as stored -> dtype[B, *latent_shape] as the projection takes them
    view: Callable[[Tensor], Tensor] | None = None
    # SHA-256 by image path, of all images of the store -> for each the image whose row stands for it
    pairs: Callable[[Mapping[str, str]], Mapping[str, str]] | None = None


@dataclass(frozen=True)
class EncoderSpec:
    """What an encoder's rows are and mean."""

    name: str  # of the store's folder in a cache and of its array
    row_shape: tuple[int, ...] | NotYetKnown
    dtype: str  # in which rows are stored
    weights: Weights | None  # None: an encoder without any
    fields: Mapping[str, Any]  # the fingerprint; a value can be NotYetKnown
    # Fields of PRECISION that the settings name, so that training asks for them too.
    demanded: frozenset[str] = frozenset()
    use: Use = Use()
    stored: bool = True  # False: every row is zeros, of which no store is kept

    @property
    def array(self) -> ArraySpec:
        """The array of the store."""
        assert not isinstance(self.row_shape, NotYetKnown), (
            f"{self.name}: the shape of a row is not known yet"
        )
        return ArraySpec(self.name, self.row_shape, self.dtype)

    @property
    def unknown(self) -> set[str]:
        """The names of the fields that are not known yet."""
        return {key for key, value in self.fields.items() if isinstance(value, NotYetKnown)}

    def fingerprint(self) -> dict[str, Any]:
        """Return the fingerprint of a store of these rows; all fields have to be known."""
        assert not self.unknown, f"{self.name}: {sorted(self.unknown)} are not known yet"
        return dict(self.fields)

    def having(self, **fields: Any) -> Self:
        """Return the same with these values of the fingerprint."""
        return replace(self, fields={**self.fields, **fields})

    def check_store(self, root: Path, shard_size: int) -> None:
        """Raise StoreMismatch where a store that is there cannot be gone on with: one field that is known differs.

        Raises StoreError for a damaged store.json. What is only known once the model is loaded is compared then, by
        `Store.create`.
        """
        if not (root / "store.json").exists():
            return
        stored, _ = files.read_sealed(root / "store.json", STORE_KEYS)
        differences = self._differences(stored["fingerprint"], set())
        if not isinstance(self.row_shape, NotYetKnown):
            shape = list(self.row_shape)
            arrays = [{"name": self.name, "shape": shape, "dtype": self.dtype}]
            if stored["arrays"] != arrays and not differences:
                differences.append(("arrays", stored["arrays"], arrays))
        if stored["shard_size"] != shard_size:
            differences.append(("shard_size", stored["shard_size"], shard_size))
        if differences:
            raise StoreMismatch(root, differences)

    def check_compatible(self, root: Path, fingerprint: Mapping[str, Any]) -> None:
        """Raise StoreMismatch, field by field, where rows of this fingerprint have another meaning than these."""
        differences = self._differences(fingerprint, PRECISION - self.demanded)
        if differences:
            raise StoreMismatch(root, differences)

    def check_serves(self, trained: Mapping[str, Any]) -> None:
        """Raise StoreMismatch, field by field, where these rows are others than those that a checkpoint was trained on.
        `trained`: the fingerprint in the checkpoint."""
        self.check_taken(Path(self.weights.model if self.weights else self.name), self.fields, trained)

    def check_taken(self, root: Path, stored: Mapping[str, Any], trained: Mapping[str, Any]) -> None:
        """Raise StoreMismatch, field by field, where rows of a store, taken as here, are others than those that a
        checkpoint was trained on. `stored`, `trained`: the fingerprints of the two."""
        own = {**stored, **self.use.fields}
        unknown = frozenset(key for key, value in own.items() if isinstance(value, NotYetKnown))
        check_compatible(root, own, trained, unknown)

    def _differences(self, cached: Mapping[str, Any], ignored: set[str] | frozenset[str]) -> list[Difference]:
        left_out = self.unknown | ignored
        found, wanted = (
            {key: value for key, value in fields.items() if key not in left_out}
            for fields in (cached, self.fields)
        )
        return fingerprint_differences(found, wanted)


def check_compatible(
    root: Path, cached: Mapping[str, Any], wanted: Mapping[str, Any], unknown: frozenset[str] = frozenset()
) -> None:
    """Raise StoreMismatch, field by field, unless the rows of two fingerprints can serve one projection.

    Statistics that were measured are no part of what rows mean. `unknown`: fields that are not compared.
    """
    ignored = PRECISION | unknown
    if "standardization" in cached or "standardization" in wanted:
        ignored = ignored.union(MEASURED)
    found, needed = (
        {key: value for key, value in fields.items() if key not in ignored} for fields in (cached, wanted)
    )
    differences = fingerprint_differences(found, needed)
    if differences:
        raise StoreMismatch(root, differences)


class Encoder(Protocol):
    """Photographs to rows. `like`: the fingerprint of rows that are to be made again, in the model's same revision;
    none: the newest revision."""

    name: str  # that of its spec
    spec: EncoderSpec  # with every field known
    device: torch.device

    def __init__(self, config: Config, like: Mapping[str, Any] | None = None) -> None: ...

    @staticmethod
    def describe(config: Config, like: Mapping[str, Any] | None = None) -> EncoderSpec:
        """Return what the encoder of these settings stores. Loads no weights and downloads nothing."""
        ...

    @property
    def prepare(self) -> Callable[[np.ndarray], Tensor]:
        """uint8[H, W, 3] -> what `encode` takes of one photograph, on the CPU.

        It is pickled and runs in worker processes, so it holds nothing of the model.
        """
        ...

    def encode(self, prepared: Tensor) -> Tensor:
        """[B, ...] -> dtype[B, *row_shape] on the device; may return before a GPU is done."""
        ...


def encode_alone(encoder: Encoder, pixels: np.ndarray) -> Tensor:
    """uint8[H, W, 3] -> dtype[1, *latent_shape] on the encoder's device: a photograph's row by itself, as a projection
    takes it."""
    rows, view = encoder.encode(encoder.prepare(pixels)[None]), encoder.spec.use.view
    return rows if view is None else view(rows)


def latent_shape(config: Config) -> tuple[int, int, int]:
    """Return the shape of a latent of the Cosmos VAE, [C, H, W], which its controls share."""
    side = config.latent_size // CELL
    return CHANNELS, side, side


def compute_dtype(config: Config) -> str:
    """Return the name of the dtype in which these settings compute frozen models."""
    return str(resolve_dtype(config.dtype, resolve_device(config.device))).removeprefix("torch.")


def common_fields(config: Config, storage_dtype: str, *libraries: str) -> dict[str, Any]:
    """Return the fields of a fingerprint that every encoder has: pixels, dtypes, batch size, versions of libraries."""
    pixels = {f"preprocessing_{key}": value for key, value in PREPROCESSING.items()}
    fields = {
        "compute_dtype": compute_dtype(config),
        "storage_dtype": storage_dtype,
        "encode_batch_size": config.encode_batch_size,
    }
    return pixels | fields | {name: version(name) for name in ("torch", "pillow", *libraries)}


def compiled_field(config: Config) -> dict[str, bool]:
    """Return the field of an encoder that is compiled, which rounds elsewhere; nothing for another."""
    return {"compiled": True} if wants_compile(config.compile, resolve_device(config.device)) else {}
