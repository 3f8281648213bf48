"""Numbers as people read them. Torch-free."""

from __future__ import annotations

import math

LETTERS = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"))


def short(number: float) -> str:
    """Three digits and a letter: 950, 412k, 8.03B."""
    for size, letter in LETTERS:
        if abs(number) >= 0.9995 * size:
            return f"{_three(number / size)}{letter}"
    return _three(number)


def count(text: str | float) -> float:
    """A number above 0 as people write it: 15e12, 15T, 300b.

    Raises:
        ValueError: it is none.
    """
    word = str(text).strip()
    size = next((size for size, letter in LETTERS if word.lower().endswith(letter.lower())), 1.0)
    try:
        number = size * float(word[:-1] if size > 1 else word)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise ValueError(f"{text!r} is no number of something: write 15e12, 15T or 300B")
    return number


def gibibytes(count: float) -> str:
    """Bytes in GiB, or MiB below one: 54.1 GiB."""
    size, unit = (2**30, "GiB") if abs(count) >= 2**30 else (2**20, "MiB")
    return f"{_three(count / size)} {unit}"


def duration(seconds: float) -> str:
    """Short times in ms or s, longer ones as a clock: 840 ms, 1.27 s, 12:31, 1:02:33, 3 d 04:00 h."""
    if not math.isfinite(seconds):
        return "–"
    if seconds < 1:
        return f"{1000 * seconds:.0f} ms"
    if seconds < 60:
        return f"{_three(seconds)} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} d {hours:02}:{minutes:02} h"
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _three(number: float) -> str:
    decimals = 0 if abs(number) >= 99.95 or number == round(number) else 1 if abs(number) >= 9.995 else 2
    return f"{number:.{decimals}f}"
