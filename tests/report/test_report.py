"""The page as a reader has it: its figures, its structure, and in a real browser."""

import base64
import io
import itertools
import json
import os
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import CONTRAST, CUT, OVERFLOW, SMALL, Browser, needs_browser
from PIL import Image

from theworld.data.vsr import RELATIONS, Statement
from theworld.evaluation.metrics import summarise
from theworld.evaluation.records import read_jsonl, records, write_jsonl
from theworld.evaluation.score import write_results
from theworld.evaluation.verdict import verdict
from theworld.report.report import find_results, plan_report, render, run_of, write_report
from theworld.report.text import probability, small, typeset

EVIL = '<script>alert("x")</script><img src=http://evil.example/a.png onerror=alert(1)> & "quotes" \u202e end'
VOID = {"meta", "img", "br", "link", "input", "hr", "circle", "line", "polyline"}


def with_rest(logits: np.ndarray) -> np.ndarray:
    """float[n, 2] -> float[n, 3]: the two answers have half of the probability."""
    return np.concatenate([logits, np.logaddexp(*logits.T)[:, None] + np.log(2)], 1)


def answers(generator: np.random.Generator, statements: list[Statement], share: float) -> np.ndarray:
    right = generator.random(len(statements)) < share
    margin = generator.gamma(3, 0.7, len(statements)) * np.where(right, 1, -1)
    margin *= np.where([s.label for s in statements], 1, -1)
    return with_rest(np.stack([-margin / 2, margin / 2], 1))


def write_run(run: Path, photographs: Path | None, statements: int = 400, seeds: int = 1) -> Path:
    """A run with training lines, records, figures of an alignment and a picture of it."""
    generator = np.random.default_rng(0)
    relations = sorted(RELATIONS)
    names = ("a.png", "b.png", "c.png")
    asked = [
        Statement(
            names[i % 3] if photographs else f"{i // 2}.jpg",
            EVIL if i == 3 else f"The cat number {i} is {relations[i * i % 71]} the mat.",
            int(generator.integers(2)),
            relations[i * i % 71],
            i,
        )
        for i in range(statements)
    ]
    shares = {"world": 0.85, "baseline": 0.65, "zero": 0.62, "shuffled": 0.55, "text": 0.5}
    systems = {k: v for k, v in shares.items() if seeds == 1 or k in ("baseline", "text")}
    for seed in range(seeds if seeds > 1 else 0):
        systems |= {f"s{seed}:{k}": shares[k] + 0.01 * seed for k in ("world", "zero", "shuffled")}
    logits = {name: answers(generator, asked, share) for name, share in systems.items()}
    rows = records(asked, logits, {s.image for s in asked[::3]}, set(), "vsr_random", "test")
    path = run / "evaluation" / "checkpoint-40-vsr_random-test.jsonl"
    write_jsonl(rows, path)
    lines: list[dict[str, Any]] = [{"step": 10, "phase": "align", "loss": 5.0}]
    lines += [
        {"step": s, "phase": "train", "loss": 0.7 - s / 100, "accuracy": 0.5 + s / 100} for s in (20, 30, 40)
    ]
    lines.append({"step": 40, "phase": "train", "dev_loss": 0.35, "dev_accuracy": 0.875})
    if seeds > 1:
        words = [{"step": 15, "phase": "words", "loss": 9.0, "relation_loss": 0.75}]
        words += [{"step": 15, "phase": "words", "dev_loss": 9.0, "dev_relation_loss": 0.8125}]
        lines = [lines[0], *words, *({**line, "relation_loss": 0.25} for line in lines[1:])]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    spread = {
        "mean": 0.5,
        "n": 64,
        "quantiles": {"0.05": -0.1, "0.25": 0.3, "0.5": 0.5, "0.75": 0.6, "0.95": 0.9},
    }
    one = {"cosine": spread, "control_cosine": spread, "norm": {"world": spread, "image": spread}}
    about = {"images": 4, "split": "test", "comparison": "same place", "trained": one, "untrained": one}
    (run / "alignment.json").write_text(json.dumps(about))
    Image.new("RGB", (1200, 600), "white").save(run / "alignment.png")
    return path


def write_other_split(path: Path, split: str) -> Path:
    """The same records as those of another split, a second newer."""
    other = path.with_name(path.name.replace("-test", f"-{split}"))
    write_jsonl([row | {"split": split} for row in read_jsonl(path)], other)
    os.utime(other, ns=(0, path.stat().st_mtime_ns + 10**9))
    return other


def source_of(text: str, width: int, dataset: str) -> dict[str, Any]:
    """Where records come from, with `text` in every field that holds text."""
    one = {"step": 40, "seed": 0, "parts": [text], "trained_parameters": 9, "fingerprint": {text: text}}
    one |= dict.fromkeys(
        ("checkpoint", "model_name", "model_revision", "dtype", "device", "trained_on"), text
    )
    one |= {"projection": {"width": width}, "fingerprint_sha256": text}
    found = {"date": text, "dataset": dataset, "split": "test", "annotations": text, "statements_in_split": 9}
    found |= {"image_folder": text, "checkpoints": {text: one}, "versions": {text: text}}
    return found | {"cache": {"folder": text, text: {"sha256": text, "fingerprint": {text: text}}}}


class Outline(HTMLParser):
    """What a page consists of; every element is closed in its order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.headings: list[tuple[int, str]] = []
        self.text: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if re.fullmatch("h[1-6]", tag):
            self.headings.append((int(tag[1]), ""))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and re.fullmatch("h[1-6]", self.open[-1]):
            self.headings[-1] = (self.headings[-1][0], self.headings[-1][1] + data)
        if not self.open or self.open[-1] != "style":
            self.text.append(data)


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory, photographs: Path) -> dict[str, Path]:
    """A page with everything, one of three seeds, and one of an empty run."""
    folder = tmp_path_factory.mktemp("report")
    shown = write_run(folder / "full", photographs)
    write_other_split(shown, "dev")
    write_run(folder / "seeds", None, seeds=3)
    (folder / "empty" / "checkpoint-20").mkdir(parents=True)  # a run that wrote nothing else
    return {
        "full": write_report(folder / "full", image_folder=photographs),
        "seeds": write_report(folder / "seeds"),
        "empty": write_report(folder / "empty"),
    }


def outline(path: Path) -> Outline:
    return Outline(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", ["full", "seeds", "empty"])
def test_the_structure_holds(pages: dict[str, Path], name: str) -> None:
    page = outline(pages[name])
    levels = [level for level, _ in page.headings]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(b <= a + 1 for a, b in itertools.pairwise(levels))
    assert all(text.strip() for _, text in page.headings)
    ids = [a["id"] for _, a in page.tags if "id" in a]
    assert len(ids) == len(set(ids))
    for tag, attributes in page.tags:
        for key in ("aria-labelledby", "aria-describedby"):
            assert attributes.get(key) is None or attributes[key] in ids
        if tag == "a":
            assert str(attributes["href"])[0] == "#"
            assert str(attributes["href"])[1:] in ids
        if tag == "img":
            assert attributes["alt"]
            assert attributes["width"]
            assert str(attributes["src"]).startswith("data:image/")
        if tag == "svg":
            assert (
                attributes.get("aria-hidden") == "true"
                or attributes.get("role") == "img"
                or "y" in attributes
            )
        if tag == "th":
            assert attributes["scope"] in ("row", "col")
        if "scroll" in str(attributes.get("class")).split():
            assert attributes["tabindex"] == "0"
            assert attributes["role"] == "region"
            assert attributes["aria-label"]
    for landmark in ("header", "nav", "main", "footer"):
        assert sum(tag == landmark for tag, _ in page.tags) == 1
    assert dict(page.tags[0][1])["lang"] == "en"


@pytest.mark.parametrize("name", ["full", "seeds", "empty"])
def test_nothing_comes_from_outside_and_nothing_runs(pages: dict[str, Path], name: str) -> None:
    text = pages[name].read_text(encoding="utf-8")
    page = outline(pages[name])
    assert not {"script", "link", "iframe", "object", "embed", "form", "base"} & {tag for tag, _ in page.tags}
    for _, attributes in page.tags:
        assert not [key for key in attributes if key.startswith("on")]
        for key in ("src", "href", "xlink:href", "action", "srcset"):
            assert not re.match(r"\w+:(?!image/)|//", str(attributes.get(key, "#")))
    assert "url(" not in text
    assert "@import" not in text
    assert "default-src 'none'; img-src data:" in text
    assert len(text) < 1_000_000


def test_captions_are_text(pages: dict[str, Path]) -> None:
    text = pages["full"].read_text(encoding="utf-8")
    assert "<script" not in text
    assert "<img src=http" not in text


def test_captions_are_shown_unchanged_and_escaped(tmp_path: Path) -> None:
    asked = [Statement(f'{i}"><b>.jpg', EVIL, 1, "<i>on</i>", i) for i in range(4)]
    wrong = with_rest(np.tile([1.0, 0.0], (4, 1)))
    write_jsonl(records(asked, {"<u>:world": wrong, "baseline": wrong}, set()), tmp_path / "results.jsonl")
    path = write_report(tmp_path)
    page = outline(path)
    assert "".join(page.text).count(EVIL) == 4
    assert not {"script", "b", "i", "u"} & {tag for tag, _ in page.tags}
    assert all("evil" not in str(a.get("src")) for _, a in page.tags)


def test_names_of_checkpoints_models_and_folders_are_text(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run", None, 40)
    write_results(read_jsonl(path), source_of(EVIL, 640, EVIL), path, [EVIL])
    page = outline(write_report(tmp_path / "run"))
    assert "".join(page.text).count(EVIL) > 20
    assert not {"script", "b", "i", "u"} & {tag for tag, _ in page.tags}
    assert all("evil" not in str(a.get("src")) for _, a in page.tags)


def test_the_same_files_give_the_same_bytes(pages: dict[str, Path], photographs: Path) -> None:
    before = pages["full"].read_bytes()
    assert write_report(pages["full"].parent, image_folder=photographs).read_bytes() == before


def test_title_and_verdict_name_the_data_and_the_split(pages: dict[str, Path]) -> None:
    text = pages["full"].read_text(encoding="utf-8")
    question = "Do world tokens help on the test split of VSR random?"
    assert f"<title>{question} full</title>" in text
    assert f"<h1>{question}</h1>" in text
    assert '<p class="scope">400 statements about 3 images: the test split of VSR random.</p>' in text
    assert "<h1>Do world tokens help?</h1>" in pages["empty"].read_text(encoding="utf-8")


def test_a_model_smaller_than_any_published_gemma_is_called_a_toy(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run", None, 40)
    rows = [row | {"dataset": "own data"} for row in read_jsonl(path)]
    write_results(rows, source_of("/data/scenes", 64, "own data"), path, ["eval"])
    text = "".join(outline(write_report(tmp_path / "run")).text)
    assert "Do world tokens help on the test split of custom data (scenes)?" in text
    assert "40 statements about 20 images: the test split of custom data (scenes); /data/scenes." in text
    assert (
        "Toy model: the hidden size of this Gemma is 64, that of the smallest published Gemma 3 is 640."
        in text
    )
    assert "The statements are no release of Visual Spatial Reasoning." in text
    write_results(read_jsonl(path), source_of("/data/scenes", 640, "own data"), path, ["eval"])
    assert "Toy model" not in write_report(tmp_path / "run").read_text(encoding="utf-8")


def test_results_of_test_are_preferred_to_newer_ones_of_dev(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run", None, 40)
    dev = write_other_split(path, "dev")
    assert find_results(tmp_path / "run") == [path, dev]
    assert next(plan_report(tmp_path / "run")).startswith(f"reads        {path}: ")
    text = write_report(tmp_path / "run").read_text(encoding="utf-8")
    assert "the test split of VSR random?" in text
    assert f"{dev.name} <small>the dev split of VSR random, 40 statements about 20 images</small>" in text
    text = write_report(tmp_path / "run", results=dev).read_text(encoding="utf-8")
    assert "the dev split of VSR random?" in text
    path.unlink()
    assert "the dev split of VSR random?" in write_report(tmp_path / "run").read_text(encoding="utf-8")


def test_a_newer_benchmark_is_listed_beside_vsr_with_its_choices(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run", None, 40)
    asked = [
        Statement(f"{i // 2}.jpg", f"It is {i}.", 1 - i % 2, "on", i, group=f"{i // 2}") for i in range(4)
    ]
    answers = {
        "world": with_rest(np.tile([[0.0, 2.0], [0.0, 1.0]], (2, 1))),
        "baseline": with_rest(np.zeros((4, 2))),
    }
    other = path.with_name("checkpoint-40-whatsup_a-test.jsonl")
    write_jsonl(records(asked, answers, set(), set(), "whatsup_a", "test"), other)
    os.utime(other, ns=(0, path.stat().st_mtime_ns + 10**9))
    text = write_report(tmp_path / "run").read_text(encoding="utf-8")
    assert "the test split of VSR random?" in text
    assert f"{other.name} <small>the test split of whatsup_a, 4 statements about 2 images</small>" in text
    assert "As 2 choices (chance 50.0\u00a0%): 100.0\u00a0% against 0.0\u00a0% of plain Gemma" in text
    path.unlink()
    assert "the test split of whatsup_a?" in write_report(tmp_path / "run").read_text(encoding="utf-8")


def test_choices_have_a_section_of_their_own(pages: dict[str, Path], tmp_path: Path) -> None:
    asked = [
        Statement(
            f"{i // 2}.jpg",
            f"It is {i}.",
            1 - i % 2,
            "on",
            i,
            group=f"{i // 2}",
            sets=(("pair", f"{i // 4}"),),
        )
        for i in range(80)
    ]
    right = np.tile([[0.0, 2.0], [0.0, 1.0]], (40, 1))  # all called true, the true ones with more
    tied = np.zeros((80, 2))
    answers = {"world": with_rest(right), "baseline": with_rest(tied)}
    write_jsonl(records(asked, answers, set(), set(), "own data", "test"), tmp_path / "results.jsonl")
    page = outline(write_report(tmp_path))
    assert (2, "Choices") in page.headings
    text = " ".join(" ".join(page.text).split())
    assert "40 choices between 2 statements, about 40 images." in text
    assert "As 40 choices (chance 50.0 %): 100.0 % against 0.0 % of plain Gemma" in text
    (table,) = re.findall(r"Choices under each condition .*?plain Gemma [^A-Z]*", text)
    assert "pairs right" in table
    assert "chance 50.0 % of 40 25.0 % of 20" in table
    assert "plain Gemma 0.0 % 0.0 to 8.8 0.0 to 0.0 40 0.0 % 0.0 to 16.1" in table
    assert (2, "Choices") not in outline(pages["full"]).headings


def test_a_probability_is_no_percentage(pages: dict[str, Path]) -> None:
    text = pages["full"].read_text(encoding="utf-8")
    cells = re.findall(r'<td>([^<]*)</td><td class="(?:right|wrong)">', text)
    assert len(cells) == 45  # five conditions on nine cards
    assert all(re.fullmatch(r"(&[lg]t;\u00a0)?[01]\.\d{3}", cell) for cell in cells)
    assert not re.search(r"% (<[^>]*>)?(right|wrong)", text)


@pytest.mark.parametrize("name", ["full", "seeds"])
def test_numbers_have_one_minus_sign(pages: dict[str, Path], name: str) -> None:
    text = "".join(outline(pages[name]).text)
    assert not re.search(r"(?<![\w./-])-\d|\de-\d", text)
    assert "−0.10 to" in text


def test_the_page_shows_the_figures_of_the_summary(pages: dict[str, Path]) -> None:
    records_of = pages["full"].parent / "evaluation" / "checkpoint-40-vsr_random-test.jsonl"
    summary = summarise([json.loads(line) for line in records_of.read_text(encoding="utf-8").splitlines()])
    text = "".join(outline(pages["full"]).text)
    found = verdict(summary)
    assert found.kind == "helps"
    assert found.sentence in text.replace("\u00a0", " ").replace(" × 10⁻", "e-").translate(
        str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹", "0123456789")
    )
    for score in summary["systems"].values():
        assert f"{100 * score['accuracy']:.1f}\u00a0%" in text
        assert f"{score['brier']:.3f}" in text
    for relation, score in summary["by_relation"].items():
        few = ", few" if score["world"]["n"] < 30 else ""
        assert f"{relation} n\u00a0{score['world']['n']:,}{few}" in text
    for quoted in (
        "human 95.4",
        "LXMERT, fine-tuned 70.1",
        "ViLT, fine-tuned 69.3",
        "PaliGemma 2 3B, fine-tuned 81.6",
        "arXiv 2205.00363) (https://arxiv.org/abs/2205.00363, as of 2026-11-28)",
        "[1] The paper gives one human accuracy, for both releases.",
    ):
        assert quoted in text
    assert "Quoted, not measured here" in text
    assert "training ends at 0.300; dev ends at 0.350" in text
    assert "The first 10 steps" in text
    assert f"python tools/eval.py --from {records_of}" in text
    assert "checkpoint-40-vsr_random-test.meta.json is not there" in text


def test_the_photographs_are_those_of_the_errors_and_small(pages: dict[str, Path], photographs: Path) -> None:
    sources = [
        str(a["src"]) for tag, a in outline(pages["full"]).tags if tag == "img" and "jpeg" in str(a["src"])
    ]
    assert len(sources) == 9  # three images of each kind, one statement each
    sizes = {Image.open(io.BytesIO(base64.b64decode(s.split(",")[1]))).size for s in sources}
    assert sizes == {(96, 80), (64, 64), (50, 120)}


def test_a_run_of_several_checkpoints_has_each_and_their_mean(pages: dict[str, Path]) -> None:
    text = "".join(outline(pages["seeds"]).text)
    assert "in each of 3 checkpoints" in text
    assert "Over checkpoints" in text
    assert "standard deviation" in text
    assert "s2: world tokens" in text
    assert "Up to step 15 words alone were trained" in text
    assert "training ends at 0.300; dev ends at 0.350" in text  # not what the label cost among the words
    assert "training ends at 0.250; dev ends at 0.812" in text
    assert "photograph not at hand" in text


def test_a_missing_part_is_named_with_its_command(pages: dict[str, Path]) -> None:
    run = pages["empty"].parent
    text = "".join(outline(pages["empty"]).text)
    assert f"there are no records in {run / 'evaluation'}" in text
    assert f"python tools/eval.py --model {run} --cache cache/" in text
    assert f"{run / 'metrics.jsonl'} is not there, so there are no training curves" in text
    assert (
        f"tools/visualize_alignment.py --model {run} --cache cache/ --output {run / 'alignment.png'}" in text
    )


def test_results_are_found_in_the_run_and_its_checkpoints(tmp_path: Path, photographs: Path) -> None:
    path = write_run(tmp_path / "run", photographs)
    checkpoint = tmp_path / "run" / "checkpoint-40"
    checkpoint.mkdir()
    other = path.with_name("checkpoint-20-vsr_random-test.jsonl")
    shutil.copy(path, other)
    assert run_of(checkpoint) == tmp_path / "run"
    assert find_results(checkpoint) == [path]
    assert set(find_results(tmp_path / "run")) == {path, other}
    other.write_text("not a record\n")
    text = render(tmp_path / "run", path, [other], photographs, tmp_path / "my page.html")
    assert f"{tmp_path / 'run'} --results {path} --output &#39;{tmp_path / 'my page.html'}&#39;" in text
    assert "Other evaluations of this run" in text
    assert "checkpoint-20-vsr_random-test.jsonl:1:1: Expecting value" in text
    with pytest.raises(ValueError, match="Expecting value"):
        write_report(tmp_path / "run", results=other)
    with pytest.raises(ValueError, match="nowhere: no such folder; name a run"):
        write_report(tmp_path / "nowhere")
    (tmp_path / "page").write_text("")
    with pytest.raises(ValueError, match="page: a file, and a folder is wanted; name a run"):
        write_report(tmp_path / "page")
    (tmp_path / "scenes").mkdir()
    with pytest.raises(ValueError, match=r"scenes: neither a run or a checkpoint \(none of metrics.jsonl, "):
        write_report(tmp_path / "scenes")
    assert list((tmp_path / "scenes").iterdir()) == []
    with pytest.raises(ValueError, match=r"--image_folder .*: no such folder"):
        write_report(tmp_path / "run", results=path, image_folder=tmp_path / "nowhere")


def test_numbers_are_set_as_in_print() -> None:
    assert typeset("95 % <b>, p = 2.8e-48") == "95\u00a0% <b>, p\u00a0=\u00a02.8\u00a0×\u00a010⁻⁴⁸"
    assert typeset("checkpoint-40: -3.5 points (-7 to +1)") == "checkpoint-40: −3.5\u00a0points (−7 to +1)"
    assert small(0.00001234) == "1.2\u00a0×\u00a010⁻⁵"
    assert [probability(p) for p in (0, 1e-9, 0.002, 0.9996, 1)] == [
        "0.000",
        "<\u00a00.001",
        "0.002",
        ">\u00a00.999",
        "1.000",
    ]


# ---- in a browser

# Headline figures that are broken over lines, in the middle of a word or a number.
BROKEN = """
[...document.querySelectorAll('.tiles dd')].filter(e => {
  const range = document.createRange();
  range.selectNodeContents(e.firstChild);
  return new Set([...range.getClientRects()].map(r => Math.round(r.top))).size > 1;
}).map(e => e.textContent)
"""


@needs_browser
@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [360, 390, 768, 1400])
@pytest.mark.parametrize("name", ["full", "seeds", "empty"])
def test_the_page_fits_is_legible_and_loads_nothing(
    browser: Browser, pages: dict[str, Path], tmp_path: Path, name: str, width: int, dark: bool
) -> None:
    browser.show(pages[name], width, dark=dark)
    browser.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    assert browser.evaluate(OVERFLOW) == []
    assert browser.evaluate(CUT) == []
    assert browser.evaluate(BROKEN) == []
    assert browser.evaluate(CONTRAST) == []
    assert browser.evaluate(SMALL) == []
    assert [r for r in browser.requests if not r.startswith(("data:image/", "file:///"))] == []
    assert sum(r.startswith("file:") for r in browser.requests) == 1
    assert browser.logged == []
    broken = "[...document.images].filter(i => !i.complete || !i.naturalWidth).length"
    assert browser.evaluate(broken) == 0
    ground = browser.evaluate("getComputedStyle(document.body).backgroundColor")
    assert ground == ("rgb(20, 23, 27)" if dark else "rgb(247, 246, 242)")
    browser.screenshot(tmp_path / "page.png")
    with Image.open(tmp_path / "page.png") as shot:
        assert shot.width == width
        assert len(shot.convert("RGB").resize((64, 64)).getcolors(4096) or []) > 20


@needs_browser
def test_the_keyboard_reaches_everything_and_sees_where_it_is(
    browser: Browser, pages: dict[str, Path]
) -> None:
    browser.show(pages["full"], 1400)
    wanted = browser.evaluate("document.querySelectorAll('a[href], summary, [tabindex=\"0\"]').length")
    closed = browser.evaluate("document.querySelectorAll('details:not([open]) [tabindex=\"0\"]').length")
    seen = []
    for _ in range(wanted - closed):
        browser.press("Tab", 9)
        shown = "(e => [e.tagName, e.className, getComputedStyle(e).outlineStyle, e.getBoundingClientRect().left >= 0])"
        seen.append(browser.evaluate(f"{shown}(document.activeElement)"))
    assert seen[0] == ["A", "skip", "solid", True]
    assert {tag for tag, *_ in seen} == {"A", "SUMMARY", "DIV", "PRE"}
    assert all(outline == "solid" and there for _, _, outline, there in seen)
    browser.evaluate("document.querySelector('summary').focus()")
    browser.press("Enter", 13, "\r")
    assert browser.evaluate("document.querySelector('details').open")
    browser.evaluate("document.querySelector('.skip').focus()")
    browser.press("Enter", 13, "\r")
    assert browser.evaluate("document.activeElement.id") == "content"


@needs_browser
def test_a_screen_reader_can_read_the_page(browser: Browser, pages: dict[str, Path]) -> None:
    browser.show(pages["full"], 1400)
    nodes = [n for n in browser.call("Accessibility.getFullAXTree")["nodes"] if not n["ignored"]]
    found = [(n["role"]["value"], n.get("name", {}).get("value", "")) for n in nodes]
    roles = [role for role, _ in found]
    for landmark in ("banner", "navigation", "main", "contentinfo"):
        assert roles.count(landmark) == 1
    regions = {name for role, name in found if role == "region"}
    assert {
        "Conditions side by side",
        "By relation",
        "Photographs",
        "All metrics of each condition",
    } <= regions
    images = [name for role, name in found if role in ("image", "img")]
    assert all(images)
    assert any(name.startswith("Calibration of world tokens") for name in images)
    assert "loss at the label, nats by optimizer step: training ends at 0.300; dev ends at 0.350" in images
    assert ("rowheader", "world tokens") in found
