"""The runs of a study: extract what is missing, train each arm with each seed, and evaluate the last checkpoints.

protocol.json              what was fixed before the first run (see `theworld.study.protocol`)
runs/ARM-SEED/             a training run's own folder
    evaluation/dev.jsonl   records of its last checkpoint, with provenance and summary beside them; test.jsonl likewise
    run.json               seconds, steps and parameters, and the seconds that were predicted: the run is done

Run n belongs to part n modulo the number of parts. Each part writes to its own runs alone, so parts may work at the
same time, on any machines that share the folder; after a stop or a kill the same command goes on.
"""

import functools
import json
import logging
import multiprocessing
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from theworld.config.config import Config
from theworld.data.vsr import images_of, load_all, load_statements
from theworld.evaluation.predict import predict
from theworld.evaluation.records import publish_json, read_source
from theworld.evaluation.score import Ask, score_to_file
from theworld.extraction.extract import extract
from theworld.models import world_encoder
from theworld.models.encoder import EncoderSpec
from theworld.models.gemma import Gemma, KeptGemma, is_multimodal
from theworld.models.gemma_vision import VisionEncoder
from theworld.models.serialization import numbered
from theworld.store.format import VISION
from theworld.store.reader import StoreReader
from theworld.study.prediction import predicted_seconds
from theworld.study.protocol import SPLITS, Arm, Run, Study, arm_config, conditions_of
from theworld.training.memory import NotFinite, OutOfMemory
from theworld.training.trainer import Trainer
from theworld.utils.console import configure_logging, duration, quiet_libraries
from theworld.utils.device import memory_of
from theworld.utils.distributed import Part
from theworld.utils.files import StoreError, companion, parse_json
from theworld.utils.locks import check_unlocked, empty_folder
from theworld.utils.signals import StopRequest
from theworld.utils.starting import starting_workers

logger = logging.getLogger(__name__)

DONE, STARTS = "run.json", "starts.jsonl"
POLL_SECONDS = 30.0  # between two looks for the work of other parts
ALL = Part()


def is_done(run: Run) -> bool:
    """Whether a run has been trained and evaluated."""
    return (run.folder / DONE).is_file()


def read_done(run: Run) -> dict[str, Any]:
    """Return what a run that is done says of itself. Raises StoreError for a damaged file."""
    path = run.folder / DONE
    return parse_json(path.read_bytes(), path)


# ---- phase 1


def cache_of(config: Config, cache: Path) -> Path:
    """Return the folder of the rows that a run of these settings reads: predicted frames have one for each number of
    them, since a store holds the rows of one."""
    return cache / f"frames-{config.num_world_steps}" if config.num_world_steps else cache


def by_cache(study: Study, cache: Path) -> dict[Path, Study]:
    """Return the study of the arms that read each cache, by its folder."""
    found: dict[Path, list[Arm]] = {}
    for arm in study.arms:
        found.setdefault(cache_of(arm_config(study, arm), cache), []).append(arm)
    return {root: replace(study, arms=arms) for root, arms in found.items()}


def lacking(study: Study, cache: Path) -> tuple[list[Config], bool]:
    """Return what a cache lacks of the rows that the arms read: settings of an arm for each world encoder, and whether
    it lacks vision features.

    Raises StoreMismatch, field by field, where the cache has rows of something else.
    """
    splits = load_all(study.base.annotations, study.base.dataset_name)
    named = set(images_of([statement for own in splits.values() for statement in own]))
    stores: dict[str, tuple[EncoderSpec, Config]] = {}  # those of the world encoders, by name
    for config in (arm_config(study, arm) for arm in study.arms):
        spec = world_encoder.describe(config)
        if spec.stored and spec.name != VISION:
            stores.setdefault(spec.name, (spec, config))
    sees = is_multimodal(study.base.model_name)
    vision = sees and not _has(VisionEncoder.describe(study.base), cache, named)
    return [config for spec, config in stores.values() if not _has(spec, cache, named)], vision


def _has(spec: EncoderSpec, cache: Path, named: set[str]) -> bool:
    """Whether the cache has the rows of an encoder for every photograph that a statement names."""
    try:
        reader = StoreReader(cache / spec.name)
    except StoreError:
        return False  # not there, unfinished or damaged: extraction says which, and mends it
    spec.check_compatible(reader.root, reader.fingerprint)
    return named <= reader.images.keys()


def extract_missing(study: Study, cache: Path, part: Part = ALL) -> None:
    """Extract the rows that the arms read and the cache lacks, this part's share of them, and wait for other parts.

    Photographs are listed and decoded once for all world encoders. Raises as `extract` does.
    """
    own = part if part.count > 1 else None
    for root, some in by_cache(study, cache).items():
        while any(missing := lacking(some, root)):
            configs, vision = missing
            first, *others = configs or [arm_config(some, some.arms[0])]
            if not extract(first, root, vision, False, own, others=others):
                logger.info("waiting for the shards of the other parts")
                time.sleep(POLL_SECONDS)


# ---- one run


def work_on(run: Run, cache: Path, stop: StopRequest, kept: KeptGemma) -> bool:
    """Train a run, from its newest checkpoint if it has any, and evaluate it. Returns False if it was stopped. `kept`:
    see `load_model`.

    Raises InUse if another process works on it, and what training and evaluation do.
    """
    start, cache = time.perf_counter(), cache_of(run.config, cache)
    check_unlocked(run.folder, "--output")  # before anything in it is removed
    try:
        trainer = Trainer(_going_on(run), cache, stop, kept=kept)
        predicted = predicted_seconds(run, trainer.plan)
        checkpoint = trainer.run()
        if trainer.stopped:
            return False
        done, gemma = _done(run, trainer, checkpoint), trainer.model.gemma
        if predicted is not None:
            done["predicted_seconds"] = round(predicted, 1)
        del trainer  # its optimizer and its projection
        if not evaluate(run, checkpoint, cache, gemma, stop):
            return False
    finally:
        if run.folder.is_dir():
            with open(run.folder / STARTS, "a", encoding="utf-8") as file:
                file.write(json.dumps({"seconds": round(time.perf_counter() - start, 1)}) + "\n")
    starts = (run.folder / STARTS).read_text(encoding="utf-8").splitlines()
    seconds = round(sum(json.loads(line)["seconds"] for line in starts), 1)
    publish_json(done | {"seconds": seconds}, run.folder / DONE)
    return True


def _done(run: Run, trainer: Trainer, checkpoint: Path) -> dict[str, Any]:
    """Return what a run that was trained to its end says of itself."""
    facts = trainer.plan.facts
    return {
        "arm": run.arm.name,
        "seed": run.config.seed,
        "checkpoint": checkpoint.name,
        "steps": facts.num_steps,
        "statements_per_step": facts.statements_per_step,
        "training_statements": len(trainer.data.train),
        "trainable_parameters": facts.trainable,
        "device": memory_of(trainer.model.gemma.device).name,
    }


def _going_on(run: Run) -> Config:
    """Return the settings of a run that goes on from its newest checkpoint, or starts anew where it has none."""
    if numbered(run.folder):
        return replace(run.config, resume_from=str(run.folder))
    if run.folder.exists():
        empty_folder(run.folder, keep=(STARTS,))  # of a start that saved nothing
    return run.config


def evaluate(
    run: Run, checkpoint: Path, cache: Path, gemma: Gemma, stop: StopRequest, ask: Ask = predict
) -> bool:
    """Write the records of the last checkpoint of a run on each split, unless they are there. Returns False if it was
    stopped. `gemma` is that of the run; `ask`: see `score_to_file`."""
    load = functools.cache(load_statements)  # the splits share those of training
    keys = ("annotations", "image_folder", "device", "num_workers")
    overrides = {key: getattr(run.config, key) for key in keys}
    for split in SPLITS:
        if stop.asked:
            return False
        output = records_of(run, split)
        if output.is_file() and read_source(output) is not None:
            continue
        conditions = conditions_of(run)
        if len(images_of(load(run.config.annotations, split, run.config.dataset_name))) < 2:
            logger.info("%s: without 'shuffled' on %s: a single photograph has no other", run.name, split)
            conditions = tuple(condition for condition in conditions if condition != "shuffled")
        places = ("--model", checkpoint, "--cache", cache, "--split", split, "--output", output)
        words = ["python", "tools/eval.py", *map(str, places), "--conditions", *conditions]
        score_to_file(
            *([checkpoint], split, cache, None, conditions, overrides, words, output),
            gemma=None if gemma.modified_parts else gemma,
            load=load,
            ask=ask,
        )
    return True


def records_of(run: Run, split: str) -> Path:
    """Return the file of a run's records on a split."""
    return run.folder / "evaluation" / f"{split}.jsonl"


# ---- all of them


def run_part(runs: Sequence[Run], cache: Path, part: Part, stop: StopRequest) -> dict[str, str]:
    """Train and evaluate the runs of a part that are not done, one after the other; return which failed, and why.

    A run that fails is named, and the others go on; the same command tries it again.
    """
    failed: dict[str, str] = {}
    kept = KeptGemma()
    for run in waiting(runs, part):
        if stop.asked:
            break
        try:
            done = work_on(run, cache, stop, kept)
        except (ValueError, OSError, NotFinite, OutOfMemory) as error:
            failed[run.name] = str(error)
            kept.loaded = None
            logger.error("%s failed: %s", run.name, error)
            continue
        if done:
            logger.info("%s", said_of(run))
    return failed


def waiting(runs: Sequence[Run], part: Part) -> list[Run]:
    """Return the runs of a part that are not done."""
    return [run for run in runs if part.owns(run.number) and not is_done(run)]


def said_of(run: Run) -> str:
    """Return a line about a run that is done."""
    summary = json.loads(
        companion(records_of(run, "test"), ".summary.json", ".jsonl").read_text(encoding="utf-8")
    )
    found = summary["systems"]["world"]["accuracy"]
    return f"{run.name}: {found:.1%} of test, {duration(read_done(run)['seconds'])}"


def in_processes(count: int, runs: Sequence[Run], cache: Path, part: Part, stop: StopRequest) -> bool:
    """Share the runs of a part among processes of this machine; return whether none of their runs failed.

    Requests to stop are passed on. The processes import the main module: a script calls this under
    `if __name__ == "__main__":`.
    """
    context = multiprocessing.get_context("spawn")
    shares = [Part(part.index + part.count * number, part.count * count) for number in range(count)]
    processes = [context.Process(target=_work_in_process, args=(runs, cache, share)) for share in shares]
    with starting_workers():
        for process in processes:
            process.start()
    try:
        while not stop.asked and any(process.is_alive() for process in processes):
            time.sleep(0.2)
    finally:  # also on Ctrl-C, of which they do not hear
        for process in processes:
            process.terminate()  # a request to stop; nothing for one that has ended
        for process in processes:
            process.join()
    return all(process.exitcode == 0 for process in processes)


def _work_in_process(runs: Sequence[Run], cache: Path, part: Part) -> None:
    """Train and evaluate the runs of a part in this process; its exit status is 1 if one failed."""
    quiet_libraries()
    configure_logging()
    quiet_runs()
    with StopRequest("study") as stop, stop.working():
        failed = run_part(runs, cache, part, stop)
    sys.exit(1 if failed else 0)


def quiet_runs() -> None:
    """Leave out what each run and each evaluation says of itself, dozens of times. For tools: loggers are global."""
    for name in ("theworld.training.trainer", "theworld.evaluation.score"):
        logging.getLogger(name).setLevel(logging.WARNING)
