"""Latents to world tokens: the one part that trains.

Dimensions: B images, T moments (the photograph, then those predicted from it), C, H, W the latent's channels, height
and width, N world tokens of a moment, P values a token, D the width of Gemma's language model.
"""

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from theworld.config import Config


@dataclass(frozen=True)
class ProjectionShape:
    """What it takes to build a projection, and to know what its inputs mean."""

    latent_shape: tuple[int, int, int]  # C, H, W
    width: int  # D
    mode: str = "patch"  # "patch": p x p places a token; "channel": one latent channel a token
    patch: int = 4  # p, in latent pixels
    architecture: str = "mlp"  # "mlp" or "linear"
    hidden: int | None = None  # of the MLP; None: D
    positions: bool = False  # a trained vector for each place
    steps: int = 0  # T - 1, predicted moments after the photograph
    max_steps: int | None = None  # of which the time embedding has a row each; None: steps

    def __post_init__(self) -> None:
        _, height, width = self.latent_shape
        if self.mode not in ("patch", "channel"):
            raise ValueError(f"world_mode {self.mode!r}: wanted 'patch' or 'channel'")
        if self.architecture not in ("mlp", "linear"):
            raise ValueError(f"projection {self.architecture!r}: wanted 'mlp' or 'linear'")
        if self.mode == "patch" and (self.patch < 1 or height % self.patch or width % self.patch):
            raise ValueError(
                f"world_patch {self.patch} does not divide the latent's {height} x {width} places"
            )
        if not 0 <= self.steps <= self.time_rows - 1:
            raise ValueError(f"num_world_steps {self.steps}: wanted 0 to max_world_steps, {self.max_steps}")

    @property
    def time_rows(self) -> int:
        """Rows of the time embedding where there is one: the photograph's and one for each step."""
        return 1 + (self.steps if self.max_steps is None else self.max_steps)

    @property
    def row_shape(self) -> tuple[int, ...]:
        """The shape of what a cache holds of one image: (C, H, W), or (T, C, H, W) where moments follow."""
        return (1 + self.steps, *self.latent_shape) if self.steps else self.latent_shape

    @property
    def num_tokens(self) -> int:
        """T x N, the world tokens of one image, without the two brackets."""
        return (1 + self.steps) * self.tokens_per_moment

    @property
    def tokens_per_moment(self) -> int:
        """N, the first of which are the photograph's own."""
        channels, height, width = self.latent_shape
        return channels if self.mode == "channel" else (height // self.patch) * (width // self.patch)

    @property
    def values_per_token(self) -> int:
        """P, so that N x P = C x H x W: every latent value reaches some token."""
        channels, height, width = self.latent_shape
        return height * width if self.mode == "channel" else channels * self.patch**2

    def check_no_steps(self, instead: str) -> None:
        """ValueError where world tokens take more than a photograph: moments predicted from it, minutes each."""
        if self.steps:
            raise ValueError(
                f"this projection was trained on {self.steps} predicted moments a photograph (num_world_steps), which "
                f"only a cache holds: use tools/eval.py --cache; {instead}"
            )

    def to_dict(self) -> dict[str, Any]:
        """JSON form; `from_dict` gives an equal object back. Without steps it says nothing of them."""
        values = asdict(self) | {"latent_shape": list(self.latent_shape)}
        return values if self.steps else {k: v for k, v in values.items() if k not in ("steps", "max_steps")}

    @classmethod
    def from_settings(cls, config: Config, fingerprint: dict[str, Any], width: int) -> "ProjectionShape":
        """That of a run, for the latents that `fingerprint` describes and a language model `width` wide."""
        steps = fingerprint.get("num_world_steps", 0)
        return cls(
            latent_shape=tuple(fingerprint["latent_shape"]),
            width=width,
            mode=config.world_mode,
            patch=config.world_patch,
            architecture=config.projection,
            hidden=config.projection_hidden,
            positions=config.world_positions,
            steps=steps,
            max_steps=config.max_world_steps if steps else None,
        )

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "ProjectionShape":
        """The inverse of `to_dict`; TypeError for missing or unknown keys."""
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


class WorldProjection(nn.Module):
    """Normalised latents become T x N world tokens between two trained brackets, at the scale of Gemma's embeddings.

    All of its parameters train, and nothing else does; they are float32 whatever Gemma's dtype is.
    `latents_mean` and `latents_std` (one number a channel, from the VAE) are buffers: the normalisation that
    the diffusion model sees, (z - mean) / std. Each moment goes through the same layers; what tells it from the others
    is `time`, a trained vector a moment, which starts at zero and is there only where moments follow the photograph.
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
        channels = shape.latent_shape[0]
        if len(latents_mean) != channels or len(latents_std) != channels or min(latents_std) <= 0:
            raise ValueError(
                f"latents_mean and latents_std have {len(latents_mean)} and {len(latents_std)} numbers (smallest "
                f"std {min(latents_std, default=0)}); wanted {channels} each, every std above 0"
            )
        self.shape = shape
        self.latents_mean: Tensor
        self.latents_std: Tensor
        self.register_buffer("latents_mean", torch.tensor(latents_mean)[:, None, None])
        self.register_buffer("latents_std", torch.tensor(latents_std)[:, None, None])
        if shape.architecture == "linear":
            self.layers: nn.Module = nn.Linear(shape.values_per_token, shape.width)
        else:
            hidden = shape.hidden or shape.width
            first, last = nn.Linear(shape.values_per_token, hidden), nn.Linear(hidden, shape.width)
            self.layers = nn.Sequential(first, nn.GELU(), last)
        places, width = shape.tokens_per_moment, shape.width
        self.positions = nn.Parameter(torch.zeros(places, width)) if shape.positions else None
        self.time = nn.Parameter(torch.zeros(shape.time_rows, width)) if shape.steps else None
        self.norm = ScaledNorm(shape.width, scale)
        start = brackets if brackets is not None else torch.zeros(2, shape.width)
        self.brackets = nn.Parameter(start.detach().float().cpu().clone())

    def patches(self, latents: Tensor) -> Tensor:
        """float[B, C, H, W] -> float[B, N, P], row by row over the picture."""
        if self.shape.mode == "channel":
            return latents.flatten(2)
        p = self.shape.patch
        cells = latents.unflatten(3, (-1, p)).unflatten(2, (-1, p))  # B, C, H/p, p, W/p, p
        return cells.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)

    def forward(self, latents: Tensor) -> Tensor:
        """Raw latents as the VAE gives them, float[B, *row_shape] -> float32[B, T x N, D], moment after moment."""
        if tuple(latents.shape[1:]) != self.shape.row_shape:
            raise ValueError(
                f"latents {tuple(latents.shape[1:])}; this projection takes {self.shape.row_shape}"
            )
        normalised = (latents.float() - self.latents_mean) / self.latents_std
        moments = normalised.flatten(0, 1) if self.time is not None else normalised
        tokens = self.layers(self.patches(moments))
        if self.positions is not None:
            tokens = tokens + self.positions
        if self.time is not None:
            by_moment = tokens.unflatten(0, (len(latents), 1 + self.shape.steps))
            tokens = (by_moment + self.time[: 1 + self.shape.steps, None]).flatten(1, 2)
        return self.norm(tokens)
