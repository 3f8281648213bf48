"""/v1/completions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from statistics import fmean
from typing import Any

from fastapi import APIRouter
from fastapi import Request as HttpRequest
from starlette.responses import Response

from weft.serve.requests.request import Output, Request, TokenLogprob
from weft.serve.server.catalogue import Catalogue
from weft.serve.server.config import ServerConfig
from weft.serve.server.errors import FieldError, cut_off
from weft.serve.server.openai.asking import make_grammar, make_requests
from weft.serve.server.openai.bodies import CompletionBody, Prompt, read
from weft.serve.server.openai.job import Job
from weft.serve.server.openai.logprobs import CompletionLogprobs, prompt_table
from weft.serve.server.outputs import Outputs
from weft.serve.server.version import Version

MAX_TOKENS = 16
"""OpenAI's, where a request says nothing."""


def completions_router(catalogue: Catalogue, config: ServerConfig) -> APIRouter:
    router = APIRouter()

    @router.post("/v1/completions")
    async def completions(http: HttpRequest) -> Response:
        body = await read(CompletionBody, http)
        check(body)
        hosted, version = catalogue.find(body.model)
        config.limits.check_count("prompts", len(body.prompt), config.limits.prompts)  # before they are tokenized
        prompts = await tokenize(body.prompt, version, body.add_special_tokens)
        asked = body.max_completion_tokens or body.max_tokens
        max_tokens = MAX_TOKENS if asked is None else asked
        logprobs = body.logprobs
        if body.best_of is not None and body.best_of > body.n and logprobs is None:
            logprobs = 0
        requests = make_requests(
            body, prompts, max_tokens, version, config, http, n=body.best_of or body.n, logprobs=logprobs,
            prompt_logprobs=body.logprobs if body.echo and body.logprobs is not None else body.prompt_logprobs,
            grammar=await make_grammar(body, hosted, version, http), special=not body.skip_special_tokens,
        )  # fmt: skip
        for request in requests if body.echo else ():
            version.desk.about.check(request)  # before its ids are read; submitting it checks it in any case
        return await CompletionJob(body, version, requests, drop=max_tokens == 0).answer(hosted, http.state.tenant)

    return router


def check(body: CompletionBody) -> None:
    """
    Raises:
        FieldError: what this server cannot do.
    """
    if body.suffix:
        raise FieldError("suffix: these models continue a text, they do not fill one in: leave it out", "suffix")
    if body.best_of is not None and body.best_of < body.n:
        raise FieldError(f"best_of is {body.best_of}, fewer than n ({body.n})", "best_of")
    if body.best_of is not None and body.best_of > body.n and body.stream:
        raise FieldError(
            "best_of: which is best is known at the end, and a stream tells before: leave one out", "best_of"
        )


async def tokenize(prompts: Prompt, version: Version, special: bool = True) -> list[list[int]]:
    """Token ids of each prompt.

    Raises:
        ValueError: one does not fit, or the model has no tokenizer.
    """
    return [
        await version.need_words().encode(prompt, version.max_context, special) if isinstance(prompt, str) else prompt
        for prompt in prompts
    ]


class Choice:
    """One completion as it comes."""

    def __init__(self, number: int, request: Request, told: CompletionLogprobs) -> None:
        self.number, self.request, self.told = number, request, told
        self.text, self.tokens, self.logprobs = "", list[int](), list[TokenLogprob]()
        self.prompt_logprobs: Sequence[TokenLogprob | None] | None = None
        self.finish: str | None = None

    @property
    def goodness(self) -> float:
        """By which the best is chosen: mean log-probability of a token."""
        return fmean(one.logprob for one in self.logprobs) if self.logprobs else float("-inf")


class CompletionJob(Job):
    """
    Args:
        drop: nothing but the prompt was asked for: leave the computed token out.
    """

    def __init__(self, body: CompletionBody, version: Version, requests: list[Request], drop: bool) -> None:
        super().__init__(body, version, requests, "cmpl", "text_completion")
        self.body, self.drop = body, drop
        self.prompts = [
            (body.prompt[at] if isinstance(body.prompt[at], str) else self._decode(request.prompt)) if body.echo else ""
            for at, request in enumerate(requests)
        ]
        self.choices: dict[tuple[str, int], Choice] = {}
        for at, request in enumerate(requests):
            for index in range(request.n):
                told = CompletionLogprobs(self.namer, body.logprobs or 0)
                told.offset = 0 if body.echo and body.logprobs is not None else len(self.prompts[at])
                self.choices[request.id, index] = Choice(at * request.n + index, request, told)
        self.begun: set[tuple[str, int]] = set()

    def _decode(self, ids: Sequence[int]) -> str:
        return self.version.words.decode(ids) if self.version.words is not None else ""

    def take(self, output: Output) -> tuple[Choice, dict[str, Any]]:
        """A completion's next part, as a choice of an event.

        Raises:
            HttpError: it was cut off.
        """
        key = output.id, output.index
        choice, first = self.choices[key], key not in self.begun
        self.begun.add(key)
        if error := cut_off(output, bool(choice.tokens or output.tokens)):
            raise error
        if self.drop:
            output = Output(output.id, output.index, finish="length", prompt_logprobs=output.prompt_logprobs)
        self.usage.count(output, first)
        text = self.text(output)
        tokens, told = list(output.tokens), list[TokenLogprob | None](output.logprobs or ())
        if output.prompt_logprobs is not None:
            choice.prompt_logprobs = output.prompt_logprobs
        if first and self.body.echo:
            text = self.prompts[choice.number // choice.request.n] + text
            if self.body.logprobs is not None:
                prompt_told = self.choices[output.id, 0].prompt_logprobs
                if prompt_told is not None:
                    tokens, told = [*choice.request.prompt, *tokens], [*prompt_told, *told]
        choice.text += text
        choice.tokens += output.tokens
        choice.logprobs += output.logprobs or ()
        choice.finish = output.finish
        table: dict[str, Any] = {"index": choice.number, "text": text, "logprobs": None, "finish_reason": output.finish}
        if self.body.logprobs is not None:
            table["logprobs"] = choice.told.table(told, tokens)
        if output.finish == "stop":
            table["stop_reason"] = self.stop_reason(output)
        if self.body.return_token_ids:
            table["token_ids"] = list(output.tokens)
            if first:
                table["prompt_token_ids"] = list(choice.request.prompt)
        if first and self.body.prompt_logprobs is not None and choice.prompt_logprobs is not None:
            table["prompt_logprobs"] = prompt_table(self.namer, choice.prompt_logprobs)
        return choice, table

    def parts(self, output: Output) -> Iterator[dict[str, Any]]:
        _, table = self.take(output)
        if table["text"] or table["finish_reason"] or table["logprobs"] or self.body.return_token_ids:
            yield table

    async def whole(self, outputs: Outputs) -> dict[str, Any]:
        found: dict[int, dict[str, Any]] = {}
        choices: dict[int, Choice] = {}
        async for output in outputs.joined():
            choice, part = self.take(output)
            choices[choice.number] = choice
            found[choice.number] = join(found[choice.number], part) if choice.number in found else part
        kept = [found[number] for number in self._best(choices)]
        for index, table in enumerate(kept):
            table["index"] = index
            table.setdefault("stop_reason", None)
        return {**self.head, "choices": kept, "usage": self.usage.table()}

    def _best(self, choices: dict[int, Choice]) -> list[int]:
        """Numbers of the completions that are told: of each prompt's `best_of` the `n` best, the best first."""
        numbers = sorted(choices)
        n, of = self.body.n, self.body.best_of or self.body.n
        if of == n:
            return numbers
        kept: list[int] = []
        for start in range(0, len(numbers), of):
            ranked = sorted(numbers[start : start + of], key=lambda number: -choices[number].goodness)
            kept += ranked[:n]
        return kept


def join(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """One choice of two parts."""
    logprobs = before["logprobs"]
    if logprobs is not None and after["logprobs"] is not None:
        for name, values in after["logprobs"].items():
            logprobs[name] += values
    tokens = {"token_ids": before["token_ids"] + after["token_ids"]} if "token_ids" in before else {}
    return {**before, **after, "text": before["text"] + after["text"], "logprobs": logprobs, **tokens}
