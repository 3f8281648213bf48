"""How a template takes calls of functions, and how its model makes them: the template is asked to write a turn that calls
two. Models are tuned on what their template writes, so what stands around a call there stands around it in an answer.
Torch-free.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product, takewhile
from typing import Any

from weft.serve.server.reader import CallReader
from weft.serve.server.ways import DECODER, Named, Objects, Tagged, Way

Table = Mapping[str, Any]
Render = Callable[[Sequence[Table], Sequence[Table], bool], str]
"""Messages, tools, and whether to write what begins an answer → the text of the chat."""

ASKED, SAID = "Is it cold?", "Let me see."
NAMES, KEYS, VALUES = ("probe_alpha", "probe_beta"), ("key_alpha", "key_beta"), ("value_alpha", "value_beta")
ARGUMENTS = dict(zip(KEYS, VALUES, strict=True))
IDS = (("x1y2z3x1y", "0a9b8c7d6"), ("functions.probe_alpha:0", "functions.probe_beta:1"))
"""Of calls: nine letters and figures, as Mistral's want them; or what a model counts by itself, as Kimi's does."""


@dataclass(frozen=True)
class Manner:
    """
    Attributes:
        way: None: the template shows none.
        shows_tools: it tells the model which functions there are.
        takes_text: it wants arguments as JSON text, and not as a table.
        silence: a turn's content where it calls and says nothing; by None some templates know a call.
        speaks: a turn that calls may say something besides.
    """

    way: Way | None
    shows_tools: bool
    takes_text: bool = False
    silence: str | None = ""
    speaks: bool = True

    def dress(self, message: Table) -> Table:
        """A message as the template takes it."""
        if not message.get("tool_calls"):
            return message
        calls = message["tool_calls"]
        if self.takes_text:
            calls = [{**call, "function": as_text(call["function"])} for call in calls]
        said = message.get("content") if self.speaks else None
        return {**message, "content": said or self.silence, "tool_calls": calls}


def as_text(function: Table) -> Table:
    return {**function, "arguments": json.dumps(function["arguments"], ensure_ascii=False)}


def learn(render: Render) -> Manner:
    """What a template shows; all that templates want a call to be is tried."""
    asked = {"role": "user", "content": ASKED}
    prompt = tried(render, [asked], True) or ""
    shows_tools = all(name in prompt for name in NAMES)
    for find in (find_objects, find_named, find_tagged):
        for count, content, takes_text, ids in product((2, 1), (SAID, "", None), (False, True), IDS):
            calls = [make_call(name, id, takes_text) for name, id in zip(NAMES[:count], ids[:count], strict=True)]
            turn = {"role": "assistant", "content": content, "tool_calls": calls}
            text = tried(render, [asked, turn], False)
            written = answer_of(text, prompt, content) if text else ""
            if (
                all(name in written for name in NAMES[:count])
                and (way := find(written, count))
                and reads(way, written, count)
            ):
                return Manner(way, shows_tools, takes_text, None if content is None else "", content == SAID)
    return Manner(None, shows_tools)


def make_tool(name: str) -> Table:
    keys = {key: {"type": "string", "description": "a key"} for key in KEYS}
    form = {"type": "object", "properties": keys, "required": list(KEYS)}
    return {"type": "function", "function": {"name": name, "description": "a function", "parameters": form}}


def make_call(name: str, id: str, takes_text: bool) -> Table:
    function = {"name": name, "arguments": dict(ARGUMENTS)}
    return {"id": id, "type": "function", "function": as_text(function) if takes_text else function}


def tried(render: Render, messages: Sequence[Table], begins: bool) -> str | None:
    try:
        return render(messages, [make_tool(name) for name in NAMES], begins)
    except ValueError:  # it does not take them
        return None


def answer_of(text: str, prompt: str, content: str | None) -> str:
    """The turn that calls, behind what it says besides."""
    text = text.rpartition(ASKED)[2]
    if content and content in text:
        text = text.rpartition(content)[2]
    else:
        begun = shared_start([text, prompt.rpartition(ASKED)[2]])
        text = text.removeprefix(re.sub(r"<[^>]*$", "", begun))
    return re.sub(r"\s*<think>\s*</think>", "", text)


def reads(way: Way, written: str, count: int) -> bool:
    """Whether the way finds the calls in what it was learnt from."""
    _, calls = CallReader(way, NAMES).push(written, whole=True)
    return calls == [(name, ARGUMENTS) for name in NAMES[:count]]


@dataclass(frozen=True)
class Frame:
    """What stands around calls of which each is text[start:end].

    Attributes:
        before: what stands before each.
        closing: what stands behind each.
    """

    marks: tuple[str, ...]
    ends: tuple[str, ...]
    before: str
    closing: str


def frame(text: str, spans: Sequence[tuple[int, int]]) -> Frame:
    """Of one call or two: what stands before both is before each, and what else is before the first begins them all."""
    (start, end), (_, last) = spans[0], spans[-1]
    opening, rest = text[:start], text[last:]
    before, closing = opening, rest
    if len(spans) == 2:
        gap = text[end : spans[1][0]]
        before = shared_end([opening, gap])
        tag = re.search(r"[<\[]", before)  # <|a_end|><|b|> and <|a_begin|><|b|> have one mark in common, not "|>" too
        before = before[tag.start() :] if tag else before
        closing = gap.removesuffix(before)
    marks: tuple[str, ...] = (opening.removesuffix(before).strip(), before.strip())
    marks = tuple(mark for mark in marks if re.search(r"\w", mark) and not any(id in mark for ids in IDS for id in ids))
    return Frame(marks, tuple(dict.fromkeys(signs(closing) + signs(rest))), before, closing)


def signs(text: str) -> tuple[str, ...]:
    """<a>, [B] and ``` one by one, up to the first word."""
    found: dict[str, None] = {}
    while sign := SIGN.match(text):
        found[sign[1]] = None
        text = text[sign.end() :]
    return tuple(found)


SIGN = re.compile(r"\s*(<[^<>]+>|\[/?\w+\]|[^\s\w<\[]+)")


def find_objects(text: str, count: int) -> Objects | None:
    """Each call is an object with the name and the arguments among its fields, or all are in one list."""
    spans = []
    for name in NAMES[:count]:
        for start in (found.start() for found in re.finditer(r"[{\[]", text[: text.find(name)])):
            value, end = decoded(text, start)
            one = value[0] if isinstance(value, list) and value else value
            keys = {json.dumps(content): key for key, content in one.items()} if isinstance(one, dict) else {}
            if json.dumps(name) in keys and json.dumps(ARGUMENTS) in keys:
                spans.append((start, end))
                key, arguments = keys[json.dumps(name)], keys[json.dumps(ARGUMENTS)]
                break
        if spans and isinstance(decoded(text, spans[0][0])[0], list):
            break
    if not spans:
        return None
    around = frame(text, spans)
    return Objects(around.marks, around.ends, key, arguments)


def find_named(text: str, count: int) -> Named | None:
    """The arguments are the next JSON behind the name."""
    spans, gaps = [], []
    for name in NAMES[:count]:
        start = text.find(name)
        behind = start + len(name)
        brace = text.find("{", behind)
        value, end = decoded(text, brace)
        if value != ARGUMENTS:
            return None
        spans.append((start, end))
        gaps.append(text[behind:brace])
    around = frame(text, spans)
    first = shared_start(gaps)
    last = "" if first in gaps else shared_end(gaps)
    return Named(around.marks, around.ends, around.before, (first, last)) if around.marks else None


def find_tagged(text: str, count: int) -> Tagged | None:
    """Names and values of the arguments stand one by one, all with the same around them."""
    spans, at = [], 0
    for name in NAMES[:count]:
        start = at = text.find(name, at)
        parts = []
        for needle in (name, KEYS[0], VALUES[0], KEYS[1], VALUES[1]):
            found = text.find(needle, at)
            if found < 0:
                return None
            parts.append(text[at:found])
            at = found + len(needle)
        _, opened, value, again, same = parts
        key = shared_end([opened, again])
        close = again.removesuffix(key)
        if value != same or name in opened or not key.strip() or not close.strip() or not text.startswith(close, at):
            return None
        at += len(close)
        spans.append((start, at))
    around = frame(text, spans)
    end = re.match(r"\W*\w[^>\]]*[>\]]", around.closing)
    if not around.marks or end is None:
        return None
    return Tagged(around.marks, around.ends, around.before, opened.removesuffix(key), key, value, close, end[0])


def shared_start(texts: Sequence[str]) -> str:
    same = takewhile(lambda letters: len(set(letters)) == 1, zip(*texts, strict=False))
    return "".join(letters[0] for letters in same)


def shared_end(texts: Sequence[str]) -> str:
    return shared_start([text[::-1] for text in texts])[::-1]


def decoded(text: str, start: int) -> tuple[Any, int]:
    """JSON's value at a place, and where it ends; None, where there is none."""
    try:
        return DECODER.raw_decode(text, start)
    except ValueError:
        return None, start
