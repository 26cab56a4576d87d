"""The page of a study, and its figures for other programs."""

import csv
import json
import re
from pathlib import Path

import pytest
from browser import CONTRAST, CUT, OVERFLOW, SMALL, Browser, needs_browser
from study_records import few_statements, run, study

from theworld.evaluation.study_summary import learning_curve, summarise_study
from theworld.evaluation.study_verdict import PLAIN, Question
from theworld.evaluation.verdict import p_words
from theworld.report.charts import Mark, Scale, Track
from theworld.report.page import environment
from theworld.report.study import Study, write_study
from theworld.report.study_files import study_csv, study_latex
from theworld.report.text import p_value, percent

ARMS = ("world", "prompt", "pixels", "untrained", "noise")


@pytest.fixture(scope="module")
def summary() -> dict:
    """A study in which pixels do nearly as well as world tokens, as its file has it."""
    arms = study(0.7, pixels=0.69) | {PLAIN: {0: run(0.55, 0, "baseline")}}
    return json.loads(json.dumps(summarise_study(arms)))


@pytest.fixture(scope="module")
def folder(summary: dict, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of the study."""
    folder = tmp_path_factory.mktemp("study") / "vsr"
    curves = {
        arm: {s: [(i, 0.7 - 0.001 * i + 0.01 * s) for i in range(300)] for s in range(3)} for arm in ARMS
    }
    costs = {arm: {"trainable parameters": "1,234,567"} for arm in ARMS} | {PLAIN: {"steps": "none"}}
    found = Study(
        "vsr <1>", summary, curves=curves, costs=costs, fixed=[("recipe", "3 epochs")], caution="Toy model."
    )
    assert write_study(found, folder) == folder / "study.html"
    return folder


@pytest.fixture(scope="module")
def page(folder: Path) -> str:
    return (folder / "study.html").read_text(encoding="utf-8")


def plain(html: str) -> str:
    """The text of a page, with one space for any space."""
    return " ".join(re.sub(r"<[^>]+>", " ", html).replace("&#39;", "'").split())


def test_the_files_are_three(folder: Path) -> None:
    assert sorted(p.name for p in folder.iterdir()) == ["study.csv", "study.html", "study.tex"]


def test_the_page_opens_with_both_verdicts(page: str, summary: dict) -> None:
    text = plain(page)
    assert "Does the video model help on the test split of VSR random?" in text
    assert text.index("All statements: Helps, but not beyond every control") < text.index(
        "Statements whose image is not in the training set: Helps, but not beyond every control"
    )
    for scope in summary["scopes"].values():
        assert scope["verdict"]["sentence"] in text
    assert text.count("Toy model.") == 1


def test_the_page_has_every_part(page: str) -> None:
    assert re.findall(r"<h2 [^>]*>([^<]+)</h2>", page) == [
        "Arms and seeds",
        "Differences to each control",
        "By meta-category and relation",
        "Training",
        "What each arm costs",
        "What was fixed before",
        "What this cannot show",
    ]
    assert "vsr &lt;1&gt;" in page
    text = plain(page)
    assert "primary comparison world against prompt, pixels, untrained, noise, each to be beaten" in text
    assert "recipe 3 epochs" in text
    assert "Exploratory: the study was not planned for these" in text
    assert page.count('class="line ') == 5 * 3
    assert "<script" not in page
    assert not re.search(r"""(src|href)=["'](?!#)""", page)


def test_a_study_without_curves_and_costs_leaves_them_out(tmp_path: Path) -> None:
    write_study(Study("small", summarise_study(study(0.7, seeds=1))), tmp_path)
    page = (tmp_path / "study.html").read_text(encoding="utf-8")
    assert 'id="training"' not in page
    assert 'id="costs"' not in page
    assert '#training"' not in page
    assert "A difference of arms: 1 seeds say too little about others." not in plain(page)
    assert "A difference of arms: one seed says too little about others." in plain(page)


def test_every_arm_and_seed_is_a_dot(page: str) -> None:
    """Two scopes: six arms with five of three seeds, and five differences of three seeds each."""
    assert page.count('r="3.5"') == 2 * (5 * 3 + 1 + 5 * 3)


def test_dots_lie_above_the_mark_of_their_mean() -> None:
    scale = Scale(0.0, 1.0, (0.0, 1.0))
    charts = environment().get_template("charts.html").module
    drawn = str(charts.track(Track([Mark("world", 0.5, 0.4, 0.6)], scale, dots=(0.45, 0.55))))  # type: ignore[attr-defined]
    assert re.findall(r'<circle class="([^"]+)" cx="([^"]+)" cy="([^"]+)"', drawn) == [
        ("dot hollow world", "45.00%", "-5.5"),
        ("dot hollow world", "55.00%", "-5.5"),
        ("dot world", "50.00%", "5.5"),
    ]
    assert "height:34px" in drawn


def test_the_csv_has_a_line_for_each_value(summary: dict, folder: Path) -> None:
    text = (folder / "study.csv").read_text()
    assert text == study_csv(summary)
    lines = list(csv.DictReader(text.splitlines()))
    # Two scopes, three metrics: a mean and three seeds of five arms and of five differences, and plain Gemma's two.
    assert len(lines) == 2 * 3 * (5 * 4 + 5 * 4 + 2)
    seeds = [
        float(line["value"])
        for line in lines
        if (line["scope"], line["quantity"], line["arm"], line["metric"])
        == ("all", "metric", "world", "auroc")
    ]
    own = summary["scopes"]["all"]["arms"]["world"]["auroc"]
    assert seeds == [own["mean"], *own["each"].values()]
    test = summary["scopes"]["unseen"]["differences"]["pixels"]["accuracy"]
    assert {
        "scope": "unseen",
        "quantity": "difference",
        "arm": "pixels",
        "metric": "accuracy",
        "seed": "mean",
        "value": str(test["difference"]),
        "low": str(test["low"]),
        "high": str(test["high"]),
        "p_value": str(test["p_value"]),
    } in lines


def test_the_latex_table_has_a_row_for_each_arm(summary: dict, folder: Path) -> None:
    text = (folder / "study.tex").read_text()
    assert text == study_latex(summary)
    lines = text.splitlines()
    assert lines[1:5] == [
        r"\begin{tabular}{lcccrr}",
        r"\toprule",
        r"arm & accuracy & balanced accuracy & AUROC & $\Delta$ accuracy & $p$ \\",
        r"\midrule",
    ]
    assert (
        lines[5] == r"the video model's latents & 70.1 $\pm$ 0.7 & 70.1 $\pm$ 0.7 & 82.2 $\pm$ 0.1 &  &  \\"
    )
    assert lines[10].startswith(r"plain Gemma & 53.2 & 53.2 & 59.2 & $+")
    assert lines[-2:] == [r"\bottomrule", r"\end{tabular}"]


@needs_browser
@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [360, 768, 1400])
def test_the_page_fits_and_is_legible(browser: Browser, folder: Path, width: int, dark: bool) -> None:
    browser.show(folder / "study.html", width, dark=dark)
    browser.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    for poor in (OVERFLOW, CUT, CONTRAST, SMALL):
        assert browser.evaluate(poor) == []
    assert browser.evaluate("[...document.querySelectorAll('.line')].map(e => getComputedStyle(e).fill)") == [
        "none"
    ] * (5 * 3)
    assert browser.logged == []
    ground = browser.evaluate("getComputedStyle(document.body).backgroundColor")
    assert ground == ("rgb(20, 23, 27)" if dark else "rgb(247, 246, 242)")


PATCHES = {"patch-4": 0.62, "patch-2": 0.66, "patch-1": 0.7}
SHARES = {0.1: 768, 0.3: 2304, 1.0: 7680}


@pytest.fixture(scope="module")
def explored(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, Path]:
    """The figures and the files of a study of three patch sizes on three shares, without a comparison that decides."""
    arms = {arm: {s: run(a, s) for s in range(3)} for arm, a in PATCHES.items()}
    question = Question("patch-4", "patch-2", ("patch-2", "patch-1"), decides=False)
    found = summarise_study(arms | {PLAIN: {0: run(0.55, 0, "baseline")}}, question)
    shares = {
        share: {arm: {s: run(a - 0.05 * (1 - share), s) for s in range(3)} for arm, a in PATCHES.items()}
        for share in SHARES
    }
    found = json.loads(json.dumps(found | {"learning": learning_curve(shares, SHARES, question)}))
    folder = tmp_path_factory.mktemp("study") / "patches"
    curves = {arm: {s: [(i, 0.7) for i in range(20)] for s in range(3)} for arm in PATCHES}
    write_study(Study("patches", found, curves=curves), folder)
    return found, folder


def test_the_page_of_a_study_that_explores_has_pairs_and_learning_curves(
    explored: tuple[dict, Path],
) -> None:
    summary, folder = explored
    page = (folder / "study.html").read_text(encoding="utf-8")
    text = plain(page)
    assert re.findall(r"<h2 [^>]*>([^<]+)</h2>", page)[:3] == [
        *("Arms and seeds", "Differences between arms", "Learning curves")
    ]
    assert summary["scopes"]["all"]["verdict"]["sentence"] in text
    assert "patch-2 less patch-4 +3.7 points p = 0.009" in text
    assert (
        "The 3 intervals hold all differences together in 95 % of such studies. p is adjusted (Holm)." in text
    )
    assert "all are corrected for their number" in text
    assert "primary comparison none: the study explores, every two arms" in text
    assert "level 5 %, two-sided, for all comparisons together" in text
    assert "has to be beaten" not in text
    assert "The comparisons above are of all statements; this explores." in text
    # Arms of other names have colours of their own.
    for kind in ("world", "baseline", "text"):
        assert f'<polyline class="line {kind}"' in page
    # Two plots: three arms and two differences, of three seeds on three shares.
    assert page.count('r="2.5"') == (3 + 2) * 3 * 3
    assert page.count('r="3.5"') == 2 * (3 * 3 + 1 + 3 * 3) + (3 + 2) * 3
    rows = re.findall(r'<th scope="row">patch-1</th><td>([^<]+)</td><td>([^<]+)</td>', page)
    assert ("10 % (768)", percent(summary["learning"][0]["arms"]["patch-1"]["accuracy"]["mean"])) in rows


def test_the_csv_of_a_study_that_explores_names_both_arms_and_the_share(explored: tuple[dict, Path]) -> None:
    summary, folder = explored
    lines = list(csv.DictReader((folder / "study.csv").read_text().splitlines()))
    pair = summary["scopes"]["unseen"]["pairs"][1]
    names = {"scope": "unseen", "quantity": "pair", "arm": "patch-1", "against": "patch-4", "share": ""}
    found = {key: str(pair["auroc"][key]) for key in ("low", "high", "p_value", "adjusted_p_value")}
    value = {"metric": "auroc", "seed": "mean", "value": str(pair["auroc"]["difference"])}
    assert names | found | value in lines
    assert sum(line["quantity"] == "pair" for line in lines) == 2 * 3 * 3 * 4
    curve = [line for line in lines if line["quantity"] == "learning"]
    assert len(curve) == 3 * 3 * 3 * 4
    assert [line["value"] for line in curve if line["share"] == "0.1"][1:4] == [
        str(value) for value in summary["learning"][0]["arms"]["patch-4"]["accuracy"]["each"].values()
    ]


def test_the_latex_of_a_study_that_explores_has_a_table_of_pairs_and_one_of_shares(
    explored: tuple[dict, Path],
) -> None:
    arms, pairs, shares = (explored[1] / "study.tex").read_text().split("\n\n")
    assert r"arm & accuracy & balanced accuracy & AUROC \\" in arms
    assert r"patch-2 & patch-4 & $+3.7$ [$+0.9$, $+6.4$] & 0.009 \\" in pairs
    assert pairs.count(r"\\") == 4
    assert r"arm & 10 \% & 30 \% & 100 \% \\" in shares
    assert shares.count(r"$\pm$") == 9


@needs_browser
@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [360, 1400])
def test_the_page_of_a_study_that_explores_fits_and_is_legible(
    browser: Browser, explored: tuple[dict, Path], width: int, dark: bool
) -> None:
    browser.show(explored[1] / "study.html", width, dark=dark)
    browser.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    for poor in (OVERFLOW, CUT, CONTRAST, SMALL):
        assert browser.evaluate(poor) == []
    assert browser.logged == []


def test_a_study_that_decides_shows_the_gain_on_each_share(summary: dict, tmp_path: Path) -> None:
    curve = learning_curve({0.1: study(0.62), 1.0: study(0.7)}, {0.1: 768, 1.0: 7680}, Question())
    write_study(Study("vsr", summary | {"learning": curve}), tmp_path)
    text = plain((tmp_path / "study.html").read_text(encoding="utf-8"))
    assert "The verdict is of all statements; this explores." in text
    assert "Accuracy of world less each, in the colour of the other arm. Dashed: no difference." in text
    assert "every share takes as many steps, so a smaller one is seen more often" in text


@pytest.mark.parametrize("decides", [True, False])
def test_no_file_has_a_figure_that_cannot_be(tmp_path: Path, decides: bool) -> None:
    """Two seeds that lie far apart, on six statements."""
    arms, question = few_statements(), Question("world", "prompt", ("prompt",), decides=decides)
    found = summarise_study(arms, question) | {
        "learning": learning_curve({1.0: arms, 0.5: arms}, {1.0: 6, 0.5: 3}, question)
    }
    write_study(Study("few", json.loads(json.dumps(found))), tmp_path)
    page = (tmp_path / "study.html").read_text(encoding="utf-8")
    text = plain(page)
    assert "−100.0 to +100.0" in text
    assert "Differences of any size: " in text
    assert page.count("<td>none</td>") == 3  # the smallest difference, in each metric
    assert not re.search(r"\bnan\b|\binf\b|\bNone\b", text)
    assert [x for x in re.findall(r"[\d.]+(?=\xa0%)", page) if float(x) > 100] == []
    for line in csv.DictReader((tmp_path / "study.csv").read_text().splitlines()):
        least = 0 if line["quantity"] in ("metric", "learning") else -1
        assert all(least <= float(line[key]) <= 1 for key in ("value", "low", "high") if line[key]), line
    difference = r"[$-100.0$, $+100.0$]"
    assert difference in (tmp_path / "study.tex").read_text()


def test_a_p_value_too_small_for_a_float_is_not_0() -> None:
    assert [p_value(p) for p in (1.0, 0.0312, 2.3e-57, 1e-101, 0.0)] == [
        *("1", "0.031", "2.3\u00a0×\u00a010⁻⁵⁷", "<\u00a01\u00a0×\u00a010⁻¹⁰⁰", "<\u00a01\u00a0×\u00a010⁻¹⁰⁰")
    ]
    assert [p_words(p, 1) for p in (0.0312, 0.0)] == ["p = 0.03", "p < 1e-100"]


def test_a_study_that_explores_asks_no_question(tmp_path: Path) -> None:
    arms = study(0.7, seeds=1)
    explored = {"patch-2": arms["world"], "patch-4": arms["prompt"]}
    question = Question("patch-2", "patch-4", ("patch-4",), decides=False)
    write_study(Study("patches", summarise_study(explored, question)), tmp_path)
    text = plain((tmp_path / "study.html").read_text(encoding="utf-8"))
    assert "Arms compared on the test split of VSR random" in text
    assert "primary comparison none: the study explores, every two arms" in text
    assert "has to be beaten" not in text
    assert "video model" not in text
