"""What a run says of a step that failed, and ends with: numbers that are not finite, or no memory left."""

import math
import resource
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch

from theworld.batch import ZERO
from theworld.checkpoint import list_checkpoints
from theworld.config import Config
from theworld.feed import Pass
from theworld.machine import GIB, memory_of
from theworld.preflight import Plan
from theworld.vsr import Statement

SHOWN = 8  # images that are named
ROOM = 0.95  # of the memory that settings may fill to be said to fit
# How torch says it where it has no type for it: the CPU, and a library that asks the device itself.
_WORDS = ("DefaultCPUAllocator", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")


class NotFinite(ArithmeticError):
    """A loss or gradient that is not a number; the step, its images and settings are in the message."""


class OutOfMemory(MemoryError):
    """A step that did not fit; its pass, and settings that would fit, are in the message."""


# ---- numbers


def not_finite(step: int, loss: float, norm: float, rate: float, passes: Sequence[Pass]) -> NotFinite:
    """The loss or the gradient norm of the `step`-th step, over all processes, is not finite; `passes`: of this one."""
    what, value = ("loss", loss) if not math.isfinite(loss) else ("gradient norm", norm)
    culprits = "; ".join(f"{kind} of {named(images)} are not finite" for kind, images in _faulty(passes))
    return NotFinite(
        f"step {step}: the {what} is {value} (learning rate {rate:.3g}; images {_images(passes)}; gradient norm "
        f"{norm:.3g}{'; ' + culprits if culprits else ''}); nothing was updated or overwritten. Lower --learning_rate, "
        "or resume from the last checkpoint"
    )


def check_answers(step: int, statements: Sequence[Statement], logits: np.ndarray) -> None:
    """NotFinite if the answers to some statements of dev, float32[n, _], are not finite after `step` steps."""
    bad = sorted({s.image for s, row in zip(statements, logits, strict=True) if not np.isfinite(row).all()})
    if bad:
        raise NotFinite(
            f"step {step}: answers on dev are not finite (images {named(bad)}); nothing was overwritten. Resume from "
            "the last checkpoint with a lower --learning_rate"
        )


def _faulty(passes: Sequence[Pass]) -> Iterator[tuple[str, list[str]]]:
    """What the passes read that is not finite itself, and of which images."""
    for kind in ("latents", "vision features"):
        found = set[str]()
        for one in passes:
            rows = one.latents if kind == "latents" else one.vision
            names: Sequence[str] = [s.image for s in one.statements]
            if one.batch is not None:
                names = one.batch.worlds if kind == "latents" else one.batch.images
            if rows is not None:
                finite = rows.flatten(1).isfinite().all(1).tolist()
                found |= {name for name, good in zip(names, finite, strict=True) if not good and name != ZERO}
        if found:
            yield kind, sorted(found)


def _images(passes: Sequence[Pass]) -> str:
    return named(sorted({s.image for one in passes for s in one.statements}))


def named(images: Sequence[str]) -> str:
    """The first few of them, and how many more there are."""
    more = f" and {len(images) - SHOWN} more" if len(images) > SHOWN else ""
    return ", ".join(images[:SHOWN]) + more


# ---- memory


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that there is no memory left, on a GPU or here."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error) for word in _WORDS)


def out_of_memory(plan: Plan, step: int, start: int, one: Pass) -> OutOfMemory:
    """Memory ran out in a pass of the `step`-th step, whose first statement is the `start`-th of the order."""
    device = plan.gemma.device
    tokens = f", {one.batch.token_ids.numel():,} tokens" if one.batch is not None else ""
    images = sorted({s.image for s in one.statements})
    if device.type == "cuda":
        peak, room = torch.cuda.max_memory_allocated(device), _room_on_gpu(device)
    else:
        peak, room = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, memory_of(device).total
    older = list_checkpoints(plan.output_dir)
    cure = (
        f"go on from {older[-1]} with --resume_from {plan.output_dir}"
        if older
        else "no checkpoint was saved yet"
    )
    return OutOfMemory(
        f"step {step}: out of memory in a pass of {len(one.statements)} statements about {len(images)} images{tokens} "
        f"({named(images)}): this process had {peak / GIB:.1f} GiB at most, {device} has {room / GIB:.1f} for it. "
        f"{_advice(settings_that_fit(plan, start, room))}; {cure}"
    )


def _room_on_gpu(device: torch.device) -> float:
    """What this process could have, beside others on the same GPU."""
    return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)


def _advice(found: Sequence[str]) -> str:
    if not found:
        return (
            "By the estimate no way to divide this step would fit: train less of Gemma (--lora_rank 16), take fewer "
            "world tokens (a larger --world_patch), a smaller Gemma, or a larger GPU"
        )
    return f"The same training in settings that would fit, by the estimate: {', or '.join(found)}"


def settings_that_fit(plan: Plan, start: int, room: float) -> list[str]:
    """Flags that divide the same step so that it fits into `room` bytes: the largest passes that do, and gradient
    checkpointing. A pass is taken to need what is estimated or, since it did not fit, at least what there was."""
    now = plan.estimate(plan.config, start)
    factor = max(1.0, (room - now.frozen - now.trained) / now.activations)

    def fits(config: Config) -> bool:
        memory = plan.estimate(config, start)
        return memory.frozen + memory.trained + factor * memory.activations <= ROOM * room

    found = []
    for checkpointing in (False, True):
        if checkpointing and plan.config.use_gradient_checkpointing:
            break
        flag = ["--use_gradient_checkpointing"] if checkpointing else []
        changed = replace(
            plan.config, use_gradient_checkpointing=checkpointing or plan.config.use_gradient_checkpointing
        )
        # As it was, but checkpointed, or else in smaller passes.
        divided = next((d for d in _divided(changed) if (checkpointing or d != changed) and fits(d)), None)
        if divided is not None:
            if divided.batch_size != plan.config.batch_size:
                sizes = (divided.batch_size, divided.gradient_accumulation_steps)
                flag = ["--batch_size {} --gradient_accumulation_steps {}".format(*sizes), *flag]
            found.append(" ".join(flag))
    return found


def _divided(config: Config) -> Iterator[Config]:
    """The same statements a step in passes of a half, a quarter and so on, where that comes out even; itself first."""
    total = config.batch_size * config.gradient_accumulation_steps
    for size in range(config.batch_size, 0, -1):
        if total % size == 0:
            yield replace(config, batch_size=size, gradient_accumulation_steps=total // size)
