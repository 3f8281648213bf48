"""A chat as one text: the model's own template, in a sandbox. Torch-free."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from copy import deepcopy
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import Node
from jinja2.parser import Parser
from jinja2.sandbox import SandboxedEnvironment

from weft.checkpoint.sidecars import read_json
from weft.serve.server.errors import FieldError
from weft.serve.server.manner import learn
from weft.serve.server.ways import Objects, Way
from weft.serve.server.words import Words, any_of

OPEN, CLOSE, END = "\ufdd0", "\ufdd1", "\ufdd2"
"""Around the number of a special token that a client wrote into a message, until the text around it is tokenized; and the
end of a message that is continued. Unicode keeps these for a program's inside: no text has them."""
MARKS = str.maketrans("", "", OPEN + CLOSE + END)


class ChatTemplate:
    """A template and the names that it may use.

    Attributes:
        source: what it says, in Jinja2.
        names: bos_token, eos_token and the like.
        with_tools: what it says of a chat that has tools.
        manner: how it takes calls, and how its model makes them.
    """

    def __init__(self, source: str, names: Mapping[str, str], with_tools: str | None = None) -> None:
        """
        Args:
            names: bos_token, eos_token and the like.
            with_tools: None: as of others.

        Raises:
            ValueError: it is not a template.
        """
        self.source, self.with_tools, self.names = source, with_tools or source, dict(names)
        self._plain = make_template(source)
        self._with_tools = make_template(with_tools) if with_tools else self._plain
        self.manner = learn(self._text)

    @property
    def way(self) -> Way:
        """How calls are looked for where they are the model's own choice. Some templates speak of marks, and write none."""
        told = "<tool_call>" in self.with_tools
        return self.manner.way or (Objects(("<tool_call>",), ("</tool_call>",)) if told else Objects())

    def render(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True, more: Mapping[str, Any] | None = None,
    ) -> str:  # fmt: skip
        """The text of a chat.

        Raises:
            ValueError: the template does not take these messages.
        """
        dressed = [self.manner.dress(one) for one in messages]
        return self._text(deepcopy(dressed), deepcopy(tools), add_generation_prompt, more)

    def _text(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None,
        add_generation_prompt: bool, more: Mapping[str, Any] | None = None,
    ) -> str:  # fmt: skip
        template = self._with_tools if tools else self._plain
        names = {**(more or {}), **self.names}
        try:
            return template.render(
                messages=messages, tools=tools or None, add_generation_prompt=add_generation_prompt, **names
            )
        except TemplateError as error:
            raise FieldError(f"the model's chat template refuses these messages: {error}", "messages") from None
        except (TypeError, ValueError, KeyError, AttributeError, OverflowError, RecursionError):
            raise FieldError("the model's chat template cannot make a text of these messages", "messages") from None

    async def encode(
        self, words: Words, most: int, messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None, add_generation_prompt: bool = True,
        more: Mapping[str, Any] | None = None, continues: bool = False,
    ) -> list[int]:  # fmt: skip
        """The tokens of a chat. A special token's text in what a client wrote, be it the name of an argument or of a tool's
        or one of the template's own (`more`), is tokenized as text: nobody can forge a turn.

        Args:
            continues: the chat ends where the last message's text does, to be gone on with.

        Raises:
            ValueError: the template does not take these messages, or they do not fit into `most` tokens.
        """
        safe, safe_tools, safe_more = hide((messages, tools or (), more or {}), words.special)
        if continues:
            safe[-1]["content"] += END
        text = self.render(safe, safe_tools, add_generation_prompt, safe_more)
        if continues:
            text, end, _ = text.rpartition(END)
            if not end:
                raise FieldError("the model's chat template does not show the last message's text", "messages")
            text = text.replace(END, "")
        tokens: list[int] = []
        for number, piece in enumerate(split_forged(text)):
            if number % 2:
                tokens += await words.encode_plain(words.special[int(piece)])
            elif piece:
                tokens += await words.encode(piece, most, special=False)
        return tokens


class Generation(Extension):
    """{% generation %} … {% endgeneration %}: what training learns from, which nobody asks here."""

    tags = {"generation"}  # noqa: RUF012 (Jinja2's type)

    def parse(self, parser: Parser) -> list[Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def make_template(source: str) -> Any:
    """In a sandbox. Some templates append to lists, so what they are given has to be a copy.

    Raises:
        ValueError: it is not a template.
    """
    environment = SandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, Generation])
    environment.filters["tojson"] = to_json
    environment.globals.update(raise_exception=refuse, strftime_now=strftime_now)
    try:
        return environment.from_string(source)
    except TemplateError as error:
        raise ValueError(f"the chat template is not a Jinja2 template: {error}") from error


def hide(value: Any, special: Sequence[str]) -> Any:
    """The same messages, with special tokens' texts replaced: all in one pass, for a model may have hundreds."""
    numbers = {token: f"{OPEN}{number}{CLOSE}" for number, token in enumerate(special)}
    found_in = any_of(tuple(special)).sub

    def hidden(value: Any) -> Any:
        if isinstance(value, str):
            return found_in(lambda found: numbers[found[0]], value.translate(MARKS))
        if isinstance(value, Mapping):
            return {hidden(name): hidden(one) for name, one in value.items()}
        if isinstance(value, list | tuple):
            return [hidden(one) for one in value]
        return value

    return hidden(value)


def split_forged(text: str) -> list[str]:
    """Text, number of a special token, text, number, …, text."""
    pieces: list[str] = []
    for part in text.split(OPEN):
        number, end, rest = part.partition(CLOSE)
        pieces += [number, rest] if end and pieces else [part]
    return pieces


def find_template(folder: Path, file: Path | None = None) -> ChatTemplate | None:
    """The chat template of a Hugging Face directory; or of `file`, in its place. None: there is none.

    Raises:
        ValueError: it cannot be read, or is not a template.
    """
    settings = folder / "tokenizer_config.json"
    table = read_json(settings) if settings.is_file() else {}
    if file is not None:
        if not file.is_file():
            raise ValueError(f"there is no chat template {file}")
        source: Any = file.read_text(encoding="utf-8")
    elif (folder / "chat_template.jinja").is_file():
        source = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    elif (folder / "chat_template.json").is_file():
        source = read_json(folder / "chat_template.json").get("chat_template")
    else:
        source = table.get("chat_template")
    named: dict[str, Any] = {}
    if isinstance(source, list):  # several, by name
        try:
            named = {one["name"]: one["template"] for one in source}
        except (TypeError, KeyError):
            raise ValueError(f"{settings}: chat_template has an entry without name and template") from None
        source = named.get("default") or next(iter(named.values()), None)
    beside = folder / "additional_chat_templates" / "tool_use.jinja"
    if file is None and beside.is_file():
        named["tool_use"] = beside.read_text(encoding="utf-8")
    if not source:
        return None
    tokens = {name: text_of(value) for name, value in table.items() if name.endswith("_token")}
    names = {name: text for name, text in tokens.items() if text is not None}
    return ChatTemplate(str(source), names, named.get("tool_use"))


def text_of(token: Any) -> str | None:
    """tokenizer_config.json writes a token as its text, or as a table that has it."""
    found = token.get("content") if isinstance(token, dict) else token
    return found if isinstance(found, str) else None


def to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **more: Any) -> str:
    """transformers' filter: no escapes for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **more)


def refuse(message: str) -> None:
    raise TemplateError(str(message)[:500])


def strftime_now(form: str) -> str:
    return datetime.now().strftime(form)
