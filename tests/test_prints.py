"""Library code logs; only tools print."""

import ast

from constants import ROOT

PRINTS = {
    "cli/demo.py",  # the result line of `python -m theworld.demo`
    "utils/console.py",  # the lines of dry runs and the errors of tools
}


def test_only_listed_modules_print() -> None:
    found = set()
    for path in (ROOT / "theworld").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print":
                found.add(str(path.relative_to(ROOT / "theworld")))
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "tqdm.write":
                found.add(str(path.relative_to(ROOT / "theworld")))
    assert found == PRINTS
