"""Claim: chats are written as transformers writes them, and how a model calls is learnt from its template.

    python benchmarks/chat_templates.py FOLDER

FOLDER holds templates (*.jinja). llama.cpp and vLLM ship some hundred and twenty of the models in use; they are in their
source archives on PyPI:

    https://pypi.org/project/llama-cpp-python/0.3.36/#files     vendor/llama.cpp/models/templates
    https://pypi.org/project/vllm/0.33.0/#files                 examples, vllm/transformers_utils/chat_templates

Of each: which chats are written as transformers does, letter by letter (= the same, ! not, - transformers refuses it);
whether tools are shown; and the way of calling that was learnt, which has read back the calls that the template wrote.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

from common import shown, write
from weft.serve.server.chat import ChatTemplate

NAMES = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
TOOL = {
    "type": "function",
    "function": {
        "name": "weather", "description": "The weather of a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string", "description": "Which"}}},
    },
}  # fmt: skip
USER = {"role": "user", "content": "Is it cold in Köln?"}
CALL = {"id": "x1y2z3x1y", "type": "function", "function": {"name": "weather", "arguments": {"city": "Köln"}}}
CHATS: dict[str, tuple[list[dict[str, Any]], list[dict[str, Any]] | None]] = {
    "asked": ([USER], None),
    "told": ([{"role": "system", "content": "Be short."}, USER], None),
    "turns": ([USER, {"role": "assistant", "content": "Yes."}, {"role": "user", "content": "Sure?"}], None),
    "tools": ([USER], [TOOL]),
    "called": (
        [USER, {"role": "assistant", "content": "", "tool_calls": [CALL]},
         {"role": "tool", "tool_call_id": CALL["id"], "name": "weather", "content": '{"degrees": 3}'}],
        [TOOL],
    ),
}  # fmt: skip


def sameness(template: ChatTemplate, source: str) -> Iterator[str]:
    for messages, tools in CHATS.values():
        dressed = [dict(template.manner.dress(one)) for one in messages]
        try:
            [theirs], _ = render_jinja_template(
                [dressed], tools=tools, chat_template=source, add_generation_prompt=True, **NAMES
            )
        except (TemplateError, TypeError, ValueError, KeyError, AttributeError):
            yield "-"
            continue
        try:
            yield "=" if template.render(messages, tools) == theirs else "!"
        except ValueError:
            yield "!"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    files = sorted(options.folder.glob("*.jinja"))
    if not files:
        parser.error(f"{options.folder} has no *.jinja")
    rows: dict[str, Any] = {}
    for file in files:
        source = file.read_text(encoding="utf-8")
        try:
            template = ChatTemplate(source, NAMES)
        except ValueError as error:
            rows[file.stem] = {"error": str(error)}
            print(f"{file.stem:52.52} {error}")
            continue
        way = template.manner.way
        rows[file.stem] = {
            "chats": "".join(sameness(template, source)), "tools": "tools" in source, "shows": template.manner.shows_tools,
            "way": type(way).__name__ if way else None, "marks": list(way.marks) if way else [],
        }  # fmt: skip
        row = rows[file.stem]
        marks = " ".join(repr(mark) for mark in row["marks"])
        print(f"{file.stem:52.52} {row['chats']} {'tools' if row['shows'] else '     '} {row['way'] or ''} {marks}")
    chats = "".join(row.get("chats", "") for row in rows.values())
    told = {
        "templates": len(rows), "unreadable": sum("error" in row for row in rows.values()),
        "chats as transformers": chats.count("="), "chats not as transformers": chats.count("!"),
        "with tools": sum(bool(row.get("tools")) for row in rows.values()),
        "ways learnt": sum(bool(row.get("way")) for row in rows.values()),
    }  # fmt: skip
    print(*(f"{name}: {count}" for name, count in told.items()), sep="\n")
    path = write("chat_templates", {"summary": told, "templates": rows}, ("transformers", "jinja2"))
    print(f"written to {shown(path)}")


if __name__ == "__main__":
    main()
