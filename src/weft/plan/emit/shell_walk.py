"""A walk through a shell script's tree: what its variables come to have, and which programs it starts. Torch-free."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterator, Sequence
from fnmatch import fnmatchcase
from typing import Any

from weft.plan.emit.shell_tree import Array, Block, Case, Choice, Command, Function, Group, Loop, Node
from weft.plan.emit.shell_words import Value, Words, is_unset

ASSIGNED = re.compile(r"(\w+)(\+?)=(.*)", re.DOTALL)
DECLARES = ("export", "local", "declare", "readonly", "typeset")
COMPARED: dict[str, Callable[[Any, Any], bool]] = {
    "=": lambda one, other: fnmatchcase(one, other), "==": lambda one, other: fnmatchcase(one, other),
    "!=": lambda one, other: not fnmatchcase(one, other), "-eq": operator.eq, "-ne": operator.ne, "-lt": operator.lt,
    "-le": operator.le, "-gt": operator.gt, "-ge": operator.ge,
}  # fmt: skip
TURNS = 1000
"""After which a loop is no loop over words."""


class Walk(Words):
    """Attributes:
    commands: the programs that were started, each with its words, in order.
    remarks: what was not gone through.
    asked: what the condition was that was not decided last.
    """

    def __init__(self, given: Sequence[str] = ()) -> None:
        super().__init__()
        self.words = [word for word in given if not ASSIGNED.match(word)]
        self.variables |= dict(word.split("=", 1) for word in given if ASSIGNED.match(word))
        self.commands: list[list[str]] = []
        self.remarks: list[str] = []
        self.functions: dict[str, Block] = {}
        self.asked = ""

    def run(self, block: Block) -> bool | None:
        """The status of the last command; None: nothing says it."""
        status: bool | None = True
        for node in block:
            if node.after in ("&&", "||"):
                if status is (node.after == "||"):
                    continue
                if status is None:
                    self._undecided([(node,), ()])
                    continue
            status = self._step(node)
        return status

    def values(self) -> Iterator[str]:
        for value in self.variables.values():
            yield from [value] if isinstance(value, str) else value

    def _step(self, node: Node) -> bool | None:
        match node:
            case Command():
                return self._command(node)
            case Choice():
                return self._choose(list(node.branches))
            case Case():
                return self._case(node)
            case Loop():
                return self._loop(node)
            case Function():
                self.functions[node.name] = node.body
            case Group():
                return self.run(node.body)
        return True

    def _command(self, node: Command) -> bool | None:
        words, rest = list(node.words), list[str]()
        declares = words[0] in DECLARES
        while words and (declares or _is_assigned(words[0])):
            word = words.pop(0)
            if isinstance(word, Array):
                name = word.name.rstrip("+=")
                self.assign(name, [each for one in word.words for each in self.expand(one)], "+" in word.name)
            elif match := ASSIGNED.match(word):
                self.assign(match[1], " ".join(self.expand(match[3], split=False)), bool(match[2]))
        if not words:
            return True
        first = words[0]
        if first in ("[", "[[", "test", "!") or str(first).startswith("(("):
            return self._test([str(word) for word in words])
        rest = [each for word in words for each in self.expand(str(word))]
        match rest[:1]:
            case ["shift"]:
                del self.words[: int(rest[1]) if rest[1:] and rest[1].isdigit() else 1]
            case ["set"] if "--" in rest:
                self.words = rest[rest.index("--") + 1 :]
            case ["source" | "."]:
                self.remarks.append(" ".join(rest))
            case ["true" | ":"]:
                pass
            case ["false"]:
                return False
            case [name] if name in self.functions:
                outer, self.words = self.words, rest[1:]
                self.run(self.functions.pop(name))  # so that none calls itself
                self.words = outer
            case _:
                self.commands.append(rest)
        return True

    def _choose(self, branches: list[tuple[Block, Block]]) -> bool | None:
        """The branch whose condition is met; or, from the first that is not decided on, each of them."""
        while branches:
            condition, body = branches.pop(0)
            commands = len(self.commands)
            met = self.run(condition)
            if len(self.commands) > commands:  # a program's status
                met, self.asked = None, " ".join(self.commands[commands])
                del self.commands[commands:]
            if met is None:
                bodies = [body, *(other for _, other in branches)]
                self._undecided(bodies if branches and not branches[-1][0] else [*bodies, ()])
                return True
            if met:
                return self.run(body)
        return True

    def _undecided(self, bodies: list[Block]) -> None:
        """What branches add to a variable is added; what they set otherwise than each other has no value."""
        before, outcomes, asked = dict(self.variables), list[dict[str, Value]](), self.asked
        for body in bodies:
            self.variables = dict(before)
            self.run(body)
            outcomes.append(self.variables)
        merged = dict(before)
        for name in {name: None for outcome in outcomes for name in outcome}:
            values = [outcome.get(name) for outcome in outcomes]
            new = [value for value in values if value != before.get(name)]
            if name in self.added and all(_begins(value, before.get(name)) for value in values):
                for value in new:
                    assert value is not None
                    start = len(before.get(name, ()))
                    merged[name] = merged.get(name, type(value)()) + value[start:]  # type: ignore[operator]
            elif all(value == values[0] for value in values) and values[0] is not None:
                merged[name] = values[0]
            elif new:
                merged.pop(name, None)
                self.depends[name] = asked
        self.variables = merged

    def _case(self, node: Case) -> bool | None:
        [word] = self.expand(node.word, split=False)
        if is_unset(word) and not self._is_empty(word):
            self.asked = f"case {word}"
            self._undecided([*(body for _, body in node.branches), ()])
            return True
        word = "" if is_unset(word) else word
        for patterns, body in node.branches:
            if any(fnmatchcase(word, pattern.strip("\"'")) for pattern in patterns):
                return self.run(body)
        return True

    def _loop(self, node: Loop) -> bool | None:
        if node.kind == "for":
            words = [each for word in node.head for each in self.expand(str(word))]
            if words and not node.name.startswith("(("):
                self.assign(node.name, words[-1], False)  # the last one counts
            return self.run(node.body)
        assert all(not isinstance(part, str) for part in node.head)
        for _ in range(TURNS):
            commands = len(self.commands)
            met = self.run(node.head)  # type: ignore[arg-type]
            if len(self.commands) > commands or met is None:
                self._undecided([node.body, ()])
                break
            if met is (node.kind == "until"):
                break
            words = list(self.words)
            self.run(node.body)
            if self.words == words:  # nothing that the script says will end it
                break
        return True

    def _test(self, words: list[str]) -> bool | None:
        """Of `[`, `[[`, `test` and `((`, with -a, -o, && and || inside. None where it asks what the script does not say."""
        if words[0] == "!":
            met = self._test(words[1:])
            return None if met is None else not met
        if words[0].startswith("(("):
            total = self.sum(self.filled(words[0][2:-2]))
            return None if total is None else bool(total)
        words = [word for word in words[words[0] in ("[", "[[", "test") :] if word not in ("]", "]]")]
        for signs, decides in ((("||", "-o"), True), (("&&", "-a"), False)):
            if place := next((place for place, word in enumerate(words) if word in signs and place), None):
                found = [self._test(["[", *words[:place]]), self._test(["[", *words[place + 1 :]])]
                return decides if decides in found else None if None in found else not decides
        if words[:1] == ["!"]:
            return self._test(["!", "[", *words[1:]])
        values = [" ".join(self.expand(word, split=False)) for word in words]
        known = ["" if is_unset(value) and self._is_empty(value) else value for value in values]
        match known:
            case ["-z" | "-n" as asked, value]:
                if not is_unset(value) or re.fullmatch(r"\$\d+", value):
                    return (not value or is_unset(value)) is (asked == "-z")
            case [value] if not is_unset(value):
                return bool(value)
            case [left, sign, right] if sign in COMPARED and not is_unset(left + right):
                if sign.startswith("-"):
                    numbers = [self.sum(side) for side in (left, right)]
                    if None not in numbers and left and right:
                        return COMPARED[sign](*numbers)
                else:
                    return COMPARED[sign](left, right)
        self.asked = " ".join(values)
        return None

    def _is_empty(self, word: str) -> bool:
        """A name that nobody sets is empty; a word of the command line, or what depends on a condition, is not known."""
        names = re.findall(r"\$(\w+)", word)
        return bool(re.fullmatch(r"(?:\$\w+)+", word)) and not any(
            name.isdigit() or name in self.depends for name in names
        )


def _is_assigned(word: str | Array) -> bool:
    return isinstance(word, Array) or ASSIGNED.match(word) is not None


def _begins(value: Value | None, start: Value | None) -> bool:
    return start is None or (value is not None and type(value) is type(start) and value[: len(start)] == start)
