"""Annotations: exact counts of the real releases, and every line that is refused."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from constants import ROOT

from theworld.config.config import Config
from theworld.data.vsr import (
    META_CATEGORIES,
    OWN,
    PUBLISHED_SHA256,
    RELATIONS,
    Statement,
    dataset_label,
    images_of,
    load_all,
    load_hub_statements,
    load_statements,
    meta_category,
    relation_note,
    relation_span,
    seen_images,
    split_words,
    statements_sha256,
    training_statements,
)

REAL = ROOT.parent / "shared" / "vsr"
needs_real = pytest.mark.skipif(not REAL.is_dir(), reason=f"the VSR annotations are not at {REAL}")

ROW = {"image": "a.jpg", "caption": "The cat is left of the dog.", "label": 1, "relation": "left of"}


def write(path: Path, *rows: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def refusal(folder: Path, line: str) -> str:
    (folder / "train.jsonl").write_text(json.dumps(ROW) + "\n" + line + "\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"train\.jsonl:2") as error:
        load_statements(folder, "train")
    return str(error.value).removeprefix(f"{folder}/")


def test_a_line_becomes_a_statement_with_its_place(tmp_path: Path) -> None:
    other = {**ROW, "image": "b/c.jpg", "label": 0, "image_link": "http://x/b.jpg", "annotator_id": 3}
    write(tmp_path / "train.jsonl", ROW, other)
    assert load_statements(tmp_path, "train") == [
        Statement("a.jpg", "The cat is left of the dog.", 1, "left of", index=0, image_link=""),
        Statement(
            "b/c.jpg", "The cat is left of the dog.", 0, "left of", index=1, image_link="http://x/b.jpg"
        ),
    ]


def test_lines_may_end_in_crlf_and_captions_may_hold_other_separators(tmp_path: Path) -> None:
    row = json.dumps({**ROW, "caption": "a\u2028b\x0bc"}, ensure_ascii=False)
    (tmp_path / "test.jsonl").write_bytes(f"\ufeff{row}\r\n{row}".encode())
    assert [statement.caption for statement in load_statements(tmp_path, "test")] == ["a\u2028b\x0bc"] * 2


def test_blank_lines_count_for_nothing_but_the_line_in_a_message(tmp_path: Path) -> None:
    row = json.dumps(ROW)
    (tmp_path / "test.jsonl").write_text(f"\n{row}\n\r\n  \t\n{row}\n\n")
    assert [statement.index for statement in load_statements(tmp_path, "test")] == [0, 1]
    (tmp_path / "test.jsonl").write_text(f"\n{row}\n\n{{}}\n")
    with pytest.raises(ValueError, match=r"test\.jsonl:4: has no field image"):
        load_statements(tmp_path, "test")


def test_half_a_character_and_nul_are_named(tmp_path: Path) -> None:
    wanted = 'train.jsonl:2: caption is "a\\ud83d"; give text that is not empty (it holds half a character'
    assert refusal(tmp_path, json.dumps({**ROW, "caption": "a\ud83d"})).startswith(wanted)
    assert "(it holds NUL" in refusal(tmp_path, json.dumps({**ROW, "image": "\0.jpg"}))


def test_a_file_in_utf_16_is_refused_with_what_converts_it(tmp_path: Path) -> None:
    (tmp_path / "test.jsonl").write_text(json.dumps(ROW), encoding="utf-16")
    with pytest.raises(ValueError, match=r"test\.jsonl: is UTF-16, .*iconv -f UTF-16 -t UTF-8"):
        load_statements(tmp_path, "test")


@pytest.mark.parametrize("split", ["dev", "validation"])
@pytest.mark.parametrize("file", ["dev.jsonl", "validation.jsonl"])
def test_dev_and_validation_are_one(tmp_path: Path, split: str, file: str) -> None:
    path = write(tmp_path / file, ROW)
    assert len(load_statements(tmp_path, split)) == 1
    assert len(load_statements(path, split)) == 1


def test_a_split_that_is_there_twice_or_not_at_all_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "dev.jsonl", ROW)
    write(tmp_path / "validation.jsonl", ROW)
    with pytest.raises(ValueError, match="keep one"):
        load_statements(tmp_path, "dev")
    with pytest.raises(FileNotFoundError, match=r"no train\.jsonl in "):
        load_statements(tmp_path, "train")
    with pytest.raises(FileNotFoundError, match="no file or folder"):
        load_statements(tmp_path / "nowhere", "train")
    with pytest.raises(ValueError, match="split is 'val'"):
        load_statements(tmp_path, "val")
    with pytest.raises(ValueError, match="dataset_name is 'gqa'"):
        load_statements(tmp_path, "dev", "gqa")


def test_a_file_of_another_split_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "train.jsonl", ROW)
    with pytest.raises(ValueError, match=r"train\.jsonl is not a file of the split test"):
        load_statements(path, "test")


def test_the_release_is_chosen_by_the_dataset_name(tmp_path: Path) -> None:
    write(tmp_path / "random" / "test.jsonl", ROW)
    write(tmp_path / "zeroshot" / "test.jsonl", ROW, ROW)
    for name, count in (("vsr", 1), ("vsr_random", 1), ("vsr_zeroshot", 2)):
        assert len(load_statements(tmp_path, "test", name)) == count
    with pytest.raises(ValueError, match="set it to vsr_zeroshot"):
        load_statements(tmp_path / "zeroshot", "test", "vsr")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("\ufeff{}", ["train.jsonl:2:1", "BOM", "JSON object"]),
        ("{", ["train.jsonl:2:2", "JSON object"]),
        ("[1]", ["[1]", "JSON object"]),
        ("[" * 100_000, ["nested too deeply"]),
        ('{"a": 1, "label": 1, "label": 0}', ["'label' stands twice"]),
        ('{"label": 1' + "0" * 5000 + "}", ["4300 digits"]),
    ],
)
def test_a_line_that_is_no_object_is_named(tmp_path: Path, line: str, words: list[str]) -> None:
    message = refusal(tmp_path, line)
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *[("label", value) for value in (2, -1, True, "1", 1.0, None)],
        *[("caption", value) for value in ("", "  ", None, 3, "a\0b", "\ud800")],
        *[("relation", value) for value in ("", None, ["on"])],
        *[("image", value) for value in ("/etc/passwd", "../a.jpg", "a/../b.jpg", "a\\b.jpg", "a\0.jpg")],
        *[("image", value) for value in ("", ".", "./a.jpg", "a//b.jpg", "a/", None, 7, "\udcff.jpg")],
        *[("image_link", value) for value in (5, "a\0")],
    ],
)
@pytest.mark.torture("security", "bad fields of annotations named, paths among them")
def test_a_bad_field_is_named_with_its_value_and_the_cure(tmp_path: Path, field: str, value: object) -> None:
    message = refusal(tmp_path, json.dumps({**ROW, field: value}))
    assert message.startswith(f"train.jsonl:2: {field} is {json.dumps(value)}; give ")


@pytest.mark.parametrize("field", list(ROW))
def test_a_missing_field_is_named(tmp_path: Path, field: str) -> None:
    message = refusal(tmp_path, json.dumps({key: value for key, value in ROW.items() if key != field}))
    assert message.startswith(f"train.jsonl:2: has no field {field}; give ")


def test_your_own_data_needs_image_statement_and_label(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text(
        '{"image": "a/1.png", "statement": "It is so.", "label": 1}\n'
        '{"image": "2.png", "statement": "It is not.", "label": 0, "relation": "on"}\n'
    )
    assert load_statements(tmp_path, "train") == [
        Statement(image="a/1.png", caption="It is so.", label=1, relation="(none)", index=0),
        Statement(image="2.png", caption="It is not.", label=0, relation="on", index=1),
    ]
    assert list(load_all(tmp_path)) == ["train"]
    (tmp_path / "test.jsonl").write_text('{"image": "1.png", "statement": "So?", "label": 0}\n')
    assert {split: len(own) for split, own in load_all(tmp_path).items()} == {"train": 2, "test": 1}
    (tmp_path / "test.jsonl").write_text('{"image": "1.png", "label": 0}\n')
    with pytest.raises(ValueError, match=r"test\.jsonl:1: has no field caption"):
        load_all(tmp_path)
    (tmp_path / "test.jsonl").write_text('{"image": "1.png", "statement": "", "label": 0}\n')
    with pytest.raises(ValueError, match=r'test\.jsonl:1: statement is ""; give text'):
        load_all(tmp_path)


OPTION = {"image": "a.jpg", "statement": "The mug is on the table.", "label": 1, "group": "1"}
OTHER = {**OPTION, "statement": "The mug is under the table.", "label": 0}


def test_statements_may_be_options_of_a_choice_and_choices_may_form_sets(tmp_path: Path) -> None:
    sets = {"set": "7", "pair": "7 on/under"}
    write(
        tmp_path / "test.jsonl", {**OPTION, "sets": sets}, {**OTHER, "sets": sets}, {**OTHER, "group": None}
    )
    one, other, alone = load_statements(tmp_path, "test")
    assert (one.group, one.sets) == ("1", (("pair", "7 on/under"), ("set", "7")))
    assert (other.group, other.sets, other.label) == ("1", one.sets, 0)
    assert (alone.group, alone.sets) == ("", ())


def test_a_question_stands_in_place_of_the_statement(tmp_path: Path) -> None:
    row = {"image": "a.jpg", "question": "Is the car beneath the cat?", "label": 0}
    write(tmp_path / "test.jsonl", row)
    (found,) = load_statements(tmp_path, "test")
    assert found == Statement("a.jpg", "Is the car beneath the cat?", 0, "(none)", 0, is_question=True)
    for other in ("statement", "caption"):
        write(tmp_path / "test.jsonl", row, {**row, other: "The car is there."})
        with pytest.raises(
            ValueError, match=rf"test\.jsonl:2: has both question and {other}; keep one of them"
        ):
            load_statements(tmp_path, "test")
    write(tmp_path / "test.jsonl", {**row, "question": " "})
    with pytest.raises(ValueError, match=r'test\.jsonl:1: question is " "; give text that is not empty'):
        load_statements(tmp_path, "test")


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (
            {**OTHER, "label": 1},
            r':2: group "1" has label 1 on 2 of its 2 lines \(.*:1, .*:2\); give it on exactly',
        ),
        ({**OTHER, "group": "2"}, r':1: group "1" has this line alone; give it two or more'),
        (
            {**OTHER, "image": "b.jpg"},
            r':2: image is "b.jpg", and group "1" is about "a.jpg" \(.*:1\); give a',
        ),
        (
            {**OTHER, "sets": {"set": "1"}},
            r':2: sets is {"set": "1"}, and group "1" has {} \(.*:1\); give all',
        ),
        ({**OTHER, "group": ""}, r':2: group is ""; give text that is not empty, or nothing'),
        ({**OTHER, "group": 3}, r":2: group is 3; give text"),
        (
            {**OTHER, "sets": ["1"]},
            r':2: sets is \["1"\]; give an object such as {"pair": "7 left"}, or nothing',
        ),
        ({**OTHER, "sets": {"set": 1}}, r':2: sets is {"set": 1}; give an object'),
        ({**OTHER, "group": None, "sets": {"set": "1"}}, r":2: has sets and no field group; give the group"),
    ],
)
def test_a_group_that_is_no_choice_is_named_by_line_and_field(
    tmp_path: Path, second: dict[str, object], message: str
) -> None:
    write(tmp_path / "test.jsonl", OPTION, second)
    with pytest.raises(ValueError, match=r"test\.jsonl" + message):
        load_statements(tmp_path, "test")


def test_a_group_without_a_true_option_is_named(tmp_path: Path) -> None:
    write(tmp_path / "test.jsonl", {**OPTION, "label": 0}, OTHER)
    with pytest.raises(
        ValueError, match=r'test\.jsonl:1: group "1" has label 1 on 0 of its 2 lines; give it on'
    ):
        load_statements(tmp_path, "test")


def test_options_and_questions_of_a_hub_data_set_are_those_of_its_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    sets = [{**OPTION, "sets": {"set": "7"}}, {**OTHER, "sets": {"set": "7"}}, OPTION | {"group": "2"}]
    question = {"image": "a.jpg", "question": "Is it so?", "label": 0, "relation": "on"}
    write(tmp_path / "vsr" / "test.jsonl", *sets, OTHER | {"group": "2", "sets": None}, question)
    found = load_hub_statements(str(tmp_path / "vsr"), "test")  # in which each row has the fields of all
    assert found == load_statements(tmp_path / "vsr", "test")
    assert [(s.group, s.sets, s.is_question) for s in found[2:]] == [("2", (), False)] * 2 + [("", (), True)]


def test_a_folder_without_any_split_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"annotations: no train\.jsonl in"):
        load_all(tmp_path)


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").touch()
    with pytest.raises(ValueError, match="holds no statements"):
        load_statements(tmp_path, "train")


def test_the_hub_and_the_files_give_equal_statements(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "vsr"
    (folder / "train.jsonl").parent.mkdir()
    (folder / "train.jsonl").write_text(f"{json.dumps(ROW)}\n\n{json.dumps({**ROW, 'label': 0})}\n\n")
    write(folder / "dev.jsonl", {**ROW, "image_link": "x"})
    write(folder / "test.jsonl", {**ROW, "label": 7})
    for split in ("train", "dev", "validation"):
        assert load_hub_statements(str(folder), split) == load_statements(folder, split)
    with pytest.raises(ValueError, match=r"test\.jsonl:1: label is 7"):
        load_hub_statements(str(folder), "test")


def test_the_dataset_name_chooses_the_hubs_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str]] = []
    monkeypatch.setattr("theworld.data.vsr.load_hub_statements", lambda *names: asked.append(names))
    for name in ("vsr", "vsr_random", "vsr_zeroshot"):
        load_statements(None, "dev", name)
    repositories = ("vsr_random", "vsr_random", "vsr_zeroshot")
    assert asked == [(f"cambridgeltl/{repository}", "dev") for repository in repositories]


def test_images_are_listed_once_and_sorted_and_overlaps_found() -> None:
    test = [Statement(image, "c", 1, "on", index) for index, image in enumerate(("b", "a", "b"))]
    train = [Statement(image, "c", 1, "on", index) for index, image in enumerate(("c", "b"))]
    assert images_of(test) == ["a", "b"]
    assert seen_images(test, train) == {"b"}


def test_every_relation_has_one_meta_category() -> None:
    assert " ".join(META_CATEGORIES) == (
        "adjacency directional orientation projective proximity topological unallocated"
    )
    counts = Counter(RELATIONS.values())
    assert [counts[category] for category in META_CATEGORIES] == [10, 16, 4, 12, 5, 17, 6]
    assert meta_category("left of") == "projective"
    assert meta_category("among") == "unallocated"
    assert meta_category("congruent") == "unknown"


@needs_real
def test_the_meta_categories_match_the_paper() -> None:
    paper: dict[str, str] = {}
    for line in (REAL / "relation_meta_categories.txt").read_text(encoding="utf-8").splitlines():
        category, _, relations = line.partition(":")
        paper.update({relation.strip(): category.lower() for relation in relations.split(",") if relations})
    assert paper == RELATIONS


@needs_real
def test_the_releases_have_their_exact_sizes() -> None:
    counts = {
        name: [len(load_statements(REAL, split, name)) for split in ("train", "dev", "test")]
        for name in ("vsr", "vsr_zeroshot")
    }
    assert counts == {"vsr": [7680, 1097, 2195], "vsr_zeroshot": [3489, 340, 1222]}


@needs_real
def test_the_releases_have_their_exact_images_relations_and_majorities() -> None:
    random = {split: load_statements(REAL, split) for split in ("train", "dev", "test")}
    zeroshot = {split: load_statements(REAL, split, "vsr_zeroshot") for split in ("train", "dev", "test")}
    everything = [statement for statements in random.values() for statement in statements]
    images = images_of(everything)
    assert (len(everything), len(images)) == (10_972, 6_259)
    assert set(images_of([s for statements in zeroshot.values() for s in statements])) <= set(images)
    assert {s.relation for s in everything if meta_category(s.relation) == "unknown"} == {"congruent"}
    assert sum(s.label for s in random["test"]) / 2195 == pytest.approx(0.5380, abs=5e-5)
    assert sum(s.label for s in zeroshot["test"]) / 1222 == pytest.approx(0.5147, abs=5e-5)


@needs_real
def test_the_overlaps_of_the_releases_are_found() -> None:
    random = {split: load_statements(REAL, split) for split in ("train", "test")}
    zeroshot = load_statements(REAL, "test", "vsr_zeroshot")
    seen = seen_images(random["test"], random["train"])
    assert sum(statement.image in seen for statement in random["test"]) == 1_226
    for split, shared in (("test", 272), ("train", 830)):
        there = {(statement.image, statement.caption) for statement in random[split]}
        assert sum((statement.image, statement.caption) in there for statement in zeroshot) == shared


@pytest.mark.parametrize(
    ("caption", "relation", "words"),
    [
        ("The cat is left of the laptop.", "left of", "left of"),
        (" The cat is Left of the laptop. ", "left of", "Left of"),
        ("The pan is in the inn.", "in", "in"),
        ("The cat is at the left side of the box.", "at the left side of", "at the left side of"),
        ("The cat is on the box on the bed.", "on", None),
        ("The cat sits.", "on", None),
        ("The c.t is", "c(t", None),
    ],
)
def test_a_relation_span_is_whole_words_that_occur_once(
    caption: str, relation: str, words: str | None
) -> None:
    span = relation_span(caption, relation)
    assert (None if span is None else caption.strip()[slice(*span)]) == words


def test_statements_without_the_words_of_their_relation_are_counted() -> None:
    def make(caption: str, label: int = 1, relation: str = "on") -> Statement:
        return Statement("a.png", caption, label, relation, 0)

    found, lost, false = make("It is on it."), make("It is under it."), make("It is under it.", label=0)
    assert relation_note([found, found, false]) == "relation words: in 2 of 2 true statements"
    assert relation_note([found, lost]) == (
        "relation words: in 1 of 2 true statements; not exactly once in the others, such as 'It is under it.' "
        "with 'on'"
    )
    with pytest.raises(
        ValueError, match=r"none of 1 true statements .* such as 'It is under it\.' with 'on'; write"
    ):
        relation_note([lost, false])


@needs_real
@pytest.mark.parametrize(("release", "count"), [("vsr_random", 10972), ("vsr_zeroshot", 5051)])
def test_every_relation_of_vsr_occurs_once_in_its_statement(release: str, count: int) -> None:
    statements = [s for own in load_all(REAL, release).values() for s in own]
    assert (
        sum(relation_span(s.caption, s.relation) is not None for s in statements) == count == len(statements)
    )


def test_a_data_set_is_called_vsr_for_its_statements_and_not_for_their_number(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    own = [Statement(f"{i}.jpg", "The cat is on the mat.", 1, "on", i) for i in range(2195)]
    assert dataset_label("folder", "vsr", "test", own) == OWN
    assert dataset_label(None, "vsr", "test", own) == "vsr_random"  # from the hub
    published = statements_sha256((s.image, s.caption, s.label) for s in own)
    monkeypatch.setitem(PUBLISHED_SHA256, ("vsr_zeroshot", "dev"), published)
    moved = [replace(s, image=f"train2017/{s.image}", caption=f"{s.caption} ") for s in reversed(own)]
    assert dataset_label("folder", "vsr", "validation", moved) == "vsr_zeroshot"
    assert dataset_label("folder", "vsr_zeroshot", "test", moved) == OWN
    assert dataset_label("folder", "vsr_zeroshot", "dev", [replace(moved[0], label=0), *moved[1:]]) == OWN


def test_a_share_of_the_training_statements_is_drawn_by_the_seed_and_holds_smaller_ones() -> None:
    statements = [Statement(f"{i}.jpg", f"statement {i}", i % 2, "near", i) for i in range(40)]

    def taken(**settings: Any) -> list[int]:
        return [statements.index(s) for s in training_statements(statements, Config(**settings))]

    assert taken() == list(range(40))
    assert taken(num_samples=3) == [0, 1, 2]
    tenth = taken(train_share=0.1)
    assert tenth == [4, 13, 22, 28]
    assert taken(train_share=0.1, seed=1) != tenth
    assert len(taken(train_share=0.25)) == 10
    assert set(tenth) < set(taken(train_share=0.25)) < set(taken(train_share=0.99))
    assert taken(train_share=0.25) == sorted(taken(train_share=0.25))
    assert len(taken(train_share=0.5, num_samples=10)) == 5
    assert set(taken(train_share=0.5, num_samples=10)) < set(range(10))
    assert len(taken(train_share=0.001)) == 1


def test_a_split_is_named_in_words() -> None:
    assert split_words("vsr_random", "test", "scenes") == "the test split of VSR random"
    assert split_words(OWN, "dev", "scenes") == "the dev split of custom data (scenes)"
    assert split_words(OWN, "dev") == "the dev split of custom data"
    assert split_words("What'sUp A", "") == "What'sUp A"
    assert split_words("", "test") == "the test split of unnamed data"
