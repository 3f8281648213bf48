"""Draws plan.svg, the first picture of the page that `weft plan layouts --html` writes: python docs/make_plan.py"""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import weft.plan.show.page
from weft.plan.machine import read_cluster
from weft.plan.numbers import Job
from weft.plan.search import search
from weft.plan.show.markup import tag
from weft.plan.show.pareto import Pareto
from weft.presets import preset_shape

PICTURE = Path(__file__).with_name("plan.svg")


def made(_: Path = PICTURE) -> str:
    job = Job(seq=8192, global_batch=1024, tokens=15e12)
    picture = Pareto(search(preset_shape("llama3-70b"), job, read_cluster("h100x512"))).draw()
    picture.set("xmlns", "http://www.w3.org/2000/svg")
    picture.set("font-family", "system-ui, -apple-system, Segoe UI, Helvetica, Arial, sans-serif")
    picture.insert(0, tag("style", weft.plan.show.page.STYLE.read_text(encoding="utf-8")))
    return ElementTree.tostring(picture, encoding="unicode") + "\n"


if __name__ == "__main__":
    PICTURE.write_text(made(), encoding="utf-8")
