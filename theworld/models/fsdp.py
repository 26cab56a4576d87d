"""Sharding of a Gemma that trains over processes (FSDP2, through accelerate), and the state of a sharded run on disk.

Each process holds a share of every weight, gradient and optimizer state, and puts a layer together only while it
computes the layer. The projection is small and stays whole in every process.

In a checkpoint each process writes its own shares of the optimizer state (torch.distributed.checkpoint, in
safetensors). Weights are gathered one parameter at a time, to the main process alone.
"""

import contextlib
import errno
import math
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from accelerate import Accelerator
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch import Tensor, nn
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.tensor import DTensor, distribute_tensor

from theworld.models.gemma import Gemma
from theworld.utils.distributed import Processes

_LAYERS = ["Gemma3DecoderLayer", "SiglipEncoderLayer"]
State = dict[str, Any]  # as Optimizer.state_dict() returns it


def asked() -> bool:
    """Return whether this run was started with `accelerate launch --use_fsdp`."""
    return os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("true", "1")


def wants_sharding(processes: int, gemma: Gemma) -> bool:
    """Return whether this run is sharded.

    Raises ValueError if there is nothing to shard: FSDP puts together the modules of transformers, and a frozen
    language model is computed by a decoder of our own.
    """
    if not asked():
        return False
    if not gemma.uses_hf_decoder:
        raise ValueError(
            "this run was started with --use_fsdp, but its language model is frozen (freeze_gemma_language is true), "
            "so it fits on each GPU; start it with `accelerate launch --multi_gpu`"
        )
    return processes > 1


class Shell(nn.Module):
    """The module that all computation is called through: FSDP then puts together the model's outermost parameters."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, compute: Callable[[], Any]) -> Any:
        """Return what `compute` returns."""
        return compute()


def shard(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Shard a transformers model in place over the processes of the run and return the shell to compute in.

    Trained weights are held in float32, put together and computed in `dtype`, and reduced in float32.
    """
    layers = {type(module).__name__ for module in model.modules()}
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        cpu_ram_efficient_loading=False,
        activation_checkpointing=False,  # that is use_gradient_checkpointing
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=[name for name in _LAYERS if name in layers],
    )
    mixed = "bf16" if dtype == torch.bfloat16 else "no"
    on_cpu = not torch.cuda.is_available()
    accelerator = Accelerator(mixed_precision=mixed, fsdp_plugin=plugin, cpu=on_cpu)
    if on_cpu:  # where accelerate would copy the model to each process instead
        accelerator.state.distributed_type = DistributedType.FSDP
        accelerator.state.fsdp_plugin = plugin
    # accelerate takes an optimiser along to exchange its parameters; the run's own is made after this.
    trains = [p for p in model.parameters() if p.requires_grad]
    shell, _ = accelerator.prepare(Shell(model), torch.optim.SGD(trains, lr=0.0))
    assert all(isinstance(p, DTensor) for p in model.parameters())
    return shell


# ---- weights and optimizer state, between the shares and the disk


def gather_to_main(tensor: Tensor) -> Tensor | None:
    """Return the whole of a tensor on the CPU, but None for the shares of a process that is not the main one.

    All processes have to call this for a sharded tensor. Processes hold equal rows of it but the last ones, which have
    fewer or none.
    """
    if not isinstance(tensor, DTensor):
        return tensor.cpu().contiguous()
    share, count, is_main = tensor.to_local(), dist.get_world_size(), dist.get_rank() == 0
    padded = share.new_zeros(-(-len(tensor) // count), *tensor.shape[1:])
    padded[: len(share)] = share
    shares = [torch.empty_like(padded) for _ in range(count)] if is_main else None
    dist.gather(padded, shares)
    return torch.cat([one.cpu() for one in shares])[: len(tensor)] if shares is not None else None


def split_state(state: State) -> tuple[State, dict[str, DTensor]]:
    """Divide an optimizer's state: the values that each process has whole, on the CPU, and by "number.name" those of
    which each process has a share."""
    whole: dict[int, dict[str, Any]] = {}
    shares: dict[str, DTensor] = {}
    for number, own in state["state"].items():
        whole[number] = {}
        for name, value in own.items():
            if isinstance(value, DTensor):
                shares[f"{number}.{name}"] = value
            else:
                whole[number][name] = value.cpu() if isinstance(value, Tensor) else value
    return state | {"state": whole}, shares


def write_shares(shares: dict[str, DTensor], folder: Path) -> None:
    """Write the shares of this process into a folder that all processes write to; all of them have to call this.

    Raises OSError in each process if one of them cannot write.
    """
    try:
        with _quiet():
            dcp.save(shares, storage_writer=HuggingFaceStorageWriter(str(folder), save_distributed=True))  # type: ignore[arg-type]
    except CheckpointException as error:
        rank, (reason, _) = next(iter(error.failures.items()))
        code = getattr(reason, "errno", None) or errno.EIO
        raise OSError(code, f"process {rank} could not write its shares: {reason}", str(folder)) from None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Leave out torch's warnings about its own internals."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        yield


def written_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Return the shape of each tensor in a folder of shares. Raises ValueError if a share of one is missing."""
    shapes = {}
    for name, found in HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata.items():
        assert isinstance(found, TensorStorageMetadata)
        values = sum(math.prod(chunk.sizes) for chunk in found.chunks)
        if values != math.prod(found.size):
            raise ValueError(
                f"{folder}: {values:,} of the {math.prod(found.size):,} values of {name} are there"
            )
        shapes[name] = tuple(found.size)
    return shapes


def read_shares(folder: Path, parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of a folder of shares by name, sharded as these parameters are, of which each process reads
    its own shares, or whole."""
    found = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    with _quiet():
        dcp.load(found, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=True)  # type: ignore[arg-type]
    return found


def load_state(optimizer: torch.optim.Optimizer, state: State) -> None:
    """Load the state of an optimizer whose values are whole or sharded as the parameters are: each process takes its
    shares. The optimizer keeps copies, so `state` may be mapped from a file. Whether its updates are fused depends on
    its own device, not on that of the state."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    shares = {
        number: {name: _share(value, parameters[number]) for name, value in own.items()}
        for number, own in state["state"].items()
    }
    pairs = zip(state["param_groups"], optimizer.param_groups, strict=True)
    groups = [saved | {"fused": own["fused"]} for saved, own in pairs]
    optimizer.load_state_dict(state | {"state": shares, "param_groups": groups})


def _share(value: Any, parameter: Tensor) -> Any:
    if isinstance(value, DTensor) or not isinstance(value, Tensor):
        return value
    if not isinstance(parameter, DTensor) or value.shape != parameter.shape:
        return value.clone()
    # Each process has the whole value, so none is sent.
    mesh, placements = parameter.device_mesh, parameter.placements
    return distribute_tensor(value.to(parameter.device), mesh, placements, src_data_rank=None)


# ---- gradients


def sum_over(processes: Processes, parameters: Sequence[nn.Parameter], sums: Tensor, scale: float) -> Tensor:
    """Return the sum of `sums`, float32[_], over all processes, and add up the gradients in the same message.

    FSDP has averaged the gradients of sharded weights already, for which the loss was multiplied by `scale`. A process
    without a statement, in a step with few images, adds nothing.
    """
    if processes.count == 1:
        return sums
    kept = [p for p in parameters if not isinstance(p, DTensor)]
    own = [p.grad if p.grad is not None else torch.zeros_like(p) for p in kept]
    sums, *gradients = processes.sum([sums, *own])
    for parameter, gradient in zip(kept, gradients, strict=True):
        parameter.grad = gradient.div(scale)
    return sums


def clip(parameters: Sequence[nn.Parameter], max_norm: float) -> Tensor:
    """Scale the gradients of whole and of sharded parameters together to a norm of at most `max_norm`, and return the
    norm before: float32[]."""
    if not any(isinstance(p, DTensor) for p in parameters):
        return nn.utils.clip_grad_norm_(list(parameters), max_norm)
    kinds = [[p for p in parameters if isinstance(p, DTensor) is shared] for shared in (False, True)]
    norms = [nn.utils.get_total_norm([p.grad for p in own if p.grad is not None]) for own in kinds if own]
    norm = torch.stack([n.full_tensor() if isinstance(n, DTensor) else n for n in norms]).norm()
    factor = min(1.0, max_norm / (float(norm) + 1e-6))
    for parameter in parameters:
        if parameter.grad is not None:
            parameter.grad.mul_(factor)
    return norm
