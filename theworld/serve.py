"""The page that asks a model about photographs: tools/ask.py --serve."""

import html
import ipaddress
import json
import string
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from theworld.dry_run import line
from theworld.local_server import Server
from theworld.questions import MAX_STATEMENTS, Limits
from theworld.tryout import NAMES, Answers, answers, called, load_for_asking

WEB = Path(__file__).parent / "web"


def serve(name: str, systems: Sequence[str], overrides: dict[str, Any], host: str, port: int) -> None:
    """Serves the page of a model (see `load_for_asking`) until it is interrupted, and prints where it is.

    Raises as that does, and OSError for an address that cannot be had, before anything is loaded.
    """
    check_address(host, port)
    model = load_for_asking(name, systems, overrides)

    def answer(pixels: np.ndarray, statements: list[str]) -> Answers:
        return answers(model, pixels, statements, systems)

    limits = Limits(max_pixels=model.config.max_image_pixels)
    with Server(answer, files(name, called(model, systems), limits), host, port, limits) as server:
        print(f"{server.url} (Ctrl-C ends it)", flush=True)
        if not ipaddress.ip_address(str(server.server_address[0])).is_loopback:
            print("every machine that reaches this one can ask; leave --host out to change that", flush=True)
        server.serve_forever()


def check_address(host: str, port: int) -> None:
    """Raises OSError for an address that cannot be had."""
    Server(lambda pixels, statements: [], {}, host, port).server_close()


def plan_page(host: str, port: int) -> Iterator[str]:
    """What `serve` would do with an address, in a line. Raises OSError as it does."""
    check_address(host, port)
    yield line("serves", f"a page on {host}, {f'port {port}' if port else 'a free port'}")


def files(model: str, systems: Sequence[str], limits: Limits) -> dict[str, tuple[str, bytes]]:
    """(media type, content) of everything that the page of a model of that name is made of, by its path."""
    values = {
        "model": model,
        "systems": json.dumps([[system, NAMES[system]] for system in systems]),
        "max_bytes": limits.max_bytes,
        "max_statements": MAX_STATEMENTS,
    }
    page = string.Template((WEB / "index.html").read_text(encoding="utf-8"))
    text = page.substitute({key: html.escape(str(value)) for key, value in values.items()})
    return {
        "/": ("text/html", text.encode("utf-8")),
        "/style.css": ("text/css", (WEB / "theme.css").read_bytes() + (WEB / "style.css").read_bytes()),
        "/script.js": ("text/javascript", (WEB / "script.js").read_bytes()),
    }
