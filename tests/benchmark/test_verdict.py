"""Figures beside their aims, and the estimates of memory."""

from benchmark.choices import VARIANTS
from benchmark.verdict import AIMS, verdict


def test_a_line_says_figure_aim_share_of_the_floor_and_bound() -> None:
    rows = {
        "fp8": {
            "rate": 140.0,
            "unit": "statements/s",
            "mfu": 0.81,
            "memory_gib": 28.0,
            "estimate_error": -0.12,
        },
        "exact": {"rate": 93.0, "unit": "statements/s", "estimate_error": 0.1},
    }
    parts = {"variants": {"rows": rows}, "start": {"rows": {"compiled before": {"first_step_s": 12.0}}}}
    matrix = "matrix products, then flex attention backwards and pointwise kernels"
    assert list(verdict(parts)) == [
        f"MISSED  variants, exact: 93 statements/s, aim at least 100; bound by {matrix}",
        "reached variants, fp8: 140 statements/s, aim at least 135, 81% of the floor; bound by matrix products, flex "
        "attention backwards, and rounding to 8 bits",
        "MISSED  variants, fp8: 28 memory gib, aim at most 22; bound by values kept in 16 bits for the backward pass",
        "reached start, compiled before: 12 first step s, aim at most 12; bound by imports, weights",
        "MISSED  variants, fp8: estimate of memory off by -12.0%, aim at most 10%",
        "reached variants, exact: estimate of memory off by +10.0%, aim at most 10%",
    ]


def test_the_share_of_time_that_the_gpu_works_is_that_of_the_same_run() -> None:
    rows = {"ours": {"rate": 101.0, "unit": "statements/s"}, "kernels": {"busy_share": 0.97}}
    (line,) = verdict({"train": {"rows": rows}})
    assert line.startswith("reached train, ours: 101 statements/s, aim at least 100; bound by ")
    assert line.endswith(" (GPU busy 97%)")


def test_aims_are_of_variants_that_are_measured() -> None:
    assert {aim.row for aim in AIMS if aim.part == "variants"} <= set(VARIANTS)
