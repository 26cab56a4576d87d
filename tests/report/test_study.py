"""The page of a study."""

import csv
import json
import re
from pathlib import Path

import pytest
from browser import CONTRAST, CUT, OVERFLOW, SMALL, Browser, needs_browser
from study_records import few_statements, study

from theworld.evaluation.study_summary import learning_curve, summarise_study
from theworld.evaluation.study_verdict import Question
from theworld.report.charts import Mark, Scale, Track
from theworld.report.page import environment
from theworld.report.study import StudyPage, write_study
from theworld.report.text import percent


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
    write_study(StudyPage("small", summarise_study(study(0.7, seeds=1))), tmp_path)
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
    write_study(StudyPage("vsr", summary | {"learning": curve}), tmp_path)
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
    write_study(StudyPage("few", json.loads(json.dumps(found))), tmp_path)
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


def test_a_study_that_explores_asks_no_question(tmp_path: Path) -> None:
    arms = study(0.7, seeds=1)
    explored = {"patch-2": arms["world"], "patch-4": arms["prompt"]}
    question = Question("patch-2", "patch-4", ("patch-4",), decides=False)
    write_study(StudyPage("patches", summarise_study(explored, question)), tmp_path)
    text = plain((tmp_path / "study.html").read_text(encoding="utf-8"))
    assert "Arms compared on the test split of VSR random" in text
    assert "primary comparison none: the study explores, every two arms" in text
    assert "has to be beaten" not in text
    assert "video model" not in text
