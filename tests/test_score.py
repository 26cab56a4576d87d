"""Checkpoints scored together answer as each by itself, and say where their answers come from."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from theworld import score as module
from theworld.config import Config
from theworld.extract import extract
from theworld.files import hash_file
from theworld.metrics import SYSTEMS, read_jsonl, summarise
from theworld.model import Gemma
from theworld.provenance import default_output, read_source, short_names
from theworld.saved import read_world
from theworld.score import score, score_to_file
from theworld.train import Trainer


@pytest.fixture
def cache(config: Config, tmp_path: Path) -> Path:
    extract(config, tmp_path / "cache", with_vision=True, allow_missing=False)
    return tmp_path / "cache"


@pytest.fixture
def seeds(config: Config, cache: Path, tmp_path: Path) -> list[Path]:
    """Two runs of one step, of different seeds."""
    config = replace(config, max_steps=1, do_eval=False)
    return [
        Trainer(replace(config, seed=s, output_dir=str(tmp_path / f"s{s}")), cache).run().parent
        for s in (0, 1)
    ]


def test_checkpoints_together_answer_as_each_by_itself_with_one_gemma(
    seeds: list[Path], cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = []
    real = module.TheWorld.from_pretrained

    def watched(path: Path, gemma: Gemma | None, **overrides: object) -> object:
        model = real(path, gemma, **overrides)
        loaded.append(model.gemma)
        return model

    alone = [score(path / "checkpoint-1", cache, None, "test", SYSTEMS, {}) for path in seeds]
    monkeypatch.setattr(module.TheWorld, "from_pretrained", watched)
    output = tmp_path / "both.jsonl"
    command = ["python", "tools/eval.py", "--annotations", "my data"]
    path, summary = score_to_file(seeds, "test", cache, None, SYSTEMS, {}, command, output)
    assert path == output
    rows = read_jsonl(output)
    own = [f"{name}:{kind}" for name in ("s0", "s1") for kind in ("world", "zero", "shuffled")]
    assert list(rows[0]["systems"]) == ["baseline", "text", *own]
    for name, wanted in zip(("s0", "s1"), alone, strict=True):
        for row, one in zip(rows, wanted, strict=True):
            for kind in SYSTEMS:
                found = row["systems"][kind if kind in ("baseline", "text") else f"{name}:{kind}"]
                assert found == pytest.approx(one["systems"][kind], abs=1e-4)
    assert loaded[0] is loaded[1]
    assert rows[0]["systems"]["s0:world"] != rows[0]["systems"]["s1:world"]
    assert summary == summarise(rows)
    assert set(summary["checkpoints"]["world"]["each"]) == {"s0", "s1"}
    source = read_source(output)
    assert source is not None
    assert source["command"] == "python tools/eval.py --annotations 'my data'"
    assert source["records_sha256"] == hash_file(output)[1]
    assert [source["checkpoints"][name]["seed"] for name in ("s0", "s1")] == [0, 1]
    assert source["checkpoints"]["s1"]["step"] == 1
    assert source["cache"]["latents"]["fingerprint"]["latent_size"] == 64
    assert "latents_mean" not in source["cache"]["latents"]["fingerprint"]
    assert source["statements_in_split"] == len(rows) == 4


def test_checkpoints_that_ask_in_other_words_have_a_baseline_each(
    config: Config, cache: Path, tmp_path: Path
) -> None:
    config = replace(config, max_steps=1, do_eval=False)
    ways = {"plainly": config, "worded": replace(config, question_template="Is it so? {caption}")}
    runs = [
        Trainer(replace(way, output_dir=str(tmp_path / name)), cache).run().parent
        for name, way in ways.items()
    ]
    score_to_file(runs, "test", cache, None, ("world", "baseline"), {}, [], tmp_path / "r.jsonl")
    rows = read_jsonl(tmp_path / "r.jsonl")
    wanted = ["plainly:world", "plainly:baseline", "worded:world", "worded:baseline"]
    assert list(rows[0]["systems"]) == wanted
    assert rows[0]["systems"]["plainly:baseline"] != rows[0]["systems"]["worded:baseline"]


def test_baseline_is_the_published_gemma_and_a_trained_one_stands_beside_it(
    seeds: list[Path], config: Config, cache: Path, tmp_path: Path
) -> None:
    """A second stage that trains Gemma's language model: what that answers alone is another system."""
    stage = replace(
        config,
        max_steps=3,
        do_eval=False,
        learning_rate=1e-2,
        init_from=str(seeds[0]),
        freeze_gemma_language=False,
        output_dir=str(tmp_path / "stage-2"),
    )
    second = Trainer(stage, cache).run()
    assert read_world(second)["parts"] == ["language"]
    alone = score(seeds[0] / "checkpoint-1", cache, None, "test", SYSTEMS, {})
    score_to_file([seeds[0], second.parent], "test", cache, None, SYSTEMS, {}, [], tmp_path / "r.jsonl")
    rows = read_jsonl(tmp_path / "r.jsonl")
    own = ["world", "zero", "shuffled", "text"]
    wanted = ["baseline", *(f"s0:{k}" for k in own), "stage-2:world", "stage-2:without"]
    assert list(rows[0]["systems"]) == [*wanted, *(f"stage-2:{k}" for k in own[1:])]
    single = score(second, cache, None, "test", SYSTEMS, {})
    assert list(single[0]["systems"]) == ["world", "without", "zero", "shuffled", "text", "baseline"]
    for row, one, published in zip(rows, single, alone, strict=True):
        plain = published["systems"]["baseline"]
        assert row["systems"]["baseline"] == pytest.approx(plain, abs=1e-4)
        assert one["systems"]["baseline"] == pytest.approx(plain, abs=1e-4)
        assert row["systems"]["stage-2:without"] == pytest.approx(one["systems"]["without"], abs=1e-4)
    gap = [
        abs(one["systems"]["without"]["logit_1"] - one["systems"]["baseline"]["logit_1"]) for one in single
    ]
    assert max(gap) > 1e-2
    source = read_source(tmp_path / "r.jsonl")
    assert source is not None
    assert [source["checkpoints"][name]["parts"] for name in ("s0", "stage-2")] == [[], ["language"]]


def test_results_of_a_run_lie_in_it(seeds: list[Path], cache: Path) -> None:
    path, _ = score_to_file(seeds[:1], "test", cache, None, ("world",), {}, [])
    assert path == seeds[0] / "evaluation" / "checkpoint-1-own-data-test.jsonl"
    names = ["checkpoint-1-own-data-test" + end for end in (".jsonl", ".meta.json", ".summary.json")]
    assert sorted(p.name for p in path.parent.iterdir()) == names
    with pytest.raises(ValueError, match="several models belong to no single run; name an --output"):
        score_to_file(seeds, "test", cache, None, ("world",), {}, [])


def test_a_model_that_lies_by_itself_has_its_results_in_its_folder(tmp_path: Path) -> None:
    download = tmp_path / "snapshot"
    wanted = download / "evaluation" / "snapshot-own-data-dev.jsonl"
    assert default_output([download], [download], "own data", "dev") == wanted


def test_where_results_come_from_is_not_believed_of_other_records(seeds: list[Path], cache: Path) -> None:
    path, _ = score_to_file(seeds[:1], "test", cache, None, ("world",), {}, [])
    meta = path.with_suffix(".meta.json")
    whole = json.loads(meta.read_text())
    assert read_source(path) == whole
    del whole["checkpoints"][""]["parts"], whole["date"]
    meta.write_text(json.dumps(whole))
    with pytest.raises(
        ValueError, match=r"test\.meta\.json has no date, parts; score again, or move it away"
    ):
        read_source(path)
    score_to_file(seeds[:1], "test", cache, None, ("world",), {}, [])
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    with pytest.raises(ValueError, match=r"test\.meta\.json is of records with SHA-256 .*; score again"):
        read_source(path)
    path.with_suffix(".meta.json").unlink()
    assert read_source(path) is None


def test_a_text_only_gemma_is_not_asked_without_the_photograph(
    config: Config, cache: Path, text_gemma_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = replace(config, model_name=str(text_gemma_folder), do_eval=False, max_steps=1)
    checkpoint = Trainer(config, cache).run()
    rows = score(checkpoint, cache, None, "test", ("baseline", "text"), {})
    assert list(rows[0]["systems"]) == ["baseline"]
    assert "without 'text': this Gemma sees no photograph, so it is 'baseline'" in capsys.readouterr().out
    with pytest.raises(ValueError, match="so it is 'baseline'; ask for that"):
        score(checkpoint, cache, None, "test", ("text",), {})


def test_names_are_the_shortest_that_tell_checkpoints_apart(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("a/run/checkpoint-4", "b/run/checkpoint-4", "b/run/checkpoint-8")]
    assert short_names(folders[:1], folders[:1]) == [""]
    assert short_names(folders[1:], folders[1:]) == ["checkpoint-4", "checkpoint-8"]
    assert short_names(folders, folders) == ["a/run/checkpoint-4", "b/run/checkpoint-4", "b/run/checkpoint-8"]
    assert short_names([tmp_path / "a", tmp_path / "c:d"], folders[:2]) == ["a", "c_d"]  # as they were given
    with pytest.raises(ValueError, match=r"a/run/checkpoint-4 is named twice"):
        short_names([tmp_path / "a" / "run", folders[0]], [folders[0], folders[0]])
