"""The order of the packages: each imports only from packages in lines above its own, and no import is a cycle."""

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

from constants import ROOT

ORDER = [
    {"utils"},
    {"config", "store"},
    {"data"},
    {"models"},
    {"extraction"},
    {"evaluation", "hub"},
    {"training", "report", "serving"},
    {"cli", "harnesses", "study"},
]
RANK = {package: rank for rank, packages in enumerate(ORDER) for package in packages}
PACKAGE = ROOT / "theworld"
TASKS = PACKAGE / "harnesses" / "tasks"  # data: lmms-eval loads its files, and nothing of the package does
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): path
    for path in PACKAGE.rglob("*.py")
    if path.parent != PACKAGE and path.name != "__init__.py" and not path.is_relative_to(TASKS)
}


def imports(path: Path, top_only: bool = False) -> Iterator[str]:
    """Yield the names of the modules and packages that a file imports, at any depth or at its top alone."""
    tree = ast.parse(path.read_text())
    for node in tree.body if top_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            for alias in node.names:
                module = f"{node.module}.{alias.name}"
                yield module if module in MODULES else str(node.module)


def test_a_package_imports_only_from_packages_above_its_own() -> None:
    assert {path.parent.name for path in MODULES.values()} == set(RANK)
    for module, path in MODULES.items():
        own = module.split(".")[1]
        for name in imports(path):
            top, _, rest = name.partition(".")
            assert top not in ("tools", "tests", "benchmark", "demo_models"), f"{module} imports {name}"
            if top == "theworld" and rest:
                other = rest.split(".")[0]
                assert other == own or RANK[other] < RANK[own], f"{module} imports {name}"


def test_no_modules_import_each_other_in_a_cycle() -> None:
    graph = {module: {n for n in imports(path) if n in MODULES} for module, path in MODULES.items()}
    assert len(list(TopologicalSorter(graph).static_order())) == len(MODULES)


def libraries(module: str) -> set[str]:
    """Return the top-level packages that are imported where this module is."""
    found, pending = set[str](), {module}
    while pending:
        found |= (now := pending)
        pending = {
            name for own in now if own in MODULES for name in imports(MODULES[own], top_only=True)
        } - found
    return {name.split(".")[0] for name in found}


def test_a_tool_starts_without_the_libraries_that_it_may_not_need() -> None:
    assert libraries("theworld.training.trainer").isdisjoint({"sklearn", "scipy", "diffusers", "peft"})
    drawing_and_statistics = {"matplotlib", "sklearn"}
    for module in ("evaluation.score", "evaluation.tables", "extraction.extract", "cli.dry_run"):
        found = libraries(f"theworld.{module}")
        assert found.isdisjoint({"diffusers", "peft"} | drawing_and_statistics), module
    assert "scipy" in libraries("theworld.evaluation.score")  # for metrics
