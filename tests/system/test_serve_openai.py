"""OpenAI's routes, asked by OpenAI's own SDK, by lm-eval's calls and by curl, over a real socket."""

from __future__ import annotations

import asyncio
import json
import math
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
from profiled import LETTERS, REQUESTS, TOKENS, analyze, needs_aiperf, needs_perf_analyzer, profile
from served import Served, make_folder, model, served

from weft.checkpoint.weights import load_decoder
from weft.serve.generate import complete
from weft.serve.requests.request import Sampling

TOOL: Any = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object", "properties": {"city": {"enum": ["Rome", "Oslo"]}}, "required": ["city"],
            "additionalProperties": False,
        },
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("served") / "tiny")


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Served]:
    with served(model(folder), apart=True) as one:
        yield one


@pytest.fixture(scope="module")
def client(server: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as one:
        yield one


def post(server: Served, route: str, body: Any, **headers: str) -> httpx.Response:
    return httpx.post(f"{server.url}{route}", json=body, headers=headers, timeout=60)


def greedy(folder: Path, prompt: str, tokens: int) -> list[int]:
    _, decoder = load_decoder(folder)
    return complete(decoder, [bytes_to_ids(prompt, folder)], Sampling(max_tokens=tokens))[0]


def bytes_to_ids(prompt: str, folder: Path) -> list[int]:
    from tokenizers import Tokenizer

    return list(Tokenizer.from_file(str(folder / "tokenizer.json")).encode(prompt).ids)


def test_a_completion_is_the_engines(client: openai.OpenAI, folder: Path) -> None:
    from tokenizers import Tokenizer

    told = client.completions.create(
        model="tiny", prompt="Once upon", max_tokens=12, temperature=0, extra_body={"return_token_ids": True}
    )
    expected = greedy(folder, "Once upon", 12)
    assert told.choices[0].model_extra is not None
    assert told.choices[0].model_extra["token_ids"] == expected
    text = Tokenizer.from_file(str(folder / "tokenizer.json")).decode(expected)
    assert text.startswith(told.choices[0].text.rstrip("\ufffd"))
    assert told.choices[0].finish_reason == "length"
    assert told.usage is not None
    assert (told.usage.prompt_tokens, told.usage.completion_tokens, told.usage.total_tokens) == (9, 12, 21)
    assert told.system_fingerprint == "weft-1"


def test_every_form_of_prompt(client: openai.OpenAI, folder: Path) -> None:
    ids = [bytes_to_ids(text, folder) for text in ("one", "three")]
    settings: Any = {"model": "tiny", "max_tokens": 6, "temperature": 0}
    texts = [client.completions.create(prompt=text, **settings).choices[0].text for text in ("one", "three")]
    by_list = client.completions.create(prompt=["one", "three"], **settings).choices
    by_ids = client.completions.create(prompt=ids, **settings).choices
    assert [one.text for one in by_list] == [one.text for one in by_ids] == texts
    assert [one.index for one in by_list] == [0, 1]
    assert client.completions.create(prompt=ids[0], **settings).choices[0].text == texts[0]


def test_a_stream_says_what_the_whole_says(client: openai.OpenAI) -> None:
    settings: Any = {"model": "tiny", "prompt": ["ab", "cd"], "max_tokens": 9, "temperature": 0.8, "seed": 3, "n": 2}
    whole = client.completions.create(**settings)
    texts, ends, usage = {}, {}, None
    for event in client.completions.create(stream=True, stream_options={"include_usage": True}, **settings):
        usage = event.usage or usage
        for choice in event.choices:
            texts[choice.index] = texts.get(choice.index, "") + choice.text
            if choice.finish_reason:
                ends[choice.index] = choice.finish_reason
    assert [texts[index] for index in range(4)] == [one.text for one in whole.choices]
    assert ends == dict.fromkeys(range(4), "length")
    assert usage is not None
    assert whole.usage is not None
    assert usage.total_tokens == whole.usage.total_tokens == 2 * 2 + 4 * 9
    assert texts[0] != texts[1]
    more = {"stream_options": {"continuous_usage_stats": True}, "ignore_eos": True}
    counts = [
        event.usage.completion_tokens
        for event in client.completions.create(model="tiny", prompt="ab", max_tokens=4, stream=True, extra_body=more)
        if event.usage is not None
    ]
    assert counts == sorted(counts)
    assert counts[-1] == 4


def test_lm_evals_calls(server: Served, folder: Path) -> None:
    """`local-completions` scores a text so: token ids, echo, logprobs 1, one token that it drops."""
    prompts = [bytes_to_ids(text, folder) for text in ("The sky is blue", "Water is wet")]
    body = {
        "model": "tiny", "prompt": prompts, "temperature": 0, "max_tokens": 1, "logprobs": 1, "echo": True, "seed": 1234,
    }  # fmt: skip
    choices = post(server, "/v1/completions", body).json()["choices"]
    _, decoder = load_decoder(folder)
    for prompt, choice in zip(prompts, sorted(choices, key=lambda one: one["index"]), strict=True):
        told = choice["logprobs"]
        assert told["token_logprobs"][0] is None
        assert len(told["token_logprobs"]) == len(told["top_logprobs"]) == len(told["tokens"]) == len(prompt) + 1
        with torch.inference_mode():
            expected = decoder(torch.tensor([prompt]))[0].log_softmax(-1)
        for place, token in enumerate(prompt[1:]):
            assert told["token_logprobs"][place + 1] == pytest.approx(float(expected[place, token]), abs=1e-4)
            is_greedy = told["token_logprobs"][place + 1] == max(told["top_logprobs"][place + 1].values())
            assert is_greedy == (int(expected[place].argmax()) == token)
        assert choice["text"].startswith("".join(told["tokens"][:-1]))
        assert told["text_offset"] == [sum(map(len, told["tokens"][:at])) for at in range(len(prompt) + 1)]
    scored = post(server, "/v1/completions", {**body, "max_tokens": 0}).json()
    first, *again = scored["choices"][0]["logprobs"]["token_logprobs"]
    assert first is None
    # whether both prompts were read in one step is by chance, and so is a sum's last bit
    assert again == pytest.approx(choices[0]["logprobs"]["token_logprobs"][1:-1], abs=1e-5)
    assert scored["usage"]["completion_tokens"] == 0


@needs_perf_analyzer
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("route", ["v1/chat/completions", "v1/completions"])
def test_perf_analyzer_measures_the_server(server: Served, route: str, stream: bool, tmp_path: Path) -> None:
    """Its openai kind, which streams where the body says so (`--streaming` is for gRPC alone)."""
    prompt = {"messages": [{"role": "user", "content": "Hi"}]} if "chat" in route else {"prompt": "Hi"}
    body = {**prompt, "model": "tiny", "max_tokens": TOKENS, "stream": stream, "structured_outputs": {"regex": LETTERS}}
    more = ("--service-kind", "openai", "--endpoint", route, "-i", "http", "--async")
    found = analyze(server.url.removeprefix("http://"), "tiny", tmp_path / "out", {"payload": [body]}, *more)
    for request in found:
        told = "".join(one["response"] for one in request["response_outputs"])
        lines = [line.removeprefix("data: ") for line in told.split("\n") if line.strip()]
        assert (lines[-1] == "[DONE]") is stream
        events = [json.loads(line) for line in lines[: -1 if stream else None]]
        assert "".join(words(event["choices"][0]) for event in events).isalpha()
        assert sum(len(words(event["choices"][0])) for event in events) == TOKENS
    pieces = sum(len(request["response_timestamps"]) for request in found)  # events that come together are one
    assert (pieces > len(found)) is stream


def words(choice: dict[str, Any]) -> str:
    """Of either route, streaming or not."""
    return str(choice.get("text") or (choice.get("message") or choice.get("delta") or {}).get("content") or "")


@needs_aiperf
@pytest.mark.slow
def test_aiperf_measures_the_server(server: Served, folder: Path, tmp_path: Path) -> None:
    told = profile(
        server.url, "tiny", folder, tmp_path, "--endpoint-type", "chat", "--use-server-token-count", "--extra-inputs",
        json.dumps({"guided_regex": LETTERS}),
    )  # fmt: skip
    lengths = told["output_sequence_length"]
    assert lengths["min"] == lengths["max"] == TOKENS
    assert told["total_usage_completion_tokens"]["avg"] == REQUESTS * TOKENS


def test_best_of_tells_the_likeliest(client: openai.OpenAI) -> None:
    settings: Any = {"model": "tiny", "prompt": "ab", "max_tokens": 8, "temperature": 1.5, "seed": 5, "logprobs": 0}
    every = client.completions.create(n=6, **settings).choices
    means = {}
    for one in every:
        assert one.logprobs is not None
        assert one.logprobs.token_logprobs is not None
        means[one.text] = sum(value for value in one.logprobs.token_logprobs if value is not None) / 8
    best = client.completions.create(n=2, best_of=6, **settings)
    assert [one.text for one in best.choices] == sorted(means, key=lambda text: -means[text])[:2]


def test_vllms_fields(server: Served) -> None:
    plain = {"prompt": "abc", "max_tokens": 8, "temperature": 0}

    def text(**more: Any) -> dict[str, Any]:
        answer = post(server, "/v1/completions", {**plain, "return_token_ids": True, **more})
        assert answer.status_code == 200, answer.text
        return answer.json()["choices"][0]

    first = text()["token_ids"]
    assert text(top_k=1, temperature=1.0)["token_ids"] == first
    assert text(min_p=1.0, temperature=1.0)["token_ids"] == first
    assert text(stop_token_ids=[first[3]])["token_ids"] == first[: first.index(first[3]) + 1]
    assert text(stop_token_ids=[first[3]])["stop_reason"] == first[3]
    assert len(text(stop_token_ids=[first[0]], min_tokens=4)["token_ids"]) > 4
    assert first[0] not in text(logit_bias={str(first[0]): -100})["token_ids"]
    assert text(repetition_penalty=50.0)["token_ids"] != first
    assert text(guided_choice=["yes", "no (not)"])["text"] in ("yes", "no (not)")
    assert text(guided_regex="[0-9]{3}")["text"].isdecimal()
    assert text(structured_outputs={"json": {"enum": [7]}})["text"] == "7"
    assert text(structured_outputs={"grammar": 'start: "a" "b"'})["text"] == "ab"
    told = text(prompt_logprobs=2)["prompt_logprobs"]
    assert told[0] is None
    assert [len(one) for one in told[1:]] == [len(one) for one in told[1:] if 2 <= len(one) <= 3]
    assert text(priority=-5, cache_salt="mine", ignore_eos=True)["token_ids"] == first


def test_a_chat(client: openai.OpenAI) -> None:
    messages: Any = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
    ]
    settings: Any = {"model": "tiny", "messages": messages, "temperature": 0, "max_completion_tokens": 10}
    whole = client.chat.completions.create(logprobs=True, top_logprobs=2, **settings)
    told = whole.choices[0]
    assert told.logprobs is not None
    assert told.logprobs.content is not None
    assert len(told.logprobs.content) == 10
    assert bytes(told.logprobs.content[0].bytes or []).decode("utf-8", "replace")
    assert told.logprobs.content[0].logprob == max(one.logprob for one in told.logprobs.content[0].top_logprobs)
    text, ends, roles = "", [], []
    for event in client.chat.completions.create(stream=True, **settings):
        text += event.choices[0].delta.content or ""
        roles.append(event.choices[0].delta.role)
        ends.append(event.choices[0].finish_reason)
    assert text == told.message.content
    assert roles[0] == "assistant"
    assert set(roles[1:]) == {None}
    assert [end for end in ends if end] == ["length"]
    more: Any = {"extra_body": {"return_token_ids": True, "prompt_logprobs": 1}, **settings}
    extra = client.chat.completions.create(**more).model_extra
    assert extra is not None
    events = [event.choices[0].model_extra or {} for event in client.chat.completions.create(stream=True, **more)]
    stop: Any = {**settings, "extra_body": {"stop_token_ids": list(range(256))}}
    assert (client.chat.completions.create(**stop).choices[0].model_extra or {})["stop_reason"] in range(256)
    [*_, last] = client.chat.completions.create(stream=True, **stop)
    assert last.choices[0].model_extra == client.chat.completions.create(**stop).choices[0].model_extra
    for name in ("prompt_token_ids", "prompt_logprobs"):  # a stream's first event says what the whole says
        assert events[0][name] == extra[name]
        assert not any(name in event for event in events[1:])


def test_a_chat_in_a_form(client: openai.OpenAI) -> None:
    form = {
        "type": "object",
        "properties": {"ok": {"type": "boolean"}},
        "required": ["ok"],
        "additionalProperties": False,
    }
    settings: Any = {"model": "tiny", "messages": [{"role": "user", "content": "?"}], "seed": 1, "max_tokens": 200}
    told = client.chat.completions.create(
        response_format={"type": "json_schema", "json_schema": {"name": "answer", "schema": form}}, **settings
    )
    assert set(json.loads(told.choices[0].message.content or "")) == {"ok"}
    assert told.choices[0].finish_reason == "stop"


def test_a_chat_that_has_to_call(client: openai.OpenAI) -> None:
    settings: Any = {
        "model": "tiny", "messages": [{"role": "user", "content": "?"}], "tools": [TOOL], "seed": 1, "max_tokens": 300,
        "tool_choice": {"type": "function", "function": {"name": "weather"}},
    }  # fmt: skip
    told = client.chat.completions.create(**settings).choices[0]
    assert told.finish_reason == "tool_calls"
    assert told.message.tool_calls is not None
    [call] = told.message.tool_calls
    assert call.type == "function"
    assert call.function.name == "weather"
    assert json.loads(call.function.arguments)["city"] in ("Rome", "Oslo")
    parts, ends = [], []
    for event in client.chat.completions.create(stream=True, **settings):
        parts += event.choices[0].delta.tool_calls or []
        ends.append(event.choices[0].finish_reason)
    assert [part.index for part in parts] == [0]
    assert parts[0].function is not None
    assert parts[0].function.arguments == call.function.arguments
    assert ends[-1] == "tool_calls"
    answered = [
        *settings["messages"], {"role": "assistant", "content": None, "tool_calls": [call.model_dump()]},
        {"role": "tool", "tool_call_id": call.id, "content": "sunny"},
    ]  # fmt: skip
    more = client.chat.completions.create(model="tiny", messages=answered, max_tokens=5)
    assert more.choices[0].finish_reason in ("length", "stop")


def test_a_chat_that_thinks_and_may_call(client: openai.OpenAI) -> None:
    """A regular expression has random weights say what a tuned model would."""
    call = '<tool_call>\\{"name": "weather", "arguments": \\{"city": "Rome"\\}\\}</tool_call>'
    settings: Any = {
        "model": "tiny", "messages": [{"role": "user", "content": "?"}], "tools": [TOOL], "seed": 1, "max_tokens": 300,
        "extra_body": {"guided_regex": f"<think>Well\\.</think>So: {call}"},
    }  # fmt: skip
    told = client.chat.completions.create(**settings).choices[0]
    assert told.finish_reason == "tool_calls"
    assert told.message.content == "So: "
    assert told.message.model_extra == {"reasoning_content": "Well."}
    [called] = told.message.tool_calls or []
    assert called.type == "function"
    assert (called.function.name, json.loads(called.function.arguments)) == ("weather", {"city": "Rome"})
    parts: dict[str, str] = {"content": "", "reasoning_content": "", "arguments": ""}
    for event in client.chat.completions.create(stream=True, **settings):
        delta = event.choices[0].delta
        parts["content"] += delta.content or ""
        parts["reasoning_content"] += (delta.model_extra or {}).get("reasoning_content", "")
        parts["arguments"] += "".join(one.function.arguments for one in delta.tool_calls or [])  # type: ignore[union-attr,misc]
    assert parts == {"content": "So: ", "reasoning_content": "Well.", "arguments": called.function.arguments}
    answered = [
        *settings["messages"], {**told.message.model_dump(exclude_none=True), "reasoning": "Well."},
        {"role": "tool", "tool_call_id": called.id, "content": "sunny"},
    ]  # fmt: skip
    assert client.chat.completions.create(**{**settings, "messages": answered}).choices[0].finish_reason == "tool_calls"


def test_special_tokens_are_told_where_they_are_asked_for(server: Served) -> None:
    for route, prompt in (
        ("completions", {"prompt": "a"}),
        ("chat/completions", {"messages": [{"role": "user", "content": "a"}]}),
    ):
        body = {**prompt, "logit_bias": {"257": 100}, "max_tokens": 2, "temperature": 0}
        for skip, text in ((True, ""), (False, "<|turn|><|turn|>")):
            told = post(server, f"/v1/{route}", {**body, "skip_special_tokens": skip}).json()["choices"][0]
            assert (told.get("text") or (told.get("message") or {}).get("content") or "") == text


def test_async_and_many_at_once(server: Served) -> None:
    async def main() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none") as client:

            async def one(number: int) -> str:
                stream = await client.completions.create(
                    model="tiny", prompt=f"number {number % 3}", max_tokens=10, temperature=0, stream=True
                )
                return "".join([event.choices[0].text async for event in stream])

            return await asyncio.gather(*(one(number) for number in range(12)))

    texts = asyncio.run(main())
    assert [texts[number] for number in range(3, 12)] == [texts[number % 3] for number in range(3, 12)]


def test_models_tokens_and_embeddings(client: openai.OpenAI, server: Served) -> None:
    assert [one.id for one in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"
    assert httpx.get(f"{server.url}/v1/models/").json() == httpx.get(f"{server.url}/v1/models").json()
    told = post(server, "/tokenize", {"prompt": "héllo", "return_token_strs": True}).json()
    assert told["count"] == len(told["tokens"]) == 6
    assert told["token_strs"][1:3] == ["bytes:\\xc3", "bytes:\\xa9"]
    assert post(server, "/detokenize", {"tokens": told["tokens"]}).json() == {"prompt": "héllo"}
    chat = post(server, "/tokenize", {"messages": [{"role": "user", "content": "<|end|>"}]}).json()["tokens"]
    assert chat.count(256) == 1  # the turn's own; the one in the message is seven characters
    asked: Any = {"messages": [{"role": "user", "content": "?"}], "tools": [TOOL]}
    counted = post(server, "/tokenize", asked).json()["count"]
    answer = client.chat.completions.create(model="tiny", max_tokens=1, **asked)
    assert answer.usage is not None
    assert counted == answer.usage.prompt_tokens > post(server, "/tokenize", asked | {"tools": []}).json()["count"]
    vectors = [one.embedding for one in client.embeddings.create(model="tiny", input=["a b", "a b", "zzz"]).data]
    assert vectors[0] == vectors[1] != vectors[2]
    assert math.sqrt(sum(value**2 for value in vectors[0])) == pytest.approx(1, abs=1e-5)
    plain = client.embeddings.create(model="tiny", input="a b", encoding_format="float").data[0].embedding
    assert plain == pytest.approx(vectors[0], abs=1e-6)


def test_an_answer_may_go_on_with_the_last_message(server: Served) -> None:
    messages = [{"role": "user", "content": "?"}]
    begun = post(server, "/tokenize", {"messages": messages}).json()["tokens"]
    messages.append({"role": "assistant", "content": "{<|end|> "})
    for settings, ends in (({"continue_final_message": True}, False), ({"add_generation_prompt": False}, True)):
        tokens = post(server, "/tokenize", {"messages": messages, **settings}).json()["tokens"]
        assert tokens[: len(begun)] == begun
        more = tokens[len(begun) :]
        assert [token == 256 for token in more] == [False] * 9 + [True] * ends  # what is written is no special token
        assert post(server, "/detokenize", {"tokens": more[:9]}).json()["prompt"] == "{<|end|> "
        answer = post(server, "/v1/chat/completions", {"messages": messages, "max_tokens": 1, **settings}).json()
        assert answer["usage"]["prompt_tokens"] == len(tokens)
    both = {"messages": messages, "continue_final_message": True, "add_generation_prompt": True}
    refused = post(server, "/v1/chat/completions", both)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "add_generation_prompt")


def test_what_a_models_makers_advise_holds_where_a_request_says_nothing(tmp_path: Path) -> None:
    advised = {"temperature": 0.0, "top_k": 3, "top_p": 1.0, "repetition_penalty": 1.3}
    folder = make_folder(tmp_path / "advised")
    more = {"eos_token_id": 256, "do_sample": False, "min_p": None}
    (folder / "generation_config.json").write_text(json.dumps(advised | more))
    body = {"prompt": "abc", "max_tokens": 24, "ignore_eos": True}
    with served(model(folder)) as one:
        assert httpx.get(f"{one.url}/v1/models").json()["data"][0]["sampling"] == advised

        def say(**settings: Any) -> str:
            text: str = post(one, "/v1/completions", {**body, **settings}).json()["choices"][0]["text"]
            return text

        assert say() == say(temperature=None) == say(temperature=0, repetition_penalty=1.3) != say(repetition_penalty=1)
        drawn: Any = {"temperature": 1, "seed": 1}
        assert say(**drawn) == say(**drawn, top_k=3) != say(**drawn, top_k=-1)


def test_curl(server: Served) -> None:
    body = json.dumps({"model": "tiny", "prompt": "a", "max_tokens": 3, "stream": True})
    done = subprocess.run(
        ["curl", "-sN", f"{server.url}/v1/completions", "-H", "Content-Type: application/json", "-d", body],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    lines = [line for line in done.stdout.splitlines() if line]
    assert lines[-1] == "data: [DONE]"
    assert all(line.startswith("data: {") for line in lines[:-1])


@pytest.mark.parametrize(
    ("route", "body", "status", "param", "words"),
    [
        ("completions", {"prompt": "a", "model": "none"}, 404, "model", "does not exist"),
        ("completions", {}, 400, "prompt", "Field required"),
        ("completions", {"prompt": "a", "max_token": 3}, 400, "max_token", "Unrecognized request argument"),
        ("completions", {"prompt": "a", "suffix": "z"}, 400, "suffix", "continue a text"),
        ("completions", {"prompt": {"a": 1}}, 400, "prompt", "must be a text"),
        ("embeddings", {"input": []}, 400, "input", "input: must be a text, a list of texts"),
        ("completions", {"prompt": "a", "stop": 1}, 400, "stop", "stop: must be a text or a list of texts"),
        ("completions", {"prompt": "a" * 600}, 400, None, "the context holds 512"),
        ("completions", {"prompt": "a" * 50_000}, 400, "prompt", "shorten it"),
        ("completions", {"prompt": [9999]}, 400, None, "outside the model's vocabulary"),
        ("completions", {"prompt": [2**40], "echo": True}, 400, None, "outside the model's vocabulary"),
        ("completions", {"prompt": [[1], [-1]], "echo": True}, 400, None, "outside the model's vocabulary"),
        ("completions", {"prompt": ""}, 400, None, "the prompt is empty"),
        ("completions", {"prompt": "a", "temperature": -1}, 400, "temperature", "temperature is -1"),
        ("completions", {"prompt": "a", "n": 10**9}, 400, None, "this server takes 128"),
        ("completions", {"prompt": "a", "n": 0}, 400, "n", "greater than or equal to 1"),
        ("completions", {"prompt": "a", "logprobs": 10**6}, 400, "logprobs", "less than or equal to 20"),
        ("completions", {"prompt": "a", "stop": ["x"] * 99}, 400, None, "99 stop texts"),
        ("completions", {"prompt": "a", "best_of": 2, "n": 3}, 400, "best_of", "fewer than n"),
        ("completions", {"prompt": "a", "guided_json": {"type": "nonsense"}}, 400, None, "cannot be compiled"),
        ("completions", {"prompt": "a", "timeout": 0}, 400, "timeout", "greater than 0"),
        ("chat/completions", {"messages": []}, 400, "messages", "at least one"),
        ("chat/completions", {"messages": [{"role": "x", "content": "a"}]}, 400, "messages.0.role", "must be one of"),
        ("chat/completions", {"messages": [{"role": "user"}]}, 400, "messages.0.content", "is missing"),
        (
            "chat/completions",
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://a"}}]}]},
            400, "messages.0.content.0", "is no text",
        ),
        (
            "chat/completions", {"messages": [{"role": "user", "content": "a"}], "tool_choice": "required"},
            400, "tool_choice", "there is nothing to call",
        ),
        (
            "chat/completions",
            {
                "messages": [{"role": "user", "content": "a"}], "tools": [TOOL],
                "tool_choice": {"type": "function", "function": {"name": "time"}},
            },
            400, "tool_choice", "no tool is named 'time'",
        ),
        ("completions", {"prompt": "a", "max_tokens": 2, "min_tokens": 3}, 400, "min_tokens", "from 0 to max_tokens"),
        ("completions", {"prompt": "a", "stop": ""}, 400, None, "a stop text is empty"),
        ("embeddings", {"input": "a", "dimensions": 7}, 400, "dimensions", "have 32 numbers"),
    ],
)  # fmt: skip
def test_what_is_refused_is_told_as_openai_does(
    server: Served, route: str, body: Any, status: int, param: str | None, words: str
) -> None:
    answer = post(server, f"/v1/{route}", body)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (status, param), error
    assert words in error["message"]
    assert set(error) == {"message", "type", "param", "code"}


def test_the_sdk_knows_the_errors(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="suffix"):
        client.completions.create(model="tiny", prompt="a", suffix="b")
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.completions.create(model="none", prompt="a")
