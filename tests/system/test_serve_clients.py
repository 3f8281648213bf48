"""Requests as programs in use send them, byte for byte but for the model's name: what each once stumbled over.

The programs themselves are no dependency: docs/serve.md says which were tried.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from served import SHAPE, Served, make_folder, model, served

USER = {"role": "user", "content": "hi"}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    shape = SHAPE.model_copy(update={"max_seq": 2048})
    with served(model(make_folder(tmp_path_factory.mktemp("served") / "tiny", shape=shape)), apart=True) as one:
        yield one


def ask(server: Served, route: str, **body: Any) -> httpx.Response:
    return httpx.post(f"{server.url}/v1/{route}", json={"model": "tiny", **body}, timeout=60)


def nulls(*names: str) -> dict[str, Any]:
    return dict.fromkeys(names)


def test_null_is_left_out(server: Served) -> None:
    """Clients that dump a request's class send null for whatever they know of, and know of more than a server does."""
    both = nulls(
        "max_tokens", "n", "seed", "stop", "stream", "stream_options", "temperature", "top_p", "logit_bias", "logprobs",
        "user", "frequency_penalty", "presence_penalty", "skip_special_tokens", "never_heard_of",
    )  # fmt: skip
    chat = nulls(
        "audio", "function_call", "functions", "metadata", "modalities", "parallel_tool_calls", "response_format", "tools",
        "tool_choice", "top_logprobs", "web_search_options", "reasoning_effort", "add_generation_prompt",
    )  # fmt: skip
    for route, body in (
        ("chat/completions", {"messages": [USER], "max_completion_tokens": 3, **both, **chat}),
        (
            "completions",
            {"prompt": "hi", "max_completion_tokens": 3, "echo": None, "best_of": None, "suffix": None, **both},
        ),
    ):
        answer = ask(server, route, **body)
        assert answer.status_code == 200, answer.text
        assert answer.json()["usage"]["completion_tokens"] <= 3
        assert answer.json()["choices"][0]["logprobs"] is None
    form = {"type": "json_object", "json_schema": None}
    told = ask(server, "chat/completions", messages=[USER], response_format=form, stream=True, max_tokens=3,
               stream_options={"include_usage": True, "include_obfuscation": None})  # fmt: skip
    assert told.status_code == 200, told.text
    answer = ask(server, "embeddings", input="hi", encoding_format=None, dimensions=None, user=None)
    assert len(answer.json()["data"][0]["embedding"]) == 32
    refused = ask(server, "chat/completions", messages=None)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "messages")


def test_guidellms_text(server: Served) -> None:
    """guidellm 0.2 sends both names for the most tokens, on either route."""
    body = {"prompt": "hi", "max_tokens": 7, "max_completion_tokens": 7, "stop": None, "ignore_eos": True}
    told = ask(server, "completions", **body, stream=True, stream_options={"include_usage": True})
    events = [json.loads(line[6:]) for line in told.text.splitlines() if line.startswith("data: {")]
    assert events[-1]["usage"]["completion_tokens"] == 7


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "Report"}}])
def test_a_tool_of_classes_within_classes(server: Served, choice: Any) -> None:
    """instructor, langchain and pydantic-ai make tools of pydantic's classes: those within refer to `$defs`."""
    parameters = {
        "$defs": {
            "City": {
                "properties": {"name": {"enum": ["Rome", "Oslo"], "type": "string"}}, "required": ["name"],
                "type": "object", "additionalProperties": False,
            }
        },
        "properties": {"cities": {"items": {"$ref": "#/$defs/City"}, "type": "array", "minItems": 1, "maxItems": 2}},
        "required": ["cities"], "type": "object", "additionalProperties": False,
    }  # fmt: skip
    tools = [{"type": "function", "function": {"name": "Report", "parameters": parameters, "strict": True}}]
    other = {"type": "object", "properties": {}, "additionalProperties": False}
    tools.insert(0, {"type": "function", "function": {"name": "rest", "parameters": other}})
    blanks = httpx.post(f"{server.url}/tokenize", json={"prompt": " \n\r\t"}).json()["tokens"]
    no_blanks, names = {str(token): -100 for token in blanks}, set()
    for seed in range(4):
        answer = ask(
            server, "chat/completions", messages=[USER], tools=tools, tool_choice=choice, parallel_tool_calls=False,
            seed=seed, max_tokens=400, logit_bias=no_blanks,
        )  # fmt: skip
        assert answer.status_code == 200, answer.text
        [call] = answer.json()["choices"][0]["message"]["tool_calls"]
        names.add(call["function"]["name"])
        arguments = json.loads(call["function"]["arguments"])
        if call["function"]["name"] == "Report":
            assert 1 <= len(arguments["cities"]) <= 2
            assert all(city.keys() == {"name"} and city["name"] in ("Rome", "Oslo") for city in arguments["cities"])
    assert "Report" in names


def test_a_tool_whose_schema_no_grammar_holds_to(server: Served) -> None:
    """pydantic's set is an array of `uniqueItems`, its Path a text of format `path`. Who is strict is told so."""
    schema = {
        "type": "object", "required": ["days", "file"], "additionalProperties": False,
        "properties": {
            "days": {"type": "array", "items": {"enum": ["Mon", "Tue"]}, "uniqueItems": True, "maxItems": 1},
            "file": {"type": "string", "format": "path", "maxLength": 2},
        },
    }  # fmt: skip
    blanks = httpx.post(f"{server.url}/tokenize", json={"prompt": " \n\r\t"}).json()["tokens"]

    def call(**more: bool) -> httpx.Response:
        return ask(
            server, "chat/completions", messages=[USER], tool_choice="required", parallel_tool_calls=False, max_tokens=300,
            tools=[{"type": "function", "function": {"name": "plan", "parameters": schema, **more}}],
            logit_bias={str(token): -100 for token in blanks},
        )  # fmt: skip

    [made] = call().json()["choices"][0]["message"]["tool_calls"]
    assert json.loads(made["function"]["arguments"]).keys() == {"days", "file"}
    refused = call(strict=True)
    assert refused.status_code == 400
    assert "uniqueItems" in refused.json()["error"]["message"]


def test_a_turn_without_words(server: Served) -> None:
    """An agent hands back what was said to it: nothing, a refusal, a call without arguments."""
    call = {"id": "call_1", "type": "function", "function": {"name": "now", "arguments": ""}}
    message = {"role": "assistant", "content": None, **nulls("refusal", "audio", "function_call"), "annotations": []}
    turns = [{**message, "tool_calls": [call]}, {"role": "tool", "tool_call_id": "call_1", "content": "noon"}, message]
    answer = ask(server, "chat/completions", messages=[USER, *turns, USER], max_tokens=2, prompt_cache_retention="24h")
    assert answer.status_code == 200, answer.text


@pytest.mark.parametrize("length", [3000, 50_000])
def test_too_long_is_told_so_that_programs_know_it(server: Served, length: int) -> None:
    """inspect-ai, langchain and dspy go by the code, litellm by the words: they cut the prompt, or go elsewhere."""
    for route, body in (
        ("chat/completions", {"messages": [{**USER, "content": "a" * length}]}),
        ("completions", {"prompt": "a" * length}),
    ):
        answer = ask(server, route, **body)
        error = answer.json()["error"]
        assert (answer.status_code, error["code"]) == (400, "context_length_exceeded")
        assert "this model's maximum context length is" in error["message"]
        assert "shorten" in error["message"]


@pytest.mark.parametrize("route", ["/chat/completions", "/v1/responses", "/v1/messages"])
def test_whoever_asks_elsewhere_is_told_where(server: Served, route: str) -> None:
    """An address without /v1 is the commonest mistake; the others are what newer clients ask first."""
    answer = httpx.post(f"{server.url}{route}", json={"model": "tiny", "input": "hi"})
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (404, "unknown_route")
    assert "chat/completions, embeddings and models, below /v1" in error["message"]
