"""A model behind an OpenAI-compatible server: weft's own, vLLM, SGLang, llama.cpp, OpenAI, …"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from typing import Any, TypeVar

import httpx
import numpy as np

from weft.prompt.file import PromptSampling
from weft.prompt.model import Ask, Likelihood, Piece, Reply

T = TypeVar("T")

TRIES = 6
"""Times that a request is sent, where the server has no room or the line breaks."""
LONGEST_PAUSE = 60.0
BUSY = (429, 502, 503, 504)
"""Statuses of servers, and of proxies before them, that may be others soon."""
ITS_OWN = (400, 413, 422)
"""Statuses that are about what one request says: too long a prompt, or one that a filter does not let through."""

ALIKE = 16
"""Requests that a server may refuse before the others are taken to be no better."""

MOST_TEXTS = 128
"""Of one request for embeddings: what weft's own server takes."""


class RequestError(ValueError):
    """A server does not take this request; it may take others."""


class RemoteModel:
    """Asks over HTTP, several requests at once. A server that refuses for now (429, 503) is asked again, when it says."""

    def __init__(
        self, url: str, name: str = "", key: str = "", at_once: int = 16, timeout: float = 600.0, sure: bool = False
    ) -> None:
        """
        Args:
            url: up to and with /v1.
            name: the model; "": the server's only one.
            timeout: seconds without a byte after which a request has failed.
            sure: a model that is named is asked for now, not with the first question.

        Raises:
            ValueError: nobody answers there, it has several models and none is named, or not the one that is.
        """
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self.url, self.at_once, self._longest = url.rstrip("/"), at_once, 0
        limits = httpx.Limits(max_connections=at_once)
        self.http = httpx.Client(headers=headers, timeout=httpx.Timeout(timeout, connect=10.0), limits=limits)
        try:
            self.name = name or self._only_model()
            if sure and name:
                self._check_name()
        except ValueError:
            self.close()
            raise

    def complete(self, asks: Sequence[Ask], keep: bool = False) -> Iterator[tuple[int, Reply]]:
        return self._each(asks, self._complete, keep)

    def stream(self, ask: Ask) -> Iterator[Piece]:
        route, body = self._body(ask)
        try:
            with self.http.stream("POST", f"{self.url}/{route}", json=body | {"stream": True}) as answer:
                if answer.status_code != 200:
                    answer.read()
                    raise self._refused(answer)
                for line in answer.iter_lines():
                    data = line.removeprefix("data:").strip()
                    if not line.startswith("data:") or data == "[DONE]":
                        continue
                    event = json.loads(data)
                    if "error" in event:
                        raise ValueError(f"{self.url}: {message_of(event)}")
                    for choice in event.get("choices") or ():
                        text = choice.get("text") or (choice.get("delta") or {}).get("content") or ""
                        yield Piece(text, choice.get("finish_reason") == "length")
        except httpx.TransportError as error:
            raise ValueError(f"{self.url}: {type(error).__name__}: {error}") from error

    def likelihoods(self, texts: Sequence[tuple[str, str]]) -> Iterator[tuple[int, Likelihood]]:
        return self._each(texts, self._likelihood)

    def logprobs(self, texts: Sequence[Sequence[int]]) -> Iterator[tuple[int, list[float]]]:
        def told(ids: Sequence[int]) -> list[float]:
            found = self._echo(list(ids))["token_logprobs"]
            return [float(one) for one in found[1 : len(ids)]]

        return self._each(texts, told)

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        vectors: list[list[float]] = []
        for start in range(0, len(texts), MOST_TEXTS):
            body = {"model": self.name, "input": list(texts[start : start + MOST_TEXTS])}
            found = self._post("embeddings", body, "data")["data"]
            vectors += [one["embedding"] for one in sorted(found, key=lambda one: one["index"])]
        return np.array(vectors, dtype=np.float32)

    def encode(self, text: str) -> list[int]:
        """By /tokenize, which stands beside /v1 (vLLM's and weft's servers have it)."""
        root = self.url.removesuffix("/v1")
        found = self._post("tokenize", {"model": self.name, "prompt": text}, "tokens", root)
        self._longest = int(found.get("max_model_len") or 0)
        return [int(one) for one in found["tokens"]]

    @property
    def longest(self) -> int:
        if not self._longest:
            self.encode("a")
        if not self._longest:
            raise ValueError(f"{self.url} does not say how long its texts may be: set --window")
        return self._longest - 1

    def close(self) -> None:
        self.http.close()

    def _each(self, things: Sequence[Any], do: Callable[[Any], T], keep: bool = False) -> Iterator[tuple[int, T]]:
        """What comes of each.

        Args:
            keep: one that is refused for what it says holds no other up: it is told at the end.

        Raises:
            ValueError: one was refused, or the server cannot be asked. What was on its way then comes before.
        """
        with ThreadPoolExecutor(self.at_once) as pool:
            waiting = {pool.submit(do, one): index for index, one in enumerate(things)}
            refused: dict[int, RequestError] = {}
            failed: BaseException | None = None
            try:
                for done in as_completed(waiting):
                    error, index = done.exception(), waiting.pop(done)
                    if error is None:
                        yield index, done.result()
                        continue
                    if keep and isinstance(error, RequestError):
                        refused[index] = error
                    else:
                        failed = error
                    if failed or len(refused) == ALIKE:
                        break
                pool.shutdown(wait=False, cancel_futures=True)
                for done in as_completed([one for one in waiting if not one.cancelled()]):
                    if done.exception() is None:  # asked, and paid for
                        yield waiting[done], done.result()
            finally:
                pool.shutdown(wait=False, cancel_futures=True)
        if failed:
            raise failed
        if refused:
            first = min(refused)
            raise ValueError(f"{len(refused)} of {len(things)} requests; number {first + 1}: {refused[first]}")

    def _complete(self, ask: Ask) -> Reply:
        route, body = self._body(ask)
        start = time.perf_counter()
        found = self._post(route, body, "choices")
        seconds = time.perf_counter() - start
        choices = sorted(found["choices"] or (), key=lambda one: one.get("index", 0))
        if not choices:
            raise ValueError(f"{self.url}/{route} gave no answer: its choices are empty")
        texts = tuple(one.get("text") or (one.get("message") or {}).get("content") or "" for one in choices)
        cut = sum(one.get("finish_reason") == "length" for one in choices)
        usage = found.get("usage") or {}
        return Reply(texts, cut, usage.get("prompt_tokens", 0), usage.get("completion_tokens", 0), seconds)

    def _likelihood(self, texts: tuple[str, str]) -> Likelihood:
        context, whole = texts[0], texts[0] + texts[1]
        found = self._echo(whole)
        starts, logprobs, tops = (found[key] for key in ("text_offset", "token_logprobs", "top_logprobs"))
        last = len(logprobs) - 1  # a new token, which nobody asked about
        if starts[last] == len(whole):
            first = next(index for index in range(last) if starts[index + 1] > len(context))
        else:  # characters in parts: the texts of their tokens do not add up
            first = self._first_other(context, whole)
        if first == 0:
            raise ValueError("there must be at least one token before what is judged")
        greedy = all(logprobs[index] >= max(tops[index].values()) for index in range(first, last))
        return Likelihood(sum(logprobs[first:last]), last - first, greedy)

    def _first_other(self, context: str, whole: str) -> int:
        """The first token of a text that is not its beginning's."""
        mine, all_of_it = self.encode(context), self.encode(whole)
        return next((at for at, (a, b) in enumerate(zip(mine, all_of_it, strict=False)) if a != b), len(mine))

    def _echo(self, prompt: str | list[int]) -> dict[str, Any]:
        body = {
            "model": self.name, "prompt": prompt, "max_tokens": 1, "temperature": 0, "logprobs": 1, "echo": True,
        }  # fmt: skip
        found = self._post("completions", body, "choices")["choices"][0].get("logprobs")
        if not found or not found.get("token_logprobs"):
            raise ValueError(f"{self.url} tells no log-probabilities of a prompt (echo with logprobs); this needs them")
        return dict(found)

    def _body(self, ask: Ask) -> tuple[str, dict[str, Any]]:
        """Route and body of a request."""
        wanted = ask.sampling
        body: dict[str, Any] = {
            "model": self.name, "temperature": wanted.temperature, "top_p": wanted.top_p,
            "max_tokens": wanted.max_tokens, "n": ask.n,
        }  # fmt: skip
        if wanted.stop:
            body["stop"] = list(wanted.stop)
        if wanted.seed is not None:
            body["seed"] = wanted.seed
        if ask.form is not None and ask.form.kind == "json_schema":
            schema = {"name": "answer", "schema": json.loads(ask.form.source), "strict": True}
            body["response_format"] = {"type": "json_schema", "json_schema": schema}
        elif ask.form is not None:
            body["structured_outputs"] = {"regex": ask.form.source}
        if isinstance(ask.prompt, str):
            return "completions", body | {"prompt": ask.prompt}
        return "chat/completions", body | {"messages": list(ask.prompt)}

    def _check_name(self) -> None:
        """Of a server that does not list the model, as some that have it do not, a token is asked."""
        with suppress(ValueError):
            if self.name in self._models():
                return
        route, body = self._body(Ask(({"role": "user", "content": "hi"},), PromptSampling(max_tokens=1)))
        self._post(route, body, "choices")

    def _only_model(self) -> str:
        names = self._models()
        if len(names) != 1:
            raise ValueError(f"{self.url} has {len(names)} models ({', '.join(names)}): name one with --model")
        return names[0]

    def _models(self) -> list[str]:
        return [str(one["id"]) for one in self._send("GET", f"{self.url}/models", None, "data")["data"]]

    def _post(self, route: str, body: dict[str, Any], field: str, root: str = "") -> dict[str, Any]:
        return self._send("POST", f"{root or self.url}/{route}", body, field)

    def _send(self, method: str, url: str, body: dict[str, Any] | None, field: str) -> dict[str, Any]:
        """
        Args:
            field: that the answer must have.

        Raises:
            ValueError: the server refuses it, or does not answer, after several tries where that may help.
        """
        for number in range(1, TRIES + 1):
            pause = min(LONGEST_PAUSE, 0.5 * 2 ** (number - 1))
            try:
                answer = self.http.request(method, url, json=body)
            except httpx.ReadTimeout as error:
                raise ValueError(f"{url} did not answer in time") from error
            except httpx.TransportError as error:
                nobody = isinstance(error, httpx.ConnectError) and number >= 2
                if nobody or number == TRIES or isinstance(error, httpx.UnsupportedProtocol):
                    raise ValueError(f"nobody answers at {url}: {error}") from error
            else:
                if answer.status_code == 200:
                    return object_of(answer, field)
                if answer.status_code not in BUSY or number == TRIES:
                    raise self._refused(answer)
                with suppress(ValueError):  # it may be a date
                    pause = min(LONGEST_PAUSE, float(answer.headers.get("Retry-After", pause)))
            time.sleep(pause)
        raise AssertionError

    def _refused(self, answer: httpx.Response) -> ValueError:
        try:
            what = message_of(answer.json())
        except ValueError:
            what = answer.text[:200]
        kind = RequestError if answer.status_code in ITS_OWN else ValueError
        return kind(f"{answer.request.url} refused ({answer.status_code}): {what}")


def object_of(answer: httpx.Response, field: str) -> dict[str, Any]:
    """
    Raises:
        ValueError: the body is no JSON object with this field.
    """
    try:
        found = answer.json()
    except ValueError:
        found = None
    if not isinstance(found, dict) or field not in found:
        raise ValueError(
            f"{answer.request.url} does not answer as OpenAI's servers do: is it one? Its address ends in /v1, mostly"
        )
    return found


def message_of(body: Any) -> str:
    """What an error body says: OpenAI's, or FastAPI's own."""
    error = body.get("error", body.get("detail", body)) if isinstance(body, dict) else body
    return str(error.get("message", error)) if isinstance(error, dict) else str(error)
