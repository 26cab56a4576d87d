"""What is scored, and what training had of it: nothing counts as held out that was trained on, without a word."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from conftest import ROOT

from theworld.config import Config, save_config
from theworld.held_out import held_out
from theworld.references import OWN, SIZES
from theworld.vsr import load_statements

VSR = ROOT.parent / "shared" / "vsr"


def write(folder: Path, split: str, captions: Sequence[tuple[str, str]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    rows = [{"image": i, "caption": c, "label": 1, "relation": "on"} for i, c in captions]
    (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def vsr(tmp_path: Path) -> Path:
    """Both releases in small: two of three zeroshot test statements are in random train, none of random's own test."""
    folder = tmp_path / "vsr"
    write(folder / "random", "train", [("a.jpg", "one"), ("b.jpg", "two"), ("c.jpg", "three")])
    write(folder / "random", "test", [("a.jpg", "four"), ("d.jpg", "five")])
    write(folder / "zeroshot", "train", [("a.jpg", "four"), ("e.jpg", "six")])
    write(folder / "zeroshot", "test", [("a.jpg", "one"), ("b.jpg", "two"), ("d.jpg", "five")])
    return folder


def checkpoint(folder: Path, annotations: Path, name: str = "vsr", **settings: object) -> Path:
    folder.mkdir()
    config = Config(annotations=str(annotations), dataset_name=name, image_folder="photos", **settings)  # type: ignore[arg-type]
    save_config(config, folder / "config.json")
    return folder


def test_a_split_with_what_training_had_of_it(vsr: Path, tmp_path: Path) -> None:
    data = held_out({"": checkpoint(tmp_path / "c", vsr)}, "test", {})
    assert [s.caption for s in data.statements] == ["four", "five"]
    assert data.seen_images == {"a.jpg"}
    assert data.in_train == {("a.jpg", "one"), ("b.jpg", "two"), ("c.jpg", "three")}
    assert (data.dataset, data.split, data.image_folder) == (OWN, "test", "photos")
    assert data.trained_on == {"": "3 statements of own data train"}


def test_statements_that_were_cut_from_training_were_not_seen(vsr: Path, tmp_path: Path) -> None:
    data = held_out({"": checkpoint(tmp_path / "c", vsr, num_samples=1)}, "train", {})
    assert data.in_train == {("a.jpg", "one")}
    assert data.seen_images == {"a.jpg"}


def test_zeroshot_is_refused_to_a_model_of_random_unless_it_is_asked_for(vsr: Path, tmp_path: Path) -> None:
    path = checkpoint(tmp_path / "c", vsr, "vsr_random")
    wanted = "c was trained on VSR random, and 2 of the 3 statements of zeroshot test are among its training"
    with pytest.raises(
        ValueError, match=rf"{wanted}.* --dataset_name vsr_zeroshot, or give --allow_trained_statements"
    ):
        held_out({"": path}, "test", {"dataset_name": "vsr_zeroshot"})
    data = held_out({"": path}, "test", {"dataset_name": "vsr_zeroshot"}, allow_trained=True)
    assert [(s.image, s.caption) in data.in_train for s in data.statements] == [True, True, False]
    assert data.seen_images == {"a.jpg", "b.jpg"}


def test_the_reverse_is_refused_where_statements_are_shared(vsr: Path, tmp_path: Path) -> None:
    path = checkpoint(tmp_path / "c", vsr, "vsr_zeroshot")
    with pytest.raises(ValueError, match="VSR zeroshot, and 1 of the 2 statements of random test"):
        held_out({"": path}, "test", {"dataset_name": "vsr"})
    assert len(held_out({"": path}, "test", {}).statements) == 3


def test_training_statements_that_moved_have_to_be_named(vsr: Path, tmp_path: Path) -> None:
    path = checkpoint(tmp_path / "c", tmp_path / "gone")
    with pytest.raises(
        ValueError, match=r"cannot be told: annotations: no file or folder .*gone; give --train_annot"
    ):
        held_out({"": path}, "test", {"annotations": str(vsr)})
    data = held_out({"": path}, "test", {"annotations": str(vsr)}, train_annotations=str(vsr))
    assert data.seen_images == {"a.jpg"}


def test_what_an_earlier_stage_was_trained_on_was_seen(vsr: Path, tmp_path: Path) -> None:
    write(tmp_path / "own", "train", [("d.jpg", "five")])
    first = checkpoint(tmp_path / "first", tmp_path / "own")
    (first / "projection.safetensors").touch()
    second = checkpoint(tmp_path / "second", vsr, init_from=str(first))
    data = held_out({"": second}, "test", {})
    assert data.seen_images == {"a.jpg", "d.jpg"}
    assert data.trained_on == {
        "": "3 statements of own data train, before that on 1 statements of own data train"
    }
    (first / "projection.safetensors").unlink()
    with pytest.raises(
        ValueError, match=r"second was trained on train of .*vsr \(vsr\) from .*first, .*neither a check"
    ):
        held_out({"": second}, "test", {})
    assert held_out({"": second}, "test", {}, train_annotations=str(vsr)).seen_images == {"a.jpg"}


def test_checkpoints_are_compared_on_the_same_statements(vsr: Path, tmp_path: Path) -> None:
    write(tmp_path / "own", "train", [("d.jpg", "five")])
    both = {"x": checkpoint(tmp_path / "x", vsr), "y": checkpoint(tmp_path / "y", tmp_path / "own")}
    with pytest.raises(
        ValueError, match=r"name different statements \(x: .*vsr, vsr; y: .*own, vsr\); give --annot"
    ):
        held_out(both, "test", {})
    data = held_out(both, "test", {"annotations": str(vsr)})
    assert data.seen_images == {"a.jpg", "d.jpg"}  # by either
    assert ("d.jpg", "five") in data.in_train
    assert set(data.trained_on) == {"x", "y"}


@pytest.mark.skipif(not VSR.is_dir(), reason="no real data: ../shared/vsr is not there")
def test_the_real_releases(tmp_path: Path) -> None:
    path = checkpoint(tmp_path / "c", VSR)
    with pytest.raises(ValueError, match=r"830 of the 1,222 statements of zeroshot test"):
        held_out({"": path}, "test", {"dataset_name": "vsr_zeroshot"})
    data = held_out({"": path}, "test", {})
    assert sum(s.image in data.seen_images for s in data.statements) == 1226
    assert data.dataset == "vsr_random"
    assert data.trained_on == {"": "7,680 statements of vsr_random train"}
    for (release, split), size in SIZES.items():
        assert len(load_statements(VSR, split, f"vsr_{release}")) == size
