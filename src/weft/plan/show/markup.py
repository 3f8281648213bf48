"""Elements of a page, HTML and SVG, as plain functions over ElementTree. Torch-free."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeAlias
from xml.etree import ElementTree

Element: TypeAlias = ElementTree.Element
Child: TypeAlias = Element | str | None


def tag(name: str, /, *children: Child, **attributes: object) -> Element:
    """An element. `class_` is class, `stroke_width` stroke-width; text is escaped when it is written; None is left out."""
    element = ElementTree.Element(name, {_name(key): _value(value) for key, value in attributes.items()})
    last: Element | None = None
    for child in children:
        if isinstance(child, ElementTree.Element):
            element.append(child)
            last = child
        elif child is not None and last is None:
            element.text = (element.text or "") + child
        elif child is not None and last is not None:
            last.tail = (last.tail or "") + child
    return element


def page(root: Element) -> str:
    """A whole document."""
    return "<!doctype html>\n" + ElementTree.tostring(root, encoding="unicode", method="html") + "\n"


def section(name: str, words: str, *children: Child) -> list[Element]:
    """A sheet of a page, under its name; a list, so that none is none."""
    return [
        tag("section", tag("h2", name), tag("p", words, class_="told"), *children, id=name.lower().replace(" ", "-"))
    ]


def table(names: Sequence[str], rows: Iterable[Sequence[Child]]) -> Element:
    head = tag("thead", tag("tr", *(tag("th", name) for name in names)))
    body = tag("tbody", *(tag("tr", *(tag("td", cell) for cell in row)) for row in rows))
    return tag("div", tag("table", head, body), class_="wide")


def _name(key: str) -> str:
    return key.rstrip("_").replace("_", "-")


def _value(value: object) -> str:
    return f"{value:.1f}".removesuffix(".0") if isinstance(value, float) else str(value)
