"""The pages work in a real browser: they stream, stop, never show markup, and ask nobody else."""

from __future__ import annotations

import json

import headless
import pytest
from drivetrain_server import Server
from served import settings, wait_for

pytestmark = pytest.mark.skipif(
    headless.PROGRAM is None, reason="no Chromium is installed: apt-get install chromium"
)

ANSWERS = "document.querySelectorAll('.turn.assistant .under').length"


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    found = headless.Page(tmp_path_factory.mktemp("browser"))
    yield found
    found.close()


@pytest.fixture
def chat(page, server):
    page.open(f"{server.url}/")
    page.run("localStorage.clear()")
    page.open(f"{server.url}/")
    page.until("document.title === 'tiny'")
    page.complaints.clear()
    yield page
    assert page.complaints == []
    assert {url.split("/", 3)[2] for url in page.addresses if url.startswith("http")} == {
        server.url.split("/")[2]
    }


def say(page, text):
    page.run(f"prompt.value = {json.dumps(text)}; prompt.dispatchEvent(new Event('input'))")
    page.run("document.getElementById('form').requestSubmit()")


def test_what_is_said_is_answered_and_kept(chat):
    chat.run("settings.most = 20; settings.temperature = 0")
    say(chat, "Hello <b>you</b>")
    chat.until(f"{ANSWERS} === 1")
    first = chat.run("turns[1].content")
    assert first
    assert chat.run("document.querySelector('.turn.user').textContent") == "Hello <b>you</b>"
    assert "to the first token" in chat.run("document.querySelector('.under').textContent")
    say(chat, "and?")
    chat.until(f"{ANSWERS} === 2")
    chat.run("window.old = true; location.reload()")
    chat.until("!window.old && document.readyState === 'complete' && document.title === 'tiny'")
    assert chat.run("document.querySelectorAll('.turn').length") == 4
    chat.run("document.getElementById('fresh').click()")
    assert chat.run("document.querySelectorAll('.turn').length") == 0


def test_an_answer_can_be_stopped(chat, server):
    chat.run("settings.most = 440; settings.temperature = 1; ")
    say(chat, "talk")
    chat.until("turns.length === 2 && !document.getElementById('stop').hidden")
    chat.run("document.getElementById('stop').click()")
    chat.until(f"{ANSWERS} === 1", 5)
    wait_for(lambda: server.router.load == 0, 5)
    assert not chat.run("document.getElementById('send').hidden")


def test_an_error_is_shown_and_talk_goes_on(page, server):
    page.open(f"{server.url}/")
    page.until("document.title === 'tiny'")
    page.run("turns = []; settings.most = 5000; settings.temperature = 0")
    say(page, "Hello")
    page.until("document.querySelector('.error')")
    assert "are more than the 512" in page.run("document.querySelector('.error').textContent")
    page.run("settings.most = 5; again()")
    page.until(f"{ANSWERS} === 1 && !document.querySelector('.error')")


@pytest.mark.parametrize(
    ("text", "selector", "shown"),
    [
        ("# A *b*", "h1 em", "b"),
        ("**bold** and `x < y`", "p code", "x < y"),
        ("```python\nprint('<i>')\n```", ".block pre code", "print('<i>')"),
        ("```\nopen", ".block pre code", "open"),
        ("- a\n  - b\n- c", "ul ul li", "b"),
        ("3. c\n4. d", "ol[start='3'] li:last-child", "d"),
        ("| a | b |\n|---|:-:|\n| 1 | 2 |", "table td:last-child", "2"),
        ("> quoted", "blockquote p", "quoted"),
        ("[site](https://example.org/a_b)", "a[rel~=noopener]", "site"),
        ("<script>alert(1)</script>", "p", "<script>alert(1)</script>"),
        ("<img src=x onerror=alert(1)>", "p", "<img src=x onerror=alert(1)>"),
        ("[x](javascript:alert(1))", "p span", "x"),
    ],
)
def test_markdown_becomes_elements_and_never_markup(chat, text, selector, shown):
    chat.run(f"window.box = make('div'); box.append(markdown({json.dumps(text)}))")
    assert chat.run(f"box.querySelector({json.dumps(selector)})?.textContent") == shown
    assert (
        chat.run("box.querySelectorAll('script, img, [onerror], [href^=javascript]').length") == 0
    )


@pytest.mark.parametrize("path", ["/", "/live"])
def test_a_page_fits_a_phone_and_both_themes(page, server, path):
    page.size(360, 700, mobile=True)
    page.open(f"{server.url}{path}")
    page.until("document.title.startsWith('tiny')")
    assert page.run("document.documentElement.scrollWidth <= innerWidth")
    before = page.run("getComputedStyle(document.body).backgroundColor")
    page.run("switchTheme()")
    assert page.run("getComputedStyle(document.body).backgroundColor") != before
    page.run("switchTheme()")
    page.size(1100, 800)


def test_the_live_page_shows_what_the_engine_does(page, server, client):
    page.open(f"{server.url}/live")
    client.completions.create(model="tiny", prompt="a", max_tokens=200, n=4)
    page.until("Number(document.getElementById('speed').textContent) > 0")
    page.until("document.querySelectorAll('#workers tr').length === 1")
    page.until("document.querySelector('#speed-line .stroke')")
    assert page.run("document.getElementById('said').textContent") == "serving"


def test_a_server_with_keys_asks_for_one(page, folder):
    with Server(settings(folder, api_keys=("page-secret",))) as server:
        page.open(f"{server.url}/")
        page.until("document.getElementById('settings').open")
        page.run("$('key').value = 'page-secret'; $('key').dispatchEvent(new Event('change'))")
        page.until("document.title === 'tiny'")
