"""Scenes: the same for the same key, true to their geometry, of VSR's form."""

import hashlib
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from theworld.data.scenes import (
    COLOURS,
    RELATIONS,
    SPLITS,
    Scene,
    Thing,
    draw_scene,
    make_scene,
    make_statements,
    scene_rows,
    write_scenes,
)

VSR_FIELDS = [
    "image",
    "image_link",
    "caption",
    "label",
    "relation",
    "annotator_id",
    "vote_true_validator_id",
    "vote_false_validator_id",
    "reference_frame",
]


def test_equal_keys_give_equal_scenes_and_pictures() -> None:
    first, second = make_scene(3, "dev", 7), make_scene(3, "dev", 7)
    assert first == second
    assert draw_scene(first).tobytes() == draw_scene(second).tobytes()
    assert make_statements(first) == make_statements(second)


def test_every_part_of_the_key_changes_the_scene() -> None:
    keys = [(0, "train", 0), (1, "train", 0), (0, "dev", 0), (0, "test", 0), (0, "train", 1)]
    pictures = {hashlib.sha256(draw_scene(make_scene(*key)).tobytes()).hexdigest() for key in keys}
    assert len(pictures) == len(keys)


def test_an_unknown_split_is_an_error() -> None:
    with pytest.raises(ValueError, match="validation"):
        make_scene(0, "validation", 0)


@pytest.mark.parametrize(
    ("relation", "centres"),
    [
        ("left of", ((0.2, 0.5), (0.8, 0.4))),
        ("right of", ((0.8, 0.4), (0.2, 0.5))),
        ("above", ((0.5, 0.2), (0.4, 0.8))),
        ("below", ((0.4, 0.8), (0.5, 0.2))),
    ],
)
def test_labels_agree_with_places(relation: str, centres: tuple[tuple[float, float], ...]) -> None:
    first, second = (Thing(c, "ball", x, y, 0.06) for c, (x, y) in zip(("red", "blue"), centres, strict=True))
    # y grows downwards: "above" has the smaller y. Many keys, so that each relation comes up about each thing.
    seen = set()
    for index in range(200):
        for statement in make_statements(Scene((0, 0, index), (first, second))):
            if statement.relation == relation:
                about_first = statement.caption == f"The red ball is {relation} the blue ball."
                assert about_first or statement.caption == f"The blue ball is {relation} the red ball."
                assert statement.label == int(about_first)
                seen.add(about_first)
    assert seen == {True, False}


def test_a_scene_has_one_true_and_one_false_statement_in_either_order() -> None:
    labels = [tuple(s.label for s in make_statements(make_scene(0, "train", index))) for index in range(300)]
    assert set(labels) == {(0, 1), (1, 0)}
    assert 100 < labels.count((0, 1)) < 200


def test_the_words_say_nothing_about_the_label() -> None:
    counts = Counter(
        (s.relation, s.label) for i in range(2000) for s in make_statements(make_scene(0, "train", i))
    )
    # 4,000 statements over eight cells: 500 each, standard deviation 21; five of them either way.
    assert all(395 < counts[relation, label] < 605 for relation in RELATIONS for label in (0, 1))


def test_things_are_apart_inside_and_of_different_colours() -> None:
    for index in range(500):
        first, second = make_scene(5, "test", index).things
        assert first.colour != second.colour
        assert min(abs(first.x - second.x), abs(first.y - second.y)) >= 0.12
        for thing in (first, second):
            assert thing.radius < min(thing.x, thing.y, 1 - thing.x, 1 - thing.y)


def test_a_thing_is_drawn_in_its_colour_at_its_place() -> None:
    for index in range(20):
        scene = make_scene(0, "train", index)
        picture = draw_scene(scene)
        for thing in scene.things:
            y, x = int(thing.y * 192), int(thing.x * 192)
            patch = picture[y - 1 : y + 4, x : x + 5].mean(axis=(0, 1))
            nearest = min(COLOURS, key=lambda c: float(np.abs(patch - np.array(COLOURS[c])).sum()))
            assert nearest == thing.colour


def test_rows_have_the_fields_of_vsr() -> None:
    rows = scene_rows(make_scene(0, "train", 0), "scene-train-000000.png", num_statements=4)
    assert [list(row) for row in rows] == [VSR_FIELDS] * 4
    assert sum(int(str(row["label"])) for row in rows) == 2


def test_a_data_set_folder_has_pictures_and_rows(tmp_path: Path) -> None:
    write_scenes(tmp_path, {"train": 3, "dev": 1, "test": 2}, seed=4)
    files = sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file())
    pictures = [("dev", 0), ("test", 0), ("test", 1), ("train", 0), ("train", 1), ("train", 2)]
    names = [f"scene-{split}-{index:06d}.png" for split, index in pictures]
    assert files == ["dev.jsonl", *(f"images/{name}" for name in names), "test.jsonl", "train.jsonl"]
    rows = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    assert [row["image"] for row in rows] == [name for name in names[3:] for _ in range(2)]
    drawn = draw_scene(make_scene(4, SPLITS[2], 1))
    assert np.array_equal(np.asarray(Image.open(tmp_path / "images" / names[2])), drawn)
