"""Measure phases 2 and 3: steps beside the baseline, variants, losses with fp8, start-up, evaluation, a run."""

import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from benchmark.chip import language_flops, projection_flops, synchronize, time_calls, work_of
from benchmark.choices import VARIANTS
from benchmark.end_to_end import EndToEnd
from benchmark.results import Row, spread
from benchmark.setup import (
    TOOLS,
    Workbench,
    branch_tokens,
    metrics,
    packed_batches,
    quietly,
    run_command,
    run_tool,
    statements_a_step,
    stepper,
    stopwatch,
)

from theworld.data.vsr import Statement, load_statements
from theworld.evaluation.predict import predict
from theworld.training.trainer import Trainer

CONDITIONS = ("world", "baseline", "zero", "shuffled")


def part_train(bench: Workbench) -> None:
    """Measure optimizer steps of the end-to-end baseline and of TheWorld, in turns; then the stages of TheWorld's step.

    The baseline's workers decode during TheWorld's turns too, so on few cores TheWorld seems slower than it is.
    """
    bench.free()
    trainer = bench.trainer()
    bench.results.add("train", "tokens", branch_tokens(trainer.packer, trainer.config))
    sizes = {"end to end": bench.shapes.baseline_batch_size, "ours": statements_a_step(trainer.config)}
    own_weights = bench.held_gib()
    steps: dict[str, Callable[[], Any]] = {
        "end to end": _baseline_step(bench, trainer),
        "ours": stepper(trainer),
    }
    others = {"end to end": own_weights, "ours": bench.held_gib() - own_weights}  # not to be counted twice
    memory = {}
    for name, step in steps.items():
        bench.free()
        time_calls(step, bench.device, bench.shapes.warm_up)
        peak = bench.peak_gib()
        memory[name] = None if peak is None else peak - others[name]
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(bench.shapes.repeats):
        for name, step in steps.items():
            if bench.device.type == "cuda":
                bench.free()  # what the other one's allocator keeps is in this one's way
                step()
            if name == "ours":
                seconds[name] += bench.step_seconds(step, bench.shapes.steps)
            else:
                seconds[name] += time_calls(step, bench.device, bench.shapes.steps, warm_up=0)
    for name, own in seconds.items():
        row = spread([sizes[name] / s for s in own]) | {"unit": "statements/s", "memory_gib": memory[name]}
        row |= {"statements_a_step": sizes[name], "step_s": statistics.median(own)}
        if name == "ours":
            row["mfu"] = bench.mfu(trainer, statistics.median(own))
        bench.results.add("train", name, row)
    del steps, step
    bench.free()
    _add_floor(bench, trainer)
    _add_stages(bench, trainer)


def _baseline_step(bench: Workbench, trainer: Trainer) -> Callable[[], Any]:
    """Return a call that takes one step of the baseline, with a projection like the trainer's."""
    config = trainer.config
    shape = trainer.model.projection.shape
    projection = type(trainer.model.projection)(
        shape,
        [0.0] * shape.latent_shape[0],
        [1.0] * shape.latent_shape[0],
        scale=trainer.model.gemma.embedding_scale(),
    )
    baseline = EndToEnd(
        config.model_name,
        config.cosmos_model_name,
        projection,
        config.question_template,
        bench.dtype,
        bench.device,
    )
    statements = load_statements(config.annotations, "train", config.dataset_name)
    size, folder = bench.shapes.baseline_batch_size, str(config.image_folder)
    batches = baseline.batches(statements, folder, config.latent_size, size, bench.cores)
    return lambda: baseline.train_step(*next(batches))


def _add_floor(bench: Workbench, trainer: Trainer) -> None:
    """Add the floor of the step: its FLOPs at the machine's rate of matrix multiplication."""
    counted, statements = bench.step_flops(trainer), statements_a_step(trainer.config)
    seconds = (counted["forward"] + counted["backward"]) / bench.rates["flops"]
    row = {"rate": statements / seconds, "unit": "statements/s", "mfu": 1.0, "step_s": seconds}
    row |= {f"{name}_gflop": counted[name] / 1e9 for name in ("forward", "backward")}
    row |= {name: counted[name] for name in ("tokens", "padded")}
    bench.results.add("train", "floor", row)


def _add_stages(bench: Workbench, trainer: Trainer) -> None:
    """Add the time of a step by stage, with packing in the same thread; on a GPU also its kernels."""
    steps = max(2, bench.shapes.steps)
    with bench.results.attempt("train", "stages"), stopwatch(bench.device) as inside:
        total = sum(bench.call_seconds(trainer.train_step, steps))
        stages = {f"{name}_ms": 1e3 * s / steps for name, s in inside.items()}
        stages["rest_ms"] = 1e3 * (total - sum(inside.values())) / steps
        bench.results.add("train", "stages", {"step_ms": 1e3 * total / steps} | stages)
    if bench.device.type == "cuda":
        with bench.results.attempt("train", "kernels"):
            bench.results.add("train", "kernels", _kernels(bench, trainer))


def _kernels(bench: Workbench, trainer: Trainer) -> dict[str, Any]:
    """Return the share of four steps in which the GPU is busy, and the shares of the longest kernels in that."""
    step = stepper(trainer)
    step()
    synchronize(bench.device)
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        start = time.perf_counter()
        for _ in range(4):
            step()
        synchronize(bench.device)
        total = time.perf_counter() - start
    events = sorted(profile.key_averages(), key=lambda event: -event.self_device_time_total)
    busy = sum(event.self_device_time_total for event in events) / 1e6
    longest = {e.key[:90]: e.self_device_time_total / 1e6 / busy for e in events[:12]}
    return {"busy_share": busy / total, "longest": longest}


def part_variants(bench: Workbench) -> None:
    """Measure the variants, one after the other."""
    for name in bench.variants or VARIANTS:
        with bench.results.attempt("variants", name):
            bench.results.add("variants", name, bench.train_row(**VARIANTS[name]))
        bench.free()


# ---- phase 3


def part_evaluate(bench: Workbench) -> None:
    """Measure the test split under one and under all four conditions with a warm model; then tools/eval.py with all
    four, from a cold start."""
    output, cache = bench.fresh("evaluate"), bench.cache()
    config = bench.config(max_steps=1, output_dir=str(output))
    trainer = Trainer(config, cache)
    with quietly():
        checkpoint = trainer.run()
    test = load_statements(config.annotations, "test", config.dataset_name)
    for name, conditions in (("one system", CONDITIONS[:1]), ("all four", CONDITIONS)):
        with bench.results.attempt("evaluate", name):
            bench.results.add("evaluate", name, _answers_row(bench, trainer, test, conditions))
    del trainer
    bench.free()
    with bench.results.attempt("evaluate", "command, all four"), bench.nothing_compiled():
        command = [sys.executable, str(TOOLS / "eval.py"), "--model", str(checkpoint), "--cache", str(cache)]
        start = time.perf_counter()
        run_command([*command, "--output", str(output / "records.jsonl"), "--conditions", *CONDITIONS])
        seconds = time.perf_counter() - start
        answers = len(test) * len(CONDITIONS)
        row: Row = {"rate": answers / seconds, "unit": "answers/s", "seconds": seconds}
        share = bench.results.share("evaluate", "all four", row)
        bench.results.add("evaluate", "command, all four", row | {"mfu": share})


def _answers_row(
    bench: Workbench, trainer: Trainer, test: Sequence[Statement], conditions: Sequence[str]
) -> Row:
    """Return speed and FLOPs of answering `test` under these conditions, after a few warm-up batches."""
    size = trainer.config.eval_statements

    def answer(statements: Sequence[Statement]) -> None:
        predict(trainer.model, statements, trainer.data.latents, trainer.data.vision, conditions, size)

    bench.free()
    answer(test[: 3 * size])
    with packed_batches() as batches:
        seconds = time_calls(lambda: answer(test), bench.device, 1, warm_up=0)[0]
    counted = batches[:16]  # representative; counting all of them would take longer than answering
    works = [work_of(batch, trainer.model.gemma.sliding_window) for batch in counted]
    projection = projection_flops(trainer.model.projection.shape)
    flops = language_flops(trainer.model.gemma.text_config, works, projection)["forward"]
    flops /= sum(len(batch.statements) for batch in counted)  # of one answer
    answers = len(test) * len(conditions)
    row: Row = {"rate": answers / seconds, "unit": "answers/s", "seconds": seconds, "statements": len(test)}
    row |= {"gflop": flops / 1e9, "mfu": flops * answers / seconds / bench.rates["flops"]}
    return row | {"memory_gib": bench.peak_gib()}


def part_losses(bench: Workbench) -> None:
    """Compare mean losses and sustained rates of the same steps with frozen matrices in 16 and in 8 bits.

    In two micro-batches a step computes the same in another order: that row shows what rounding alone changes.
    """
    halves = {"batch_size": bench.shapes.batch_size // 2, "gradient_accumulation_steps": 2}
    kinds: dict[str, dict[str, Any]] = {"exact": {}, "exact, two micro-batches": halves, "fp8": {"fp8": True}}
    means: dict[str, float] = {}
    for name, changes in kinds.items():
        if "fp8" in changes and bench.device.type != "cuda":
            continue  # a CPU has no 8-bit products
        with bench.results.attempt("losses", name):
            row = _loss_row(bench, **changes)
            means[name] = row["mean_loss"]
            if "exact" in means:
                row["of_exact"] = means[name] / means["exact"]
            bench.results.add("losses", name, row)
        bench.free()


def _loss_row(bench: Workbench, **changes: Any) -> Row:
    """Return the mean loss of `loss_steps` steps from the same start, and the rates after the warm-up."""
    bench.free()
    trainer = bench.trainer(max_steps=bench.shapes.loss_steps, **changes)
    step = stepper(trainer)
    seconds: list[float] = []
    losses: list[float] = []
    for _ in range(bench.shapes.loss_steps):
        trainer.window = dict.fromkeys(trainer.window, 0.0)
        seconds += bench.step_seconds(step, 1)
        losses.append(trainer.window["loss"] / trainer.window["statements"])
    own, statements = seconds[bench.shapes.warm_up :], statements_a_step(trainer.config)
    row = spread([statements / s for s in own]) | {"unit": "statements/s"}
    row |= {"sustained": statements * len(own) / sum(own), "memory_gib": bench.peak_gib()}
    return row | {"mean_loss": sum(losses) / len(losses), "first_loss": losses[0], "last_loss": losses[-1]}


def part_start(bench: Workbench) -> None:
    """Measure tools/train.py up to its first optimizer step: with nothing compiled, and with the cache of that run."""
    cache = bench.cache()
    with bench.nothing_compiled():
        for name in ("nothing compiled", "compiled before"):
            with bench.results.attempt("start", name):
                output = bench.fresh("start") / "checkpoints"
                config = bench.config(max_steps=1, logging_steps=1, output_dir=str(output))
                start = time.time()
                seconds, _ = run_tool("train.py", config, cache, [])
                # The line of metrics is written after the step, before the checkpoint.
                first = (output / "metrics.jsonl").stat().st_mtime - start
                bench.results.add("start", name, {"first_step_s": first, "all_s": seconds})


def part_run(bench: Workbench) -> None:
    """Measure three epochs from a cold start to the saved checkpoint, with evaluation on dev, as a user runs them; on a
    GPU also in 8 bits."""
    for name, changes in (("three epochs", {}), ("three epochs, fp8", {"fp8": True})):
        if changes and bench.device.type != "cuda":
            continue
        with bench.results.attempt("run", name), bench.nothing_compiled():
            bench.results.add("run", name, _run_row(bench, **changes))


def _run_row(bench: Workbench, **changes: Any) -> Row:
    """Return the seconds of a run of three epochs, and the median rate of its steps between two lines of its log."""
    output, cache = bench.fresh("run") / "checkpoints", bench.cache()
    config = replace(bench.config(), num_epochs=3, do_eval=True, output_dir=str(output), **changes)
    statements = len(load_statements(config.annotations, "train", config.dataset_name))
    seconds, _ = run_tool("train.py", config, cache, [])
    checkpoints = [path.name for path in output.glob("checkpoint-*")]
    assert checkpoints, "a run that ended well has saved something"
    lines = [line for line in metrics(output) if "statements_per_second" in line]
    logged = [line["statements_per_second"] for line in lines]
    row = {"rate": 3 * statements / seconds, "unit": "statements/s", "seconds": seconds}
    row |= {
        "statements": statements,
        "checkpoints": len(checkpoints),
        "last_loss": lines[-1]["loss"] if lines else None,
    }
    row |= {"steps_rate": statistics.median(logged) if logged else None}
    return row | {"mfu": bench.results.share("train", "floor", row)}
