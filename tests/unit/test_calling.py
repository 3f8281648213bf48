"""How models call, and how that is learnt from their templates: each way, written as a template of its own."""

import asyncio
import json
import re
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from weft.serve.server.chat import ChatTemplate
from weft.serve.server.config import ModelConfig, ServerConfig
from weft.serve.server.errors import FieldError
from weft.serve.server.openai.bodies import ChatBody
from weft.serve.server.openai.chats import tokenize_chat
from weft.serve.server.openai.tools import make_call, read_tools
from weft.serve.server.reader import AnswerReader, CallReader, ThoughtReader
from weft.serve.server.version import Version
from weft.serve.server.ways import Named, Objects, Tagged, Texts, Way

TURN = """\
{%- if tools %}(tools){{ tools | tojson }}(/tools){% endif %}
{%- for message in messages %}(role){{ message.role }}(/role)
{%- if message.content %}{{ message.content }}{% endif %}CALLS(end)
{%- endfor %}
{%- if add_generation_prompt %}(role)assistant(/role){% endif %}
"""
EACH = "{%- for call in message.tool_calls or [] %}ONE{% endfor %}"
ALL = "{%- if message.tool_calls %}FIRST{% for call in message.tool_calls %}ONE{% endfor %}LAST{% endif %}"
PAIRS = "{% for key, value in ARGUMENTS.items() %}PAIR{% endfor %}"
PARTS = {
    "OBJECT": "{{ {'name': NAME, 'arguments': ARGUMENTS} | tojson }}", "JSON": "{{ ARGUMENTS | tojson }}",
    "NAME": "call.function.name", "ARGUMENTS": "call.function.arguments",
}  # fmt: skip
"""Parts of templates: a word in capitals stands for another one."""

WAYS: dict[str, tuple[type, list[str], str]] = {
    "hermes": (
        Objects, [EACH, "<tool_call>\nOBJECT\n</tool_call>"],
        'Hm.\n<tool_call>{"name":"f","arguments":{"x":"a b"}}</tool_call>\n<tool_call>\n{"name": "g"}\n</tool_call>\n',
    ),
    "llama": (
        Objects, [EACH, "{{ {'name': NAME, 'parameters': ARGUMENTS} | tojson }}"],
        '{"name": "f", "parameters": {"x": "a b"}}; {"name": "g", "parameters": {}}',
    ),
    "list": (
        Objects, [ALL, "OBJECT{% if not loop.last %}, {% endif %}", "[CALLS][", "]"],
        'Hm. [CALLS] [{"name": "f", "arguments": {"x": "a b"}}, {"name": "g", "arguments": {}}]',
    ),
    "lines": (
        Objects, [ALL, "OBJECT\n", "<calls>\n", "</calls>"],
        'Hm.<calls>\n{"name": "f", "arguments": {"x": "a b"}}\n{"name": "g", "arguments": {}}\n</calls>',
    ),
    "fence": (
        Named, [ALL, "<call>fn<sep>{{ NAME }}\n```json\nJSON\n```<end>", "<calls>", "</calls>"],
        'Hm.<calls><call>fn<sep>f\n```json\n{"x": "a b"}\n```<end>\n<call>fn<sep>g\n```json\n{}\n```<end></calls>',
    ),
    "ids": (
        Named, [EACH, "[CALL]{{ NAME }}[ID]{{ call.id }}[ARGS]JSON"],
        'Hm. [CALL]f[ID]9Xk2[ARGS]{"x": "a b"}[CALL]g[ID]7[ARGS]{}',
    ),
    "counted": (
        Named, [EACH, "<call_begin>{{ call.id }}<args>JSON<call_end>"],
        'Hm.<call_begin>functions.f:3<args>{"x": "a b"}<call_end><call_begin>functions.g:4<args>{}',
    ),
    "tags": (
        Tagged,
        [EACH, "<call>\n<function={{ NAME }}>\nPAIRS</function>\n</call>\n", "<of={{ key }}>\n{{ value }}\n</of>\n"],
        "Hm.\n<call>\n<function=f>\n<of=x>\na b\n</of>\n</function>\n</call>\n<call>\n<function=g>\n</function>\n</call>",
    ),
    "keys": (
        Tagged,
        [EACH, "<call>{{ NAME }}\nPAIRS</call>", "<key>{{ key }}</key>\n<value>{{ value }}</value>\n"],
        "Hm.<call>f\n<key>x</key>\n<value>a b</value>\n</call><call>g\n</call>",
    ),
}  # fmt: skip


@cache
def written(name: str) -> ChatTemplate:
    """The template of a way."""
    kind, (source, one, *more), _ = WAYS[name]
    source = source.replace("ONE", one)
    if kind is Tagged:
        source = source.replace("PAIRS", PAIRS.replace("PAIR", more[0]))
    elif more:
        source = source.replace("FIRST", more[0]).replace("LAST", more[1])
    for part, text in PARTS.items():
        source = source.replace(part, text)
    return template(source)


def template(calls: str) -> ChatTemplate:
    return ChatTemplate(TURN.replace("CALLS", calls), {})


def read(found: Way, text: str, sizes: list[int]) -> tuple[str, list[Any]]:
    reader, said, calls = AnswerReader(calls=CallReader(found, ("f", "g"))), "", []
    for size in sizes:
        piece, text = text[:size], text[size:]
        part = reader.push(piece)
        said, calls = said + part.said, calls + part.calls
    part = reader.push(text, whole=True)
    return said + part.said, calls + part.calls


@pytest.mark.parametrize("name", WAYS)
@given(sizes=st.lists(st.integers(1, 7), max_size=60))
def test_a_way_is_learnt_from_the_template(name: str, sizes: list[int]) -> None:
    kind, _, answer = WAYS[name]
    found = written(name)
    assert isinstance(found.way, kind)
    assert found.manner.shows_tools
    said, made = read(found.way, answer, sizes)
    assert made == [("f", {"x": "a b"}), ("g", {})]
    assert said.strip() == ("" if name == "llama" else "Hm.")


@pytest.mark.parametrize("name", WAYS)
def test_what_only_looks_like_a_call_is_said(name: str) -> None:
    way, answer = written(name).way, WAYS[name][2]
    said, made = read(way, re.sub(r"\bf\b", "h", answer), [])  # there is no h
    assert [name for name, _ in made] in ([], ["g"])
    assert "h" in said
    for cut in range(len(answer)):
        said, made = read(way, answer[:cut], [3] * 40)
        assert all(call in [("f", {"x": "a b"}), ("g", {})] for call in made)
        assert made or said.strip() == answer[:cut].strip()


@given(st.lists(st.integers(1, 9), max_size=80))
def test_calls_are_found_however_the_text_comes(sizes: list[int]) -> None:
    call = '<tool_call>{"name": "f", "arguments": {"x": "</b>"}}</tool_call>'
    text = f"Well <tool {call} and {call}<tool_call>nonsense</tool_call>.<tool_c"
    said, made = read(Objects(("<tool_call>",), ("</tool_call>",)), text, sizes)
    assert said == "Well <tool  and <tool_call>nonsense</tool_call>.<tool_c"
    assert made == [("f", {"x": "</b>"})] * 2


@pytest.mark.parametrize(
    ("text", "content", "names"),
    [
        ('{"name": "f", "parameters": {"x": 1}}', "", ["f"]),
        ('[{"name": "f", "arguments": {}}, {"name": "g", "arguments": "{}"}]', "", ["f", "g"]),
        ('{"name": "h"}', '{"name": "h"}', []),
        ('{"name": ', '{"name": ', []),
        ("  so {", "  so {", []),
        ("  ", "  ", []),
        ("[]", "[]", []),
        ('\n{"name": "f"} so', " so", ["f"]),
    ],
)
def test_a_bare_call(text: str, content: str, names: list[str]) -> None:
    for sizes in ([], [1] * len(text)):
        said, made = read(Objects(), text, sizes)
        assert (said, [name for name, _ in made]) == (content, names)


def test_a_text_is_what_its_schema_says() -> None:
    keys = {"n": {"type": "integer"}, "s": {"type": "string"}, "l": {"type": "array"}, "b": {"type": "boolean"}}
    tools = read_tools([{"type": "function", "function": {"name": "f", "parameters": {"properties": keys}}}])
    call = make_call("f", Texts(n="3", s="3", l='["a"]', b="true", other="x y", broken="[", m="{}"), tools)
    assert json.loads(call.arguments) == {
        "n": 3, "s": "3", "l": ["a"], "b": True, "other": "x y", "broken": "[", "m": {}
    }  # fmt: skip
    assert json.loads(make_call("f", {"x": "ü"}, tools).arguments) == {"x": "ü"}
    assert make_call("f", '{"x": 1}', tools).arguments == '{"x": 1}'


CALLED = {"id": "a", "type": "function", "function": {"name": "f", "arguments": {"x": "ü"}}}


def test_a_template_is_given_a_call_as_it_wants_it() -> None:
    """DeepSeek's own show a call only where nothing is said, and add its arguments to a text."""
    each = "<call>{{ call.function.name }}({{ '' + call.function.arguments }}){% endfor %}"
    found = template("{% if message.content is none %}{% for call in message.tool_calls %}" + each + "{% endif %}")
    assert (found.manner.takes_text, found.manner.silence, found.manner.speaks) == (True, None, False)
    for content in ("", None, "Hm."):
        text = found.render([{"role": "assistant", "content": content, "tool_calls": [CALLED]}], None, False)
        assert text == '(role)assistant(/role)<call>f({"x": "ü"})(end)'
    told = found.render([{"role": "assistant", "content": "Hm."}], None, False)
    assert told == "(role)assistant(/role)Hm.(end)"


def test_a_template_that_takes_one_call_only() -> None:
    single = "{% if message.tool_calls | length > 1 %}{{ raise_exception('one') }}{% endif %}" + EACH.replace(
        "ONE", "<tool_call>{{ call.function | tojson }}"
    )
    assert template(single).way.marks == ("<tool_call>",)


def test_templates_that_show_no_call() -> None:
    silent = ChatTemplate("{{ messages[0].content }}", {})
    assert (silent.manner.way, silent.manner.shows_tools, silent.way) == (None, False, Objects())
    talks = ChatTemplate("{{ tools }} write it between <tool_call> and </tool_call>. {{ messages[0].content }}", {})
    assert (talks.manner.way, talks.manner.shows_tools) == (None, True)
    assert talks.way == Objects(("<tool_call>",), ("</tool_call>",))


def test_tools_that_a_template_does_not_show_are_refused() -> None:
    silent = SimpleNamespace(template=ChatTemplate("{{ messages[0].content }}", {}), need_words=lambda: None)
    body = ChatBody(
        messages=[{"role": "user", "content": "x"}], tools=[{"type": "function", "function": {"name": "f"}}]
    )
    config = ServerConfig(models=(ModelConfig("a", Path("a")),))
    with pytest.raises(FieldError, match="does not show it tools") as caught:
        asyncio.run(tokenize_chat(body, cast(Version, silent), config))
    assert caught.value.param == "tools"


def test_a_template_may_build_lists() -> None:
    """Kimi's do: what they are given is a copy."""
    grows = (
        "{%- set seen = [] %}{% for message in messages %}{{ seen.append(message.role) or '' }}{% endfor %}{{ seen }}"
    )
    assert ChatTemplate(grows, {}).render([{"role": "user", "content": "x"}]) == "['user']"


@given(st.lists(st.integers(1, 7), max_size=40))
def test_thoughts_are_parted_from_what_is_said(sizes: list[int]) -> None:
    for begun, text, want in (
        (False, "<think>\nhm\n\nso\n</think>\n\nYes </think>.", ("hm\n\nso", "Yes </think>.")),
        (True, "hm </thin so</think>Yes", ("hm </thin so", "Yes")),
        (True, "hm </thin", ("hm </thin", "")),
        (False, " <thing> yes", ("", " <thing> yes")),
        (False, "<thi", ("", "<thi")),
        (False, "<think></think>\n", ("", "")),
    ):
        reader, thought, said, rest = AnswerReader(ThoughtReader(begun)), "", "", text
        for size in sizes:
            piece, rest = rest[:size], rest[size:]
            part = reader.push(piece)
            thought, said = thought + part.thought, said + part.said
        part = reader.push(rest, whole=True)
        assert (thought + part.thought, said + part.said) == want


def test_marks_that_are_special_tokens_are_not_said() -> None:
    reader = AnswerReader(None, CallReader(Objects(("[CALLS]",)), ("f",)), ("[CALLS]", "<eot>"))
    parts = [reader.push("Hm<eot>."), reader.push("[CALLS]no"), reader.push('[CALLS][{"name": "f"}]', whole=True)]
    assert "".join(part.said for part in parts) == "Hm.no"
    assert [part.calls for part in parts] == [[], [], [("f", {})]]
