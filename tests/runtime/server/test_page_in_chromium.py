"""The page in a real browser: before a stand-in that answers, refuses and breaks off on cue, and before the server.

Skipped where playwright or a Chromium is missing; `ROUNDEXPORT_CHROMIUM` names one that is not on the PATH.
"""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = os.environ.get("ROUNDEXPORT_CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
uvicorn = pytest.importorskip("uvicorn", reason="uvicorn is not installed")
if CHROMIUM is None:
    pytest.skip("no chromium on the PATH", allow_module_level=True)

import page_stand_in as stand_in  # noqa: E402
from page_stand_in import served  # noqa: E402
from server_toys import Running, running  # noqa: E402

BUSY, IDLE = '#send:text-is("Stop")', '#send:text-is("Send")'


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture(scope="module")
def talker() -> Iterator[tuple[stand_in.StandIn, str]]:
    app = stand_in.StandIn([stand_in.decoder()])
    with served(app) as url:
        yield app, url


class Opened:
    """A tab, and what went wrong in it."""

    def __init__(self, browser: Any, url: str, *, width: int = 1400, height: int = 900, **options: Any) -> None:
        self.context = browser.new_context(viewport={"width": width, "height": height}, **options)
        self.tab = self.context.new_page()
        self.tab.set_default_timeout(20_000)
        self.wrong: list[str] = []
        self.tab.on("pageerror", lambda error: self.wrong.append(str(error)))
        self.tab.on("console", lambda told: self.wrong.append(told.text) if "Security Policy" in told.text else None)
        self.tab.goto(url)

    def ask(self, question: str) -> None:
        self.tab.fill("#message", question)
        self.tab.press("#message", "Enter")

    def answer(self, question: str) -> str:
        self.ask(question)
        self.tab.wait_for_selector(IDLE)
        return str(self.tab.locator(".answer").last.inner_text())


Open = Callable[..., Opened]


@pytest.fixture
def opened(browser: Any) -> Iterator[Open]:
    tabs: list[Opened] = []

    def open_(url: str, **options: Any) -> Opened:
        tabs.append(Opened(browser, url, **options))
        tabs[-1].tab.wait_for_selector("#front h2, #notice h2")
        return tabs[-1]

    yield open_
    for one in tabs:
        one.context.close()
        assert not one.wrong


def until(held: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not held():
        assert time.monotonic() < end, "it never came about"
        time.sleep(0.02)


def test_an_answer_streams_and_is_measured(opened: Open, talker: tuple[stand_in.StandIn, str]) -> None:
    app, url = talker
    page = opened(url)
    page.ask("slowly, why is the sky blue?")
    page.tab.wait_for_selector(".busy .answer p")
    first = page.tab.locator(".answer").inner_text()
    until(lambda: len(page.tab.locator(".answer").inner_text()) > len(first))
    assert page.tab.locator("#status").inner_text() == "The answer is being written."
    page.tab.press("#message", "Escape")
    page.tab.wait_for_selector(IDLE)
    until(lambda: app.left > 0)  # the server is told at once
    assert 0 < len(page.tab.locator(".answer").inner_text()) < len(stand_in.PLAIN)

    assert page.answer("And why red in the evening?") == stand_in.PLAIN
    told = page.tab.locator(".meter").last.inner_text()
    assert "first token" in told and "tok/s" in told and f"written\n{len(stand_in.PLAIN.split())}" in told
    assert "of it cached" in told
    until(lambda: page.tab.locator("#status").inner_text() == f"Answer: {stand_in.PLAIN}")  # whole, once
    assert [message["role"] for message in app.bodies[-1]["messages"]] == ["user", "assistant", "user"]
    assert app.bodies[-1]["stream_options"] == {"include_usage": True}


def test_the_keyboard_alone_is_enough(opened: Open, talker: tuple[stand_in.StandIn, str]) -> None:
    page = opened(talker[1])
    keys = page.tab.keyboard
    keys.press("Tab")
    assert page.tab.evaluate("document.activeElement.className") == "skip"
    keys.press("Enter")
    assert page.tab.evaluate("document.activeElement.id") == "message"
    keys.type("first line")
    keys.press("Shift+Enter")
    keys.type("slowly, second")
    keys.press("Enter")
    page.tab.wait_for_selector(BUSY)
    assert page.tab.locator(".question").inner_text().endswith("first line\nslowly, second")
    page.tab.wait_for_selector(".busy .answer p")
    keys.press("Tab")
    assert page.tab.evaluate("document.activeElement.id") == "send"
    keys.press("Enter")
    page.tab.wait_for_selector(IDLE)
    for name in ("card", "settings"):
        page.tab.focus(f"#open-{name}")
        keys.press("Enter")
        assert page.tab.evaluate("document.activeElement.id") == f"{name}-title"
        keys.press("Tab")
        assert page.tab.evaluate("document.activeElement.className") == "close"
        keys.press("Escape")
        assert page.tab.evaluate("document.activeElement.id") == f"open-{name}"
        page.tab.wait_for_selector(f'#open-{name}[aria-expanded="false"]')


def test_what_a_model_writes_is_text(opened: Open, talker: tuple[stand_in.StandIn, str]) -> None:
    page = opened(talker[1])
    page.answer("code, please")
    assert page.tab.locator(".answer script").count() == 0
    assert '<script>alert("this is text")</script>' in page.tab.locator(".answer").inner_text()
    code = page.tab.locator(".answer pre").inner_text()
    assert code == stand_in.CODE.split("```python\n")[1].split("\n```")[0]
    counts = {part: page.tab.locator(f".answer {part}").count() for part in ("strong", "ol li", "ul li", "td")}
    assert counts == {"strong": 1, "ol li": 5, "ul li": 2, "td": 9}


TABLE = [
    ("a *b* **c `d`** _e_ f_g_h", "<p>a <em>b</em> <strong>c <code>d</code></strong> <em>e</em> f_g_h</p>"),
    ("2 * 3 * 4 and <b>x</b>", "<p>2 * 3 * 4 and &lt;b&gt;x&lt;/b&gt;</p>"),
    ("# One\ntwo\nthree", "<h3>One</h3><p>two<br>three</p>"),
    ("3. a\n4. b\n\n   - c", '<ol start="3"><li>a</li><li>b<ul><li>c</li></ul></li></ol>'),
    ("- a\n  more\n- b", "<ul><li>a<p>more</p></li><li>b</li></ul>"),
    ("> a\n> - b", "<blockquote><p>a</p><ul><li>b</li></ul></blockquote>"),
    ("a\n\n---\n\n[b](javascript:alert(1))", "<p>a</p><hr><p>[b](javascript:alert(1))</p>"),
    ("**open", "<p>**open</p>"),
]


def test_markdown(opened: Open, talker: tuple[stand_in.StandIn, str]) -> None:
    render = """async (texts) => {
        const { Rendering } = await import("/page/markdown.js");
        return texts.map((text) => {
            const grown = document.createElement("div"), rendering = new Rendering(grown);
            for (let at = 1; at <= text.length; at += 1) rendering.update(text.slice(0, at));
            return grown.innerHTML;
        });
    }"""
    found = opened(talker[1]).tab.evaluate(render, [text for text, _ in TABLE])
    assert dict(zip([text for text, _ in TABLE], found, strict=True)) == dict(TABLE)


def test_editing_asking_again_and_a_new_chat(opened: Open, talker: tuple[stand_in.StandIn, str]) -> None:
    app, page = talker[0], opened(talker[1])
    page.answer("one")
    page.answer("two")
    page.tab.click(".exchange:last-child .edit")
    assert page.tab.input_value("#message") == "two"
    page.answer("three")
    assert page.tab.locator(".question").all_inner_texts() == ["You:\none", "You:\nthree"]
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.tab.click(".exchange:last-child >> text=Copy")
    page.tab.wait_for_selector("text=Copied")
    assert page.tab.evaluate("navigator.clipboard.readText()") == stand_in.PLAIN
    page.tab.click(".exchange:last-child .again")
    page.tab.wait_for_selector(IDLE)
    assert [message["content"] for message in app.bodies[-1]["messages"]][::2] == ["one", "three"]
    page.tab.reload()
    page.tab.wait_for_selector(".exchange + .exchange")  # nothing is lost
    page.tab.click("#new-chat")
    assert page.tab.locator(".exchange").count() == 0
    page.tab.wait_for_selector("#front h2")  # comes with the card, a moment later


def test_settings_are_sent_where_the_server_knows_them(opened: Open, talker: tuple[stand_in.StandIn, str]) -> None:
    app, page = talker[0], opened(talker[1])
    page.tab.click("#open-settings")
    assert page.tab.get_attribute("#temperature", "placeholder") == "0.2"  # the package's own
    assert page.tab.locator("#top_k").count() == 0  # its OpenAPI document has none
    for name, value in {
        "system": "Be brief.",
        "temperature": "0.5",
        "min_p": "0.1",
        "max_tokens": "5",
        "stop": "a\nb",
    }.items():
        page.tab.fill(f"#{name}", value)
    page.tab.fill("#top_p", "7")  # out of range: marked, not sent
    page.answer("one")
    body = app.bodies[-1]
    sent = {
        name: value for name, value in body.items() if name not in {"model", "messages", "stream", "stream_options"}
    }
    assert sent == {"temperature": 0.5, "min_p": 0.1, "max_tokens": 5, "stop": ["a", "b"]}
    assert body["messages"][0] == {"role": "system", "content": "Be brief."}
    assert page.tab.locator(".fault-note.calm strong").inner_text() == "Cut at the longest answer."


def test_a_package_without_a_temperature_is_asked_for_less_than_openais(opened: Open) -> None:
    model = stand_in.decoder()
    model["card"]["defaults"] = {}
    app = stand_in.StandIn([model])
    with served(app) as url:
        page = opened(url)
        page.answer("one")
        assert app.bodies[-1]["temperature"] == 0.7
        page.tab.click("#open-settings")
        page.tab.fill("#temperature", "1")
        page.answer("two")
        assert app.bodies[-1]["temperature"] == 1


def test_what_can_go_wrong_is_told(opened: Open, talker: tuple[stand_in.StandIn, str]) -> None:
    page = opened(talker[1])
    title = page.tab.locator(".fault-note strong").last
    page.ask("wait for me")
    page.tab.wait_for_selector("text=Asking again in 2 s.")
    assert title.inner_text() == "The server is full."
    page.tab.wait_for_selector(IDLE)
    assert page.tab.locator(".answer").inner_text() == stand_in.PLAIN
    for question, told in (
        ("fail midway", "The answer broke off."),
        ("break off", "The answer broke off."),
        ("refuse me", "The server could not answer."),
        ("too long", "The conversation no longer fits."),
    ):
        page.answer(question)
        assert title.inner_text() == told
    page.tab.click("text=Edit the question")  # a question that is too long by itself: it is not lost
    assert page.tab.input_value("#message") == "too long"
    page.tab.click("text=Leave it as it was")
    for _ in range(3):  # until nothing stands before the question
        page.tab.click("text=Leave out the oldest question")
        page.tab.wait_for_selector(IDLE)
    assert page.tab.locator(".answer").last.inner_text() == stand_in.PLAIN
    assert page.tab.locator(".left").count() == 3


def test_a_key_is_asked_for_and_kept_in_the_tab(opened: Open) -> None:
    app = stand_in.StandIn([stand_in.decoder()], key=stand_in.KEY)
    with served(app) as url:
        page = opened(url)
        assert page.tab.locator("#notice h2").inner_text() == "This server asks for a key."
        page.tab.fill("#asked-key", "wrong")
        page.tab.press("#asked-key", "Enter")
        page.tab.wait_for_selector("text=The key was not accepted.")
        page.tab.fill("#asked-key", stand_in.KEY)
        page.tab.press("#asked-key", "Enter")
        page.tab.wait_for_selector("#front h2")
        assert page.answer("why?") == stand_in.PLAIN
        stored = "[JSON.stringify(localStorage), sessionStorage.getItem('roundexport.key'), document.cookie]"
        assert page.tab.evaluate(stored) == ["{}", stand_in.KEY, ""]


def test_a_server_that_loads_or_is_away_is_waited_for(opened: Open) -> None:
    app = stand_in.StandIn([stand_in.decoder()], loading=1)
    with served(app) as url:
        page = opened(url)
        assert page.tab.locator("#notice h2").inner_text() == "The model is loading."
        page.tab.wait_for_selector("#front h2")
        assert page.tab.locator("#notice").is_hidden()
    page.answer("is anybody there?")
    assert page.tab.locator(".fault-note strong").inner_text() == "The server does not answer."
    page.tab.wait_for_selector("text=No server answers.")


def test_similarity_of_an_encoder(opened: Open) -> None:
    with served(stand_in.StandIn([stand_in.encoder()])) as url:
        page = opened(url)
        assert page.tab.locator("#composer").is_hidden()
        page.tab.fill("#query", "abc")
        page.tab.fill("#texts", "xyz\n\nabc\n")
        page.tab.click("text=Compare")
        page.tab.wait_for_selector(".ranking")
        assert page.tab.locator(".ranking .text").all_inner_texts() == ["abc", "xyz"]
        assert page.tab.locator(".ranking .value").first.inner_text().endswith("1.000")


def test_the_card_shows_bits_in_a_picture_and_in_words(opened: Open, talker: tuple[stand_in.StandIn, str]) -> None:
    page = opened(talker[1])
    page.tab.click("#open-card")
    cells = page.tab.locator("#card .weave rect")
    assert cells.count() == stand_in.BLOCKS * len(stand_in.KINDS)
    assert page.tab.locator("#card .kinds li").all_inner_texts() == ["q", "k", "v", "o", "gate", "up", "down"]
    cells.nth(12).hover()
    assert page.tab.locator("#card .blocks").inner_text() == "block 12, self_attn.q_proj: 4 bits, groups of 64"
    assert "30 blocks of 7 kinds of layer" in str(page.tab.get_attribute("#card .weave svg", "aria-label"))
    page.tab.click("text=The same in words")
    rows = page.tab.locator("#card .words tbody tr").all_inner_texts()
    assert "mlp.up_proj\t12–18\t2 bits, groups of 64" in rows
    told = page.tab.locator("#card-body").inner_text()
    assert all(text in told for text in ("0.0912", "81.3 %", "87.8", "ONNX Runtime 1.31.1", "rms norm"))


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_phone_and_a_thumb(opened: Open, talker: tuple[stand_in.StandIn, str], scheme: str) -> None:
    page = opened(talker[1], width=360, height=780, color_scheme=scheme, has_touch=True)
    measure = """() => [...document.querySelectorAll("body *")].filter((e) => e.checkVisibility()).flatMap((e) => {
        const box = e.getBoundingClientRect();
        const wide = box.right > innerWidth + 1 && !e.closest("pre, .wide, .hidden, .skip");
        const small = e.matches("button, select, input, textarea, summary") && box.height < 44;
        return wide || small ? [`${e.tagName} ${e.id} ${e.className} ${box.right} ${box.height}`] : [];
    })"""
    assert page.tab.evaluate(measure) == []
    page.answer("code, please")
    assert page.tab.evaluate(measure) == []
    scrolled = "(code) => { code.scrollLeft = 99; return code.scrollLeft; }"
    assert page.tab.locator(".answer pre").evaluate(scrolled) > 0  # long lines are reached, not cut
    for name in ("card", "settings"):
        page.tab.click(f"#open-{name}")
        assert page.tab.evaluate(measure) == []
        page.tab.click(f"#{name} .close")
    page.tab.click("#theme")
    other = page.tab.evaluate("[document.documentElement.dataset.theme, localStorage['roundexport.theme']]")
    assert other == [{"light": "dark", "dark": "light"}[scheme]] * 2


def test_the_server_itself_answers(opened: Open, server: Running) -> None:
    page = opened(f"{server.url}/?model=talker")
    page.ask("How many days are in a week?")
    page.tab.wait_for_selector(f"{BUSY}, .answer p")
    page.tab.keyboard.press("Escape")
    page.tab.wait_for_selector(IDLE)
    until(lambda: server.busy() == 0)

    page.tab.click("#new-chat")  # what was written before the stop is left to chance, and so would be what follows it
    page.tab.click("#open-settings")
    for name, value in {"max_tokens": "24", "temperature": "0", "top_k": "5", "min_p": "0.01", "seed": "7"}.items():
        page.tab.fill(f"#{name}", value)
    answers = [page.answer("And in a year?")]
    faults = page.tab.locator(".exchange:last-child .fault-note").all_inner_texts()
    assert all(told.startswith("Cut at the longest answer") for told in faults), faults
    page.tab.click(".exchange:last-child .again")
    page.tab.wait_for_selector(IDLE)
    answers.append(page.tab.locator(".answer").last.inner_text())
    assert answers[0] and answers[0] == answers[1]
    written = re.search(r"written\n(\d+)", page.tab.locator(".meter").last.inner_text())
    assert written is not None and 1 <= int(written[1]) <= 24
    assert "of it cached" in page.tab.locator(".meter").last.inner_text()

    page.tab.click("#open-card")
    told = page.tab.locator("#card-body").inner_text()
    assert "ONNX Runtime" in told and "No record of what was lost" in told
    page.tab.select_option("#model", "encoder")
    page.tab.click("text=Compare")
    page.tab.wait_for_selector(".ranking li:nth-child(4)")


def test_the_server_itself_asks_for_its_key(opened: Open, folders: dict[str, Path]) -> None:
    with running([folders["talker"]], keys=(stand_in.KEY,)) as server:
        page = opened(server.url)
        page.tab.fill("#asked-key", stand_in.KEY)
        page.tab.press("#asked-key", "Enter")
        page.tab.wait_for_selector("#front h2")
        page.ask("Who goes there?")
        page.tab.wait_for_selector(".answer p")
        page.tab.click("#send")
        page.tab.wait_for_selector(IDLE)
    page.answer("And now?")
    assert page.tab.locator(".fault-note strong").last.inner_text() == "The server does not answer."
