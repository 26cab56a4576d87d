"""What `theworld.align` measures as text for a terminal."""

from collections.abc import Sequence
from typing import Any

from theworld.align import NEAREST_IMAGE, NEAREST_TEXT, QUANTILES, SAME_PLACE

GOOD, POOR = 0.5, 0.3  # the guide's reading of a mean cosine
CAUTION = """\
What this does not show: whether world tokens are of use. Tokens that resemble image tokens can hold nothing about the
picture, and tokens that do not can be read well; accuracy beside its controls tells (tools/eval.py). Where all tokens
point one way, unrelated ones have high cosines too: only what lies above the control depends on the picture."""

_PARTNER = {
    SAME_PLACE: "each world token is compared with the image token of the same place",
    NEAREST_IMAGE: "they do not lie on the same places: each world token is compared with the nearest image token of\n"
    "the same image (the highest cosine of many, so higher than at the same place)",
    NEAREST_TEXT: "a text-only Gemma: each world token is compared with the nearest token, by cosine, of the\n"
    "statements about its image",
}


def report(result: dict[str, Any]) -> str:
    """The figures as text for a terminal, with the guide's reading and its limits."""
    both, kind = [result["untrained"], result["trained"]], result["comparison"]
    later = result.get("predicted_moments_left_out", 0)
    left_out = [f"those of {later} predicted moments have no place in the photograph and are left out"]
    lines = [
        f"{result['images']} images of {result['split']}: {result['world_tokens']} world tokens each, "
        f"{result['image_tokens']} image tokens",
        *(left_out if later else []),
        _PARTNER[kind],
        "",
        f"{'':<46}{'untrained':>11}{'trained':>11}{'n':>9}",
    ]
    for key, label in (
        ("cosine", f"cosine, {kind}"),
        ("control_cosine", "control: the same of another image"),
        ("distance", "distance (L2)"),
    ):
        lines.append(_row(label, [one[key]["mean"] for one in both], both[0][key]["n"]))
        if key != "distance":
            for q in (str(QUANTILES[0]), str(QUANTILES[-1])):
                lines.append(
                    _row(f"  {float(q):.0%} of them are below", [o[key]["quantiles"][q] for o in both])
                )
    for name in both[0]["norm"]:
        lines.append(
            _row(f"norm, {name}", [o["norm"][name]["mean"] for o in both], both[0]["norm"][name]["n"])
        )
    for name in both[0]["norm_ratio"]:
        label = name.replace("_", " / ")
        lines.append(_row(f"ratio of norms, {label}", [o["norm_ratio"][name] for o in both]))
    for name in both[0]["mean_vector_cosine"]:
        label = name.replace("_", ", ")
        values = [o["mean_vector_cosine"][name]["cosine"] for o in both]
        lines.append(_row(f"cosine of mean vectors, {label}", values))
    return "\n".join([*lines, "", _reading(result), CAUTION])


def _row(label: str, values: Sequence[float], n: int | None = None) -> str:
    return f"{label:<46}{values[0]:>11.3f}{values[1]:>11.3f}" + (f"{n:>9,}" if n else "")


def _reading(result: dict[str, Any]) -> str:
    mean = result["trained"]["cosine"]["mean"]
    above = mean - result["trained"]["control_cosine"]["mean"]
    if result["comparison"] == NEAREST_TEXT:
        return f"mean cosine {mean:.2f}, {above:+.2f} against the control."
    word = "good" if mean > GOOD else "poor" if mean < POOR else "in between"
    return (
        f"mean cosine {mean:.2f}, {above:+.2f} against the control. The guide's reading: {word} "
        f"(above {GOOD} good, below {POOR} poor)."
    )
