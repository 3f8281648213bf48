"""Words of a shell script as the shell makes them: variables put in, quotes gone, sums added up. Torch-free."""

from __future__ import annotations

import ast
import operator
import re
import shlex
from collections.abc import Callable
from typing import Any

from weft.plan.emit.shell_tree import BRACES, NESTED, QUOTED

Value = str | list[str]
PIECE = re.compile(
    rf"(?P<plain>'[^']*')|(?P<quoted>{QUOTED})|(?P<bare>(?:{NESTED}|{BRACES}|\\.|[^'\"\\])+?(?=['\"]|$))", re.DOTALL
)
WHOLE = re.compile(r'"?\$(?:\{(\w+)\[[@*]\]\}|\{?([@*])\}?)"?')
"""All words of an array."""
SUM = re.compile(r"\$\(\(((?:[^()$]|\((?:[^()$]|\([^()$]*\))*\))*)\)\)")
OUTPUT = re.compile(r"\$\(\s*([^\s()]*)[^()]*(?:\([^()]*\)[^()]*)*\)|`\s*([^\s`]*)[^`]*`")
VARIABLE = re.compile(
    r"\$(?:\{(?P<name>\w+)(?:(?P<sign>:?[-=+?])(?P<other>(?:[^{}]|\$\{[^{}]*\})*))?\}|(?P<short>\w+)|(?P<count>#)"
    r"|\{(?P<array>\w+)\[(?P<place>\d+|[@*])\]\}|\{#(?P<length>\w+)\[[@*]\]\})"
)
COUNTED: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Pow: operator.pow, ast.Mod: operator.mod,
    ast.Div: lambda one, other: int(one / other), ast.FloorDiv: operator.floordiv, ast.Eq: operator.eq, ast.Gt: operator.gt,
    ast.NotEq: operator.ne, ast.Lt: operator.lt, ast.LtE: operator.le, ast.GtE: operator.ge,
}  # fmt: skip


def is_unset(word: str) -> bool:
    """Whether the script does not say all of a word: a name, or the output of a program, stands in it still."""
    return "$" in word


class Words:
    """Attributes:
    words: of the command line; $1 is the first.
    variables: what they have at this point; an array is a list.
    depends: variables without a value, because a condition decides on it that was not decided: what that asks.
    """

    def __init__(self) -> None:
        self.words: list[str] = []
        self.variables: dict[str, Value] = {}
        self.depends: dict[str, str] = {}
        self.added: set[str] = set()

    def assign(self, name: str, value: Value, add: bool) -> None:
        before = self.variables.get(name)
        if add and before is not None:
            value = [*listed(before), *listed(value)] if list in (type(before), type(value)) else f"{before}{value}"
        elif isinstance(value, str) and before is None and name not in self.depends:
            value = value.replace(f"${name}", "")  # nobody has set it before
        (self.added.add if add else self.added.discard)(name)
        self.depends.pop(name, None)
        self.variables[name] = value

    def expand(self, word: str, *, split: bool = True) -> list[str]:
        """A word as the shell makes it: quotes gone, variables put in; without quotes they are split at blanks."""
        if (match := WHOLE.fullmatch(word)) is not None:
            value = self.words if match[2] else self.variables.get(match[1])
            return ([f"${match[1]}"] if match[1] in self.depends else []) if value is None else list(listed(value))
        if (match := re.fullmatch(r"\$\{?(\w+)\}?", word)) and isinstance(value := self.variables.get(match[1]), list):
            return value[:1]
        text, splits = "", False
        for piece in PIECE.finditer(word):
            if piece["plain"]:
                text += piece[0][1:-1]
            elif piece["quoted"]:
                text += re.sub(r"\\(.)", r"\1", self.filled(piece[0][1:-1]), flags=re.DOTALL)
            else:
                filled = re.sub(r"\\(.)", r"\1", self.filled(piece[0]), flags=re.DOTALL)
                splits = splits or filled != piece[0]
                text += filled
        return self.split(text) if splits and split else [text]

    @staticmethod
    def split(text: str) -> list[str]:
        text = re.sub(r"\\\r?\n", " ", text)
        try:
            return shlex.split(text)
        except ValueError:
            return text.split()

    def filled(self, text: str) -> str:
        """With what the variables have; a name, or $(…), stays where that is not known."""
        text = VARIABLE.sub(self._value, text)
        text = OUTPUT.sub(lambda it: it[0] if it[0].startswith("$((") else f"$({it[1] or it[2]}…)", text)
        before = ""
        while before != text:  # one sum may have another in it
            before, text = text, SUM.sub(self._summed, text)
        return re.sub(NESTED, lambda it: "".join(it[0].split()), text)

    def _value(self, it: re.Match[str]) -> str:
        name, sign = it["name"] or it["short"] or it["array"], it["sign"] or ""
        if it["count"]:
            return str(len(self.words))
        if it["length"]:
            return str(len(listed(self.variables.get(it["length"], []))))
        value = self.variables.get(name)
        if name.isdigit() and 0 < int(name) <= len(self.words):
            value = self.words[int(name) - 1]
        if isinstance(value, list):
            place = it["place"] or "0"
            value = " ".join(value[int(place) :][:1] if place.isdigit() else value)
        other = "".join(self.expand(it["other"] or "", split=False))
        if sign.endswith("+"):
            return other if value else ""
        if value is None or (sign.startswith(":") and not value):
            if name in self.depends or not sign or sign.endswith("?"):
                return f"${name}"
            if sign.endswith("="):
                self.assign(name, other, False)
            return other
        return value

    def _summed(self, it: re.Match[str]) -> str:
        total = self.sum(it[1])
        return it[0] if total is None else str(int(total))

    def sum(self, text: str) -> int | None:
        """Of whole numbers and of names of variables. None where a name has no value, or this is no sum."""
        named = re.sub(r"\b[A-Za-z_]\w*", lambda it: str(self.variables.get(it[0], it[0])), text)
        if chosen := re.fullmatch(r"([^?]*)\?([^:]*):(.*)", named, re.DOTALL):
            met = self.sum(chosen[1])
            return None if met is None else self.sum(chosen[2] if met else chosen[3])
        try:
            return _count(ast.parse(named.strip() or "0", mode="eval").body)
        except (SyntaxError, ValueError, ZeroDivisionError):
            return None


def _count(node: ast.AST) -> int:
    match node:
        case ast.Constant(value=int() as value):
            return value
        case ast.BinOp(left=left, op=sign, right=right) if type(sign) in COUNTED:
            return COUNTED[type(sign)](_count(left), _count(right))
        case ast.Compare(left=left, ops=[sign], comparators=[right]) if type(sign) in COUNTED:
            return COUNTED[type(sign)](_count(left), _count(right))
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_count(operand)
    raise ValueError


def listed(value: Value) -> list[str]:
    return value if isinstance(value, list) else value.split()
