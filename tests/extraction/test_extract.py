"""The list of photographs is the same whoever reads them.

Phase 1 shared among processes: whoever takes part, the files are those of a single run.
"""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import forked, ranks, tool
from constants import EMBEDDED_VAE, ROOT
from jobs import config_of, content, flip, make_photographs

from theworld.data.images import sha256
from theworld.extraction import extract as phase_1
from theworld.extraction import reading
from theworld.extraction.extract import _seconds_an_image, extract, freeze, preflight, verify
from theworld.extraction.pipeline import feed
from theworld.extraction.reading import Source, Spool
from theworld.models.encoder import EncoderSpec
from theworld.store.format import known_hashes, read_failures
from theworld.store.shard import ArraySpec, ImageEntry
from theworld.store.writer import Store
from theworld.utils import files
from theworld.utils.distributed import part_of
from theworld.utils.files import write_failures

ENVIRONMENT = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with 68 photographs (9 shards), settings, and `cache`, what a single run makes of them."""
    folder = tmp_path_factory.mktemp("job")
    config = make_photographs(folder, 68, 20)
    assert extract(config, folder / "cache", with_vision=False, allow_missing=False)
    return folder


def words(job: Path, cache: Path, *arguments: str) -> list[str]:
    return ["extract_latents", "--config", str(job / "config.json"), "--cache", str(cache), *arguments]


def command(job: Path, cache: Path, *arguments: str) -> list[str]:
    name, *given = words(job, cache, *arguments)
    return [f"tools/{name}.py", *given]


def start(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def test_processes_that_read_change_no_byte(
    job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "FEW", 1)
    extract(replace(config_of(job), num_workers=2), tmp_path, with_vision=False, allow_missing=False)
    assert content(tmp_path) == content(job / "cache")
    assert len(content(tmp_path)) == 3 + 2 * 9
    assert verify(tmp_path) == []


@pytest.mark.parametrize("order", [(1, 2, 3), (3, 1, 2)])
def test_parts_in_any_order_make_the_files_of_a_single_run(
    job: Path, tmp_path: Path, order: tuple[int, ...], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    lines = []
    for n, i in enumerate(order):
        done = extract(config_of(job), tmp_path, False, False, part_of(f"{i}/3"))
        assert done == (n == 2)
        lines.append(caplog.text)
        caplog.clear()
        assert (tmp_path / "latents" / "manifest.json").exists() == (n == 2)
        own = [shard for shard in range(9) if shard % 3 == i - 1]
        assert all((tmp_path / "latents" / "shards" / f"{shard:05}.json").exists() for shard in own)
    assert "latents: 6 of 9 shards still missing: those of other parts" in lines[0]
    assert "latents: 3 of 9 shards still missing: those of other parts" in lines[1]
    assert "missing" not in lines[2]
    assert content(tmp_path) == content(job / "cache")


def test_a_part_of_more_parts_than_shards_has_nothing_to_do(
    job: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    assert not extract(config_of(job), tmp_path, False, False, part_of("12/12"))
    assert "latents: 0 of 68 images to encode in 0 of 9 shards" in caplog.text
    assert "latents: 9 of 9 shards still missing" in caplog.text


def test_an_interrupted_run_goes_on_in_parts(
    job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_shard = Store.write_shard

    def interrupted(self: Store, shard: int, arrays: dict[str, np.ndarray]) -> None:
        if shard == 4:
            raise KeyboardInterrupt
        write_shard(self, shard, arrays)

    monkeypatch.setattr(Store, "write_shard", interrupted)
    with pytest.raises(KeyboardInterrupt):
        extract(config_of(job), tmp_path, False, False)
    monkeypatch.setattr(Store, "write_shard", write_shard)
    assert not extract(config_of(job), tmp_path, False, False, part_of("2/2"))
    assert extract(config_of(job), tmp_path, False, False, part_of("1/2"))
    assert content(tmp_path) == content(job / "cache")


def test_two_parts_at_the_same_time_make_the_files_of_a_single_run(job: Path, tmp_path: Path) -> None:
    def part(number: int) -> subprocess.CompletedProcess[str]:
        return tool(*words(job, tmp_path, "--part", f"{number}/2", "--num_workers", "1"))

    with ThreadPoolExecutor(2) as pool:
        tasks = list(pool.map(part, (1, 2)))
    assert content(tmp_path) == content(job / "cache")
    said = [("still missing" in out, f"done: {tmp_path}" in out) for out in (task.stdout for task in tasks)]
    assert said in [[(True, False), (False, True)], [(False, True), (True, False)], [(False, True)] * 2]


def test_processes_launched_together_make_the_files_of_a_single_run(job: Path, tmp_path: Path) -> None:
    name, *given = words(job, tmp_path)
    done = forked(name, given, ranks(2), 120)
    assert done.returncode == 0, done.stderr
    out = done.stdout
    assert content(tmp_path) == content(job / "cache")
    # 9 shards: the first process has five of them, and is the only one to speak
    assert out.count("latents: 36 of 68 images to encode in 5 of 9 shards") == 1
    assert out.count("images to encode") == out.count("done: ") == 1


def test_what_is_wrong_is_said_once_by_processes_launched_together(job: Path, tmp_path: Path) -> None:
    name, *given = words(job, tmp_path, "--max_image_pixels", "10")
    done = forked(name, given, ranks(2), 120)
    assert done.returncode == 1
    assert done.stderr.count("extract_latents: 68 of 68 photographs cannot be read") == 1
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("stop", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.heavy)])
def test_an_interrupted_tool_says_one_line_and_leaves_no_process(
    tmp_path: Path, stop: signal.Signals
) -> None:
    make_photographs(tmp_path, 300, 100)
    run = start(*command(tmp_path, tmp_path / "cache", "--num_workers", "2", "--latent_size", "128"))
    shards = tmp_path / "cache" / "latents" / "shards"
    deadline = time.monotonic() + 60
    while not list(shards.glob("*.json")):  # then it is in the middle of it
        assert run.poll() is None, run.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(run.pid, stop)
    deadline = time.monotonic() + 60
    out, errors = run.communicate(timeout=60)
    assert run.returncode == 130, errors
    assert "Traceback" not in errors
    assert errors.rstrip().endswith("extract_latents: interrupted; the same command goes on from here")
    assert "done:" not in out
    # the server of the reading processes ends when it sees that the tool is gone
    while time.monotonic() < deadline:
        try:
            os.killpg(run.pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.05)
    raise AssertionError("a process of its group is left")


def test_the_same_bytes_may_be_published_by_two_parts_at_the_same_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, holds = tmp_path / "manifest.json", files.holds

    def another_is_faster(asked: Path, data: bytes) -> bool:
        monkeypatch.setattr(files, "holds", holds)
        found = holds(asked, data)
        path.write_bytes(b"the same")
        return found

    monkeypatch.setattr(files, "holds", another_is_faster)
    files.publish_bytes(path, b"the same")
    assert path.read_bytes() == b"the same"
    with pytest.raises(
        FileExistsError, match=r"already there with other content; it is never overwritten: '.*json'"
    ):
        files.publish_bytes(path, b"other")


class Timed:
    """An encoder of which every batch takes so long, and the first one half a second if it is compiled."""

    name, device = "latents", torch.device("cpu")

    def __init__(self, compiled: bool, seconds: float) -> None:
        self.compiled, self.seconds = compiled, seconds
        fields = {"compiled": True} if compiled else {}
        self.spec = EncoderSpec("latents", (3,), "float32", None, fields)
        self.sizes: list[int] = []

    def prepare(self, pixels: np.ndarray) -> torch.Tensor:
        return torch.zeros(3, dtype=torch.uint8)

    def encode(self, prepared: torch.Tensor) -> torch.Tensor:
        time.sleep(0.5 if self.compiled and not self.sizes else self.seconds)
        self.sizes.append(len(prepared))
        return prepared


@pytest.mark.parametrize(
    ("compiled", "seconds", "sizes", "an_image"),
    [
        (False, 0.08, [1, 4, 4], 0.02),  # a batch is quick: it is timed, the second time around
        (False, 0.2, [1], 0.2),  # two batches of four would take more than a second
        (True, 0.08, [4, 4], 0.02),  # what the first batch takes is for compiling
    ],
)
def test_the_estimate_is_quick_and_leaves_out_what_happens_once(
    job: Path, tmp_path: Path, compiled: bool, seconds: float, sizes: list[int], an_image: float
) -> None:
    rows = [ImageEntry(p.name, sha256(p.read_bytes())) for p in sorted((job / "photographs").iterdir())]
    timed = Timed(compiled, seconds)
    store = Store.create(tmp_path, {}, rows, [timed.spec.array], 8)
    source, spool = Source(job / "photographs", 10**6, 0), Spool(timed.prepare)
    with feed(store, timed, [3, 4], source, 4, spool) as fed:
        found = _seconds_an_image(timed, 4, fed)
        assert timed.sizes == sizes
        assert [batch.num_photographs for batch in fed.batches] == [4] * 4  # all of them
    assert found == pytest.approx(an_image, rel=0.4)  # on a machine that does other things too
    with feed(store, timed, [], source, 4, spool) as fed:
        assert preflight(store, timed, [], 4, fed).endswith("about 0 s")


# ---- the list, and the first encoder beside it


def test_the_first_encoder_is_loaded_while_photographs_are_listed(
    job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded, load = threading.Event(), phase_1.load

    def loading(*arguments: Any) -> Any:
        encoder = load(*arguments)
        loaded.set()
        return encoder

    def listing(*arguments: Any) -> Any:
        assert loaded.wait(60)
        return freeze(*arguments)

    monkeypatch.setattr(phase_1, "load", loading)
    monkeypatch.setattr(phase_1, "freeze", listing)
    assert extract(config_of(job), tmp_path, False, False)
    assert content(tmp_path) == content(job / "cache")


def test_an_error_of_the_list_comes_before_one_of_the_model(job: Path, tmp_path: Path) -> None:
    (tmp_path / "vae").mkdir()
    config = replace(config_of(job), cosmos_model_name=str(tmp_path / "vae"))
    (tmp_path / "vae" / "config.json").write_text((EMBEDDED_VAE / "config.json").read_text())
    (tmp_path / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(b"no weights")
    with pytest.raises(ValueError, match="68 of 68 photographs cannot be read"):
        extract(replace(config, max_image_pixels=10), tmp_path / "cache", False, False)
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["failures.jsonl"]
    with pytest.raises(ValueError, match=r"model\.safetensors: no header of a safetensors file"):
        extract(config, tmp_path / "cache", False, False)
    assert list((tmp_path / "cache").iterdir()) == []


def test_an_interruption_while_the_model_loads_stops_the_list(
    job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, ended = threading.Event(), []

    def interrupted(*_: object) -> None:
        assert begun.wait(60)
        raise KeyboardInterrupt

    def listing(*arguments: Any) -> Any:
        begun.set()
        assert arguments[-1].wait(60)
        try:
            return freeze(*arguments)
        except phase_1.Stopped:
            ended.append("stopped")
            raise

    monkeypatch.setattr(phase_1, "load", interrupted)
    monkeypatch.setattr(phase_1, "freeze", listing)
    with pytest.raises(KeyboardInterrupt):
        extract(replace(config_of(job), max_image_pixels=10), tmp_path / "cache", False, False)
    assert ended == ["stopped"]
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.parametrize(
    ("compiled", "time_left", "complete", "sizes"),
    [(True, True, False, [4]), (True, False, False, []), (True, True, True, []), (False, True, False, [])],
)
def test_an_encoder_that_starts_slowly_is_started_while_there_is_time_and_work(
    job: Path, tmp_path: Path, compiled: bool, time_left: bool, complete: bool, sizes: list[int]
) -> None:
    timed = Timed(compiled, 0.0)
    if complete:
        (tmp_path / "latents").mkdir()
        (tmp_path / "latents" / "manifest.json").touch()
    config = replace(config_of(job), encode_batch_size=4)
    kind: Any = lambda _: timed  # noqa: E731 - in place of a class
    assert phase_1.load(kind, config, tmp_path, lambda: time_left) is timed
    assert timed.sizes == sizes


@pytest.fixture
def folder(photographs: Path, tmp_path: Path) -> Path:
    """40 photographs; 07.png is damaged, 20.png is missing."""
    for i in range(40):
        shutil.copy(photographs / "b.png", tmp_path / f"{i:02}.png")
    (tmp_path / "07.png").write_bytes((photographs / "b.png").read_bytes()[:99])
    (tmp_path / "20.png").unlink()
    return tmp_path


@pytest.mark.parametrize("workers", [0, 2])
def test_listing_is_sorted_and_names_what_cannot_be_read(
    folder: Path, photographs: Path, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "FEW", 1)  # so that processes read
    names = [f"{i:02}.png" for i in range(40)]
    entries, failures = freeze(names[::-1], Source(folder, 10**6, workers), {})
    digest = sha256((photographs / "b.png").read_bytes())
    assert entries == [ImageEntry(name, digest) for name in names if name not in ("07.png", "20.png")]
    assert [path for path, _ in failures] == ["07.png", "20.png"]
    assert failures[0][1].startswith("damaged or not complete")
    assert failures[1][1] == f"no such file in {folder}"


def test_known_bytes_are_not_decoded_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[str] = []
    monkeypatch.setattr(reading, "decode", lambda data, path, max_pixels: decoded.append(path))
    digest = sha256((folder / "01.png").read_bytes())
    freeze(["01.png", "02.png", "03.png"], Source(folder, 10**6, 0), {"01.png": digest, "02.png": "0" * 64})
    assert decoded == ["02.png", "03.png"]


def test_failures_are_a_file_only_while_there_are_some(tmp_path: Path) -> None:
    path = tmp_path / "failures.jsonl"
    write_failures(tmp_path, [("a.png", "zero bytes"), ("ü.png", "gone")])
    write_failures(tmp_path, [("ü.png", "gone")])
    assert path.read_text(encoding="utf-8") == '{"path": "ü.png", "reason": "gone"}\n'
    assert [p.name for p in tmp_path.iterdir()] == ["failures.jsonl"]
    # as a file name has it that is not UTF-8
    named = {
        "a\u2028b.png": "a link to \udcff.png",
        "ü.png": "gone",
    }
    write_failures(tmp_path, list(named.items()))
    assert read_failures(tmp_path) == named
    write_failures(tmp_path, [])
    assert not path.exists()


def test_photographs_of_both_stores_are_known_unless_their_list_is_damaged(tmp_path: Path) -> None:
    spec = ArraySpec("latents", (1,), "float32")
    entries = {"latents": ImageEntry("a.png", "1" * 64), "gemma_vision": ImageEntry("b.png", "2" * 64)}
    for name, entry in entries.items():
        Store.create(tmp_path / name, {}, [entry], [spec], 1)
    assert known_hashes(tmp_path) == {"a.png": "1" * 64, "b.png": "2" * 64}
    flip(tmp_path / "latents/images.jsonl")
    assert known_hashes(tmp_path) == {"b.png": "2" * 64}
