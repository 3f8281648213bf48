"""The playground at `/`, used as people use it: in a real browser, against the real server, with a model of weft's."""

from __future__ import annotations

import json
import math
import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from browsers import opened_browser
from playwright.sync_api import Browser, Page, Route, expect
from served import Served, make_folder, model, served
from test_serve_adapters import make_adapter

LONG = 400
"""Tokens of an answer that takes a while."""

TIME = re.compile(r"^\d+ ms$|^\d+\.\d\d s$")

pytestmark = pytest.mark.slow
expect.set_options(timeout=20_000)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("playground")
    base = make_folder(folder / "base")
    make_adapter(base, folder / "tuned", folder / "merged", seed=10)
    other = model(make_folder(folder / "other", seed=1), "other")
    with served(model(base, "tiny", adapters={"tuned": str(folder / "tuned")}), other) as one:
        yield one


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with opened_browser() as one:
        yield one


@pytest.fixture
def page(browser: Browser, server: Served) -> Iterator[Page]:
    """An empty tab. Whatever the page does, its console has no error, and its policy was never broken."""
    context = browser.new_context(viewport={"width": 1280, "height": 800}, base_url=server.url)
    context.grant_permissions(["clipboard-read", "clipboard-write"])
    page = context.new_page()
    wrong: list[str] = []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda told: wrong.append(told.text) if told.type == "error" else None)
    yield page
    context.close()
    assert not [text for text in wrong if not text.startswith("Failed to load resource")]  # a refused request is one


def visit(page: Page, **link: str) -> None:
    page.goto("about:blank")
    page.goto("/#" + str(httpx.QueryParams({name.replace("__", "."): value for name, value in link.items()})))
    expect(column(page).get_by_label("Model").locator("option")).to_have_count(3 if "nope" not in link.values() else 4)


def column(page: Page, name: str = "A") -> Any:
    return page.get_by_role("region", name=f"Column {name}", exact=True)


def figure(page: Page, name: str, column_name: str = "A") -> Any:
    return column(page, column_name).locator(f"[data-figure={name}]")


def tokens(page: Page, name: str = "A") -> Any:
    return column(page, name).locator(".token")


def ask(server: Served, route: str = "completions", **body: Any) -> dict[str, Any]:
    answer = httpx.post(f"{server.url}/v1/{route}", json={"model": "tiny", **body}, timeout=60)
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]


def test_a_proxy_may_have_the_page_below_a_path(page: Page, server: Served) -> None:
    asked: list[str] = []

    def forward(route: Route) -> None:
        asked.append(route.request.url.removeprefix(server.url))
        route.fulfill(response=route.fetch(url=route.request.url.replace("/models/weft/", "/")))

    page.route("**/models/weft/**", forward)
    page.goto("/models/weft/")
    page.get_by_label("Prompt").fill("Once")
    column(page).get_by_label("Max tokens").fill("3")
    page.keyboard.press("Control+Enter")
    expect(figure(page, "tokens")).to_have_text("4 + 3")
    assert {"/models/weft/playground/page.js", "/models/weft/v1/models", "/models/weft/v1/completions"} <= set(asked)
    column(page).get_by_role("button", name="Copy as curl").click()
    copied = page.evaluate("navigator.clipboard.readText()")
    assert copied.startswith(f"curl {server.url}/models/weft/v1/completions ")


WATCH = """() => {
    window.seen = [];
    const look = () => seen.push([document.querySelector("[data-figure=state]").textContent,
                                  !document.querySelector("#stop").disabled]);
    const all = {subtree: true, childList: true, attributes: true, characterData: true};
    new MutationObserver(look).observe(document.body, all);
}"""
"""From now on, what a column tells of its answer, and whether that can be stopped, after each change of the page."""


def test_tokens_stream_and_tell_how_likely_they_were(page: Page, server: Served) -> None:
    asked = ask(server, prompt="Once upon", max_tokens=60, temperature=0, logprobs=5)
    visit(page)
    page.get_by_label("Prompt").fill("Once upon")
    column(page).get_by_label("Temperature").fill("0")
    column(page).get_by_label("Max tokens").fill("60")
    page.evaluate(WATCH)  # an answer may be over before anybody looks
    page.keyboard.press("Control+Enter")
    expect(figure(page, "state")).to_have_text("length limit")
    assert ["writing", True] in page.evaluate("seen"), "it could have been stopped while it was written"
    expect(figure(page, "tokens")).to_have_text("9 + 60")
    expect(figure(page, "first")).to_have_text(TIME)
    expect(figure(page, "total")).to_have_text(TIME)
    assert float(figure(page, "speed").inner_text()) > 0
    expect(page.get_by_role("button", name="Run")).to_be_enabled()
    told = asked["logprobs"]
    whole = [at for at, text in enumerate(told["tokens"]) if not text.startswith("bytes:")]
    shown = tokens(page).evaluate_all("spans => spans.map(span => span.textContent)")
    assert "".join(shown).startswith(asked["text"].rstrip("\ufffd"))
    first = whole[0]  # before it there are but parts of characters, which have no places of their own
    span = tokens(page).filter(has_text=told["tokens"][first]).first
    span.hover()
    tip = page.get_by_role("tooltip")
    expect(tip).to_be_visible()
    chosen = tip.locator("[aria-current]").last
    assert percent(chosen) == pytest.approx(100 * math.exp(told["token_logprobs"][first]), abs=0.06)
    rows = tip.locator("ol").last.locator("li")
    likely = sorted((100 * math.exp(one) for one in told["top_logprobs"][first].values()), reverse=True)
    assert [percent(row) for row in rows.all()[:-1]] == pytest.approx(likely, abs=0.06)
    assert percent(rows.last) == pytest.approx(100 - sum(likely), abs=0.5)
    page.mouse.move(0, 0)
    expect(tip).to_be_hidden()
    column(page).get_by_label("Answer A").focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    expect(tip).to_be_visible()
    expect(tokens(page).nth(1)).to_have_class("token current")


def percent(row: Any) -> float:
    return float(row.locator(".percent").inner_text().removesuffix(" %").removeprefix("< "))


def test_two_settings_and_two_models_side_by_side(page: Page, server: Served) -> None:
    visit(page, prompt="Once", a__temperature="0", a__max_tokens="24")
    page.get_by_label("Compare").check()
    expect(column(page, "B").get_by_label("Temperature")).to_have_value("0")  # begins as the other one is
    column(page, "B").get_by_label("Temperature").fill("1.5")
    column(page, "B").get_by_label("Seed").fill("7")
    page.get_by_role("button", name="Run").click()
    for name, settings in (("A", {"temperature": 0}), ("B", {"temperature": 1.5, "seed": 7})):
        alone = ask(server, prompt="Once", max_tokens=24, logprobs=0, **settings)
        expect(figure(page, "tokens", name)).to_have_text(f"4 + {len(alone['logprobs']['tokens'])}")
        shown = column(page, name).locator(".answer").inner_text()
        assert normal(shown).startswith(normal(alone["text"]))
    select = column(page, "B").get_by_label("Model")
    expect(select.locator("option")).to_have_text(["tiny", "tuned (adapter of tiny)", "other"])
    for name in ("tuned", "other"):
        select.select_option(name)
        page.get_by_role("button", name="Run").click()
        alone = ask(server, model=name, prompt="Once", max_tokens=24, temperature=1.5, seed=7, logprobs=0)
        expect(figure(page, "tokens", "B")).to_have_text(f"4 + {len(alone['logprobs']['tokens'])}")
        assert normal(column(page, "B").locator(".answer").inner_text()).startswith(normal(alone["text"]))
    page.wait_for_timeout(400)
    link = page.url
    assert "b.seed=7" in link
    visit(page)
    page.goto(link)  # brings all of it back, in a tab that knows nothing
    expect(page.get_by_label("Prompt")).to_have_value("Once")
    expect(column(page, "B").get_by_label("Model")).to_have_value("other")
    expect(column(page, "B").get_by_label("Temperature")).to_have_value("1.5")
    expect(column(page, "A").get_by_label("Model")).to_have_value("tiny")


def normal(text: str) -> str:
    """Text as a browser gives it back: it draws no control characters, and several spaces where it likes."""
    return "".join(char for char in text if char.isprintable() and not char.isspace()).rstrip("\ufffd")


def test_stop_cancels_on_the_server(page: Page, server: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    loop = server.catalogue.models["tiny"].current.desk
    assert len(ask(server, prompt="Once", max_tokens=LONG, temperature=0, logprobs=0)["logprobs"]["tokens"]) == LONG
    visit(page, prompt="Once", a__temperature="0", a__max_tokens=str(LONG))
    step = loop.engine.step
    monkeypatch.setattr(loop.engine, "step", lambda: (time.sleep(0.02), step())[1])  # else it may end before the click
    page.get_by_role("button", name="Run").click()
    tokens(page).nth(2).wait_for()
    assert loop.num_live == 1
    page.get_by_role("button", name="Stop").click()
    expect(figure(page, "state")).to_have_text("stopped")
    until = time.monotonic() + 2
    while loop.num_live and time.monotonic() < until:
        time.sleep(0.01)
    assert loop.num_live == 0
    assert 3 <= int(figure(page, "tokens").inner_text()) < LONG
    assert 'finished_reason="abort",model_name="tiny"} 1.0' in httpx.get(f"{server.url}/metrics").text


def test_a_chat_goes_on_and_curl_says_the_same(page: Page, server: Served) -> None:
    visit(page, mode="chat", system="Be brief.", a__temperature="0", a__max_tokens="12")
    for number, message in enumerate(("It's me", "And?")):
        page.get_by_label("Message", exact=True).fill(message)
        if number:
            column(page).get_by_role("button", name="Copy as curl").click()
            expect(column(page).get_by_role("button", name="Copied")).to_be_visible()
        with page.expect_request("**/v1/chat/completions") as sent:
            page.keyboard.press("Control+Enter")
        expect(figure(page, "total")).to_have_text(TIME)
    messages = sent.value.post_data_json["messages"]
    assert [one["role"] for one in messages] == ["system", "user", "assistant", "user"]
    first = ask(server, "chat/completions", messages=messages[:2], temperature=0, max_tokens=12)
    assert messages[2]["content"] == first["message"]["content"]
    command = page.evaluate("navigator.clipboard.readText()")
    told = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True, timeout=60).stdout
    second = ask(server, "chat/completions", messages=messages, temperature=0, max_tokens=12)
    assert second["message"]["content"] == httpx.Response(200, text=told).json()["choices"][0]["message"]["content"]


def test_errors_are_told_in_words(page: Page) -> None:
    visit(page, prompt="Once", a__model="nope")
    error = column(page).get_by_role("alert")
    page.get_by_role("button", name="Run").click()
    expect(error).to_have_text("The model 'nope' does not exist; GET /v1/models lists those that do.")
    expect(figure(page, "state")).to_have_text("failed")
    column(page).get_by_label("Model").select_option("tiny")
    column(page).get_by_label("Temperature").fill("-1")
    page.get_by_role("button", name="Run").click()
    expect(error).to_have_text("Temperature is -1.0; it must be from 0 (most probable token) to 100.")
    column(page).get_by_label("Temperature").fill("")
    column(page).get_by_label("Seed").press_sequentially("-")
    page.get_by_role("button", name="Run").click()
    expect(error).to_have_text("Seed is not a number.")
    column(page).get_by_label("Seed").fill("")
    page.context.set_offline(True)
    page.get_by_role("button", name="Run").click()
    expect(error).to_have_text("The server cannot be reached. Is it still running?")
    page.context.set_offline(False)
    column(page).get_by_label("Max tokens").fill("4")
    page.get_by_role("button", name="Run").click()
    expect(figure(page, "tokens")).to_have_text("4 + 4")
    expect(error).to_be_hidden()


@pytest.mark.parametrize(
    ("rest", "words"),
    [
        ("", "The connection ended before the answer did."),
        ('data: {"error": {"message": "the engine failed"}}\n\n', "The engine failed."),
    ],
)
def test_an_answer_that_breaks_off_is_told(page: Page, rest: str, words: str) -> None:
    told = {"tokens": ["a"], "token_logprobs": [-1], "top_logprobs": [{}]}
    begun = "data: " + json.dumps({"choices": [{"text": "a", "logprobs": told}]})
    page.route("**/v1/completions", lambda route: route.fulfill(body=f"{begun}\n\n{rest}"))
    visit(page, prompt="Once")
    page.get_by_role("button", name="Run").click()
    expect(column(page).get_by_role("alert")).to_have_text(words)
    expect(tokens(page)).to_have_text(["a"])
    expect(figure(page, "state")).to_have_text("failed")


def test_what_is_said_stays_text(page: Page, server: Served) -> None:
    visit(page, prompt="<img src=/x onerror=alert(1)><b>bold</b>", a__max_tokens="2")
    page.get_by_role("button", name="Run").click()
    expect(figure(page, "total")).to_have_text(TIME)
    expect(column(page).locator(".prompt")).to_have_text("<img src=/x onerror=alert(1)><b>bold</b>")
    assert page.locator(".log img, .log b").count() == 0
    policy = httpx.get(server.url).headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self';")
    assert "require-trusted-types-for 'script'" in policy


def test_a_key_is_asked_for_and_stays_in_the_tab(browser: Browser, tmp_path: Path) -> None:
    with served(model(make_folder(tmp_path / "one"), "tiny"), api_keys=("open sesame",)) as server:
        context = browser.new_context(base_url=server.url)
        page = context.new_page()
        page.goto("/")
        dialog = page.get_by_role("dialog", name="API key")
        for key in ("wrong", "open sesame"):
            dialog.get_by_label("Key", exact=True).fill(key)
            dialog.get_by_role("button", name="Use it").click()
            if key == "wrong":
                expect(column(page).get_by_role("alert")).to_contain_text("No valid API key came")
                expect(dialog).to_be_visible()
        expect(column(page).get_by_label("Model").locator("option")).to_have_text(["tiny"])
        expect(dialog).to_be_hidden()
        column(page).get_by_label("Max tokens").fill("3")
        page.get_by_label("Prompt").fill("Once")
        page.get_by_role("button", name="Run").click()
        expect(figure(page, "tokens")).to_have_text("4 + 3")
        page.wait_for_timeout(400)
        assert "sesame" not in page.url
        assert page.evaluate("Object.keys(localStorage).length + document.cookie.length") == 0
        server.call(server.catalogue.unload, "tiny")
        page.reload()
        expect(column(page).get_by_role("alert")).to_have_text("No model is ready yet. Waiting for one.")
        page.get_by_role("button", name="Run").click()
        words = "The model is not being served at the moment; it was unloaded. Try again in 1 s."
        expect(column(page).get_by_role("alert")).to_have_text(words)
        server.call(server.catalogue.load, "tiny")
        expect(column(page).get_by_label("Model").locator("option")).to_have_text(["tiny"])
        other = context.new_page()
        other.goto("/")
        expect(other.get_by_role("dialog", name="API key")).to_be_visible()
        context.close()


@pytest.mark.parametrize(("width", "height"), [(390, 800), (760, 800), (1280, 800), (844, 390), (1280, 480)])
@pytest.mark.parametrize("mode", ["complete", "chat"])
def test_it_fits_the_window(page: Page, width: int, height: int, mode: str) -> None:
    """Also a phone's that lies on its side, and with all settings open: then the page is longer than the window. One answer
    is an error, as the prompt is too long."""
    page.set_viewport_size({"width": width, "height": height})
    visit(page, compare="1", mode=mode, prompt="word " * (400 if mode == "complete" else 90), a__max_tokens="4")
    page.get_by_role("button", name="Run").click()
    for name in "AB":  # the page grows until both are done
        expect(figure(page, "total", name)).to_have_text(TIME)
    for details in page.locator("details").all():
        details.evaluate("it => { it.open = true; }")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.evaluate("scrollTo(0, document.documentElement.scrollHeight)")
    edges = page.evaluate(EDGES)
    assert all(inside <= panel for panel, inside in edges["panels"])
    assert max(panel for panel, _ in edges["panels"]) <= edges["composer"]


EDGES = """() => {
    const bottom = (one) => one.getBoundingClientRect().bottom;
    const ends = (one) => [bottom(one), bottom(one.querySelector(".figures"))];
    const panels = [...document.querySelectorAll(".panel")].map(ends);
    return {panels, composer: document.querySelector("#composer").getBoundingClientRect().top};
}"""
"""Where columns end, where what stands last in them ends, and where the next thing on the page begins."""
