"""The page that asks: as a process, and in a real Chromium."""

import base64
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import CONTRAST, SMALL, Browser, needs_browser
from conftest import EMBEDDED_GEMMA, EMBEDDED_VAE, ROOT
from PIL import Image
from test_tryout import STATEMENTS, save_model

from theworld.asking import SYSTEMS
from theworld.config import Config
from theworld.local_server import Server
from theworld.model import TheWorld
from theworld.questions import Limits
from theworld.serve import WEB, files, plan_page
from theworld.tryout import answers, load_for_asking

EVIL = '"><script>document.title="evil"</script><img src=x onerror=alert(1)> & $model'


# ---- the process


def test_the_tool_serves_until_it_is_interrupted(config: Config, photographs: Path, tmp_path: Path) -> None:
    saved = save_model(tmp_path / "model", config)
    process = subprocess.Popen(
        [sys.executable, "tools/ask.py", "--model", str(saved), "--serve", "--port", "0"],
        cwd=ROOT,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        said = process.stdout.readline()
        found = re.fullmatch(r"(http://127\.0\.0\.1:\d+/) \(Ctrl-C ends it\)\n", said)
        assert found, said
        coded = base64.b64encode((photographs / "a.png").read_bytes()).decode()
        request = urllib.request.Request(
            found[1] + "ask",
            json.dumps({"photograph": coded, "statements": STATEMENTS}).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as response:
            rows = json.load(response)["answers"]
        process.send_signal(signal.SIGINT)
        rest, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert (process.returncode, rest) == (130, "")
    assert errors.endswith("ask: interrupted\n")
    model = TheWorld.from_pretrained(saved)
    wanted = model.score(photographs / "a.png", STATEMENTS)
    assert [row["p_true"]["world"] for row in rows] == pytest.approx(wanted, abs=1e-5)


def test_an_address_that_is_taken_stops_it_before_anything_loads() -> None:
    with Server(lambda pixels, statements: [], {}) as server:
        with pytest.raises(OSError, match="Address already in use; choose another"):
            list(plan_page("127.0.0.1", server.server_address[1]))
        assert list(plan_page("127.0.0.1", 0)) == ["serves       a page on 127.0.0.1, a free port"]


def test_the_page_is_filled_in_and_nothing_can_break_out() -> None:
    made = files(EVIL, ["world"], Limits(max_bytes=123))
    assert set(made) == {"/", "/style.css", "/script.js"}
    page = made["/"][1].decode()
    assert "<script>document" not in page
    assert "&lt;script&gt;document.title=&quot;evil&quot;&lt;/script&gt;" in page
    assert page.count("<script") == 1
    assert 'data-max-bytes="123"' in page
    assert 'data-systems="[[&quot;world&quot;, &quot;with world tokens&quot;]]"' in page
    for path in WEB.iterdir():  # nothing from outside, nothing that the policy would stop
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"https?://|style=|\son\w+=|innerHTML|eval\(|@import|url\(", text), path


# ---- the page


OVERFLOW = """
[...document.querySelectorAll('body *')].filter(e => e.getBoundingClientRect().right > innerWidth + 1)
  .map(e => e.tagName + ' ' + e.textContent.slice(0, 40))
"""
SHOWN = """
[...document.querySelectorAll('#list li')].map(item => [item.querySelector('h3').textContent,
  [...item.querySelectorAll('.row')].map(row => [row.querySelector('dt').textContent,
    row.querySelector('.figure').textContent, row.querySelector('.fill').style.width])])
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> TheWorld:
    """An untrained one of the embedded models."""
    config = Config(
        model_name=str(EMBEDDED_GEMMA),
        cosmos_model_name=str(EMBEDDED_VAE),
        latent_size=64,
        world_patch=2,
        device="cpu",
    )
    saved = save_model(tmp_path_factory.mktemp("served") / "model", config)
    return load_for_asking(str(saved), SYSTEMS, {})


@pytest.fixture(scope="module")
def url(model: TheWorld) -> Iterator[str]:
    """Where the page of that model is served."""

    def answer(pixels: np.ndarray, statements: list[str]) -> list[dict[str, Any]]:
        return answers(model, pixels, statements)

    limits = Limits(max_bytes=200_000, max_pixels=1_000_000)
    with Server(answer, files("you/world " + EVIL, SYSTEMS, limits), limits=limits) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server.url
        server.shutdown()
        thread.join()


def visit(browser: Browser, url: str, width: int = 1200, dark: bool = False) -> None:
    """Loads the page in a window of that size and colour scheme."""
    browser.show(WEB / "style.css", width, dark=dark)
    browser.requests.clear()
    browser.logged.clear()
    browser.call("Page.navigate", url=url)
    while browser._read().get("method") != "Page.loadEventFired":
        pass


def choose(browser: Browser, path: Path) -> None:
    root = browser.call("DOM.getDocument")["root"]["nodeId"]
    node = browser.call("DOM.querySelector", nodeId=root, selector="#file")["nodeId"]
    browser.call("DOM.setFileInputFiles", nodeId=node, files=[str(path)])


def write(browser: Browser, *statements: str) -> None:
    browser.evaluate(f"document.getElementById('statements').value = {json.dumps(chr(10).join(statements))}")


def press_ask(browser: Browser) -> str:
    """Presses the button and returns the status line, or the error."""
    browser.evaluate("document.getElementById('ask').click()")
    return outcome(browser)


def outcome(browser: Browser) -> str:
    until = time.monotonic() + 60
    while browser.evaluate("document.getElementById('ask').hasAttribute('aria-disabled')"):
        assert time.monotonic() < until
        time.sleep(0.02)
    text = "document.getElementById('error').textContent || document.getElementById('status').textContent"
    return browser.evaluate(text)


def expected(model: TheWorld, image: Path, statements: list[str]) -> list[Any]:
    """What the page should show, as SHOWN reads it."""
    names = {"world": "with world tokens", "baseline": "without them", "zero": "zero latents"}
    shown = []
    for row in answers(model, image, statements):
        figures = []
        for system, p in row["p_true"].items():
            said = "true" if p > 0.5 else "not true"
            figures.append([names[system], f"{100 * p:.1f}\u00a0% {said}"])
        shown.append([row["statement"], figures])
    return shown


def without_widths(shown: list[Any]) -> list[Any]:
    return [[statement, [row[:2] for row in rows]] for statement, rows in shown]


@needs_browser
@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [360, 390, 768, 1200])
def test_it_answers_fits_is_legible_and_loads_nothing_from_elsewhere(
    browser: Browser, url: str, model: TheWorld, photographs: Path, tmp_path: Path, width: int, dark: bool
) -> None:
    visit(browser, url, width, dark)
    assert browser.evaluate("document.title") == "Is it true of this photograph? TheWorld"
    assert browser.evaluate(CONTRAST) == []
    choose(browser, photographs / "a.png")
    statements = [*STATEMENTS, EVIL, "The" + " very long" * 40 + " statement is " + "t" * 90 + "rue."]
    write(browser, *statements[:2], "   ", *statements[2:])
    assert re.fullmatch(r"4 statements answered below in \d+\.\d+ s\.", press_ask(browser))
    shown = browser.evaluate(SHOWN)
    assert without_widths(shown) == expected(model, photographs / "a.png", statements)
    assert (
        browser.evaluate("document.title") == "Is it true of this photograph? TheWorld"
    )  # and no script ran
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    for check in (OVERFLOW, CONTRAST, SMALL):
        assert browser.evaluate(check) == []
    assert browser.evaluate("document.getElementById('preview').naturalWidth") == 96
    asked = [r for r in browser.requests if not r.startswith(("blob:" + url, "data:,"))]
    assert asked == [url, url + "style.css", url + "script.js", url + "ask"]
    assert browser.logged == []
    ground = browser.evaluate("getComputedStyle(document.body).backgroundColor")
    assert ground == ("rgb(20, 23, 27)" if dark else "rgb(247, 246, 242)")
    browser.screenshot(tmp_path / "page.png")
    with Image.open(tmp_path / "page.png") as shot:
        assert shot.width == width


@needs_browser
def test_a_bar_is_as_long_as_its_figure_says(
    browser: Browser, url: str, model: TheWorld, photographs: Path
) -> None:
    visit(browser, url)
    choose(browser, photographs / "b.png")
    write(browser, STATEMENTS[0])
    assert press_ask(browser).startswith("1 statement answered below in ")
    share = "(e => e.getBoundingClientRect().width / e.parentElement.getBoundingClientRect().width)"
    wanted = list(answers(model, photographs / "b.png", STATEMENTS[:1])[0]["p_true"].values())
    until = time.monotonic() + 30  # they grow
    while True:
        found = browser.evaluate(f"[...document.querySelectorAll('.fill')].map({share})")
        if found == pytest.approx(wanted, abs=0.002):
            break
        assert time.monotonic() < until, (found, wanted)
        time.sleep(0.05)


@needs_browser
def test_what_is_wrong_is_said_in_words_and_mended(
    browser: Browser, url: str, photographs: Path, tmp_path: Path
) -> None:
    visit(browser, url)
    assert press_ask(browser) == "Choose a photograph first."
    assert browser.evaluate("document.activeElement.id") == "file"
    choose(browser, photographs / "a.png")
    assert browser.evaluate("document.getElementById('error').hidden")
    assert press_ask(browser).startswith("Write a statement first, such as: ")
    assert browser.evaluate("document.activeElement.id") == "statements"
    write(browser, *["So."] * 33)
    assert press_ask(browser) == "At most 32 statements at once; these are 33."
    write(browser, "The cat.<end_of_turn>")
    assert "holds Gemma's control token '<end_of_turn>'; remove it" in press_ask(browser)
    write(browser, STATEMENTS[0])
    (tmp_path / "large.png").write_bytes(bytes(200_001))
    choose(browser, tmp_path / "large.png")
    assert press_ask(browser) == "The photograph has 200,001 bytes; at most 200,000 are read."
    (tmp_path / "page.jpg").write_text("<!doctype html>")
    choose(browser, tmp_path / "page.jpg")
    assert press_ask(browser).startswith("the photograph: an HTML or XML page, not a photograph")
    Image.new("1", (1001, 1000)).save(tmp_path / "wide.png")
    choose(browser, tmp_path / "wide.png")
    assert press_ask(browser) == "the photograph: 1001 x 1000 pixels; at most 1000000 are decoded"
    choose(browser, photographs / "a.png")
    assert press_ask(browser).startswith("1 statement answered below in ")
    choose(browser, photographs / "b.png")
    assert browser.evaluate("document.getElementById('answers').hidden")  # they were about the other one


@needs_browser
def test_a_server_that_has_gone_is_said(browser: Browser, photographs: Path) -> None:
    with Server(lambda pixels, statements: [], files("m", ["world"], Limits())) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        visit(browser, server.url)
        server.shutdown()
        thread.join()
    choose(browser, photographs / "a.png")
    write(browser, STATEMENTS[0])
    said = press_ask(browser)
    assert said.startswith("No answer came: ")
    assert said.endswith("Is tools/ask.py still running?")


@needs_browser
def test_a_photograph_can_be_dropped_and_pasted(
    browser: Browser, url: str, model: TheWorld, photographs: Path
) -> None:
    visit(browser, url)
    data = {"items": [], "files": [str(photographs / "c.png")], "dragOperationsMask": 1}
    for kind in ("dragEnter", "dragOver", "drop"):
        browser.call("Input.dispatchDragEvent", type=kind, x=300, y=300, data=data)
    assert browser.evaluate("document.getElementById('file').files[0].name") == "c.png"
    write(browser, STATEMENTS[1])
    press_ask(browser)
    shown = without_widths(browser.evaluate(SHOWN))
    assert shown == expected(model, photographs / "c.png", STATEMENTS[1:])
    coded = base64.b64encode((photographs / "b.png").read_bytes()).decode()
    paste = """(() => { const held = new DataTransfer();
      held.items.add(new File([Uint8Array.from(atob('CODED'), c => c.charCodeAt(0))], 'pasted.png'));
      document.body.dispatchEvent(new ClipboardEvent('paste', {clipboardData: held, bubbles: true})); })()"""
    browser.evaluate(paste.replace("CODED", coded))
    assert browser.evaluate("document.getElementById('file').files[0].name") == "pasted.png"
    press_ask(browser)
    shown = without_widths(browser.evaluate(SHOWN))
    assert shown == expected(model, photographs / "b.png", STATEMENTS[1:])


@needs_browser
def test_the_keyboard_is_enough_and_sees_where_it_is(
    browser: Browser, url: str, model: TheWorld, photographs: Path
) -> None:
    visit(browser, url)
    choose(browser, photographs / "a.png")
    seen = []
    where = "[document.activeElement.id, getComputedStyle(document.activeElement).outlineStyle]"
    for _ in range(3):
        browser.press("Tab", 9)
        seen.append(browser.evaluate(where))
        if seen[-1][0] == "statements":
            browser.call("Input.insertText", text=STATEMENTS[0])
    assert seen == [["file", "solid"], ["statements", "solid"], ["ask", "solid"]]
    browser.press("Enter", 13, "\r")
    assert outcome(browser).startswith("1 statement answered below in ")
    assert browser.evaluate("document.activeElement.id") == "ask"  # where it was
    wanted = expected(model, photographs / "a.png", STATEMENTS)
    assert without_widths(browser.evaluate(SHOWN)) == wanted[:1]
    browser.evaluate("document.getElementById('statements').focus()")
    browser.call("Input.insertText", text=chr(10) + STATEMENTS[1])
    for kind in ("rawKeyDown", "keyUp"):
        key = {"key": "Enter", "code": "Enter", "windowsVirtualKeyCode": 13, "modifiers": 2}
        browser.call("Input.dispatchKeyEvent", type=kind, **key)
    assert outcome(browser).startswith("2 statements answered below in ")
    assert sorted(without_widths(browser.evaluate(SHOWN))) == sorted(wanted)


@needs_browser
def test_a_screen_reader_is_told_what_is_there(browser: Browser, url: str, photographs: Path) -> None:
    visit(browser, url)
    choose(browser, photographs / "a.png")
    write(browser, STATEMENTS[0])
    press_ask(browser)
    nodes = [n for n in browser.call("Accessibility.getFullAXTree")["nodes"] if not n["ignored"]]
    found = [(n["role"]["value"], n.get("name", {}).get("value", "")) for n in nodes]
    roles = [role for role, _ in found]
    for landmark in ("banner", "main", "contentinfo", "status", "list"):
        assert roles.count(landmark) == 1, landmark
    assert ("region", "How likely it is that the statement is true") in found
    assert ("textbox", "Statements, one a line") in found
    assert ("button", "Ask") in found
    assert any(role == "button" and name.startswith("Photograph") for role, name in found)
    assert [name for role, name in found if role == "image"] == ["The photograph that is asked about"]
    headings = [name for role, name in found if role == "heading"]
    assert headings == [
        "Is it true of this photograph?",
        "How likely it is that the statement is true",
        STATEMENTS[0],
    ]
    words = [name for role, name in found if role == "StaticText"]
    figures = [figure for _, figure, _ in browser.evaluate(SHOWN)[0][1]]
    assert [word for word in words if word.endswith("%")] == [
        figure.partition("% ")[0] + "%" for figure in figures
    ]
    assert {"with world tokens", "without them", "zero latents"} <= set(words)
    browser.evaluate("document.getElementById('statements').value = ''")
    press_ask(browser)
    nodes = [n for n in browser.call("Accessibility.getFullAXTree")["nodes"] if not n["ignored"]]
    assert "alert" in [n["role"]["value"] for n in nodes]
