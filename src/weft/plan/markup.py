"""Elements of a page, HTML and SVG, as plain functions over ElementTree. Torch-free."""

from __future__ import annotations

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


def _name(key: str) -> str:
    return key.rstrip("_").replace("_", "-")


def _value(value: object) -> str:
    return f"{value:.1f}".removesuffix(".0") if isinstance(value, float) else str(value)
