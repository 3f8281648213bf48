"""Forms of texts, compiled by llguidance; and a process beside that tries each one first. Torch-free.

A form is the client's own program: a schema of some kilobytes can overflow the stack of what compiles it, which would end
the server, or keep it busy for long. So it is compiled once where that ends nothing but a helper, under a deadline; then by
the server, in a thread of more stack.
"""

from __future__ import annotations

import json
import os
import resource
import select
import subprocess
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

Kind = Literal["json", "json_schema", "regex", "lark"]

BLANKS: JsonCompileOptions = {"whitespace_pattern": r"[\x20\x0A\x0D\x09]{1,64}"}
"""Between two signs of JSON: enough for an indented one, and not until a weak model has no tokens left."""

HELPERS = 2
"""Processes that try forms, at most."""

FAIR_SECONDS = 1.0
"""That one form may take while others wait."""

START_SECONDS = 60.0
"""In which a helper has read its tokenizer."""

HELPER_STACK = 2 << 20
"""Bytes of a helper's stack: a quarter of what a thread has on Linux, and less than anywhere else."""

HELPER_MEMORY = 4 << 30

KEPT = 64
"""Forms that are kept compiled, the last used ones."""

LATER = "forms cannot be compiled at the moment: leave the form out, or try again later"


@dataclass(frozen=True)
class Form:
    """A form by its name, where it is compiled elsewhere."""

    kind: Kind
    text: str


def text_of(source: str | dict[str, Any]) -> str:
    return json.dumps(source) if isinstance(source, dict) else source


def form_of(settings: Mapping[str, Any]) -> tuple[Kind, str] | None:
    """The form that a text must have, of settings named as kinds are, and of which kind it is.

    Raises:
        ValueError: there are several.
    """
    kinds: tuple[Kind, ...] = ("json_schema", "regex", "lark")
    asked = [kind for kind in kinds if kind in settings]
    if len(asked) > 1:
        raise ValueError(f"{' and '.join(asked)}: a text has one form; leave all but one of them out")
    return (asked[0], settings[asked[0]]) if asked else None


def make_matcher(tokenizer: Any, kind: Kind, text: str) -> Any:
    """llguidance's matcher of a form, at its start.

    Raises:
        ValueError: the form is malformed.
    """
    import llguidance

    json_schema = llguidance.LLMatcher.grammar_from_json_schema
    makers = {
        "json": lambda: json_schema('{"type": "object"}', BLANKS),
        "json_schema": lambda: json_schema(text, BLANKS),
        "regex": lambda: llguidance.LLMatcher.grammar_from_regex(text),
        "lark": lambda: llguidance.LLMatcher.grammar_from_lark(text),
    }
    if kind not in makers:
        raise ValueError(f"the form is a {kind!r}; it must be one of {', '.join(makers)}")
    try:
        matcher = llguidance.LLMatcher(tokenizer, makers[kind](), log_level=0)
        error = matcher.get_error() if matcher.is_error() else ""
    except ValueError as malformed:
        error = str(malformed)
    if error:
        raise ValueError(f"the {kind} cannot be compiled: {in_a_line(error)}")
    return matcher


def in_a_line(error: str) -> str:
    """What llguidance says in several: the first, and the reason, which regular expressions have in a line of its own."""
    first, *others = error.strip().splitlines()
    reasons = [line.removeprefix("error: ") for line in others if line.startswith("error: ")]
    return " ".join([first, *reasons[:1]])


class Helpers:
    """Up to HELPERS processes that try forms. May be used by any thread.

    Args:
        source: tokenizer.json's text, and ids that may end a text once its form is complete; asked when one begins.
    """

    def __init__(self, source: Callable[[], tuple[str, Sequence[int]]]) -> None:
        self._source = source
        self._free: list[subprocess.Popen[bytes] | None] = [None] * HELPERS  # None: not begun
        self._waiting = deque[object]()  # for one of them: who came first has the first one
        self._changed = threading.Condition()
        self._closed = False
        self._processes: set[subprocess.Popen[bytes]] = set()
        self._finalizer = weakref.finalize(self, end_all, self._processes)

    def check(self, kind: Kind, text: str, timeout: float) -> None:
        """Whether a form can be compiled. Blocks for `timeout` seconds at most, and for the start of a helper.

        Raises:
            ValueError: it cannot, or not in this time.
        """
        until = time.monotonic() + timeout
        helper = self._take(kind, timeout)
        try:
            if helper is not None and helper.poll() is not None:
                self._end(helper)
                helper = None
            if helper is None:
                began = time.monotonic()
                helper = self._begin()
                until += time.monotonic() - began
            if self._closed:  # whoever closed may not have seen this one
                self._end(helper)
                raise ValueError(LATER)
            error = self._ask(helper, kind, text, until)
        finally:
            self._give_back(helper)
        if error:
            raise ValueError(error)

    def close(self) -> None:
        """End them. One that is at work is cleared away by the thread that waits for it: it alone may close the pipes."""
        self._closed = True
        for helper in list(self._processes):
            helper.kill()
        with self._changed:
            idle, self._free = self._free, [None] * len(self._free)
        for helper in filter(None, idle):
            self._end(helper)

    def _take(self, kind: Kind, timeout: float) -> subprocess.Popen[bytes] | None:
        """
        Raises:
            ValueError: none was free in this time.
        """
        me = object()
        with self._changed:
            self._waiting.append(me)
            try:
                if not self._changed.wait_for(lambda: self._free and self._waiting[0] is me, timeout):
                    raise ValueError(f"the {kind} waited for more than {timeout:g} s behind others: try again later")
                return self._free.pop()
            finally:
                self._waiting.remove(me)
                self._changed.notify_all()

    def _give_back(self, helper: subprocess.Popen[bytes] | None) -> None:
        with self._changed:
            self._free.append(helper)
            self._changed.notify_all()

    def _begin(self) -> subprocess.Popen[bytes]:
        code = "from weft.serve.requests.forms import main; main()"
        pipe, silent = subprocess.PIPE, subprocess.DEVNULL  # a form that fails does not fill the server's log
        helper = subprocess.Popen([sys.executable, "-c", code], stdin=pipe, stdout=pipe, stderr=silent, bufsize=0)
        self._processes.add(helper)
        until = time.monotonic() + START_SECONDS

        def late() -> bool:
            return time.monotonic() > until

        self._write(helper, json.dumps(self._source()), late)
        if not self._line(helper, late):
            self._end(helper)
            raise ValueError(LATER)
        return helper

    def _ask(self, helper: subprocess.Popen[bytes], kind: Kind, text: str, until: float) -> str:
        """What is wrong with a form; "": nothing. A helper that is late has ended."""
        began = time.monotonic()

        def late() -> bool:
            now = time.monotonic()
            return now > until or (now > began + FAIR_SECONDS and bool(self._waiting))

        self._write(helper, json.dumps([kind, text]), late)
        if line := self._line(helper, late):
            return str(json.loads(line))
        self._end(helper)
        if self._closed:
            return LATER
        if line is None:
            return f"the {kind} took more than {time.monotonic() - began:.2g} s to compile: simplify it"
        return f"the {kind} cannot be compiled: it is too deep, or needs too much memory: simplify it"

    def _write(self, helper: subprocess.Popen[bytes], line: str, late: Callable[[], bool]) -> None:
        """As much of it as the helper reads until it is late; that it does not answer says the rest."""
        assert helper.stdin is not None
        left, pipe = memoryview(line.encode() + b"\n"), helper.stdin.fileno()
        os.set_blocking(pipe, False)
        with suppress(BrokenPipeError):
            while left:
                if select.select([], [pipe], [], 0.05)[1]:
                    left = left[os.write(pipe, left) :]
                elif late():
                    return

    def _line(self, helper: subprocess.Popen[bytes], late: Callable[[], bool]) -> bytes | None:
        """What it says next; empty: it has ended; None: it is late, be it in the middle of a line."""
        assert helper.stdout is not None
        line, pipe = b"", helper.stdout.fileno()
        while not line.endswith(b"\n"):
            if select.select([pipe], [], [], 0.05)[0]:
                if not (part := os.read(pipe, 1 << 16)):
                    return b""
                line += part
            elif late():
                return None
        return line

    def _end(self, helper: subprocess.Popen[bytes]) -> None:
        self._processes.discard(helper)
        end_all({helper})


def end_all(helpers: set[subprocess.Popen[bytes]]) -> None:
    while helpers:  # others may begin one meanwhile
        helper = helpers.pop()
        helper.kill()
        helper.wait()
        assert helper.stdout is not None
        assert helper.stdin is not None
        helper.stdout.close()
        with suppress(BrokenPipeError):
            helper.stdin.close()


def main() -> None:
    """A helper: a tokenizer's line, then lines of forms; says of each what is wrong with it. Ends with its input."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    threading.stack_size(HELPER_STACK)
    thread = threading.Thread(target=_help)
    thread.start()
    thread.join()


def _help() -> None:
    import llguidance

    tokenizer, eos = json.loads(sys.stdin.readline())
    tokens = llguidance.LLTokenizer(tokenizer, eos_token=eos)
    resource.setrlimit(resource.RLIMIT_AS, (HELPER_MEMORY, HELPER_MEMORY))
    say("ready")
    for line in sys.stdin:
        error = ""
        try:
            matcher = make_matcher(tokens, *json.loads(line))
            matcher.deep_copy().compute_bitmask()
        except ValueError as wrong:
            error = str(wrong)
        say(json.dumps(error))


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()
