"""The options in a shell script, with its variables put in. Nothing is run. Torch-free."""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Callable, Iterator, Mapping
from typing import Any

ASSIGNED = re.compile(
    r"""^\s*(?:export\s+)?(\w+)=("[^"]*"|'[^']*'|\$\(\([^)]*\)\)|\$\{[^}]*\}|[^\s("'#]*)[ \t]*(?:;|\#.*)?$""",
    re.MULTILINE,
)
VARIABLE = re.compile(r"\$(?:\{(\w+)(?::?[-=]([^}]*))?\}|(\w+))")
PRODUCT = re.compile(r"\$\(\(\s*(\d+(?:\s*\*\s*\d+)*)\s*\)\)")
ARRAY = re.compile(r"^\w+\+?=\(")
BEGINS = re.compile(r"\.py$|^[()]$|^(if|then|elif|else|fi|done)$|^\S+\[@\]\S*$")
"""A word that is no value of the option before it."""


Options = dict[str, list[str]]


def one(there: Options, name: str, kind: Callable[[str], Any]) -> Any:
    """Take an option's value away.

    Raises:
        ValueError: it is none of its kind.
    """
    values = there.pop(name)
    try:
        [value] = values[:1]
        return kind(value)
    except ValueError:
        raise ValueError(f"{name} {' '.join(values)}: a number has to follow") from None


def options_of(text: str) -> Options:
    """Name, with dashes → values. Of what a script may set, by a condition or twice, the last counts.

    Raises:
        ValueError: it is no script.
    """
    found: Options = {}
    values: list[str] = []
    for word in _words(text):
        if word.startswith("--"):
            name, equals, value = word.rstrip(")").partition("=")
            values = found[name.replace("_", "-")] = [value] if equals else []
        elif BEGINS.search(word):
            values = []
        else:
            values.append(word.rstrip(")"))
    return found


def _words(text: str) -> Iterator[str]:
    """An option and its value may be one string of the shell."""
    text = re.sub(r"\\\r?\n", " ", text)
    variables: dict[str, str] = {}
    for name, value in ASSIGNED.findall(text):
        variables[name] = _filled(value, variables).strip("\"'")
    try:
        for word in shlex.split(_filled(text, variables), comments=True):
            word = ARRAY.sub("", word) or "("
            yield from shlex.split(word) if re.match(r"--[\w-]+ ", word) else [word]
    except ValueError as error:
        raise ValueError(f"the file is no list of arguments: {error}") from None


def _filled(text: str, variables: Mapping[str, str]) -> str:
    """With what the variables have, or else what the text says they have where nobody sets them."""
    for _ in range(2):  # what is said may be a variable too
        text = VARIABLE.sub(lambda it: variables.get(it[1] or it[3], it[2] if it[2] is not None else it[0]), text)
    return PRODUCT.sub(lambda it: str(math.prod(map(int, it[1].split("*")))), text)
