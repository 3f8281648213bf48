"""A checkpoint that is asked in this process, by weft's own engine: no server is needed."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from weft.checkpoint.weights import load_decoder
from weft.prompt.model import Ask, Likelihood, Piece, Reply
from weft.prompt.render import Message
from weft.serve.config import EngineConfig
from weft.serve.embed import embed
from weft.serve.engine import Engine
from weft.serve.folder import advised_sampling, end_tokens, find_model, load_tokenizer
from weft.serve.requests.request import Output, Request, Sampling, TokenLogprob
from weft.serve.server.chat import ChatTemplate, find_template
from weft.serve.server.reader import AnswerReader, find_thoughts
from weft.serve.steps.device import pick_device, pick_dtype, room_on

SAID = ("temperature", "top_p")
"""What a prompt says of sampling; the rest is as the model's makers advise, as a server has it."""

PLAIN_STOPS = ("\nuser:", "\nsystem:")
"""Where an answer ends for a model without a chat template."""


class LocalModel:
    """What is asked runs as a batch, as many at once as the engine takes.

    Attributes:
        folder: the Hugging Face directory that it was read from.
        template: the model's chat template; None: turns are written out as plain text.
    """

    def __init__(self, path: Path, device: str = "auto", dtype: str = "auto") -> None:
        folder, _ = find_model(path)
        self.name, self.folder = str(path), folder
        self.template = find_template(folder)
        self.tokenizer: Any = load_tokenizer(folder)
        where = pick_device(device)
        with room_on(where):
            _, self.decoder = load_decoder(folder, where, pick_dtype(dtype, where))
            self.engine = Engine(self.decoder, self.tokenizer, EngineConfig(), end_tokens(folder))
        self._advised: dict[str, Any] = {name: it for name, it in advised_sampling(folder).items() if name not in SAID}
        self._ids = count()

    @property
    def longest(self) -> int:
        return self.engine.max_context - 1  # the engine always makes one new token

    def encode(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text).ids)

    def complete(self, asks: Sequence[Ask], keep: bool = False) -> Iterator[tuple[int, Reply]]:
        texts = [[""] * ask.n for ask in asks]
        cut, tokens, begun = [0] * len(asks), [0] * len(asks), [0.0] * len(asks)
        requests = [self._request(ask) for ask in asks]
        left = [ask.n for ask in asks]
        readers = [
            [self._reader(ask, request) for _ in range(ask.n)] for ask, request in zip(asks, requests, strict=True)
        ]
        for index, output in self._run(requests, begun):
            texts[index][output.index] += readers[index][output.index].push(output.text, output.finish is not None).said
            tokens[index] += len(output.tokens)
            if output.finish is None:
                continue
            if output.finish == "error":
                raise ValueError(f"{self.name}: {output.error}")
            cut[index] += output.finish == "length"
            left[index] -= 1
            if not left[index]:
                seconds = time.perf_counter() - begun[index]
                yield index, Reply(tuple(texts[index]), cut[index], len(requests[index].prompt), tokens[index], seconds)

    def stream(self, ask: Ask) -> Iterator[Piece]:
        request = self._request(ask)
        reader = self._reader(ask, request)
        for _, output in self._run([request], [0.0]):
            if output.finish == "error":
                raise ValueError(f"{self.name}: {output.error}")
            yield Piece(reader.push(output.text, output.finish is not None).said, output.finish == "length")

    def likelihoods(self, texts: Sequence[tuple[str, str]]) -> Iterator[tuple[int, Likelihood]]:
        encoded = [self.tokenizer.encode(context + text) for context, text in texts]
        for index, found in self._told([list(one.ids) for one in encoded]):
            boundary = len(texts[index][0])
            asked = [one for one, (_, end) in zip(found, encoded[index].offsets, strict=True) if end > boundary]
            if not asked or None in asked:
                raise ValueError(f"text {index + 1}: there must be at least one token before what is judged")
            known = [one for one in asked if one is not None]
            yield (
                index,
                Likelihood(
                    sum(one.logprob for one in known), len(known), all(one.logprob >= one.top[0][1] for one in known)
                ),
            )

    def logprobs(self, texts: Sequence[Sequence[int]]) -> Iterator[tuple[int, list[float]]]:
        for index, found in self._told(texts):
            yield index, [one.logprob for one in found if one is not None]

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """As the server's: the mean of the last hidden states; of a text too long, of its first tokens."""
        return np.array([embed(self.engine, self.encode(text)[: self.engine.max_context]) for text in texts])

    def close(self) -> None:
        self.engine.close()

    def _told(self, texts: Sequence[Sequence[int]]) -> Iterator[tuple[int, tuple[TokenLogprob | None, ...]]]:
        """What the engine tells of each token of some texts."""
        requests = [
            Request(str(next(self._ids)), list(text), Sampling(max_tokens=1), prompt_logprobs=1) for text in texts
        ]
        for index, output in self._run(requests, [0.0] * len(texts)):
            if output.finish == "error":
                raise ValueError(f"{self.name}: {output.error}")
            if output.prompt_logprobs is not None:
                yield index, output.prompt_logprobs

    def _run(self, requests: Sequence[Request], begun: list[float]) -> Iterator[tuple[int, Output]]:
        """Put requests through the engine, no more at once than run at once; `begun` gets when each was begun."""
        for number, request in enumerate(requests, start=1):
            try:
                self.engine.check(request)
            except ValueError as error:
                raise ValueError(f"prompt {number}: {error}") from error
        waiting = deque(enumerate(requests))
        indices: dict[str, int] = {}
        try:
            while waiting or self.engine.busy:
                while waiting and (self._room > 0 or not self.engine.busy):
                    index, request = waiting.popleft()
                    indices[request.id], begun[index] = index, time.perf_counter()
                    self.engine.add(request)
                for output in self.engine.step():
                    yield indices[output.id], output
        finally:  # whoever stops reading wants no more of it
            for name in indices:
                self.engine.cancel(name)
            while self.engine.busy:
                self.engine.step()

    @property
    def _room(self) -> int:
        return self.engine.free_places - len(self.engine.scheduler.waiting)

    def _reader(self, ask: Ask, request: Request) -> AnswerReader:
        """What an answer says; what it thinks before is no part of it, as behind a server."""
        if isinstance(ask.prompt, str) or self.template is None:
            return AnswerReader()
        tail = self.tokenizer.decode(request.prompt[-16:], skip_special_tokens=False)
        return AnswerReader(find_thoughts(self.template.source, tail, request.grammar is not None))

    def _request(self, ask: Ask) -> Request:
        wanted = ask.sampling
        stop = wanted.stop
        if isinstance(ask.prompt, str):
            ids = self.encode(ask.prompt)
        else:
            stop = stop if self.template else (*stop, *PLAIN_STOPS)
            text = written_out(self.template, ask.prompt)
            ids = list(self.tokenizer.encode(text, add_special_tokens=not self.template).ids)
        form = self.engine.grammars.compile(ask.form.kind, ask.form.source) if ask.form else None
        room = self.engine.max_context - len(ids)
        sampling = Sampling(
            temperature=wanted.temperature, top_p=wanted.top_p, seed=wanted.seed, stop=stop, eos=self.engine.eos,
            max_tokens=max(1, min(wanted.max_tokens, room)), **self._advised,
        )  # fmt: skip
        return Request(str(next(self._ids)), ids, sampling, n=ask.n, grammar=form)


def written_out(template: ChatTemplate | None, messages: Sequence[Message]) -> str:
    """A conversation as the text that the model continues.

    Raises:
        ValueError: the model's template does not take this conversation.
    """
    if template is None:
        return "".join(f"{turn['role']}: {turn['content']}\n" for turn in messages) + "assistant:"
    return template.render(messages)
