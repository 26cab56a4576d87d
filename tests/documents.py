"""Read the project's documents: their links, the paths and flags that they name, and the commands that they print.

python tests/documents.py    writes the settings of tools/train.py into GUIDE.md
"""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

from constants import ROOT

from theworld.config.config import FIELDS, GROUPS

MAIN = ("README.md", "GUIDE.md", "CONTRIBUTING.md")
DOCUMENTS = (*MAIN, "RESULTS.md", "CHANGELOG.md", "cache/README.md", "theworld/embedded/README.md")
START, END = "<!-- settings: written by tests/documents.py -->\n", "<!-- end of settings -->\n"


def text_of(document: str) -> str:
    """Return the text of a document."""
    return (ROOT / document).read_text(encoding="utf-8")


def code_blocks(text: str, language: str) -> list[str]:
    """Return the code blocks of a language, such as "bash"; "" is none."""
    blocks = re.findall(r"^ *```(\w*)\n(.*?)^ *```$", text, re.MULTILINE | re.DOTALL)
    return [block for own, block in blocks if own == language]


def without_code(text: str) -> str:
    """Return a text without its code blocks."""
    return re.sub(r"^ *```.*?^ *```$", "", text, flags=re.MULTILINE | re.DOTALL)


def inline_code(text: str) -> list[str]:
    """Return what stands between backticks, outside of code blocks."""
    return [code.replace("\n", " ") for code in re.findall(r"`([^`]+)`", without_code(text))]


def anchors(text: str) -> set[str]:
    """Return the anchors that GitHub makes of a text's headings."""
    headings = re.findall(r"^#+ (.+)$", without_code(text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-") for heading in headings}


def links(text: str) -> list[str]:
    """Return the targets of all links and pictures that are not on the network."""
    found = re.findall(r"\]\(([^)\s]+)\)", without_code(text))
    return [link for link in found if not link.startswith(("http:", "https:"))]


def paths(text: str) -> Iterator[str]:
    """Yield the project's files and folders that inline code names; a name with a placeholder is none."""
    for code in inline_code(text):
        if re.fullmatch(r"(theworld|tools|tests|configs|\.ci)/[\w./-]*", code):
            yield code


def commands(text: str) -> Iterator[tuple[str, list[str]]]:
    """Yield (name of the tool, arguments) of every `python tools/NAME.py` in code, launched in whatever way."""
    blocks = [
        block.replace("\\\n", " ") for language in ("bash", "") for block in code_blocks(text, language)
    ]
    lines = [line for block in blocks for line in block.splitlines()]
    for line in [*lines, *(code for code in inline_code(text) if " " in code)]:
        found = re.search(r"(?:^|\s)tools/(\w+)\.py(\s.*|$)", line)
        if found:
            words = shlex.split(found[2], comments=True)
            yield found[1], [word for word in words if word != "..."]


def settings_table() -> str:
    """Return every setting with its default and meaning, in the groups of `tools/train.py --help`."""
    firsts = {first: group for group, first in GROUPS.items()}
    lines: list[str] = []
    for name, setting in FIELDS.items():
        if name in firsts:
            title = firsts[name].capitalize()
            lines += [f"\n### {title}\n", "| setting | default | meaning |", "|---|---|---|"]
        default = str(setting.default).replace("\n", "\\n")
        default = {"None": "none", "True": "true", "False": "false"}.get(default, default)
        choices = f" One of {', '.join(setting.choices)}." if setting.choices else ""
        lines.append(f"| `{name}` | {default} | {setting.help}{choices} |")
    return "\n".join(lines) + "\n\n"


def settings_in_guide() -> str:
    """Return what GUIDE.md has between the marks of the settings."""
    return text_of("GUIDE.md").partition(START)[2].partition(END)[0]


def main() -> None:
    """Write the settings into GUIDE.md."""
    before, _, rest = text_of("GUIDE.md").partition(START)
    Path(ROOT / "GUIDE.md").write_text(before + START + settings_table() + END + rest.partition(END)[2])


if __name__ == "__main__":
    main()
