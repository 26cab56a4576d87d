"""What was published stands beside nothing but what it was measured on."""

import pytest

from theworld.references import OWN, QUOTED, dataset_label, quoted


def test_a_data_set_of_ones_own_is_not_called_vsr() -> None:
    assert dataset_label("vsr", "test", 2195) == "vsr_random"
    assert dataset_label("vsr_zeroshot", "validation", 340) == "vsr_zeroshot"
    assert dataset_label("vsr", "test", 1222) == OWN


def test_published_results_belong_to_the_test_split_they_were_measured_on() -> None:
    assert [r.system for r, _ in quoted("vsr_random", "test")] == [r.system for r in QUOTED]
    assert dict((r.system, v) for r, v in quoted("vsr_random", "test"))["human"] == pytest.approx(0.954)
    zeroshot = {r.system: v for r, v in quoted("vsr_zeroshot", "test")}
    assert "human" not in zeroshot
    assert zeroshot["LXMERT"] == pytest.approx(0.612)
    assert quoted("vsr_random", "dev") == quoted(OWN, "test") == []
    assert all("arXiv" in r.source for r in QUOTED)
