"""Latents to world tokens: the one part that trains.

Dimensions: B images, C, H, W the latent's channels, height and width, N world tokens, P values a token, D the
width of Gemma's language model.
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

    @property
    def num_tokens(self) -> int:
        """N, the world tokens of one image, without the two brackets."""
        channels, height, width = self.latent_shape
        return channels if self.mode == "channel" else (height // self.patch) * (width // self.patch)

    @property
    def values_per_token(self) -> int:
        """P, so that N x P = C x H x W: every latent value reaches some token."""
        channels, height, width = self.latent_shape
        return height * width if self.mode == "channel" else channels * self.patch**2

    def to_dict(self) -> dict[str, Any]:
        """JSON form; `from_dict` gives an equal object back."""
        return asdict(self) | {"latent_shape": list(self.latent_shape)}

    @classmethod
    def from_settings(cls, config: Config, fingerprint: dict[str, Any], width: int) -> "ProjectionShape":
        """That of a run, for the latents that `fingerprint` describes and a language model `width` wide."""
        return cls(
            latent_shape=tuple(fingerprint["latent_shape"]),
            width=width,
            mode=config.world_mode,
            patch=config.world_patch,
            architecture=config.projection,
            hidden=config.projection_hidden,
            positions=config.world_positions,
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
    """Normalised latents become N world tokens between two trained brackets, at the scale of Gemma's embeddings.

    All of its parameters train, and nothing else does; they are float32 whatever Gemma's dtype is.
    `latents_mean` and `latents_std` (one number a channel, from the VAE) are buffers: the normalisation that
    the diffusion model sees, (z - mean) / std.
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
        self.positions = nn.Parameter(torch.zeros(shape.num_tokens, shape.width)) if shape.positions else None
        self.norm = ScaledNorm(shape.width, scale)
        start = brackets if brackets is not None else torch.zeros(2, shape.width)
        self.brackets = nn.Parameter(start.detach().float().cpu().clone())

    def patches(self, latents: Tensor) -> Tensor:
        """float[B, C, H, W] -> float[B, N, P], row by row over the picture."""
        if tuple(latents.shape[1:]) != self.shape.latent_shape:
            raise ValueError(
                f"latents {tuple(latents.shape[1:])}; this projection takes {self.shape.latent_shape}"
            )
        if self.shape.mode == "channel":
            return latents.flatten(2)
        p = self.shape.patch
        cells = latents.unflatten(3, (-1, p)).unflatten(2, (-1, p))  # B, C, H/p, p, W/p, p
        return cells.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)

    def forward(self, latents: Tensor) -> Tensor:
        """Raw latents as the VAE gives them, float[B, C, H, W] -> float32[B, N, D]."""
        normalised = (latents.float() - self.latents_mean) / self.latents_std
        tokens = self.layers(self.patches(normalised))
        if self.positions is not None:
            tokens = tokens + self.positions
        return self.norm(tokens)
