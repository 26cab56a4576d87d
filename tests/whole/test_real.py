"""The three phases on real VSR statements and real COCO photographs, where those are at hand."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from constants import ROOT

from theworld.config.config import Config
from theworld.data.vsr import load_statements
from theworld.evaluation.conditions import CONDITIONS
from theworld.evaluation.metrics import summarise
from theworld.evaluation.score import score
from theworld.extraction.extract import extract, verify
from theworld.extraction.features import CachedFeatures
from theworld.store.format import LATENTS
from theworld.training.trainer import Trainer

VSR = ROOT.parent / "shared" / "vsr"
COCO = ROOT.parent / "shared" / "coco"
pytestmark = pytest.mark.skipif(
    not (VSR.is_dir() and COCO.is_dir()),
    reason="no real data: ../shared/vsr and ../shared/coco are not there",
)


def test_all_96_photographs_are_extracted(config: Config, tmp_path: Path) -> None:
    photographs = sorted(path.name for path in COCO.glob("*.jpg"))
    row = {"image_link": "", "caption": "The cat is on the mat.", "label": 1, "relation": "on"}
    for split in ("train", "dev", "test"):
        lines = [json.dumps({"image": name, **row}) + "\n" for name in photographs]
        (tmp_path / f"{split}.jsonl").write_text("".join(lines))
    config = replace(
        config, annotations=str(tmp_path), image_folder=str(COCO), shard_size=40, encode_batch_size=8
    )
    extract(config, tmp_path / "cache", with_vision=True, allow_missing=False)
    assert verify(tmp_path / "cache") == []
    rows = CachedFeatures(tmp_path / "cache" / LATENTS)
    assert len(rows.reader) == 96
    assert rows(photographs).shape == (96, 16, 8, 8)
    assert len({bytes(row.numpy().tobytes()) for row in rows(photographs)}) == 96


def test_the_three_phases_on_the_real_statements_whose_photograph_is_there(
    config: Config, tmp_path: Path
) -> None:
    config = replace(config, annotations=str(VSR), image_folder=str(COCO), do_eval=False)
    extract(config, tmp_path / "cache", with_vision=True, allow_missing=True)
    failures = (tmp_path / "cache" / "failures.jsonl").read_text().splitlines()
    assert len(failures) == 6255
    trainer = Trainer(config, tmp_path / "cache")
    there = {p.name for p in COCO.glob("*.jpg")}
    wanted = [s for s in load_statements(VSR, "train") if s.image in there]
    assert trainer.data.train == wanted
    checkpoint = trainer.run()
    assert {s.image for s in wanted} <= {
        "000000000142.jpg",
        "000000308394.jpg",
        "000000512183.jpg",
        "000000574315.jpg",
    }
    systems = CONDITIONS if len({s.image for s in wanted}) > 1 else ("world", "baseline", "zero")
    summary = summarise(score(checkpoint, tmp_path / "cache", None, "train", systems, {}))
    assert summary["statements"] == len(wanted)
    assert set(summary["systems"]) == set(systems)
