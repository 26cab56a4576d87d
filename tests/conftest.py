"""Small things that the tests share: the embedded models, photographs made of noise, statements about them."""

import json
import logging
import os
import shutil
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import forks  # noqa: F401 - before any process is started
import garbage
import numpy as np
import pytest
import torch
from browser import Browser, find_browser
from constants import CAPTIONS, EMBEDDED_GEMMA, EMBEDDED_VAE
from PIL import Image
from transformers import AutoTokenizer, Gemma3ForCausalLM, Gemma3TextConfig

from theworld.config.config import Config
from theworld.data.vsr import Statement
from theworld.models.gemma import Gemma
from theworld.utils.console import configure_logging

pytest_plugins = ["torture"]
# As in an activated virtual environment, where `python` in the commands of messages is this interpreter.
os.environ["PATH"] = f"{os.path.dirname(sys.executable)}{os.pathsep}{os.environ.get('PATH', '')}"


QUICK = ("config", "data", "evaluation", "store")  # folders of short tests


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put folders of short tests last, so that no worker ends alone with a long one."""
    items.sort(key=lambda item: item.path.parent.name in QUICK)


def pytest_collection_finish() -> None:
    """All test modules are imported."""
    garbage.imported()


@pytest.fixture(autouse=True, scope="session")
def few_threads() -> None:
    """The models are tiny: threads cost more than they give, above all on a busy machine."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def signals_as_they_were() -> Iterator[None]:
    """Put back what a test does with signals: a run that has ended ignores them, and so would every process that later
    tests start."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
    before = {number: signal.getsignal(number) for number in numbers}
    yield
    for number, handler in before.items():
        if signal.getsignal(number) is not handler:
            signal.signal(number, handler)


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """A headless Chromium, for tests that are marked with `needs_browser`."""
    path = find_browser()
    assert path is not None
    one = Browser(path, tmp_path_factory.mktemp("profile"))
    yield one
    one.close()


_opened: Counter[str] | None = None


def _count(event: str, arguments: tuple[object, ...]) -> None:
    if event == "open" and _opened is not None and isinstance(arguments[0], (str, os.PathLike)):
        _opened[os.fspath(arguments[0])] += 1


sys.addaudithook(_count)


@pytest.fixture
def opened() -> Iterator[Callable[[Path], dict[str, int]]]:
    """How often this process opened each file of a folder since the start of the test body, from Python."""
    global _opened
    _opened = Counter()
    found = _opened
    yield lambda folder: {
        Path(name).name: count for name, count in sorted(found.items()) if Path(name).parent == folder
    }
    _opened = None


@pytest.fixture(scope="session")
def gemma() -> Gemma:
    """The embedded multimodal Gemma in float32."""
    return Gemma(str(EMBEDDED_GEMMA))


@pytest.fixture(scope="session")
def text_gemma_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text-only Gemma3ForCausalLM of random weights, with the embedded tokeniser and a mix of both layer types."""
    folder = tmp_path_factory.mktemp("text-gemma")
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED_GEMMA)
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        query_pre_attn_scalar=16,
        sliding_window=16,  # shorter than a prompt, so that the window matters
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        initializer_range=0.2,
    )
    Gemma3ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def statements() -> list[Statement]:
    """Six statements about three images."""
    return [
        Statement(image=i, caption=c, label=y, relation=r, index=n) for n, (i, c, y, r) in enumerate(CAPTIONS)
    ]


@pytest.fixture(scope="session")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a.png, b.png and c.png, of different sizes."""
    folder = tmp_path_factory.mktemp("photographs")
    generator = np.random.default_rng(0)
    for name, size in (("a.png", (80, 96)), ("b.png", (64, 64)), ("c.png", (120, 50))):
        Image.fromarray(generator.integers(0, 256, (*size, 3), dtype=np.uint8)).save(folder / name)
    return folder


@pytest.fixture(scope="session")
def annotations(tmp_path_factory: pytest.TempPathFactory, statements: list[Statement]) -> Path:
    """A VSR-shaped folder of those statements: all six in train, the first in dev, the last four in test."""
    folder = tmp_path_factory.mktemp("annotations")
    rows = [
        {"image": s.image, "image_link": "", "caption": s.caption, "label": s.label, "relation": s.relation}
        for s in statements
    ]
    for split, chosen in (("train", rows), ("dev", rows[:1]), ("test", rows[2:])):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chosen))
    return folder


@pytest.fixture
def config(tmp_path: Path, photographs: Path, annotations: Path) -> Config:
    """Settings of a tiny run on the embedded models, on the CPU."""
    return tiny_run(tmp_path / "run", photographs, annotations)


@pytest.fixture(scope="session")
def session_cache(tmp_path_factory: pytest.TempPathFactory, photographs: Path, annotations: Path) -> Path:
    """A finished cache of that tiny run, with vision features. Nobody writes to it."""
    from theworld.extraction.extract import extract

    folder = tmp_path_factory.mktemp("session") / "cache"
    extract(tiny_run(folder, photographs, annotations), folder, with_vision=True, allow_missing=False)
    return folder


@pytest.fixture
def cache(session_cache: Path, tmp_path: Path) -> Path:
    """A copy of that cache, for a test to do with as it likes."""
    return Path(shutil.copytree(session_cache, tmp_path / "cache"))


def tiny_run(output_dir: Path, photographs: Path, annotations: Path) -> Config:
    """Settings of a tiny run on the embedded models, on the CPU."""
    return Config(
        model_name=str(EMBEDDED_GEMMA),
        cosmos_model_name=str(EMBEDDED_VAE),
        annotations=str(annotations),
        image_folder=str(photographs),
        output_dir=str(output_dir),
        latent_size=64,
        world_patch=2,
        device="cpu",
        batch_size=2,
        gradient_accumulation_steps=2,
        max_steps=4,
        learning_rate=1e-3,
        warmup_steps=0,
        log_to_tensorboard=False,
        logging_steps=1,
        eval_steps=2,
        save_steps=2,
        shard_size=2,
        encode_batch_size=2,
    )


@pytest.fixture(scope="session")
def video2world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small Video2World pipeline of random weights, whose VAE is the embedded one."""
    from video2world import make_pipeline

    return make_pipeline(tmp_path_factory.mktemp("models") / "video2world")


@pytest.fixture
def rolling(config: Config, video2world: Path) -> Config:
    """The settings of that tiny run, with two predicted moments after each photograph."""
    return replace(config, cosmos_model_name=str(video2world), num_world_steps=2, rollout_steps=2)


@pytest.fixture(autouse=True)
def fresh_log() -> Iterator[None]:
    """Each test begins with the package's log as a library has it, whatever a tool in an earlier one configured."""
    yield
    logger = logging.getLogger("theworld")
    logger.handlers.clear()
    logger.setLevel(logging.NOTSET)
    logger.propagate = True


@pytest.fixture
def log_shown() -> None:
    """Show the package's log on standard output, as a tool does."""
    configure_logging()
