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
SUM = re.compile(r"\$\(\(([^$]*?)\)\)(?!\))")
OUTPUT = re.compile(r"\$\(\s*([^\s()]*)[^()]*(?:\([^()]*\)[^()]*)*\)|`\s*([^\s`]*)[^`]*`")
VARIABLE = re.compile(
    r"\$(?:\{(\w+)(?:(:?[-=+?])((?:[^{}]|\$\{[^{}]*\})*))?\}|\{(\w+)\[(\d+)\]\}|\{#(\w+)\[[@*]\]\}|(\w+)|([#]))"
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
        try:
            return shlex.split(text)
        except ValueError:
            return text.split()

    def filled(self, text: str) -> str:
        """With what the variables have; a name, or $(…), stays where that is not known."""
        text = VARIABLE.sub(self._value, text)
        text = OUTPUT.sub(lambda it: it[0] if it[0].startswith("$((") else f"$({it[1] or it[2]}…)", text)
        return SUM.sub(self._summed, text)

    def _value(self, it: re.Match[str]) -> str:
        name, sign = it[1] or it[4] or it[7], it[2] or ""
        if it[8]:
            return str(len(self.words))
        if it[6]:
            return str(len(listed(self.variables.get(it[6], []))))
        value = self.variables.get(name)
        if name.isdigit() and 0 < int(name) <= len(self.words):
            value = self.words[int(name) - 1]
        if isinstance(value, list):
            value = (value[int(it[5] or 0) : int(it[5] or 0) + 1] or [""])[0]
        other = "".join(self.expand(it[3] or "", split=False))
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
        return "".join(it[0].split()) if total is None else str(int(total))

    def sum(self, text: str) -> int | None:
        """Of whole numbers and of names of variables. None where a name has no value, or this is no sum."""
        named = re.sub(r"\b[A-Za-z_]\w*", lambda it: str(self.variables.get(it[0], it[0])), text)
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
