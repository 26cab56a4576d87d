"""The frozen Cosmos encoder: a photograph becomes a latent, and what that latent means.

Cosmos-Predict2 carries the Wan 2.1 video VAE. Its convolutions are causal in time, so for a single frame
every tap but the last one sees zero padding: a causal 3-D convolution acts as the 2-D convolution with
the weight `weight[:, :, -1]`, exactly (0.64 instead of 1.77 TFLOP an image at 512 x 512 pixels).

diffusers takes seconds to load, and training asks only what latents mean, so it is loaded with the weights.

Dimensions: B images, C latent channels (16), H, W height and width; latents are 8 times smaller than pixels.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from theworld.config.config import Config
from theworld.data.square import Square
from theworld.models.encoder import (
    UNTIL_DOWNLOADED,
    UNTIL_LOADED,
    EncoderSpec,
    NotYetKnown,
    Weights,
    common_fields,
    compiled_field,
    compute_dtype,
)
from theworld.models.pretrained import load_pretrained
from theworld.models.serialization import weights_sha256
from theworld.store.format import LATENTS
from theworld.utils.device import resolve_device, resolve_dtype, seeded, torch_dtype, wants_compile
from theworld.utils.hub import VAE_FILE, file_at_hand, hub_revision, model_id

if TYPE_CHECKING:
    from diffusers import AutoencoderKLWan
    from diffusers.models.autoencoders.autoencoder_kl_wan import (
        WanAttentionBlock,
        WanCausalConv3d,
        WanResidualBlock,
        WanRMS_norm,
    )

SPATIAL_FACTOR = 8
# Raise it whenever this file computes the same by other steps, which round elsewhere: an unfinished cache is then not
# extended, and a finished one serves as ever.
ARITHMETIC = 2
LARGEST_SCORES = 2**30  # values; in float32 4 GiB


class FrameConv(nn.Module):
    """A causal 3-D convolution as it acts on one frame: 2-D, with the kernel's last temporal tap."""

    def __init__(self, conv: WanCausalConv3d) -> None:
        super().__init__()
        # `_padding` is torch's F.pad order: (left, right, top, bottom, past, future)
        self.padding = (conv._padding[2], conv._padding[0])
        self.stride = conv.stride[1:]
        self.weight = nn.Parameter(conv.weight[:, :, -1].detach().clone(), requires_grad=False)
        self.bias = conv.bias

    def forward(self, x: Tensor, cache_x: Tensor | None = None) -> Tensor:
        """x: float[B, C, 1, H, W] -> float[B, C', 1, H', W']."""
        assert cache_x is None, "one frame has no frames before it"
        assert x.shape[2] == 1, "one frame"
        return F.conv2d(x.squeeze(2), self.weight, self.bias, self.stride, self.padding).unsqueeze(2)


class FrameNorm(nn.Module):
    """diffusers' RMS norm over channels with the same steps, and so the same bits, but in place where it can be: on a
    CPU a step takes longest where its result needs new memory."""

    def __init__(self, norm: WanRMS_norm) -> None:
        super().__init__()
        assert norm.channel_first
        self.scale, self.gamma, self.bias = norm.scale, norm.gamma, norm.bias

    def forward(self, x: Tensor) -> Tensor:
        """x: float[B, C, ...] -> the same, in memory of its own."""
        wide = x.float()
        length = torch.linalg.vector_norm(wide, dim=1, keepdim=True).clamp_min_(1e-12)
        normed = (wide / length).to(x.dtype).mul_(self.scale).mul_(self.gamma)
        return normed.add_(self.bias) if isinstance(self.bias, Tensor) else normed  # else it is 0


class FrameBlock(nn.Module):
    """diffusers' residual block, with the same steps, in place where they can be."""

    def __init__(self, block: WanResidualBlock) -> None:
        super().__init__()
        self.norm1, self.conv1, self.norm2, self.conv2 = block.norm1, block.conv1, block.norm2, block.conv2
        self.activation, self.shortcut = block.nonlinearity, block.conv_shortcut

    def forward(self, x: Tensor, feat_cache: None = None, feat_idx: object = None) -> Tensor:
        """x: float[B, C, 1, H, W] -> float[B, C', 1, H, W]."""
        assert feat_cache is None, "one frame has no frames before it"
        inner = self.conv1(self.activation(self.norm1(x)))
        return self.conv2(self.activation(self.norm2(inner))).add_(self.shortcut(x))


class FrameAttention(nn.Module):
    """diffusers' attention among the places of a frame, with a single head of all channels."""

    def __init__(self, block: WanAttentionBlock) -> None:
        super().__init__()
        self.norm, self.to_qkv, self.proj = block.norm, block.to_qkv, block.proj

    def forward(self, x: Tensor) -> Tensor:
        """x: float[B, C, 1, H, W] -> the same."""
        frames = x.squeeze(2)
        qkv = self.to_qkv(self.norm(frames)).permute(0, 2, 3, 1).flatten(1, 2)  # B, places, 3 C
        attended = attend(*qkv.chunk(3, -1)).unflatten(1, frames.shape[2:]).permute(0, 3, 1, 2)
        return self.proj(attended).unsqueeze(2) + x


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention of one head, dtype[B, N, C] each. No fused kernel for a GPU is fast at heads of 384, and one frame's
    scores fit into memory, so there it is two products with a softmax between them."""
    scores_size = query.shape[0] * query.shape[1] * key.shape[1]
    if query.is_cuda and scores_size <= LARGEST_SCORES:
        return by_products(query, key, value)
    query, key, value = (x.unsqueeze(1) for x in (query, key, value))
    return F.scaled_dot_product_attention(query, key, value).squeeze(1)


def by_products(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The same with all scores written out, in float32 whatever the dtype of the rest."""
    query = query * query.shape[-1] ** -0.5
    wide: Any = {} if query.dtype == torch.float32 else {"out_dtype": torch.float32}
    scores = torch.bmm(query, key.mT, **wide)
    return scores.softmax(-1).type_as(value) @ value


def to_frame_modules(module: nn.Module) -> None:
    """Put modules for one frame in the place of diffusers'."""
    from diffusers.models.autoencoders import autoencoder_kl_wan as wan

    kinds: dict[type, type] = {
        wan.WanCausalConv3d: FrameConv,
        wan.WanRMS_norm: FrameNorm,
        wan.WanResidualBlock: FrameBlock,
        wan.WanAttentionBlock: FrameAttention,
    }
    for name, child in list(module.named_children()):
        to_frame_modules(child)
        if type(child) in kinds:
            setattr(module, name, kinds[type(child)](child))
        elif isinstance(child, nn.SiLU):
            child.inplace = True  # what it takes is a norm's own memory


class CosmosEncoder:
    """The encoder half of an `AutoencoderKLWan`, frozen, for single frames.

    `name_or_path` is a hub name (the VAE in its subfolder `vae`) or a local folder: either the VAE's own, or
    one with a `vae` subfolder. Nothing else of the pipeline is loaded: no diffusion transformer, no text
    encoder, no guardrail.
    """

    def __init__(
        self,
        name_or_path: str,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        compile: bool = False,
        revision: str | None = None,
        seed: int | None = None,
    ) -> None:
        """`compile`: with torch.compile, once for each shape of batch (half a minute at the first one). `revision`: the
        commit of a hub model; None: the newest. `seed`: of random weights; None: the published ones."""
        self.compiled = compile
        self.device = torch.device(device)
        self.dtype = dtype
        vae = load_vae(name_or_path, revision) if seed is None else random_vae(name_or_path, revision, seed)
        self.revision = revision or hub_revision(name_or_path, "vae/config.json")
        self.config = vae.config
        if vae.config.patch_size is not None or vae.config.is_residual:
            raise ValueError(
                f"{name_or_path}: a VAE of the Wan 2.2 kind (patch_size {vae.config.patch_size}, is_residual "
                f"{vae.config.is_residual}); TheWorld reads the Wan 2.1 kind that Cosmos-Predict2 carries"
            )
        # In float32 and before anything is rearranged, so that it depends on neither dtype nor device.
        self.weights_sha256 = weights_sha256(
            {k: v for k, v in vae.state_dict().items() if k.startswith(("encoder.", "quant_conv."))}
        )
        to_frame_modules(vae.encoder)
        quant = FrameConv(vae.quant_conv) if vae.quant_conv is not None else nn.Identity()
        self.encoder, self.quant_conv = (self._frozen(module) for module in (vae.encoder, quant))
        self._run = torch.compile(self._means, fullgraph=True, dynamic=False) if compile else self._means

    def _frozen(self, module: nn.Module) -> nn.Module:
        # channels_last, the order in which a GPU's convolutions read: without it each one turns its input around
        module.to(self.device, self.dtype).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return module.eval().requires_grad_(False)

    @property
    def channels(self) -> int:
        """The number of latent channels."""
        return int(self.config.z_dim)

    def latent_shape(self, size: int) -> tuple[int, int, int]:
        """The latent's shape (C, H, W) for a square picture of `size` pixels a side."""
        if size % (2 * SPATIAL_FACTOR) != 0 or size <= 0:
            raise ValueError(
                f"latent_size {size}: the side of the picture must be a positive multiple of {2 * SPATIAL_FACTOR}"
            )
        return self.channels, size // SPATIAL_FACTOR, size // SPATIAL_FACTOR

    @torch.inference_mode()
    def encode(self, pixels: Tensor) -> Tensor:
        """The mean of the posterior, not normalised: diffusers' `encode(pixels).latent_dist.mode()`.

        pixels: uint8[B, 3, H, W], RGB, or float[B, 3, H, W], the same in [-1, 1]. Returns dtype[B, C, H/8, W/8] on
        the encoder's device; with uint8 there it does not wait for a GPU. Raises ValueError for another shape or
        range: diffusers itself takes 0..255 silently.
        """
        if pixels.ndim != 4 or pixels.shape[1] != 3:
            raise ValueError(f"pixels have shape {tuple(pixels.shape)}; wanted [B, 3, H, W]")
        if pixels.dtype == torch.uint8:
            pixels = unit_range(pixels.to(self.device, non_blocking=True))
        else:
            low, high = pixels.aminmax()
            if low < -1 or high > 1:
                raise ValueError(f"pixels range over [{low:.3g}, {high:.3g}]; wanted [-1, 1] (x / 127.5 - 1)")
        return self._run(pixels.to(self.device, self.dtype, memory_format=torch.channels_last))

    def _means(self, pixels: Tensor) -> Tensor:
        moments = self.quant_conv(self.encoder(pixels.unsqueeze(2))).squeeze(2)
        return moments[:, : self.channels]


def unit_range(pixels: Tensor) -> Tensor:
    """uint8[...] -> float32[...] in [-1, 1] on the same device, with the bits of `square.to_unit_range`.

    The divisor is a tensor there, because by a plain number CUDA multiplies with the rounded 1 / 127.5. For the same
    reason this is left out of what is compiled.
    """
    return pixels.float() / torch.full((), 127.5, device=pixels.device) - 1


def load_vae(name_or_path: str, revision: str | None = None) -> AutoencoderKLWan:
    """Return the whole VAE as diffusers loads it, in float32, from the hub or a local folder.

    Raises ValueError as `load_pretrained` does.
    """
    from diffusers import AutoencoderKLWan

    options = {"torch_dtype": torch.float32, "revision": revision}
    return load_pretrained(AutoencoderKLWan, name_or_path, _subfolder(name_or_path), **options)


def random_vae(name_or_path: str, revision: str | None, seed: int) -> AutoencoderKLWan:
    """Return a VAE of the same architecture with the weights that torch draws for its layers, in float32.

    Only the VAE's config file is read. Raises OSError without it.
    """
    from diffusers import AutoencoderKLWan

    place = {"subfolder": subfolder} if (subfolder := _subfolder(name_or_path)) else {}
    architecture = AutoencoderKLWan.load_config(name_or_path, revision=revision, **place)
    with seeded(seed):
        return AutoencoderKLWan.from_config(architecture)


def _subfolder(name_or_path: str) -> str:
    """Return the folder of a model's VAE: "" where the model is the VAE itself."""
    own_folder = (Path(name_or_path) / "config.json").is_file()
    if Path(name_or_path).is_dir() and not own_folder and not (Path(name_or_path) / "vae").is_dir():
        raise ValueError(
            f"{name_or_path}: neither config.json nor a folder vae/ in it; name a folder with a VAE"
        )
    return "" if own_folder else "vae"


class CosmosLatents:
    """The encoder of photographs to Cosmos latents: see `theworld.models.encoder.Encoder`."""

    name = LATENTS
    has_random_weights = False

    def __init__(self, config: Config, like: Mapping[str, Any] | None = None) -> None:
        config = replace(config, num_world_steps=0)  # the photograph's own latent frame
        self.device = resolve_device(config.device)
        dtype = resolve_dtype(config.dtype, self.device)
        compiled = wants_compile(config.compile, self.device)
        revision = (like or {}).get("cosmos_revision")
        seed = config.control_seed if self.has_random_weights else None
        self.encoder = CosmosEncoder(config.cosmos_model_name, dtype, self.device, compiled, revision, seed)
        self.prepare = Square(config.latent_size)
        self.spec = self.describe(config, like).having(cosmos_weights_sha256=self.encoder.weights_sha256)

    @staticmethod
    def describe(config: Config, like: Mapping[str, Any] | None = None) -> EncoderSpec:
        """Return what is stored of a photograph: its latent, followed by num_world_steps predicted ones."""
        dtype = config.latent_dtype or compute_dtype(config)
        shape, from_file = _from_config_file(config, like)
        fields = {
            "cosmos_model_name": model_id(config.cosmos_model_name),
            "cosmos_weights_sha256": UNTIL_LOADED,
            "posterior": "mean",
            "arithmetic": ARITHMETIC,
            "latent_size": config.latent_size,
            "num_world_steps": config.num_world_steps,
            **from_file,
            **compiled_field(config),
            **common_fields(config, dtype, "diffusers"),
        }
        if config.num_world_steps:
            from theworld.models.rollout import describe_rollout

            fields |= describe_rollout(config)
            shape = shape if isinstance(shape, NotYetKnown) else (1 + config.num_world_steps, *shape)
        weights = Weights("Cosmos VAE", config.cosmos_model_name, VAE_FILE)
        demanded = frozenset({"storage_dtype"} if config.latent_dtype else ())
        return EncoderSpec(LATENTS, shape, dtype, weights, fields, demanded)

    def encode(self, prepared: Tensor) -> Tensor:
        """uint8[B, S, S, 3] -> storage dtype[B, C, H, W]."""
        return self.encoder.encode(prepared.permute(0, 3, 1, 2)).to(torch_dtype(self.spec.dtype))


def _from_config_file(
    config: Config, like: Mapping[str, Any] | None
) -> tuple[tuple[int, ...] | NotYetKnown, dict[str, Any]]:
    """Return the shape of a latent and the fields of the fingerprint that the VAE's own config file gives."""
    name, revision = config.cosmos_model_name, (like or {}).get("cosmos_revision")
    files = ("config.json", VAE_FILE) if Path(name).is_dir() else (VAE_FILE,)
    path = file_at_hand(name, *files, revision=revision)
    if path is None:
        names = ("latent_shape", "latents_mean", "latents_std", "cosmos_revision")
        return UNTIL_DOWNLOADED, dict.fromkeys(names, UNTIL_DOWNLOADED)
    values = json.loads(path.read_text())
    absent = [key for key in ("z_dim", "latents_mean", "latents_std") if key not in values]
    if absent:
        raise ValueError(f"{path}: no {', '.join(absent)} in it; wanted the config of a Wan 2.1 VAE")
    side = config.latent_size // SPATIAL_FACTOR
    shape = (int(values["z_dim"]), side, side)
    normalisation = {key: [float(x) for x in values[key]] for key in ("latents_mean", "latents_std")}
    own = {"latent_shape": list(shape), "cosmos_revision": revision or hub_revision(name, VAE_FILE)}
    return shape, own | normalisation
