"""`weft plan layouts --html`: what stands on the page, read from its elements."""

from __future__ import annotations

import os
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
from typer.testing import CliRunner

from weft.cli.app import app, main
from weft.cli.scores import make_room
from weft.config.layout import Layout
from weft.plan.advice import Answer
from weft.plan.machine import read_cluster
from weft.plan.numbers import Job
from weft.plan.plan import Plan
from weft.plan.search import Search, search
from weft.plan.show.markup import tag
from weft.plan.show.page import draw_page, draw_plan
from weft.plan.show.pareto import Pareto
from weft.plan.show.places import coordinates, draw_places, group
from weft.plan.show.waterfall import memory_parts, time_parts
from weft.presets import preset_shape
from weft.units import duration, gibibytes

JOB = Job(seq=4096, global_batch=128, tokens=1e11)
VOID = {"meta"}


class Dom(HTMLParser):
    """The page as a tree; every element must be closed where it was opened."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.root = ElementTree.Element("document")
        self.open = [self.root]
        self.feed(text)
        assert self.open == [self.root]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        element = ElementTree.SubElement(self.open[-1], tag, {key: value or "" for key, value in attrs})
        if tag not in VOID:
            self.open.append(element)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop().tag == tag

    def handle_data(self, data: str) -> None:
        here = self.open[-1]
        if len(here):
            here[-1].tail = (here[-1].tail or "") + data
        else:
            here.text = (here.text or "") + data

    def section(self, name: str) -> ElementTree.Element:
        [found] = self.root.findall(f".//section[@id='{name}']")
        return found


def words(element: ElementTree.Element) -> str:
    return "".join(element.itertext())


def rows(section: ElementTree.Element) -> list[list[str]]:
    return [[words(cell) for cell in row] for row in section.findall(".//tbody/tr")]


@pytest.fixture(scope="module")
def found() -> Search:
    return search(preset_shape("llama3-70b"), JOB, read_cluster("a100-80gbx256"))


@pytest.fixture(scope="module")
def dom(found: Search) -> Dom:
    answers = [Answer("how <many>", "12 & more", Layout.parse("fsdp8.tp8"))]
    return Dom(draw_page(found, found.best(5), "llama3-70b", answers))


def test_lists_are_what_was_found(found: Search, dom: Dom) -> None:
    plans = found.best(5)
    ranked = rows(dom.section("the-best"))
    assert [row[0] for row in ranked] == [str(plan.layout) for plan in plans]
    assert [row[1] for row in ranked] == [duration(plan.seconds) for plan in plans]
    assert [row[7] for row in ranked] == [gibibytes(plan.bytes) for plan in plans]
    assert [row[0] for row in rows(dom.section("why-not"))] == [word for word, _ in found.rivals()]
    told = found.nearest()
    assert told is not None
    assert str(told[0].layout) in words(dom.section("fastest-that-does-not-fit"))
    assert rows(dom.section("what-if")) == [["how <many>", "12 & more", "fsdp8.tp8"]]


def test_parts_are_drawn_on_top_of_each_other(found: Search, dom: Dom) -> None:
    drawn = dom.section("part-by-part").findall("details")
    assert len(drawn) == 3
    for plan, details in zip(found.best(3), drawn, strict=True):
        for chart, parts, whole in zip(
            details.findall("./div/div"),
            (time_parts(plan), memory_parts(plan)),
            (plan.seconds, plan.cluster.memory),
            strict=True,
        ):
            bars = chart.findall("div")
            assert [words(bar[0]) for bar in bars] == [part.name for part in parts]
            places = [re.findall(r"[\d.]+", bar.find(".//i").get("style")) for bar in bars]  # type: ignore[union-attr, arg-type]
            assert [float(start) for start, _ in places] == pytest.approx(
                [100 * part.start / whole for part in parts], abs=0.01
            )


def test_no_layout_is_faster_and_smaller_than_one_of_the_frontier(found: Search, dom: Dom) -> None:
    pareto = Pareto(found)
    frontier = pareto.frontier()
    sizes = [point.bytes for point in frontier]
    assert sizes == sorted(sizes, reverse=True)
    assert [point.seconds for point in frontier] == sorted(point.seconds for point in frontier)
    for point in pareto.points():
        assert any(it.seconds <= point.seconds and it.bytes <= 1.006 * point.bytes for it in frontier), point.words
    best = found.best(1)[0]
    assert any(point.layout == best.layout for point in frontier if point.bytes <= found.cluster.memory)
    marks = dom.section("memory-against-time").findall(".//circle/title")
    assert [words(mark) for mark in marks] == [point.words for point in frontier]


def test_dots_lie_where_they_fit(dom: Dom) -> None:
    picture = dom.section("memory-against-time").find(".//svg")
    assert picture is not None
    paths = {path.get("class"): path.get("d", "") for path in picture.findall("path")}
    limit = float(picture.find("line[@class='limit']").get("x1", ""))  # type: ignore[union-attr]
    places = {name: [int(x) for x in re.findall(r"M(\d+)", d)] for name, d in paths.items()}
    assert max(places["fitting"]) < max(places["tight"]) <= limit
    assert min(places["failing"]) >= limit - 4
    assert len(places["fitting"]) > 100


def test_the_pipeline_is_the_winners(found: Search, dom: Dom) -> None:
    layout = found.best(1)[0].layout
    assert layout.pp > 1, "the test needs a winner with a pipeline"
    picture = dom.section("pipeline").find(".//svg")
    assert picture is not None
    lanes = [words(text) for text in picture.iter("text") if words(text).startswith("process ")]
    assert lanes == [f"process {rank}" for rank in range(layout.pp)]


def test_every_gpu_has_its_place(found: Search, dom: Dom) -> None:
    layout = found.best(1)[0].layout
    figures = dom.section("on-the-cluster").findall(".//figure")
    places = coordinates(layout)
    assert [
        words(figure).split("GPU")[0].count(f"{axis}{getattr(layout, axis)}")
        for axis, figure in zip(places, figures, strict=True)
    ]
    for axis, figure in zip(places, figures, strict=True):
        shares = [path for path in figure.iter("path") if path.get("fill")]
        assert len(shares) == getattr(layout, axis)
        assert {path.get("d", "").count("M") for path in shares} == {layout.world // getattr(layout, axis)}
        assert len({path.get("fill") for path in shares}) == len(shares)
        assert len(figure.findall(".//rect/title")) == layout.world


def test_ranks_lie_as_the_mesh_lays_them() -> None:
    layout = Layout.parse("dp2.fsdp2.cp2.tp2.pp2.ep4.etp2")
    places = coordinates(layout)
    for axis in ("pp", "dp", "fsdp", "cp", "tp", "ep"):
        ranks = group(layout, axis)
        assert list(places[axis][ranks]) == list(range(getattr(layout, axis)))
    for axis in ("pp", "dp", "fsdp", "cp", "tp"):
        others = [other for other in ("pp", "dp", "fsdp", "cp", "tp") if other != axis]
        assert all(len(set(places[other][group(layout, axis)])) == 1 for other in others)
    assert group(layout, "tp") == [0, 1]
    assert group(layout, "pp") == [0, 16]


def test_a_group_in_a_node_is_told_from_one_over_the_network() -> None:
    figures = draw_places(Layout.parse("fsdp2.tp8"), read_cluster("h100x16"))
    captions = {words(caption).split(":")[0]: words(caption) for it in figures for caption in it.iter("figcaption")}
    assert captions["tp8"].endswith("inside of a node")
    assert captions["fsdp2"].endswith("over the network")
    assert "GPUs 0, 8 talk" in captions["fsdp2"]


def test_the_page_needs_nothing_else(found: Search) -> None:
    text = draw_page(found, found.best(2), "llama3-70b", [])
    assert not re.search(r"https?://|<link|@import|src=", text)
    assert 'id="what-if"' not in text
    assert "prefers-color-scheme: dark" in text
    assert 'name="viewport"' in text


def test_where_nothing_fits_the_page_says_so() -> None:
    nothing = search(preset_shape("llama3-405b"), JOB, read_cluster("a100-40gbx8"))
    page = Dom(draw_page(nothing, [], "llama3-405b", []))
    assert "No layout fits." in words(page.root)
    assert page.root.find(".//section[@id='the-best']") is None


def test_text_is_escaped() -> None:
    text = ElementTree.tostring(
        tag("p", "a < b & c", tag("b", "d"), "e", class_="x", stroke_width=1.25), encoding="unicode", method="html"
    )
    assert text == '<p class="x" stroke-width="1.2">a &lt; b &amp; c<b>d</b>e</p>'


def test_on_the_command_line(tmp_path: Path) -> None:
    file = tmp_path / "plan.html"
    arguments = [
        "plan",
        "layouts",
        "llama3-8b",
        "--cluster",
        "h100x8",
        "--batch",
        "64",
        "--what-if",
        "--html",
        str(file),
    ]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert f"written: {file}" in done.output
    assert len(rows(Dom(file.read_text()).section("what-if"))) == 7


@pytest.mark.parametrize(
    "layout", ["fsdp8.tp8.sp.full", "fsdp4.tp8.pp2.mb1", "fsdp8.tp8.offload.mb1", "fsdp16.pp4.zbv.mb1.fit240g"]
)
@pytest.mark.parametrize("model", ["llama3-70b", "llama3-8b"])
def test_one_layout_has_a_page_of_its_own(model: str, layout: str) -> None:
    plan = Plan.of(preset_shape(model), Layout.parse(layout), JOB, read_cluster("h100x64"))
    page = Dom(draw_plan(plan, model, []))
    sections = {section.get("id") for section in page.root.iter("section")}
    assert sections == {"part-by-part", "on-the-cluster"} | ({"pipeline"} if plan.layout.pp > 1 else set())
    assert ("which fits" if plan.fits else "which does not fit") in words(page.root)
    assert duration(plan.seconds) in words(page.section("part-by-part"))


def test_a_page_of_one_gpu_has_no_map_and_one_of_none_says_why() -> None:
    shape = preset_shape("gpt2-124m")
    found = search(shape, Job(seq=1024, global_batch=1), read_cluster("h100x1"))
    page = Dom(draw_page(found, found.best(3), "gpt2-124m", []))
    assert "on-the-cluster" not in {section.get("id") for section in page.root.iter("section")}
    assert "1 sequence of 1,024 tokens" in words(page.root)
    nothing = search(shape, Job(seq=1024, global_batch=1), read_cluster("h100x7"))
    told = words(Dom(draw_page(nothing, [], "gpt2-124m", [])).root)
    assert "No layout: 7 GPUs and a batch of 1 cannot be cut so." in told


def test_what_is_missing_of_the_memory_is_in_gib() -> None:
    plan = Plan.of(preset_shape("llama3-70b"), Layout.parse("fsdp8.tp8"), JOB, read_cluster("v100-32gbx64"))
    assert plan.headroom < -(2**30)
    assert f"-{gibibytes(-plan.headroom)}" in words(Dom(draw_plan(plan, "llama3-70b", [])).root)


ASKED = ["plan", "llama3-8b", "--cluster", "h100x8", "--batch", "64", "--layout", "fsdp8.full", "--html"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux's disk that is always full")
def test_a_full_disk_is_a_sentence(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["weft", *ASKED, "/dev/full"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert capsys.readouterr().err == "weft: error: No space left on device\n"


def test_where_nothing_may_be_written_is_told_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)  # root may write anywhere
    with pytest.raises(ValueError, match=r"--html .*plan.html may not be written by you"):
        CliRunner().invoke(app, [*ASKED, str(tmp_path / "plan.html")], catch_exceptions=False)
    with pytest.raises(ValueError, match=r"--out .*scores.json may not be written by you"):
        make_room(tmp_path / "scores.json")


def test_one_layout_on_the_command_line(tmp_path: Path) -> None:
    file = tmp_path / "plan.html"
    asked = ["plan", "llama3-8b", "--cluster", "h100x8", "--batch", "64", "--layout", "fsdp8.full", "--what-if"]
    done = CliRunner().invoke(app, [*asked, "--html", str(file)], catch_exceptions=False)
    assert f"written: {file}" in done.output
    page = Dom(file.read_text())
    assert words(page.root.find(".//p[@class='verdict']")) == "fsdp8.full"  # type: ignore[arg-type]
    assert rows(page.section("what-if"))
