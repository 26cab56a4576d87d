"""The pieces of HTML that a report is made of. Everything that is not made here is escaped.

A page holds no script and loads nothing: its policy forbids both, whatever stands in a caption.
"""

import base64
import re
from collections.abc import Sequence
from html import escape
from pathlib import Path

STYLES = [Path(__file__).parent / "web" / name for name in ("theme.css", "report.css")]
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"


def page(title: str, header: str, sections: Sequence[tuple[str, str, str]], footer: str) -> str:
    """A whole document. `sections`: (id, title, content); header, contents and footer are HTML."""
    links = "".join(f'<li><a href="#{i}">{escape(t)}</a></li>' for i, t, _ in sections)
    body = "\n".join(
        f'<section id="{i}" aria-labelledby="{i}-title">\n<h2 id="{i}-title">{escape(t)}</h2>\n{content}\n</section>'
        for i, t, content in sections
    )
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{escape(title)}</title>
<style>
{"".join(style.read_text(encoding="utf-8") for style in STYLES)}</style>
</head>
<body>
<a class="skip" href="#content">Skip to the figures</a>
<header>
{header}
<nav aria-label="Sections"><ul>{links}</ul></nav>
</header>
<main id="content" tabindex="-1">
{body}
</main>
<footer>
{footer}
</footer>
</body>
</html>
"""


def words(text: str) -> str:
    """Plain text as it is set: no line begins with a per cent sign, small numbers with their power of ten."""
    text = re.sub(r"(\d) (%|points)", "\\1\u00a0\\2", text).replace("p = ", "p\u00a0=\u00a0")
    return escape(re.sub(r"(\d)e-(\d+)", _power, text))


def _power(found: re.Match[str]) -> str:
    exponent = str(int(found[2])).translate(str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return f"{found[1]}\u00a0×\u00a010⁻{exponent}"


def paragraph(text: str) -> str:
    """A paragraph of plain text."""
    return f"<p>{words(text)}</p>"


def table(caption: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of plain text, whose first column names the rows. It scrolls by itself where it is wider than the page,
    also by keyboard."""
    lines = [
        f'<div class="scroll" role="region" aria-label="{escape(caption)}" tabindex="0"><table>',
        f"<caption>{escape(caption)}</caption>",
        "<thead><tr>" + "".join(f'<th scope="col">{escape(h)}</th>' for h in head) + "</tr></thead><tbody>",
    ]
    for first, *rest in rows:
        cells = "".join(f"<td>{escape(cell)}</td>" for cell in rest)
        lines.append(f'<tr><th scope="row">{escape(first)}</th>{cells}</tr>')
    return "\n".join([*lines, "</tbody></table></div>"])


def details(summary: str, content: str) -> str:
    """Content that opens on demand."""
    return f"<details><summary>{escape(summary)}</summary>\n{content}\n</details>"


def row(name: str, drawing: str, figure: str, small: str = "", kind: str = "", note: str = "") -> str:
    """A row of a chart of tracks: name with a note, `drawing` as HTML, figure with what stands small beside it."""
    named = escape(name) + (f" <small>{words(note)}</small>" if note else "")
    shown = words(figure) + (f" <small>{words(small)}</small>" if small else "")
    return (
        f'<div class="row{" " + kind if kind else ""}"><div class="name">{named}</div>{drawing}'
        f'<div class="figure">{shown}</div></div>'
    )


def chart(rows: Sequence[str], caption: str, key: Sequence[tuple[str, str, bool]] = ()) -> str:
    """Rows of tracks with a caption; `key`: (CSS class, meaning, hollow) of the marks."""
    items = "".join(
        '<li><svg width="12" height="12" aria-hidden="true" focusable="false">'
        f'<circle class="dot {"hollow " if hollow else ""}{kind}" cx="6" cy="6" r="4.5"/></svg>{escape(meaning)}</li>'
        for kind, meaning, hollow in key
    )
    legend = f'<ul class="key">{items}</ul>' if items else ""
    return f"<figure>{legend}{''.join(rows)}<figcaption>{words(caption)}</figcaption></figure>"


def facts(pairs: Sequence[tuple[str, str]]) -> str:
    """Names with their values, both plain text."""
    inner = "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in pairs)
    return f'<dl class="facts">{inner}</dl>'


def command(text: str) -> str:
    """A command to copy."""
    return f'<pre tabindex="0"><code>{escape(text)}</code></pre>'


def missing(what: str, cure: str = "") -> str:
    """That something is not there, and the command that makes it."""
    return f'<div class="missing"><p>{escape(what)}</p>{command(cure) if cure else ""}</div>'


def data_uri(kind: str, data: bytes) -> str:
    """A picture, "jpeg" or "png", as an address that holds it."""
    return f"data:image/{kind};base64,{base64.b64encode(data).decode('ascii')}"


def percent(share: float | None, digits: int = 1) -> str:
    """A share as "71.4 %"; "–" for None."""
    return "–" if share is None else f"{100 * share:.{digits}f}\u00a0%"


def between(low: float | None, high: float | None) -> str:
    """An interval of shares in percent; "–" for none."""
    return "–" if low is None or high is None else f"{100 * low:.1f} to {100 * high:.1f}"


def signed(difference: float | None) -> str:
    """A difference of shares in points with its sign; "–" for None."""
    return "–" if difference is None else f"{100 * difference:+.1f}".replace("-", "−")
