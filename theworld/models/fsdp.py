"""A Gemma that trains, sharded over processes (FSDP2, through accelerate): each holds a share of every weight, gradient
and optimiser state, and puts a layer together only while it computes it.

The projection is small and stays whole in every
process; its gradients are added up as ever.
"""

import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import FullyShardedDataParallelPlugin
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from theworld.models.gemma import Gemma
from theworld.utils.distributed import Processes

_LAYERS = ["Gemma3DecoderLayer", "SiglipEncoderLayer"]


def asked() -> bool:
    """Whether this run was started with `accelerate launch --use_fsdp`."""
    return os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("true", "1")


def wants_sharding(processes: int, gemma: Gemma) -> bool:
    """Whether this run was started to be sharded. ValueError where there is nothing to shard: FSDP puts together the
    modules of transformers, and a frozen language model is read by a decoder of our own."""
    if not asked():
        return False
    if not gemma.plain_decoder:
        raise ValueError(
            "this run was started with --use_fsdp, but its language model is frozen (freeze_gemma_language is true), "
            "so it fits on each GPU; start it with `accelerate launch --multi_gpu`"
        )
    # The launcher's default lets processes but the first have models without weights; here each reads what it loaded,
    # such as the scale of the embeddings, before anything is sharded.
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
    return processes > 1


class Shell(nn.Module):
    """What computing goes through: FSDP puts together what the model's outermost part holds when this is called."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, compute: Callable[[], Any]) -> Any:
        """What `compute` returns, which may hold tensors."""
        return compute()


def shard(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Shards a transformers model in place among the processes of the run and returns the shell to compute in.

    What trains is held in float32, put together and computed in `dtype`, and reduced in float32.
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
    accelerator = Accelerator(mixed_precision=mixed, fsdp_plugin=plugin, cpu=not torch.cuda.is_available())
    # accelerate takes an optimiser along to exchange its parameters; the run's own is made after this.
    trains = [p for p in model.parameters() if p.requires_grad]
    shell, _ = accelerator.prepare(Shell(model), torch.optim.SGD(trains, lr=0.0))
    return shell


def whole(tensor: Tensor) -> Tensor:
    """The whole of a tensor of which each process may hold a share; then all processes have to ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def whole_state(state: Any) -> Any:
    """An optimiser's state with every tensor whole and on the CPU. All processes have to call this."""
    if isinstance(state, Tensor):
        return whole(state).cpu()
    if isinstance(state, dict):
        return {key: whole_state(value) for key, value in state.items()}
    return [whole_state(value) for value in state] if isinstance(state, list) else state


def load_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """The inverse of `whole_state`: each process takes its shares of an optimiser's whole state. Whether the update is
    fused is a matter of this optimiser's device, not of the one that the state is from."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    shares = {
        number: {name: _share(value, parameters[number]) for name, value in own.items()}
        for number, own in state["state"].items()
    }
    pairs = zip(state["param_groups"], optimizer.param_groups, strict=True)
    groups = [theirs | {"fused": own["fused"]} for theirs, own in pairs]
    optimizer.load_state_dict(state | {"state": shares, "param_groups": groups})


def _share(value: Any, parameter: Tensor) -> Any:
    if not isinstance(parameter, DTensor) or not isinstance(value, Tensor) or value.shape != parameter.shape:
        return value
    value = value.to(parameter.device)
    return distribute_tensor(value, parameter.device_mesh, parameter.placements)


def sum_over(processes: Processes, parameters: Sequence[nn.Parameter], sums: Tensor, scale: float) -> Tensor:
    """The sum of `sums`, float32[_], of all processes; gradients are added up in the same message, but for those of
    sharded weights, which FSDP has averaged and the loss was multiplied by `scale` for. A process without a statement,
    where a step has few images, adds nothing."""
    if processes.count == 1:
        return sums
    kept = [p for p in parameters if not isinstance(p, DTensor)]
    own = [p.grad if p.grad is not None else torch.zeros_like(p) for p in kept]
    sums, *gradients = processes.sum([sums, *own])
    for parameter, gradient in zip(kept, gradients, strict=True):
        parameter.grad = gradient.div(scale)
    return sums


def clip(parameters: Sequence[nn.Parameter], max_norm: float) -> Tensor:
    """Scales the gradients of whole and of shared parameters together to a norm of at most `max_norm`, and returns what
    it was: float32[]."""
    if not any(isinstance(p, DTensor) for p in parameters):
        return nn.utils.clip_grad_norm_(list(parameters), max_norm)
    kinds = [[p for p in parameters if isinstance(p, DTensor) is shared] for shared in (False, True)]
    norms = [nn.utils.get_total_norm([p.grad for p in own if p.grad is not None]) for own in kinds if own]
    norm = torch.stack([whole(own) for own in norms]).norm()
    factor = min(1.0, max_norm / (float(norm) + 1e-6))
    for parameter in parameters:
        if parameter.grad is not None:
            parameter.grad.mul_(factor)
    return norm
