"""The figures of a study for other programs."""

import csv
from pathlib import Path

from theworld.report.study_files import study_csv, study_latex


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
