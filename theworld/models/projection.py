"""The projection of latents to world tokens, the part that trains.

An encoder's rows are a grid, [C, H, W], of which a patch or a channel becomes a token, or tokens already, [N, C].

Dimensions: B images, T latent frames (the photograph's, then the frames predicted after it), C, H, W the latent's
channels, height and width, N world tokens a frame, P values a token, h the width inside, D the width of Gemma's
language model.
"""

from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from theworld.config.config import PROJECTIONS, Config
from theworld.utils.commands import PLACEHOLDER, following

DEEP = ("conv", "transformer")  # architectures in which a token depends on more than its own patch
HEAD = 32  # largest width of an attention head of the transformer


@dataclass(frozen=True)
class ProjectionShape:
    """The sizes of a projection, and the meaning of its inputs."""

    latent_shape: tuple[int, ...]  # C, H, W, or N, C
    width: int  # D
    # of a grid: "patch": p x p latent pixels a token; "channel": one latent channel a token
    mode: str = "patch"
    patch: int = 4  # p, in latent pixels
    architecture: str = "mlp"  # one of PROJECTIONS
    hidden: int | None = None  # width inside; None: D, and at most 512 for one of DEEP
    positions: bool = False  # add a trained vector for each patch or channel
    steps: int = 0  # T - 1, the predicted frames
    max_steps: int | None = None  # predicted frames with a row in the time embedding; None: steps
    depth: int = 2  # convolutions or transformer layers of one of DEEP
    trained_inputs: bool = False  # add trained rows, [*latent_shape], to those of each image

    def __post_init__(self) -> None:
        if self.mode not in ("patch", "channel"):
            raise ValueError(f"world_mode {self.mode!r}: wanted 'patch' or 'channel'")
        if self.architecture not in PROJECTIONS:
            raise ValueError(f"projection {self.architecture!r}: wanted {', '.join(PROJECTIONS)}")
        if self.architecture == "conv" and self.mode != "patch":
            raise ValueError(
                "projection 'conv' needs the grid of patches, and world_mode 'channel' has none; wanted "
                "projection transformer, mlp or linear, or world_mode patch"
            )
        if self.architecture == "transformer" and self.inner > HEAD and self.inner % HEAD:
            raise ValueError(f"projection_hidden {self.inner}: a transformer wants a multiple of {HEAD}")
        if self.has_grid:
            self._check_patch()
        else:
            self._check_tokens()
        if not 0 <= self.steps <= self.time_rows - 1:
            raise ValueError(f"num_world_steps {self.steps}: wanted 0 to max_world_steps, {self.max_steps}")

    def _check_patch(self) -> None:
        _, height, width = self.latent_shape
        if self.mode == "patch" and (self.patch < 1 or height % self.patch or width % self.patch):
            raise ValueError(
                f"world_patch {self.patch} does not divide the latent's {height} x {width} places"
            )

    def _check_tokens(self) -> None:
        shape = " x ".join(map(str, self.latent_shape))
        if len(self.latent_shape) != 2:
            raise ValueError(f"rows of shape {shape}; wanted a grid, C x H x W, or tokens, N x C")
        if self.architecture == "conv" or self.mode == "channel":
            raise ValueError(
                f"projection {self.architecture!r} and world_mode {self.mode!r}: rows of shape {shape} are tokens, "
                "without a grid; wanted projection transformer, mlp or linear, and world_mode patch"
            )

    @property
    def has_grid(self) -> bool:
        """Whether rows are a grid, C x H x W, and not tokens."""
        return len(self.latent_shape) == 3

    @property
    def num_channels(self) -> int:
        """C, the number of values that have a mean and a standard deviation of their own."""
        return self.latent_shape[0] if self.has_grid else self.latent_shape[1]

    @property
    def inner(self) -> int:
        """The width inside the layers."""
        return self.hidden or (min(self.width, 512) if self.architecture in DEEP else self.width)

    @property
    def grid(self) -> tuple[int, int]:
        """The numbers of patches from top to bottom and from left to right, in mode "patch"."""
        return self.latent_shape[1] // self.patch, self.latent_shape[2] // self.patch

    @property
    def time_rows(self) -> int:
        """The rows of the time embedding if there is one: the photograph's and one for each predicted frame."""
        return 1 + (self.steps if self.max_steps is None else self.max_steps)

    @property
    def row_shape(self) -> tuple[int, ...]:
        """The shape of an image's rows in a cache: `latent_shape`, or (T, C, H, W) with predicted frames."""
        return (1 + self.steps, *self.latent_shape) if self.steps else self.latent_shape

    @property
    def num_tokens(self) -> int:
        """T x N, the world tokens of one image, without the two brackets."""
        return (1 + self.steps) * self.tokens_per_frame

    @property
    def tokens_per_frame(self) -> int:
        """N; the photograph's own tokens come first."""
        if not self.has_grid:
            return self.latent_shape[0]
        channels, height, width = self.latent_shape
        return channels if self.mode == "channel" else (height // self.patch) * (width // self.patch)

    @property
    def values_per_token(self) -> int:
        """P; N x P = C x H x W, so every latent value reaches some token."""
        if not self.has_grid:
            return self.latent_shape[1]
        channels, height, width = self.latent_shape
        return height * width if self.mode == "channel" else channels * self.patch**2

    def check_no_steps(self, instead: str) -> None:
        """Raise ValueError if world tokens need predicted frames, which take minutes a photograph."""
        if self.steps:
            raise ValueError(
                f"this projection was trained on {self.steps} predicted frames a photograph (num_world_steps), which "
                f"only a cache holds; {instead}; evaluate with: {following('eval', '--cache', PLACEHOLDER)}"
            )

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form, without steps or depth where there are none; `from_dict` is the inverse."""
        values = asdict(self) | {"latent_shape": list(self.latent_shape)}
        absent = [] if self.steps else ["steps", "max_steps"]
        absent += [] if self.architecture in DEEP else ["depth"]
        absent += [] if self.trained_inputs else ["trained_inputs"]
        return {k: v for k, v in values.items() if k not in absent}

    @classmethod
    def from_settings(cls, config: Config, fingerprint: dict[str, Any], width: int) -> "ProjectionShape":
        """Return the shape for a run's settings, the latents of `fingerprint` and a language model `width` wide."""
        steps = fingerprint.get("num_world_steps", 0)
        return cls(
            latent_shape=tuple(fingerprint["latent_shape"]),
            width=width,
            mode=config.world_mode,
            patch=fingerprint.get("world_patch", config.world_patch),  # of a grid of other places: its own
            architecture=config.projection,
            hidden=config.projection_hidden,
            positions=config.world_positions,
            steps=steps,
            max_steps=config.max_world_steps if steps else None,
            depth=config.projection_layers if config.projection in DEEP else 2,
            trained_inputs=fingerprint.get("trained_inputs", False),
        )

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "ProjectionShape":
        """Return the shape of its JSON form. Raises TypeError for missing or unknown keys."""
        return cls(**(values | {"latent_shape": tuple(values["latent_shape"])}))


class ScaledNorm(nn.Module):
    """x / rms(x) times a trained scale of each channel, which starts at `scale`.

    Gemma's layers expect inputs at the scale of its embeddings; a projection without this starts with losses
    in the hundreds. RMS normalisation: Zhang and Sennrich 2019, arXiv 1910.07467.
    """

    def __init__(self, width: int, scale: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((width,), scale))

    def forward(self, x: Tensor) -> Tensor:
        """float[..., D] -> float[..., D]."""
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.weight


class ConvLayers(nn.Module):
    """A linear layer, residual 3 x 3 convolutions over the grid of patches, a linear layer.

    After k convolutions a token depends on the patches up to k away (He et al. 2016, arXiv 1603.05027, without norms).
    """

    def __init__(self, shape: ProjectionShape) -> None:
        super().__init__()
        self.grid = shape.grid
        self.first = nn.Linear(shape.values_per_token, shape.inner)
        self.convolutions = nn.ModuleList(
            nn.Conv2d(shape.inner, shape.inner, 3, padding=1) for _ in range(shape.depth)
        )
        self.last = nn.Linear(shape.inner, shape.width)

    def forward(self, patches: Tensor) -> Tensor:
        """float[B, N, P] -> float[B, N, D]."""
        x = self.first(patches).transpose(1, 2).unflatten(2, self.grid)
        for convolution in self.convolutions:
            x = x + convolution(F.gelu(x))
        return self.last(F.gelu(x).flatten(2).transpose(1, 2))


class TransformerLayer(nn.Module):
    """Self-attention among the tokens of a frame and a feed-forward layer, each after a norm (arXiv 2002.04745)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = max(1, width // HEAD)
        self.attention_norm, self.feed_forward_norm = nn.RMSNorm(width), nn.RMSNorm(width)
        self.queries_keys_values = nn.Linear(width, 3 * width)
        self.attended = nn.Linear(width, width)
        self.feed_forward = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """float[B, N, h] -> float[B, N, h]."""
        qkv = self.queries_keys_values(self.attention_norm(x)).unflatten(2, (3, self.heads, -1))
        queries, keys, values = qkv.permute(2, 0, 3, 1, 4)
        seen = F.scaled_dot_product_attention(queries, keys, values)
        x = x + self.attended(seen.transpose(1, 2).flatten(2))
        return x + self.feed_forward(self.feed_forward_norm(x))


class TransformerLayers(nn.Module):
    """A linear layer, a trained vector for each token's position (attention by itself has no order), transformer layers
    over all tokens of a frame, a norm, a linear layer."""

    def __init__(self, shape: ProjectionShape) -> None:
        super().__init__()
        self.first = nn.Linear(shape.values_per_token, shape.inner)
        self.places = nn.Parameter(0.1 * torch.randn(shape.tokens_per_frame, shape.inner))
        self.layers = nn.ModuleList(TransformerLayer(shape.inner) for _ in range(shape.depth))
        self.norm = nn.RMSNorm(shape.inner)
        self.last = nn.Linear(shape.inner, shape.width)

    def forward(self, patches: Tensor) -> Tensor:
        """float[B, N, P] -> float[B, N, D]."""
        x = self.first(patches) + self.places
        for layer in self.layers:
            x = layer(x)
        return self.last(self.norm(x))


def make_layers(shape: ProjectionShape) -> nn.Module:
    """Return the layers of the shape's architecture, float[B, N, P] -> float[B, N, D]."""
    if shape.architecture == "linear":
        return nn.Linear(shape.values_per_token, shape.width)
    if shape.architecture == "conv":
        return ConvLayers(shape)
    if shape.architecture == "transformer":
        return TransformerLayers(shape)
    first, last = nn.Linear(shape.values_per_token, shape.inner), nn.Linear(shape.inner, shape.width)
    return nn.Sequential(first, nn.GELU(), last)


class WorldProjection(nn.Module):
    """Normalised latents become T x N world tokens between two trained brackets, at the scale of Gemma's embeddings.

    All of its parameters train; they are float32 whatever Gemma's dtype is. `latents_mean` and `latents_std` (one
    number a channel, from the VAE) are buffers: the normalisation that the diffusion model gets, (z - mean) / std.
    Each frame goes through the same layers. With predicted frames, `time`, a trained vector a frame that starts at
    zero, tells them apart. `inputs`, which few projections have, are trained rows that are added to every image's.
    """

    def __init__(
        self,
        shape: ProjectionShape,
        latents_mean: list[float],
        latents_std: list[float],
        scale: float = 1.0,
        brackets: Tensor | None = None,
    ) -> None:
        super().__init__()
        channels = shape.num_channels
        if len(latents_mean) != channels or len(latents_std) != channels or min(latents_std) <= 0:
            raise ValueError(
                f"latents_mean and latents_std have {len(latents_mean)} and {len(latents_std)} numbers (smallest "
                f"std {min(latents_std, default=0)}); wanted {channels} each, every std above 0"
            )
        self.shape = shape
        self.latents_mean: Tensor
        self.latents_std: Tensor
        a_channel = (-1, 1, 1) if shape.has_grid else (-1,)
        self.register_buffer("latents_mean", torch.tensor(latents_mean).view(a_channel))
        self.register_buffer("latents_std", torch.tensor(latents_std).view(a_channel))
        self.layers = make_layers(shape)
        tokens, width = shape.tokens_per_frame, shape.width
        self.positions = nn.Parameter(torch.zeros(tokens, width)) if shape.positions else None
        self.time = nn.Parameter(torch.zeros(shape.time_rows, width)) if shape.steps else None
        # As large as rows that are standardised; they come last, so that others start as they would without them.
        self.inputs = nn.Parameter(torch.randn(shape.latent_shape)) if shape.trained_inputs else None
        self.norm = ScaledNorm(shape.width, scale)
        start = brackets if brackets is not None else torch.zeros(2, shape.width)
        self.brackets = nn.Parameter(start.detach().float().cpu().clone())

    def patches(self, latents: Tensor) -> Tensor:
        """float[B, C, H, W] -> float[B, N, P], row by row over the picture; tokens, float[B, N, C], are as they are."""
        if not self.shape.has_grid:
            return latents
        if self.shape.mode == "channel":
            return latents.flatten(2)
        p = self.shape.patch
        cells = latents.unflatten(3, (-1, p)).unflatten(2, (-1, p))  # B, C, H/p, p, W/p, p
        return cells.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)

    def forward(self, latents: Tensor) -> Tensor:
        """Raw latents as the VAE gives them, float[B, *row_shape] -> float32[B, T x N, D], frame after frame."""
        if tuple(latents.shape[1:]) != self.shape.row_shape:
            raise ValueError(
                f"latents {tuple(latents.shape[1:])}; this projection takes {self.shape.row_shape}"
            )
        normalised = (latents.float() - self.latents_mean) / self.latents_std
        if self.inputs is not None:
            normalised = normalised + self.inputs
        frames = normalised.flatten(0, 1) if self.time is not None else normalised
        tokens = self.layers(self.patches(frames))
        if self.positions is not None:
            tokens = tokens + self.positions
        if self.time is not None:
            by_frame = tokens.unflatten(0, (len(latents), 1 + self.shape.steps))
            tokens = (by_frame + self.time[: 1 + self.shape.steps, None]).flatten(1, 2)
        return self.norm(tokens)
