"""A shell script as a tree of its commands, conditions, loops and functions. Torch-free.

The grammar is that of POSIX's shell with bash's arrays, as far as scripts that start a training have it; a document in
the script (`<<EOF`) is left out, and so is where output goes.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

_DEEP = "[^()]"
for _ in range(6):
    _DEEP = rf"(?:[^()]|\({_DEEP}*+\))"
NESTED = rf"\$\({_DEEP}*+\)"
"""$(…) and $((…)), with brackets in brackets."""
BRACES = r"\$\{(?:\$\{[^{}]*\}|[^{}])*+\}"
_SUM = r"(?<![=\w])\(\((?:[^()]|\([^()]*\))*\)\)"
QUOTED = rf'"(?:[^"\\$`]|\\.|{NESTED}|{BRACES}|`[^`]*`|\$)*+"'
PIECE = rf"'[^']*'|{QUOTED}|{NESTED}|{BRACES}|`[^`]*`|\\[^\r\n]|[^\s;&|()<>\"'`\\]"
TOKEN = re.compile(
    r"(?P<gap>[ \t\r]+|\\\r?\n|(?<![^\s;&|()])\#[^\n]*)|(?P<to>\d?>[>&|]?|&>>?|<<<|<)"
    rf"|(?P<sum>{_SUM})|(?P<sign>\n|;;|&&|\|\||\|&|[;|&()])|(?P<word>(?:{PIECE})++)",
    re.DOTALL,
)
DOCUMENT = re.compile(r"(?<!<)<<-?\s*(['\"]?)(\w+)\1([^\n]*)\n.*?^\s*\2[ \t]*$", re.DOTALL | re.MULTILINE)
ARRAY = re.compile(r"\w+\+?=$")
ENDS = {"then", "elif", "else", "fi", "do", "done", "esac", "}", ")", ";;"}


@dataclass(frozen=True)
class Command:
    """Words as they are written, quotes and all; of each node, `after` is the sign before it: `&&`, `||`, or neither."""

    words: tuple[str | Array, ...]
    after: str = ";"


@dataclass(frozen=True)
class Array:
    """`NAME=(…)`, with the words in it; of `name` the sign is a part."""

    name: str
    words: tuple[str, ...]


@dataclass(frozen=True)
class Choice:
    """`if`, with (condition, body) of each branch; `else` has no condition."""

    branches: tuple[tuple[Block, Block], ...]
    after: str = ";"


@dataclass(frozen=True)
class Case:
    word: str
    branches: tuple[tuple[tuple[str, ...], Block], ...]
    after: str = ";"


@dataclass(frozen=True)
class Loop:
    """`kind`: for, while or until; `head`: the words of a for, or else the condition."""

    kind: str
    name: str
    head: tuple[str, ...] | Block
    body: Block
    after: str = ";"


@dataclass(frozen=True)
class Function:
    name: str
    body: Block
    after: str = ";"


@dataclass(frozen=True)
class Group:
    body: Block
    after: str = ";"


Node = Command | Choice | Case | Loop | Function | Group
Block = tuple[Node, ...]


def parse(text: str) -> Block:
    """Raises: ValueError: a quote or a bracket is not closed."""
    return _Reader(_tokens(DOCUMENT.sub(r"\3\n", text))).block()


def _tokens(text: str) -> list[str]:
    """Words and signs; where output goes is left out."""
    found, place, skip = list[str](), 0, False
    while place < len(text):
        token = TOKEN.match(text, place)
        if token is None:
            line = text[place:].partition("\n")[0]
            raise ValueError(f"the file is no list of arguments: what closes {line[:40]!r}?")
        place = token.end()
        if token["to"]:
            skip = True
        elif token["word"] and skip:
            skip = False
        elif not token["gap"] and not (skip and token[0] == "&"):  # 2>&1
            skip = False
            while token[0].startswith("--") and found[-1:] == ["\n"]:  # no command begins so: the one before goes on
                found.pop()
            found.append(token[0])
    return found


@dataclass
class _Reader:
    tokens: list[str]
    place: int = 0
    after: str = field(default=";", init=False)

    @property
    def next(self) -> str | None:
        return self.tokens[self.place] if self.place < len(self.tokens) else None

    def take(self) -> str:
        if self.next is None:
            raise ValueError("the file is no list of arguments: it ends in the middle of a command")
        self.place += 1
        return self.tokens[self.place - 1]

    def until(self, *ends: str) -> list[str]:
        """The words before a sign, which is taken too."""
        words = list[str]()
        while (token := self.take()) not in ends:
            words.append(token)
        return words

    def block(self, *ends: str) -> Block:
        """Commands up to a word that ends them, which is not taken; without `ends`, all."""
        found = list[Node]()
        while self.next is not None:
            if self.next in ends:
                break
            if self.next in ("\n", ";", "&", "|", "|&", "&&", "||"):
                self.after = self.take()
            elif not ends or self.next not in ENDS:
                found.append(self.command())
                self.after = ";"
            else:
                break
        return tuple(found)

    def command(self) -> Node:
        after = self.after
        match self.tokens[self.place : self.place + 3]:
            case ["if", *_]:
                return self.choice(after)
            case ["case", *_]:
                return self.case(after)
            case ["for" | "while" | "until", *_]:
                return self.loop(after)
            case ["function", name, *_]:
                self.place += 2
                return Function(name, self.body(), after)
            case [name, "(", ")"] if re.match(r"\w+$", name):
                self.place += 3
                return Function(name, self.body(), after)
            case ["{" | "(" as opened, *_]:
                self.take()
                group = Group(self.block("}" if opened == "{" else ")"), after)
                self.take()
                return group
        return Command(tuple(self.words()), after)

    def words(self) -> list[str | Array]:
        found = list[str | Array]()
        nested = 0
        while self.next is not None and (nested or self.next not in ("\n", ";", ";;", "&", "|", "|&", "&&", "||", ")")):
            word = self.take()
            if self.next == "(" and ARRAY.match(word):
                self.take()
                found.append(Array(word, tuple(each for each in self.until(")") if each != "\n")))
                continue
            nested += (word == "[[") - (word == "]]")
            found.append(word)
        return found or [self.take()]

    def body(self) -> Block:
        while self.next == "\n" or self.next == "(" or self.next == ")":
            self.take()
        node = self.command()
        return node.body if isinstance(node, Group) else (node,)

    def choice(self, after: str) -> Choice:
        branches = list[tuple[Block, Block]]()
        word = self.take()
        while word != "fi":
            condition: Block = ()
            if word != "else":
                condition = self.block("then")
                self.take()
            branches.append((condition, self.block("elif", "else", "fi")))
            word = self.take()
        return Choice(tuple(branches), after)

    def case(self, after: str) -> Case:
        self.take()
        word, branches = " ".join(self.until("in")), list[tuple[tuple[str, ...], Block]]()
        while True:
            while self.next in ("\n", ";", ";;", "("):
                self.take()
            if self.next == "esac":
                self.take()
                return Case(word.strip(), tuple(branches), after)
            patterns = tuple(each for each in self.until(")") if each != "|")
            branches.append((patterns, self.block(";;", "esac")))

    def loop(self, after: str) -> Loop:
        kind, name = self.take(), ""
        head: tuple[str, ...] | Block
        if kind == "for":
            name = self.take()
            head = tuple(each for each in self.until("do") if each not in ("in", ";", "\n"))
        else:
            head = self.block("do")
            self.take()
        body = self.block("done")
        self.take()
        return Loop(kind, name, head, body, after)
