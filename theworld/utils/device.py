"""Devices, dtypes and their memory, and the process-wide state of torch."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn


def count_parameters(module: nn.Module) -> tuple[int, int]:
    """Return the numbers of trainable and of frozen parameters; tied parameters count once."""
    trainable = sum(p.numel() for p in module.parameters() if p.requires_grad)
    return trainable, sum(p.numel() for p in module.parameters()) - trainable


def torch_dtype(name: str) -> torch.dtype:
    """Return torch's dtype for "float32", "float16" or "bfloat16"."""
    dtypes = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
    if name not in dtypes:
        raise ValueError(f"dtype {name!r}: wanted one of {', '.join(dtypes)}")
    return dtypes[name]


def device_setting(device_map: object) -> str:
    """Return the setting `device` for a `device_map` of transformers.

    A device map is a string, a torch.device, the number of a GPU, or {"": one of these}. Raises ValueError for a map of
    several parts, since all models are on one device.
    """
    if isinstance(device_map, dict):
        if list(device_map) != [""]:
            raise ValueError(
                f"device_map {device_map!r}: all models are on one device; wanted a device, or {{'': device}}"
            )
        device_map = device_map[""]
    return f"cuda:{device_map}" if isinstance(device_map, int) else str(device_map)


def resolve_device(device: str) -> torch.device:
    """Return the device for a setting; "auto" is CUDA if there is one. Raises ValueError for a missing CUDA device."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device {device!r}: this machine has no usable CUDA GPU; use --device cpu or auto")
    found = torch.device(device)
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        there = ", ".join(f"cuda:{index}" for index in range(torch.cuda.device_count()))
        raise ValueError(
            f"device {device!r}: this machine has {there}; use one of them with --device, or auto"
        )
    return found


def resolve_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """Return the dtype for a setting; "auto" is bfloat16 on CUDA and float32 on the CPU."""
    if dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return torch_dtype(dtype)


def wants_compile(setting: bool | None, device: torch.device) -> bool:
    """Return whether models are compiled: as `setting` says; None: on CUDA only."""
    return device.type == "cuda" if setting is None else setting


def start_compilers(compile: bool | None, device: str) -> None:
    """Start the processes that compile kernels, where these settings have a GPU compute.

    They import torch for seconds, and until they are there kernels are compiled one after the other. So a tool that
    will compile starts them before its own imports.
    """
    if compile is not False and device != "cpu" and torch.cuda.is_available():
        from torch._inductor.async_compile import maybe_warm_pool  # loads the compiler

        maybe_warm_pool()


def set_up_torch(dtype: torch.dtype) -> None:
    """Set the process-wide state that models which compute in `dtype` want: the precision of float32 products, and
    whether the processes of a launch load weights.

    Called by the trainer before its model loads, and by the programs that evaluate and ask; models themselves set
    nothing. With models in bfloat16 only the projection is in float32: TF32 rounds its products to 10 bits, the frozen
    models have 7.
    """
    if dtype == torch.bfloat16:
        torch.set_float32_matmul_precision("high")
    # The default of `accelerate launch --use_fsdp` leaves processes but the first without weights; here each reads what
    # it loaded, such as the scale of the embeddings, before anything is sharded.
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"


@contextmanager
def current_device(device: torch.device) -> Iterator[None]:
    """Make a GPU torch's current one within the block: pinned memory and events belong to the current one."""
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        yield


def pin(tensor: torch.Tensor) -> torch.Tensor:
    """Return a copy of a tensor on the CPU in page-locked memory, from which a GPU copies by itself.

    This thread alone copies: torch's own copy wakes all threads and waits for them, which beside a thread that launches
    kernels takes ten times as long.
    """
    pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    pinned.view(_BITS[tensor.itemsize]).numpy()[...] = tensor.view(_BITS[tensor.itemsize]).numpy()
    return pinned


_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # NumPy lacks bfloat16


def to_host(tensor: torch.Tensor) -> tuple[torch.Tensor, torch.cuda.Event | None]:
    """Return a copy on the host without waiting for it, and the event after which it has its values; of a tensor on a
    CPU itself, and None."""
    if not tensor.is_cuda:
        return tensor, None
    copy = torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor, non_blocking=True)
    ready = torch.cuda.Event()
    ready.record(torch.cuda.current_stream(tensor.device))
    return copy, ready


def num_compiled_graphs() -> int:
    """Return how many graphs torch.compile has made in this process."""
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draw torch's random numbers on the CPU from `seed` within the block, and leave the generator as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


@dataclass(frozen=True)
class Memory:
    """The memory of a GPU, or of the machine for a CPU, in bytes."""

    name: str
    free: float
    total: float
    capability: tuple[int, int] | None = None  # compute capability of a GPU


def memory_of(device: torch.device) -> Memory:
    """Return the memory of a device."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return Memory(
            torch.cuda.get_device_name(device), free, total, torch.cuda.get_device_capability(device)
        )
    page = os.sysconf("SC_PAGE_SIZE")
    total = page * os.sysconf("SC_PHYS_PAGES")
    available = re.search(r"MemAvailable:\s+(\d+) kB", _meminfo())
    free = int(available[1]) * 1024 if available else page * os.sysconf("SC_AVPHYS_PAGES")
    return Memory(f"CPU, {len(os.sched_getaffinity(0))} cores", free, total)


def room_on(device: torch.device) -> float:
    """Return the bytes that this process can have on a device: what is free on a GPU beside other processes, up to the
    share that `torch.cuda.set_per_process_memory_fraction` allows, or the memory of the machine for a CPU."""
    memory = memory_of(device)
    if device.type != "cuda":
        return memory.total
    index = torch.cuda.current_device() if device.index is None else device.index
    allowed = torch.cuda.get_per_process_memory_fraction(index) * memory.total
    return min(memory.free + torch.cuda.memory_reserved(device), allowed)


def _meminfo() -> str:
    path = Path("/proc/meminfo")
    return path.read_text() if path.is_file() else ""
