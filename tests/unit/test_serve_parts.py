"""Parts of the server: settings, templates, tools, words, errors, refusals."""

from __future__ import annotations

import asyncio
import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prompt_models import save_tiny
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from typer.testing import CliRunner

from weft.cli.app import app
from weft.cli.serve import address, read_keys, routes, split_adapters, split_name
from weft.serve import engine
from weft.serve.apart import EngineError
from weft.serve.desk import DeadError
from weft.serve.folder import load_tokenizer
from weft.serve.requests.request import Output, RefusedError, TokenLogprob, TooLongError
from weft.serve.server import loading
from weft.serve.server.chat import ChatTemplate, find_template, hide, split_forged
from weft.serve.server.config import ModelConfig, ServerConfig, is_loopback
from weft.serve.server.errors import FAILED, FieldError, HttpError, UnknownModelError, UnloadedError, cut_off, problem
from weft.serve.server.keys import Keys
from weft.serve.server.limits import Limits
from weft.serve.server.openai.messages import read_messages
from weft.serve.server.openai.tools import Choice, forced_form, moved, read_choice, read_tools
from weft.serve.server.outputs import joined
from weft.serve.server.words import Words

ONE = (ModelConfig("a", Path("a")),)


# -- settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"models": ()}, "no model to serve"),
        ({"models": ONE * 2}, "two models or adapters are named a: give each its own name"),
        ({"models": (ModelConfig("a\n", Path("a")),)}, "cannot be a model's name"),
        ({"host": "0.0.0.0"}, "can be reached from other machines, and there is no API key"),
        ({"host": "somewhere"}, "say --open where a proxy"),
        ({"api_keys": ("",)}, "an API key is empty"),
        ({"request_seconds": 0}, "request_seconds is 0"),
        ({"request_seconds": math.nan}, r"request_seconds is nan; it must be above 0 \(--timeout\)"),
        ({"gate": math.nan}, "gate is nan; it must be 0 or more"),
        ({"drain_seconds": -1}, "drain_seconds is -1"),
        ({"port": -1}, "port is -1; it must be from 0, which takes a free one, to 65535"),
        ({"grpc_port": 99999}, "grpc_port is 99999"),  # gRPC itself would take another one, and say nothing
        ({"port": 8000, "grpc_port": 8000}, "port and grpc_port are both 8000: HTTP and gRPC want one each"),
        ({"gate_text": Path("none")}, "there is no file none"),
        ({"model_control": True, "api_keys": ("a", "b")}, "none may load and unload models; write admin behind"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ServerConfig(**{"models": ONE, **settings})


def test_a_gates_text_is_a_text(tmp_path: Path) -> None:
    file = tmp_path / "page.txt"
    for text, words in ((b"\xff", r"page\.txt is not text in UTF-8"), (b" \n", r"gate_text: .*page\.txt is empty")):
        file.write_bytes(text)
        with pytest.raises(ValueError, match=words):
            ServerConfig(ONE, gate_text=file)
    file.write_text("a page")
    assert ServerConfig(ONE, port=0, grpc_port=0, gate_text=file).gate_text == file


def test_other_machines_are_served_with_a_key_or_a_word() -> None:
    assert ServerConfig(ONE, "0.0.0.0", api_keys=("k",)).host == ServerConfig(ONE, "0.0.0.0", open=True).host
    assert [is_loopback(host) for host in ("127.0.0.1", "::1", "localhost", "10.0.0.1")] == [True, True, True, False]


def test_who_is_an_administrator() -> None:
    """Whoever is marked; where nobody can be told from another, everybody; and of several, unmarked, nobody."""
    several = {"api_keys": ("a", "b"), "admin_keys": ("b",)}
    cases: list[tuple[dict[str, Any], list[bool]]] = [
        ({}, [True]), ({"api_keys": ("a",)}, [True]), (several, [False, True]), ({"api_keys": ("a", "b")}, [False, False]),
    ]  # fmt: skip
    for settings, expected in cases:
        config = ServerConfig(ONE, **settings)
        keys = Keys(config.api_keys)
        tenants = [keys.tenant(f"Bearer {key}") for key in config.api_keys or ("",)]
        assert [config.is_admin(tenant) for tenant in tenants] == expected


def test_limits() -> None:
    with pytest.raises(ValueError, match="limits: stops is 0"):
        Limits(stops=0)
    with pytest.raises(ValueError, match="5000 bytes of stop texts; this server takes 4096"):
        Limits().check_stops(["x" * 5000])


def test_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WEFT_API_KEY", raising=False)
    run = tmp_path / "run"
    (run / "checkpoints" / "step-00000002").mkdir(parents=True)
    assert split_name(f"x={run}") == ("x", run)
    assert split_name(str(run))[0] == split_name(str(run / "checkpoints" / "step-00000002"))[0] == "run"
    with pytest.raises(
        ValueError, match=r"--adapter: .*run has no adapter_config\.json: give the directory that peft's"
    ):
        split_adapters([str(run)])
    (run / "adapter_config.json").write_text("{}")
    assert split_adapters([f"x={run}", str(run)]) == {"x": str(run), "run": str(run)}
    with pytest.raises(ValueError, match=r"--adapter: two are named run: give each its own name"):
        split_adapters([str(run), str(run)])
    with pytest.raises(ValueError, match=r"--adapter: there is no directory nowhere"):
        split_adapters(["x=nowhere"])
    with pytest.raises(ValueError, match="there is no file"):
        read_keys(tmp_path / "keys")
    (tmp_path / "keys").write_text("\n")
    with pytest.raises(ValueError, match="has no key"):
        read_keys(tmp_path / "keys")
    (tmp_path / "keys").write_bytes(b"\xff\n")
    with pytest.raises(ValueError, match=r"keys is not text in UTF-8"):
        read_keys(tmp_path / "keys")
    (tmp_path / "keys").write_text("one\n\ntwo\n")
    monkeypatch.setenv("WEFT_API_KEY", "zero\n")
    assert read_keys(tmp_path / "keys") == (("zero", "one", "two"), ())
    (tmp_path / "keys").write_text("one  admin\n\n two\n")
    assert read_keys(tmp_path / "keys") == (("zero", "one", "two"), ("one",))
    for line in ("two three", "two admin too", "two Admin"):
        (tmp_path / "keys").write_text(f"one\n{line}\n")
        with pytest.raises(ValueError, match=r"keys, line 2: a key is one word, and behind it stands admin or nothing"):
            read_keys(tmp_path / "keys")
    assert address(ServerConfig(ONE, "::1"), 5) == "http://[::1]:5"
    assert "Authorization: Bearer $WEFT_API_KEY" in routes(ServerConfig(ONE, api_keys=("zero",)), [5])
    monkeypatch.delenv("WEFT_API_KEY")
    assert "Authorization: Bearer KEY" in routes(ServerConfig(ONE, api_keys=("zero",)), [5])  # a file's
    assert "generate_stream of each model, gRPC at 127.0.0.1:6\n" in routes(ServerConfig(ONE), [5, 6])


# -- chats ------------------------------------------------------------------------------------------------------------


def test_a_template_is_jinja_in_a_sandbox() -> None:
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    source = (
        "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}{{ bos_token }}{{ m.content }}{% endfor %}"
    )
    assert ChatTemplate(source, {"bos_token": "<s>"}).render(messages) == "<s>a"
    assert ChatTemplate("{{ tools | tojson }}", {}).render(messages, [{"a": "<ü>"}]) == '[{"a": "<ü>"}]'
    assert ChatTemplate("{% generation %}{{ strftime_now('%Y') }}{% endgeneration %}", {}).render(messages).isdecimal()
    ChatTemplate("{{ messages.append(1) }}{{ messages[0].clear() }}{{ tools.clear() }}", {}).render(
        messages, [{"a": "b"}]
    )
    assert messages[0] == {"role": "user", "content": "a"}
    for attack in ("{{ ''.__class__.__mro__ }}", "{% for a in range(10**9) %}{% endfor %}"):
        with pytest.raises(FieldError):
            ChatTemplate(attack, {}).render(messages)
    with pytest.raises(FieldError, match="refuses these messages: no system"):
        ChatTemplate("{{ raise_exception('no system') }}", {}).render(messages)
    with pytest.raises(ValueError, match="not a Jinja2 template"):
        ChatTemplate("{% if %}", {})


def test_where_a_template_stands(tmp_path: Path) -> None:
    assert find_template(tmp_path) is None
    table: dict[str, Any] = {"chat_template": "one{{ eos_token }}", "eos_token": {"content": "</s>"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(table))
    found = find_template(tmp_path)
    assert found is not None
    assert found.render([]) == "one</s>"
    table["chat_template"] = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": "two"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(table))
    found = find_template(tmp_path)
    assert found is not None
    assert found.source == "two"
    for wrong in ({"name": "default"}, "x"):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({**table, "chat_template": [wrong]}))
        with pytest.raises(ValueError, match=r"tokenizer_config\.json: chat_template has an entry without name and"):
            find_template(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("three")
    found = find_template(tmp_path)
    assert found is not None
    assert found.source == "three"
    with pytest.raises(ValueError, match="there is no chat template"):
        find_template(tmp_path, tmp_path / "none")


@given(st.lists(st.sampled_from(["<s>", "a", "\ufdd0", "\ufdd1", "0", "<s", ">"]), max_size=8).map("".join))
def test_what_looks_like_a_special_token_comes_back_as_text(text: str) -> None:
    hidden = hide({"content": [text]}, ["<s>"])["content"][0]
    pieces = split_forged(f"<s>{hidden}</s>")
    whole = "".join("<s>" if number % 2 else piece for number, piece in enumerate(pieces))
    assert whole == f"<s>{text}</s>".replace("\ufdd0", "").replace("\ufdd1", "")
    assert all(piece == "0" for piece in pieces[1::2])


def test_what_stands_for_a_special_token_is_no_other_one() -> None:
    assert hide(["a1<s>", {"b": "<s"}], ["<s>", "1", "<s"]) == ["a\ufdd01\ufdd1\ufdd00\ufdd1", {"b": "\ufdd02\ufdd1"}]
    assert hide("a1", []) == "a1"


def test_messages_are_made_plain() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    found = read_messages(
        [
            {"role": "developer", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
            {"role": "assistant", "content": None, "tool_calls": [call]},
        ]
    )
    assert found[0] == {"role": "system", "content": "ab"}
    assert found[1]["tool_calls"][0]["function"]["arguments"] == {"x": 1}
    bare = {"id": "1", "type": "function", "function": {"name": "f", "arguments": ""}}
    assert (
        read_messages([{"role": "assistant", "tool_calls": [bare]}])[0]["tool_calls"][0]["function"]["arguments"] == {}
    )
    for said, content in (
        ({"content": None}, ""),
        ({"content": None, "refusal": "no", "tool_calls": None, "function_call": None}, "no"),
        ({"content": [{"type": "text", "text": "a"}, {"type": "refusal", "refusal": "b"}]}, "ab"),
    ):
        assert read_messages([{"role": "assistant", **said}]) == [{"role": "assistant", "content": content}]
    for value, where in (
        ("text", "messages"),
        (["text"], "messages.0"),
        ([{"role": "assistant", "tool_calls": 1}], "messages.0.tool_calls"),
        ([{"role": "assistant", "tool_calls": [{}]}], "messages.0.tool_calls.0.function"),
        ([{"role": "user", "content": 1}], "messages.0.content"),
        ([{"role": "user", "content": None, "refusal": "no"}], "messages.0.content"),
        ([{"role": "assistant", "content": None, "refusal": 1}], "messages.0.content"),
        ([{"role": "assistant", "content": None, "function_call": {"name": "f"}}], "messages.0.function_call"),
        ([{"role": "user", "content": "", "name": 1}], "messages.0.name"),
    ):
        with pytest.raises(FieldError) as caught:
            read_messages(value)
        assert caught.value.param == where


# -- tools ------------------------------------------------------------------------------------------------------------

TOOLS = read_tools([{"type": "function", "function": {"name": name}} for name in ("f", "g")])


def test_who_has_to_call_has_a_form() -> None:
    form = forced_form(TOOLS, read_choice("required"), parallel=True)
    assert len(form["items"]["anyOf"]) == 2
    assert form["maxItems"] > 1
    named = forced_form(TOOLS, read_choice({"type": "function", "function": {"name": "g"}}), parallel=True)
    assert [one["properties"]["name"]["const"] for one in named["items"]["anyOf"]] == ["g"]
    assert named["maxItems"] == 1
    with pytest.raises(FieldError, match="no tool is named 'h'"):
        forced_form(TOOLS, Choice("named", "h"), True)
    for wrong in ("always", {"type": "function"}, 1):
        with pytest.raises(FieldError, match="tool_choice must be"):
            read_choice(wrong)
    for tools in ("f", [1], [{"type": "function", "function": {"name": "a b"}}]):
        with pytest.raises(FieldError, match="tools"):
            read_tools(tools)


def test_a_tools_schema_keeps_what_it_refers_to() -> None:
    """What pydantic makes of a class within a class, by which agents describe their tools."""
    city = {"type": "object", "properties": {"name": {"enum": ["Rome"]}, "near": {"$ref": "#/$defs/City"}}}
    data = {"$ref": "#/is/data"}
    schema = {
        "$defs": {"City": city},
        "type": "object",
        "properties": {"default": {"$ref": "#/$defs/City"}, "all": {"items": {"$ref": "#"}}, "one": {"const": data}},
        "anyOf": [{"$ref": "#/properties/one"}, {"$ref": "https://weft.example/else#/x"}],
    }
    found = moved(schema, "#/here")
    assert found["properties"]["default"] == {"$ref": "#/here/$defs/City"}
    assert found["properties"]["all"]["items"] == {"$ref": "#/here"}
    assert found["properties"]["one"]["const"] == data
    assert found["anyOf"] == [{"$ref": "#/here/properties/one"}, {"$ref": "https://weft.example/else#/x"}]
    assert found["$defs"]["City"]["properties"]["near"] == {"$ref": "#/here/$defs/City"}
    assert moved(True, "#/here") is True


# -- words and errors -------------------------------------------------------------------------------------------------


@given(st.text())
def test_a_texts_tokens_are_its_bytes(text: str) -> None:
    words = bytewise()
    ids = words.tokenizer.encode(text).ids
    assert b"".join(words.bytes_of(id) for id in ids) == text.encode()


def test_added_tokens_are_their_bytes() -> None:
    """Gemma's runs of spaces are added tokens, written as all of its spaces are."""
    tokenizer = Tokenizer(models.BPE(vocab={"a": 0, "<0xC3>": 1, "\u2581b": 2}, merges=[], byte_fallback=True))
    tokenizer.add_tokens(["\u2581\u2581", "<tool_call>"])
    assert [Words(tokenizer).bytes_of(id) for id in range(5)] == [b"a", b"\xc3", b" b", b"  ", b"<tool_call>"]
    tokenizer = Tokenizer.from_str(bytewise().tokenizer.to_str())
    tokenizer.add_tokens(["\uff5ctool\u2581call\uff5c"])  # DeepSeek's
    assert Words(tokenizer).bytes_of(257).decode() == "\uff5ctool\u2581call\uff5c"


def bytewise(found: list[Words] = []) -> Words:  # noqa: B006 (made once)
    if not found:
        alphabet = {piece: index for index, piece in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
        tokenizer = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
        tokenizer.add_special_tokens([AddedToken("<end>", special=True)])
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        found.append(Words(tokenizer))
    return found[0]


def test_a_server_whose_engine_is_a_thread_of_it_reads_the_tokenizer_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[Path] = []

    def counted(folder: Path) -> Tokenizer:
        read.append(folder)
        return load_tokenizer(folder)

    for module in (engine, loading):
        monkeypatch.setattr(module, "load_tokenizer", counted)
    folder = save_tiny(tmp_path / "tiny")
    _, desk, words, _, _ = loading.load(ModelConfig("tiny", folder), folder, apart=False)
    desk.close()
    assert read == [folder]
    assert words is not None
    assert words.decode([40, 41]) == words.tokenizer.decode([40, 41])


def test_no_client_writes_a_special_token() -> None:
    template = ChatTemplate("{{ messages[0].content }}{{ messages | tojson }}{{ tools | tojson }}{{ day }}<end>", {})
    call = {"function": {"name": "<end>", "arguments": {"<end>": ["<end>"]}}}
    messages = [{"role": "user", "content": "a<end>", "tool_calls": [call]}]
    words, more = bytewise(), {"day": "<end>", "<end>": 1}
    tokens = asyncio.run(template.encode(words, 9999, messages, [{"<end>": "<end>"}], more=more))
    assert [at for at, token in enumerate(tokens) if token == 256] == [len(tokens) - 1]  # the template's own
    assert b"".join(words.bytes_of(token) for token in tokens).count(b"<end>") == 9


def test_what_a_client_is_told() -> None:
    assert problem(RefusedError("full", 2.5)).all_headers == {"retry-after": "3"}
    assert problem(RefusedError("full", 2.5)).status == 429
    assert problem(RefusedError("bye", 5), draining=True).status == 503
    assert problem(DeadError("/secret/path")).status == 503
    assert "secret" not in problem(DeadError("/secret/path")).message
    assert problem(DeadError("x")).message == "the model is not being served at the moment; it is coming back"
    assert problem(UnloadedError("x")).message == "the model is not being served at the moment; it was unloaded"
    assert problem(UnknownModelError("no x")).openai["error"]["code"] == "model_not_found"
    assert problem(FieldError("bad", "a.b")).openai["error"]["param"] == "a.b"
    assert problem(ValueError("bad")).body("/v2/models") == {"error": "bad"}
    assert problem(TooLongError("9 tokens")).openai["error"]["code"] == "context_length_exceeded"
    assert problem(TooLongError("9 tokens")).message.startswith("9 tokens (this model's maximum context length is")
    assert "secret" not in str(problem(KeyError("secret")).body("/v1"))
    assert problem(HttpError(401, "no", "k", {"a": "b"})).all_headers == {"a": "b"}


def test_answers_that_were_cut_off() -> None:
    def status(begun: bool = True, **ended: Any) -> int | None:
        error = cut_off(Output("a", **ended), begun)
        return error.status if error else None

    assert status(finish="stop") is None
    assert status(finish="deadline") is None
    assert status(begun=False, finish="deadline") == 408
    assert status(finish="cancelled") == 503
    assert status(finish="error", error=FAILED) == 503
    assert status(finish="error", error="the text could not follow its form: x") == 400
    assert status(finish="error", error="the model's logits are not finite numbers") == 500


def test_a_server_whose_requests_do_not_know_of_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[ServerConfig] = []

    async def serve(config: ServerConfig, *told: Any) -> None:
        given.append(config)

    monkeypatch.setattr("weft.serve.server.run.serve", serve)
    monkeypatch.setattr("weft.serve.folder.find_model", lambda path: (path, []))
    done = CliRunner().invoke(app, ["serve", "run", "--invariant", "--max-sequences", "400", "--gpu-share", "0.4"])
    assert done.exit_code == 0
    engine = given[0].models[0].engine.on("cpu")
    assert (engine.invariant, engine.stride, engine.step_tokens, engine.gpu_share) == (True, 256, 656, 0.4)
    refused = CliRunner().invoke(app, ["serve", "run", "--invariant", "--draft-tokens", "4"]).exception
    assert "invariant: speculation computes several tokens at once" in str(refused)


def test_what_weft_serve_is_given_to_serve(tmp_path: Path) -> None:
    for arguments, words in (
        ([], "no model: name a checkpoint, a run or a Hugging Face directory"),
        (["run", "--triton", "models"], "--triton serves what its repository holds: leave run out"),
        (["--triton", "models", "--port", "99999"], "the port of http is 99999"),
        (["--triton", "models", "--api-key-file", "keys"], "Triton does not take --api-key-file: leave it out"),
        (["--triton", "models", "--tp", "2"], "Triton does not take --tp: leave it out"),
        (["--triton", str(tmp_path)], f"{tmp_path}"),  # Triton's own start looks at it
    ):
        error = CliRunner().invoke(app, ["serve", *arguments]).exception
        assert isinstance(error, ValueError), arguments
        assert words in str(error)


def test_an_engine_that_fails_at_the_start_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def fail(*arguments: Any) -> None:
        raise EngineError("the engine's process ended with exit code -9")

    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setattr("weft.serve.server.run.serve", fail)
    ended = CliRunner().invoke(app, ["serve", str(tmp_path)])
    assert (ended.exit_code, ended.stderr) == (1, "weft: error: the engine's process ended with exit code -9\n")


def test_what_lies_there_of_a_completion_is_told_as_one() -> None:
    one, two = TokenLogprob(1, -0.5), TokenLogprob(2, -0.25)
    outputs = [
        Output("a", 0, (1,), "x", (one,), prompt_logprobs=(None, one), cached=16, started=3.0),
        Output("a", 1, (7,), "q"),
        Output("a", 0, (2,), "y", (two,), cached=16),
        Output("a", 1, (8,), "r", finish="length"),
        Output("a", 0, finish="stop", stopped_by="end"),
        Output("b", 0, (4,), "s"),
        Output("b", 0, finish="deadline"),
    ]
    whole = Output("a", 0, (1, 2), "xy", (one, two), (None, one), "stop", "end", cached=16, started=3.0)
    assert joined(outputs) == [
        whole,
        Output("a", 1, (7, 8), "qr", finish="length"),
        Output("b", 0, (4,), "s"),
        Output("b", 0, finish="deadline"),
    ]
    assert joined(outputs[:1]) == outputs[:1]
