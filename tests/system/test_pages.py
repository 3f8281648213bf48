"""Pages that weft writes, in a real browser: on a telephone as on a wide screen nothing is lost, and nothing too small."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from browsers import opened_browser
from playwright.sync_api import Browser
from test_profile import profiled
from typer.testing import CliRunner

from weft.cli.app import app
from weft.profile.page import draw_page
from weft.profile.request import Request

pytestmark = pytest.mark.slow

TRACKS = "[...document.querySelectorAll('.track')].filter(it => it.offsetParent).map(it => it.clientWidth)"
LETTERS = """[...document.querySelectorAll('svg')].filter(it => it.querySelector('text')).map(it =>
    parseFloat(getComputedStyle(it.querySelector('text')).fontSize) * it.clientWidth / it.viewBox.baseVal.width)"""
BESIDE = "document.documentElement.scrollWidth - innerWidth"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with opened_browser() as one:
        yield one


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    found = {name: folder / f"{name}.html" for name in ("plan", "profile")}
    words = ["mixtral-8x7b", "--cluster", "a100-80gbx64", "--batch", "512", "--what-if", "--html", str(found["plan"])]
    assert CliRunner().invoke(app, ["plan", "layouts", *words]).exit_code == 0
    profile = profiled(folder / "run", "tp2", Request(4, 2, (0, 1)))
    found["profile"].write_text(draw_page(profile), encoding="utf-8")
    return found


@pytest.mark.parametrize("width", [360, 1400])
@pytest.mark.parametrize("name", ["plan", "profile"])
def test_a_page_is_readable(name: str, width: int, pages: dict[str, Path], browser: Browser) -> None:
    """In a narrow window a profile's bars were gone, and the letters of its pictures 4 pixels high."""
    page = browser.new_page(viewport={"width": width, "height": 800})
    wrong: list[str] = []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.goto(pages[name].as_uri())
    assert wrong == []
    assert page.evaluate(BESIDE) <= 0
    assert min(page.evaluate(TRACKS)) >= 60
    assert min(page.evaluate(LETTERS)) >= 7.5
    page.close()
