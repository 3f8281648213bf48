"""/v1/chat/completions."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fastapi import APIRouter
from fastapi import Request as HttpRequest
from starlette.responses import Response

from weft.serve.requests.request import Output, Request
from weft.serve.server.catalogue import Catalogue
from weft.serve.server.chat import ChatTemplate
from weft.serve.server.config import ServerConfig
from weft.serve.server.errors import FieldError, cut_off
from weft.serve.server.openai.asking import make_grammar, make_requests
from weft.serve.server.openai.bodies import ChatBody, TokenizeBody, read
from weft.serve.server.openai.job import Job
from weft.serve.server.openai.logprobs import chat_logprobs, prompt_table
from weft.serve.server.openai.tools import Call, forced_form, make_call
from weft.serve.server.outputs import Outputs
from weft.serve.server.reader import AnswerReader, CallReader, Part, find_thoughts
from weft.serve.server.version import Version
from weft.serve.server.ways import Objects, Way
from weft.serve.server.words import any_of


def chats_router(catalogue: Catalogue, config: ServerConfig) -> APIRouter:
    router = APIRouter()

    @router.post("/v1/chat/completions")
    async def chat(http: HttpRequest) -> Response:
        body = await read(ChatBody, http)
        hosted, version = catalogue.find(body.model)
        prompt = await tokenize_chat(body, version, config)
        forced = None
        if body.tool_choice.mode in ("required", "named"):
            forced = forced_form(body.tools, body.tool_choice, body.parallel_tool_calls)
        most = body.max_completion_tokens or body.max_tokens
        if most == 0:
            raise FieldError("max_tokens is 0; it must be at least 1", "max_tokens")
        if body.top_logprobs and not body.logprobs:
            raise FieldError("top_logprobs needs logprobs: true", "top_logprobs")
        requests = make_requests(
            body, [prompt], most or max(1, version.max_context - len(prompt)), version, config, http, n=body.n,
            logprobs=body.top_logprobs or 0 if body.logprobs else None, prompt_logprobs=body.prompt_logprobs,
            grammar=await make_grammar(body, hosted, version, http, forced), special=shows_special(body, version),
        )  # fmt: skip
        return await ChatJob(body, version, requests).answer(hosted, http.state.tenant)

    return router


def need_template(version: Version) -> ChatTemplate:
    """
    Raises:
        FieldError: the model has none.
    """
    if version.template is None:
        raise FieldError(
            "this model has no chat template, as models that were not tuned for chats have none: use /v1/completions, or "
            "start the server with --chat-template FILE",
            "messages",
        )
    return version.template


async def tokenize_chat(body: ChatBody | TokenizeBody, version: Version, config: ServerConfig) -> list[int]:
    """
    Raises:
        ValueError: too many messages or tools, ones that the template refuses, or more than there is room for.
    """
    template, words = need_template(version), version.need_words()
    messages = body.messages or []
    config.limits.check_count("messages", len(messages), config.limits.messages)
    config.limits.check_count("tools", len(body.tools), config.limits.tools)
    tools = [tool.whole for tool in body.tools] if body.tool_choice.mode != "none" else None
    if tools and body.tool_choice.mode == "auto" and not template.manner.shows_tools:
        raise FieldError(
            "this model's chat template does not show it tools, so it would never call one: leave tools out, force a "
            "call (tool_choice), or start the server with a --chat-template that shows them",
            "tools",
        )
    continues, begins = body.continue_final_message, body.add_generation_prompt
    if continues and begins:
        raise FieldError("continue_final_message: the last message goes on, and none begins: leave one out",
                         "add_generation_prompt")  # fmt: skip
    return await template.encode(
        words, version.max_context, messages, tools, not continues if begins is None else begins,
        body.chat_template_kwargs, continues,
    )  # fmt: skip


def way_of(body: ChatBody, template: ChatTemplate) -> Way | None:
    """How calls are looked for in an answer; None: they are not."""
    if not body.tools or body.tool_choice.mode == "none":
        return None
    if body.tool_choice.mode != "auto":  # forced_form
        return Objects()
    return template.way


def shows_special(body: ChatBody, version: Version) -> bool:
    """Whether the answer's text has special tokens: the client wants them, or they mark calls."""
    way = way_of(body, need_template(version))
    finds = any_of(version.need_words().special).search
    return not body.skip_special_tokens or (way is not None and any(map(finds, (*way.marks, *way.ends))))


class ChatChoice:
    """One answer as it comes."""

    def __init__(self, reader: AnswerReader) -> None:
        self.reader = reader
        self.thought = ""
        self.content = ""
        self.calls: list[Call] = []
        self.logprobs: list[Any] = []
        self.begun = False
        self.finish: str | None = None
        self.stopped_by: str | int | None = None
        self.tokens: list[int] = []


class ChatJob(Job):
    """Of one request: a chat is one prompt."""

    def __init__(self, body: ChatBody, version: Version, requests: list[Request]) -> None:
        super().__init__(body, version, requests, "chatcmpl", "chat.completion.chunk")
        self.body, [self.request] = body, requests
        self.choices = [ChatChoice(self.make_reader()) for _ in range(self.request.n)]
        self.prompt_logprobs: list[Any] | None = None

    def make_reader(self) -> AnswerReader:
        template, words = need_template(self.version), self.version.need_words()
        tail = words.decode(self.request.prompt[-16:], skip_special=False)
        thoughts, calls = find_thoughts(template.source, tail, self.request.grammar is not None), None
        if way := way_of(self.body, template):
            calls = CallReader(way, {tool.name for tool in self.body.tools})
        hides = self.request.sampling.special and self.body.skip_special_tokens
        return AnswerReader(thoughts, calls, words.special if hides else ())

    def take(self, output: Output) -> tuple[ChatChoice, Part, list[Call], dict[str, Any] | None]:
        """An answer's next part, the calls in it, and its log-probabilities.

        Raises:
            HttpError: it was cut off.
        """
        choice = self.choices[output.index]
        if error := cut_off(output, bool(choice.tokens or output.tokens)):
            raise error
        self.usage.count(output, not choice.tokens)
        choice.tokens += output.tokens
        part = choice.reader.push(self.text(output), output.finish is not None)
        calls = [make_call(name, arguments, self.body.tools) for name, arguments in part.calls]
        if not self.body.parallel_tool_calls:
            calls = calls[: max(0, 1 - len(choice.calls))]
        choice.thought += part.thought
        choice.content += part.said
        choice.calls += calls
        if output.finish is not None:
            choice.finish = "tool_calls" if choice.calls and output.finish == "stop" else output.finish
            choice.stopped_by = self.stop_reason(output)
        told = None
        if self.body.logprobs:
            told = chat_logprobs(self.namer, output.logprobs or ())
            choice.logprobs += told["content"]
        if output.prompt_logprobs is not None:
            self.prompt_logprobs = prompt_table(self.namer, output.prompt_logprobs)
        return choice, part, calls, told

    def parts(self, output: Output) -> Iterator[dict[str, Any]]:
        choice, part, calls, told = self.take(output)
        delta: dict[str, Any] = {"content": part.said} if part.said else {}
        of_prompt: dict[str, Any] = {}
        if not choice.begun:
            choice.begun = True
            delta = {"role": "assistant", "content": part.said}
            of_prompt = self._of_prompt() if output.index == 0 else {}
        if part.thought:
            delta["reasoning_content"] = part.thought
        if calls:
            start = len(choice.calls) - len(calls)
            delta["tool_calls"] = [call.table(start + number) for number, call in enumerate(calls)]
        if self.body.return_token_ids:
            delta["token_ids"] = list(output.tokens)
        if delta or told:
            yield {"index": output.index, "delta": delta, "logprobs": told, "finish_reason": None, **of_prompt}
        if choice.finish is not None:
            yield {
                "index": output.index, "delta": {}, "logprobs": None, "finish_reason": choice.finish,
                "stop_reason": choice.stopped_by,
            }  # fmt: skip

    async def whole(self, outputs: Outputs) -> dict[str, Any]:
        async for output in outputs.joined():
            self.take(output)
        choices = []
        for index, choice in enumerate(self.choices):
            message: dict[str, Any] = {"role": "assistant", "content": choice.content, "refusal": None}
            if choice.thought:
                message["reasoning_content"] = choice.thought
            if choice.calls:
                message["tool_calls"] = [call.table() for call in choice.calls]
                message["content"] = choice.content or None
            table: dict[str, Any] = {
                "index": index, "message": message, "finish_reason": choice.finish, "stop_reason": choice.stopped_by,
                "logprobs": {"content": choice.logprobs, "refusal": None} if self.body.logprobs else None,
            }  # fmt: skip
            if self.body.return_token_ids:
                table["token_ids"] = choice.tokens
            choices.append(table)
        head = {**self.head, "object": "chat.completion"}
        return {**head, "choices": choices, "usage": self.usage.table(), **self._of_prompt()}

    def _of_prompt(self) -> dict[str, Any]:
        """What is said of the prompt, where the client asked for it."""
        ids = {"prompt_token_ids": list(self.request.prompt)} if self.body.return_token_ids else {}
        return ids | ({"prompt_logprobs": self.prompt_logprobs} if self.prompt_logprobs is not None else {})
