"""A file imports only from levels below its own, so that every part can be read before those that use it."""

import ast
from pathlib import Path

import pytest

LEVELS = [
    {
        "bench_choices",
        "vocabulary",
        "pretrain_settings",
        "jsonc",
        "console",
        "images",
        "weights",
        "scenes",
        "fp8",
        "parts",
        "settings",
        "figures",
        "charts",
        "page",
        "answers",
        "trees",
    },
    {"files", "vsr", "fetch", "compare", "stopping", "questions"},
    {
        "config",
        "captions",
        "local_server",
        "places",
        "shards",
        "vae",
        "gemma",
        "processes",
        "saved",
        "references",
        "workers",
    },
    {
        "arguments",
        "watch",
        "text_model",
        "metrics",
        "plan",
        "trackers",
        "unfrozen",
        "sharding",
        "projection",
        "finished",
        "rollout",
        "machine",
        "runlog",
    },
    {"verify"},
    {"reader", "verdict"},
    {"store", "schedule", "tables"},
    {"cache", "targets", "reading", "report_figures"},
    {"batch", "given", "report_groups", "report_parts", "report_source"},
    {"masks", "losses"},
    {"decoder", "generation", "asking"},
    {"encodings", "listing", "model", "foresee"},
    {"stages", "image_by_image", "checkpoint", "feed", "gather"},
    {"evaluate", "extract", "card", "held_out", "resume"},
    {"data", "publish", "provenance", "repair", "audit"},
    {"objectives", "report"},
    {"preflight"},
    {"failed_step"},
    {"train", "score", "align"},
    {"sweep"},
    {"small_models", "align_picture", "align_report", "dry_run"},
    {"doctor", "tryout"},
    {"lessons", "serve"},
    {"demo", "pretrain"},
    {"bench_results", "bench_data", "bench_models", "end_to_end", "chip"},
    {"bench_observe", "bench_cache"},
    {"bench_setup"},
    {"bench_growth", "bench_encoders", "bench_training", "bench_runs", "bench_processes"},
    {"bench", "bench_steps"},
]
LEVEL = {name: level for level, names in enumerate(LEVELS) for name in names}
PACKAGE = Path(__file__).parent.parent / "theworld"
MODULES = sorted(path.stem for path in PACKAGE.glob("*.py") if path.stem != "__init__")


def imported(path: Path) -> set[str]:
    """The modules of the package that a file imports, anywhere in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "theworld":
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("theworld."):
            names.add(str(node.module).split(".")[1])
        elif isinstance(node, ast.Import):
            names |= {a.name.split(".")[1] for a in node.names if a.name.startswith("theworld.")}
    return names


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_from_lower_levels_only(module: str) -> None:
    assert module in LEVEL, f"{module} has no level: give it one in this test and in the README"
    for other in imported(PACKAGE / f"{module}.py"):
        assert LEVEL[other] < LEVEL[module], (
            f"{module} (level {LEVEL[module]}) imports {other} ({LEVEL[other]})"
        )


def test_the_core_does_not_know_the_demo_or_the_measurements() -> None:
    demo = {"demo", "scenes", "pretrain", "pretrain_settings", "small_models", "lessons"}
    measurements = {name for name in MODULES if name.startswith("bench")} | {"end_to_end", "chip"}
    for module in set(MODULES) - demo - measurements:
        assert not imported(PACKAGE / f"{module}.py") & (demo | measurements)
        assert "embedded" not in (PACKAGE / f"{module}.py").read_text()


def test_files_stay_short() -> None:
    root = PACKAGE.parent
    tools = {p.name: len(p.read_text().splitlines()) for p in (root / "tools").glob("*.py")}
    assert {name: n for name, n in tools.items() if n > 75} == {}
    modules = {p.name: len(p.read_text().splitlines()) for p in PACKAGE.glob("*.py")}
    assert {name: n for name, n in modules.items() if n > 330} == {}
