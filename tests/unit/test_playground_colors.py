"""The playground's colours: all text stands out from what is behind it (WCAG 2.2, AA: 4.5 to 1), by day and by night."""

from __future__ import annotations

import re
from colorsys import hls_to_rgb

import pytest

from weft.serve.server.playground.router import FOLDER

Color = tuple[float, float, float]
STRONGEST = 0.5
"""How much of its colour the least likely token has; page.css says the same."""


def palettes() -> dict[str, dict[str, Color]]:
    style = (FOLDER / "page.css").read_text(encoding="utf-8")
    day, night = (
        dict(re.findall(r"--([\w-]+): ([^;]+);", block)) for block in re.findall(r":root \{(.*?)\}", style, re.S)
    )
    assert f"calc(var(--unlikely) * {STRONGEST:g}".replace("0.", ".") in style
    return {"day": colors(day), "night": colors({**day, **night})}


def colors(table: dict[str, str]) -> dict[str, Color]:
    return {name: color(value) for name, value in table.items()}


def color(value: str) -> Color:
    if value.startswith("#"):
        red, green, blue = (int(value[at : at + 2], 16) / 255 for at in (1, 3, 5))
        return red, green, blue
    hue, saturation, light = (float(part.rstrip("%")) for part in value.split())
    return hls_to_rgb(hue / 360, light / 100, saturation / 100)


def mix(one: Color, other: Color, share: float) -> Color:
    red, green, blue = (share * a + (1 - share) * b for a, b in zip(one, other, strict=True))
    return red, green, blue


def contrast(one: Color, other: Color) -> float:
    def luminance(color: Color) -> float:
        parts = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in color]
        return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), parts, strict=True))

    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("time", ["day", "night"])
@pytest.mark.parametrize(
    ("text", "behind"),
    [
        ("ink", "paper"), ("ink", "sheet"), ("soft", "paper"), ("soft", "sheet"), ("on-accent", "accent"),
        ("wrong", "wrong-sheet"), ("ink", "surprise"),
    ],
)  # fmt: skip
def test_text_can_be_read(time: str, text: str, behind: str) -> None:
    found = palettes()[time]
    back = mix(found["surprise"], found["paper"], STRONGEST) if behind == "surprise" else found[behind]
    assert contrast(found[text], back) >= 4.5
