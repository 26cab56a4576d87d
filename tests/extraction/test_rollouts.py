"""Rollouts in phase 1: whoever takes part, however often it is killed, whatever the list does, nothing is lost.

Rows on disk before their shard is: whole, of the right photograph and fingerprint, or set aside.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import tiny_run
from constants import ROOT
from forks import in_child
from jobs import flip
from PIL import Image
from video2world import Guardrail, Refusing

from theworld.config.config import Config, save_config
from theworld.data.images import sha256
from theworld.extraction import extract as extract_module
from theworld.extraction import rollouts
from theworld.extraction.audit import audit
from theworld.extraction.encoders import RolloutEncoder
from theworld.extraction.extract import extract, verify
from theworld.extraction.features import CachedFeatures
from theworld.extraction.rollouts import FinishedRows, estimate, refusals
from theworld.models.cosmos import CosmosLatents
from theworld.store.format import LATENTS, StoreMismatch
from theworld.store.reader import StoreReader
from theworld.store.shard import ArraySpec
from theworld.utils import files
from theworld.utils.distributed import Part, part_of
from theworld.utils.files import StoreError

A, B, C = ("a" * 64, "b" * 64, "c" * 64)  # photographs
F, G = ("1" * 64, "2" * 64)  # fingerprints


def rows_in(root: Path, fingerprint: str = F, dtype: str = "float32") -> FinishedRows:
    return FinishedRows(root, fingerprint, ArraySpec("latents", (2, 3), dtype))


def row(dtype: str = "float32") -> np.ndarray:
    values = np.arange(6).reshape(2, 3)
    return values.astype({"float32": "<f4", "float16": "<f2", "bfloat16": "<u2"}[dtype])


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_row_reads_back_as_it_was_written(tmp_path: Path, dtype: str) -> None:
    finished = rows_in(tmp_path, dtype=dtype)
    assert finished.read(A) is None
    assert finished.missing([A, B]) == [A, B]
    finished.write(A, row(dtype))
    finished.write(A, row(dtype))  # the same again is no matter
    found = rows_in(tmp_path, dtype=dtype).read(A)
    assert found is not None
    assert found.dtype == row(dtype).dtype
    assert np.array_equal(found, row(dtype))
    assert finished.missing([A, B]) == [B]
    assert [p.name for p in (tmp_path / "finished").iterdir()] == [f"{A}.row"]
    assert not (tmp_path / "quarantine").exists()


def test_the_bytes_of_a_row(tmp_path: Path) -> None:
    rows_in(tmp_path).write(A, row())
    header, data = (tmp_path / "finished" / f"{A}.row").read_bytes().split(b"\n", 1)
    assert header == (
        b'{"array":"latents","crc32":"91e79017","dtype":"float32","fingerprint_sha256":"%s","schema_version":1,'
        b'"shape":[2,3],"source_sha256":"%s"}' % (F.encode(), A.encode())
    )
    assert data == row().tobytes()


def test_any_damaged_byte_is_found_and_the_row_goes_to_the_quarantine(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    finished = rows_in(tmp_path)
    finished.write(A, row())
    path = tmp_path / "finished" / f"{A}.row"
    sound = path.read_bytes()
    for position in range(len(sound)):
        damaged = bytearray(sound)
        damaged[position] ^= 1
        path.write_bytes(damaged)
        assert finished.read(A) is None
        assert not path.exists()
    for damaged in (sound[:-1], sound + b"\0", b""):
        path.write_bytes(damaged)
        assert finished.read(A) is None
    assert len(caplog.messages) == len(list((tmp_path / "quarantine").iterdir())) == len(sound) + 3
    assert "was moved to" in caplog.messages[0]


def test_a_row_of_another_fingerprint_or_photograph_or_behind_a_link_is_not_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows_in(tmp_path, G).write(A, row())
    assert rows_in(tmp_path).read(A) is None
    caplog.clear()
    finished = rows_in(tmp_path)
    finished.write(A, row())
    folder = tmp_path / "finished"
    (folder / f"{B}.row").write_bytes((folder / f"{A}.row").read_bytes())
    (folder / f"{C}.row").symlink_to(folder / f"{A}.row")
    assert finished.read(B) is None
    assert finished.read(C) is None
    assert finished.read(A) is not None
    assert len(caplog.messages) == 2


def test_what_is_no_row_is_not_written(tmp_path: Path) -> None:
    finished = rows_in(tmp_path)
    with pytest.raises(StoreError, match=r"latents is float32 \(6,\), expected float32 \(2, 3\)"):
        finished.write(A, row().reshape(6))
    with pytest.raises(StoreError, match="latents is float64"):
        finished.write(A, row().astype("<f8"))
    with pytest.raises(StoreError, match="not finite for the photograph of SHA-256 aaaa"):
        finished.write(A, row() + np.float32("inf"))
    finished.write(A, row())
    with pytest.raises(FileExistsError, match="already there with other content"):
        finished.write(A, row() + 1)


def test_a_refusal_stays_and_is_found_damaged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    finished = rows_in(tmp_path)
    finished.refuse(B, "a reason")
    assert (finished.refusal(A), finished.refusal(B)) == (None, "a reason")
    assert finished.missing([A, B]) == [A]
    assert refusals(tmp_path) == {B: "a reason"}
    path = tmp_path / "finished" / f"{B}.refused"
    assert json.loads(path.read_text())["reason"] == "a reason"
    path.write_text(path.read_text().replace("a reason", "no reason"))
    assert refusals(tmp_path) == {}
    assert finished.refusal(B) is None
    assert "damaged or was edited" in caplog.messages[0]
    rows_in(tmp_path, G).refuse(B, "a reason")
    assert rows_in(tmp_path).refusal(B) is None


def test_removal_leaves_refusals_and_rows_of_others(tmp_path: Path) -> None:
    finished = rows_in(tmp_path)
    finished.write(A, row())
    finished.write(B, row())
    finished.refuse(C, "a reason")
    finished.remove([A, C])
    assert sorted(p.name for p in (tmp_path / "finished").iterdir()) == [f"{B}.row", f"{C}.refused"]
    (tmp_path / "finished" / f"{C}.refused").unlink()
    finished.remove([B])
    assert not (tmp_path / "finished").exists()
    finished.remove([B])


NUM_PHOTOGRAPHS = 7


@pytest.fixture
def job(tmp_path: Path, video2world: Path) -> Config:
    return make_job(tmp_path / "job", video2world)


def make_job(folder: Path, video2world: Path) -> Config:
    """Seven photographs of noise, two of them of equal bytes, in shards of 3."""
    (folder / "photographs").mkdir(parents=True)
    generator = np.random.default_rng(0)
    for i in range(NUM_PHOTOGRAPHS - 1):
        pixels = generator.integers(0, 256, (40, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "photographs" / f"{i}.png")
    shutil.copy(folder / "photographs" / "2.png", folder / "photographs" / "6.png")
    job = replace(
        tiny_run(folder, folder / "photographs", folder / "annotations"),
        cosmos_model_name=str(video2world),
        latent_size=32,
        shard_size=3,
        num_world_steps=1,
        rollout_steps=2,
        num_workers=0,
    )
    annotate(job, [f"{i}.png" for i in range(NUM_PHOTOGRAPHS)])
    return job


def annotate(config: Config, names: list[str]) -> None:
    """A statement about each of these photographs."""
    folder = Path(str(config.annotations))
    folder.mkdir(exist_ok=True)
    row = {"image_link": "", "caption": "The cat is on the mat.", "label": 1, "relation": "on"}
    for split, chosen in (("train", names), ("dev", names[:1]), ("test", names[:1])):
        lines = [json.dumps({"image": name, **row}) + "\n" for name in chosen]
        (folder / f"{split}.jsonl").write_text("".join(lines))


def run(config: Config, cache: Path, guardrail: Any = None, **options: Any) -> bool:
    allow_missing, part = options.get("allow_missing", False), options.get("part")
    return extract(config, cache, False, allow_missing, part and part_of(part), guardrail or Guardrail())


def content(cache: Path) -> dict[str, bytes]:
    """Every file but the temporary ones of killed runs."""
    paths = sorted(path for path in cache.rglob("*") if path.is_file())
    return {str(p.relative_to(cache)): p.read_bytes() for p in paths if not files.TEMPORARY.fullmatch(p.name)}


def finished_rows(cache: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in (cache / "latents" / "finished").glob("*.row")}


@pytest.fixture(scope="module")
def once(tmp_path_factory: pytest.TempPathFactory, video2world: Path) -> dict[str, bytes]:
    """What a single run makes of such a job, wherever its photographs are."""
    folder = tmp_path_factory.mktemp("once")
    assert run(make_job(folder / "job", video2world), folder / "cache")
    return content(folder / "cache")


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory, video2world: Path) -> tuple[Config, Path]:
    """A job, and a cache of which another part is still to be made. Nobody writes to them."""
    folder = tmp_path_factory.mktemp("begun")
    job = make_job(folder / "job", video2world)
    assert not run(job, folder / "cache", part="1/2")
    return job, folder / "cache"


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[], int]:
    """How many rollouts were begun so far, those of killed processes included."""
    log, encode = tmp_path / "encoded", RolloutEncoder.encode
    log.touch()

    def counting(self: RolloutEncoder, pixels: np.ndarray, image_sha256: str) -> torch.Tensor:
        with log.open("ab") as file:
            file.write(b".")
        return encode(self, pixels, image_sha256)

    monkeypatch.setattr(RolloutEncoder, "encode", counting)
    return lambda: log.stat().st_size


def test_the_first_moment_is_what_no_rollout_would_store(job: Config, tmp_path: Path) -> None:
    assert run(job, tmp_path / "two")
    extract(replace(job, num_world_steps=0), tmp_path / "none", with_vision=False, allow_missing=False)
    two, none = (CachedFeatures(tmp_path / name / LATENTS) for name in ("two", "none"))
    names = [f"{i}.png" for i in range(NUM_PHOTOGRAPHS)]
    assert two(names).shape == (NUM_PHOTOGRAPHS, 2, 16, 4, 4)
    assert torch.equal(two(names)[:, 0], none(names))
    assert not torch.allclose(two(names)[:, 1], none(names), atol=0.1)
    assert verify(tmp_path / "two") == []


def test_the_fingerprint_has_the_fields_of_the_photographs_and_those_of_the_rollout(
    job: Config, tmp_path: Path
) -> None:
    run(job, tmp_path / "one")
    extract(replace(job, num_world_steps=0), tmp_path / "none", with_vision=False, allow_missing=False)
    one, none = (StoreReader(tmp_path / name / LATENTS).fingerprint for name in ("one", "none"))
    added = {key for key in one if key not in none}
    assert {key for key in added if not key.startswith("rollout_")} == {
        "cosmos_guardrail",
        "guardrail",
        "transformers",
    }
    assert len(added) == 3 + 12
    assert {key for key in none if one[key] != none[key]} == {"num_world_steps"}
    assert (one["num_world_steps"], none["num_world_steps"]) == (1, 0)
    assert one["latent_shape"] == [16, 4, 4]
    spec = CosmosLatents.describe(job)
    assert spec.fields.keys() == one.keys()
    assert spec.unknown == {
        "cosmos_weights_sha256",
        "guardrail",
        "rollout_scheduler",
        "rollout_scheduler_config",
        "rollout_text_encoder_sha256",
        "rollout_transformer_sha256",
    }
    assert {key: spec.fields[key] for key in spec.fields if key not in spec.unknown}.items() <= one.items()


def test_files_of_a_finished_store_are_those_of_any_other(job: Config, tmp_path: Path) -> None:
    run(job, tmp_path / "cache")
    own = ["images.jsonl", "manifest.json", "shards/00000.h5", "shards/00000.json", "shards/00001.h5"]
    own += ["shards/00001.json", "store.json"]
    assert list(content(tmp_path / "cache")) == [f"latents/{name}" for name in own]
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "cache").rglob("*") if p.is_file()}
    assert run(job, tmp_path / "cache")
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "cache").rglob("*") if p.is_file()} == before


@pytest.mark.parametrize("parts", [("1/3", "2/3", "3/3"), ("3/3", "1/3", "2/3"), ("2/2", "1/2")])
def test_parts_in_any_order_make_the_files_of_a_single_run(
    once: dict[str, bytes], job: Config, tmp_path: Path, parts: tuple[str, ...], encoded: Callable[[], int]
) -> None:
    complete = [run(job, tmp_path / "shared", part=part) for part in parts]
    assert complete == [False] * (len(parts) - 1) + [True]
    assert encoded() == NUM_PHOTOGRAPHS - 1
    assert content(tmp_path / "shared") == once


def test_the_order_of_the_photographs_changes_no_row(
    once: dict[str, bytes], job: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_order = rollouts.roll_out_each

    def backwards(encoding: Any, finished: Any, todo: Any, source: Any, quiet: bool) -> None:
        in_order(encoding, finished, todo[::-1], source, quiet)

    monkeypatch.setattr(rollouts, "roll_out_each", backwards)
    run(job, tmp_path / "backwards")
    assert content(tmp_path / "backwards") == once


def test_killed_at_random_moments_at_most_the_photograph_in_work_is_lost(
    job: Config, tmp_path: Path, encoded: Callable[[], int]
) -> None:
    start = time.monotonic()
    run(job, tmp_path / "once")
    duration, moments, cache = time.monotonic() - start, random.Random(0), tmp_path / "killed"
    kept: dict[str, bytes] = {}
    for _ in range(6):
        child = in_child(lambda: run(job, cache))
        time.sleep(moments.uniform(0.2, 0.9) * duration)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        if (cache / "latents" / "manifest.json").exists():
            break
        found = finished_rows(cache)
        assert kept.items() <= found.items()
        kept = found
    assert run(job, cache)
    assert encoded() <= 2 * (NUM_PHOTOGRAPHS - 1) + 6
    assert content(cache) == content(tmp_path / "once")


@pytest.mark.parametrize("renames", [1, 4, 8, 9, 10, 13])
def test_killed_at_a_rename_and_resumed_gives_the_same_bytes(
    once: dict[str, bytes], job: Config, tmp_path: Path, renames: int, encoded: Callable[[], int]
) -> None:
    """The renames: list and store.json, six rows, then file and record of two shards, and the manifest."""
    cache, replace_file, done = tmp_path / "killed", os.replace, [0]

    def killing(source: Any, target: Any) -> None:
        done[0] += 1
        if done[0] == renames:
            os.kill(os.getpid(), signal.SIGKILL)
        replace_file(source, target)

    def work() -> None:
        os.replace = killing  # in the child only
        run(job, cache)

    child = in_child(work)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    rows = len(finished_rows(cache))
    assert rows == min(max(0, renames - 3), 6)
    before = encoded()
    assert run(job, cache)
    assert encoded() - before == 6 - rows
    assert content(cache) == once


def test_what_is_finished_outlives_a_list_that_changes(
    once: dict[str, bytes],
    job: Config,
    tmp_path: Path,
    encoded: Callable[[], int],
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO")
    cache = tmp_path / "cache"
    annotate(job, [f"{i}.png" for i in range(1, NUM_PHOTOGRAPHS)])
    assert not run(job, cache, part="1/2")
    annotate(job, [f"{i}.png" for i in range(NUM_PHOTOGRAPHS)])
    assert not run(job, cache, part="1/2")
    assert run(job, cache, part="2/2")
    assert encoded() == NUM_PHOTOGRAPHS - 1
    assert "the image list changed: 6 paths before, 7 now" in caplog.messages
    assert content(cache) == once


def test_what_the_guardrail_refuses_is_recorded_and_left_out_only_when_told(
    job: Config, tmp_path: Path, encoded: Callable[[], int]
) -> None:
    cache, message = (
        tmp_path / "cache",
        r"no rollout of 1 of 7 photographs:\n  1\.png: the guardrail refuses",
    )
    with pytest.raises(ValueError, match=message) as error:
        run(job, cache, Refusing([1]))
    assert "Go on without them with --allow_missing" in str(error.value)
    assert not (cache / "latents" / "manifest.json").exists()
    lines = [json.loads(line) for line in (cache / "failures.jsonl").read_text().splitlines()]
    reason = "the guardrail refuses the frames that were predicted from it"
    assert lines == [{"path": "1.png", "reason": reason}]
    assert encoded() == 6
    with pytest.raises(ValueError, match=message):
        run(job, cache, Refusing([]))
    assert run(job, cache, Refusing([]), allow_missing=True)
    assert encoded() == 6  # neither the refused one nor the others are rolled out again
    assert sorted(StoreReader(cache / LATENTS).images) == [f"{i}.png" for i in (0, 2, 3, 4, 5, 6)]
    assert [json.loads(x)["path"] for x in (cache / "failures.jsonl").read_text().splitlines()] == ["1.png"]
    before = content(cache)
    assert run(job, cache, Refusing([]), allow_missing=True)
    assert content(cache) == before
    assert verify(cache) == []


def test_unreadable_and_refused_photographs_stand_in_one_list(job: Config, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    (Path(str(job.image_folder)) / "0.png").write_bytes(b"no photograph")
    assert run(job, cache, Refusing([1]), allow_missing=True)
    rows = [json.loads(line) for line in (cache / "failures.jsonl").read_text().splitlines()]
    # 2.png and 6.png have equal bytes, and so one rollout
    assert [row["path"] for row in rows] == ["0.png", "2.png", "6.png"]
    assert rows[1]["reason"] == rows[2]["reason"] != rows[0]["reason"]
    assert sorted(StoreReader(cache / LATENTS).images) == ["1.png", "3.png", "4.png", "5.png"]


def test_where_all_is_refused_there_is_no_store(job: Config, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="refuses what was predicted from every photograph, 7 in all"):
        run(job, tmp_path / "cache", Refusing(list(range(6))), allow_missing=True)
    assert len((tmp_path / "cache" / "failures.jsonl").read_text().splitlines()) == 7


def test_a_damaged_row_goes_to_the_quarantine_and_is_made_again(
    once: dict[str, bytes],
    job: Config,
    tmp_path: Path,
    encoded: Callable[[], int],
    caplog: pytest.LogCaptureFixture,
) -> None:
    cache = tmp_path / "cache"
    run(job, cache, part="1/2")
    path = sorted((cache / "latents" / "finished").glob("*.row"))[0]
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    before = encoded()
    run(job, cache, part="1/2")
    assert encoded() == before + 1
    assert f"{path.name} was moved to {cache / 'latents' / 'quarantine'}" in caplog.text
    assert run(job, cache, part="2/2")
    made = {name: data for name, data in content(cache).items() if "quarantine" not in name}
    assert made == once


def test_a_row_that_is_damaged_before_it_is_gathered_stops_the_run(
    job: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    each = rollouts.roll_out_each

    def damaging(*arguments: Any, **options: Any) -> None:
        each(*arguments, **options)
        path = sorted((tmp_path / "cache" / "latents" / "finished").glob("*.row"))[0]
        path.write_bytes(path.read_bytes()[:-1])

    monkeypatch.setattr(rollouts, "roll_out_each", damaging)
    with pytest.raises(StoreError, match=r"finished: a finished row is gone; run the same command again"):
        run(job, tmp_path / "cache")
    assert ".row was moved to " in caplog.text
    monkeypatch.setattr(rollouts, "roll_out_each", each)
    assert run(job, tmp_path / "cache")


def test_a_photograph_that_changes_meanwhile_stops_the_run_and_the_others_stay(
    job: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    each = rollouts.roll_out_each
    path = Path(str(job.image_folder)) / "3.png"

    def changing(*arguments: Any, **options: Any) -> None:
        path.write_bytes(path.read_bytes() + b"\0")
        each(*arguments, **options)

    monkeypatch.setattr(rollouts, "roll_out_each", changing)
    with pytest.raises(ValueError, match=r"3\.png: changed while extracting"):
        run(job, tmp_path / "cache")
    assert len(finished_rows(tmp_path / "cache")) == 3


@pytest.mark.parametrize(
    ("key", "value", "shown"),
    [
        ("num_world_steps", 2, "num_world_steps: cached 1, wanted 2"),
        ("rollout_prompt", "A ball rolls.", 'wanted "A ball rolls."'),
        ("rollout_frames", 9, "rollout_frames: cached 5, wanted 9"),
        ("rollout_steps", 3, "rollout_steps: cached 2, wanted 3"),
        ("rollout_guidance", 6.0, "rollout_guidance: cached 7.0, wanted 6.0"),
        ("rollout_seed", 1, "rollout_seed: cached 0, wanted 1"),
        ("latent_size", 64, "latent_size: cached 32, wanted 64"),
    ],
)
def test_a_changed_field_is_refused_before_any_model_loads(
    begun: tuple[Config, Path], monkeypatch: pytest.MonkeyPatch, key: str, value: Any, shown: str
) -> None:
    job, cache = begun  # unfinished, too
    monkeypatch.setattr("theworld.models.cosmos.load_vae", None)
    monkeypatch.setattr(extract_module, "freeze", None)
    with pytest.raises(StoreMismatch) as error:
        run(replace(job, **{key: value}), cache)
    assert shown in str(error.value)


def test_a_cache_of_photographs_alone_is_no_cache_of_rollouts(job: Config, tmp_path: Path) -> None:
    extract(replace(job, num_world_steps=0), tmp_path, with_vision=False, allow_missing=False)
    with pytest.raises(StoreMismatch, match="num_world_steps: cached 0, wanted 1"):
        run(job, tmp_path)
    with pytest.raises(StoreMismatch, match="rollout_seed: cached \\(absent\\), wanted 0"):
        CachedFeatures(tmp_path / LATENTS, CosmosLatents.describe(job))


def test_the_estimate_says_what_was_measured_and_what_sharing_makes_of_it() -> None:
    seconds = 6259 * (0.5 + 35 * 1.4)
    assert estimate(seconds, 6259, 35, 1.4, 0.5, "cuda", Part()) == (
        "measured now: 1.40 s a denoising step, 0.50 s before the first. 6,259 x (0.50 + 35 x 1.40) s = 86.1 "
        "GPU-hours, about 86 h 3 min here; what decoding for the guardrail takes comes on top\n"
        "shared by 4 GPUs it is about 21 h 30 min: accelerate launch --multi_gpu, or --part 1/4 to 4/4 on one each"
    )
    assert "shared by" not in estimate(24 * 3600, 1, 35, 1.4, 0.5, "cuda", Part())
    assert "shared by" not in estimate(seconds, 6259, 35, 1.4, 0.5, "cuda", Part(1, 8))
    together = estimate(seconds, 6259, 35, 1.4, 0.5, "cuda", Part(0, 8, together=True))
    assert "86.1 GPU-hours, about 10 h 45 min here" in together
    assert "3.5 CPU-hours, about 3 h 30 min here" in estimate(12600, 9, 35, 1.4, 0.5, "cpu", Part())


def test_the_preflight_counts_what_is_left_and_the_room_for_it(
    job: Config, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level("INFO")
    run(job, tmp_path / "cache", part="1/2")
    own = sum(
        int(sha256((Path(str(job.image_folder)) / f"{i}.png").read_bytes())[:12], 16) % 2 == 0
        for i in range(6)
    )
    out = caplog.text
    caplog.clear()
    assert f"latents: {own} photographs of part 1/2 to roll out, 6 in the store: 12.0 KiB, twice that" in out
    assert " denoising step, " in out
    assert f"{own} x (" in out
    run(job, tmp_path / "cache", part="1/2")
    out = caplog.text
    assert f"resuming: {own} of {own} photographs rolled out" in out
    assert "latents: 0 photographs of part 1/2 to roll out" in out
    assert "denoising" not in out
    usage = shutil.disk_usage(tmp_path)._replace(free=6 * 2048 * 2)
    monkeypatch.setattr(rollouts.shutil, "disk_usage", lambda _: usage)
    run(job, tmp_path / "room", part="1/2")
    monkeypatch.setattr(rollouts.shutil, "disk_usage", lambda _: usage._replace(free=6 * 2048 * 2 - 1))
    with pytest.raises(ValueError, match=r"24,576 bytes are needed .* and 24,575 are free; make room"):
        run(job, tmp_path / "no room")


SCRIPT = """
import os
import sys
from pathlib import Path
sys.path.insert(0, "tests")
from video2world import Guardrail
from theworld.config.config import load_config
from theworld.extraction.extract import extract
from theworld.utils.console import configure_logging
configure_logging()
complete = extract(load_config(sys.argv[1]), Path(sys.argv[2]), False, False, None, Guardrail())
Path(sys.argv[2] + os.environ["RANK"]).write_text(str(complete))
"""


@pytest.mark.heavy
def test_processes_launched_together_make_the_files_of_a_single_run(job: Config, tmp_path: Path) -> None:
    run(job, tmp_path / "once")
    save_config(job, tmp_path / "config.json")
    (tmp_path / "script.py").write_text(SCRIPT)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    arguments = [str(tmp_path / "script.py"), str(tmp_path / "config.json"), str(tmp_path / "together")]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([*launch, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("denoising step") == 1
    assert "latents: 6 photographs to roll out, 6 in the store" in done.stdout
    assert [Path(f"{arguments[2]}{rank}").read_text() for rank in (0, 1)] == ["True", "False"]
    assert content(tmp_path / "together") == content(tmp_path / "once")


def test_damaged_rollouts_are_made_again_and_audited_by_their_photographs(
    rolling: Config, tmp_path: Path
) -> None:
    extract(rolling, tmp_path, False, False, None, Guardrail())
    before = content(tmp_path)
    (found,) = audit(rolling, tmp_path, 9)
    assert (found.holds, found.num_images) == (True, 3)
    for name in ("shards/00001.h5", "store.json", "images.jsonl", "manifest.json"):
        flip(tmp_path / "latents" / name)
    extract(rolling, tmp_path, False, False, None, Guardrail())
    assert {name: data for name, data in content(tmp_path).items() if "/quarantine/" not in name} == before
    assert verify(tmp_path) == []
    with pytest.raises(StoreMismatch, match="rollout_steps: cached 2, wanted 3"):
        extract(replace(rolling, rollout_steps=3), tmp_path, False, False, None, Guardrail())
