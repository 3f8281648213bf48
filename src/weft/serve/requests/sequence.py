"""One completion on its way. Torch-free."""

from __future__ import annotations

import hashlib
import random
import struct
from collections.abc import Sequence as Row
from typing import TYPE_CHECKING, cast

from weft.serve.requests.request import Finish, Request, TokenLogprob
from weft.serve.requests.text import TextStream

if TYPE_CHECKING:
    from weft.serve.requests.grammar import Grammar, Matcher


class Sequence:
    """A prompt and what has been added to it.

    Attributes:
        adapter: its number, as the batch knows it.
        order: the smallest is served first and preempted last; given by the scheduler.
        tokens: of the prompt and the completion so far.
        computed: how many of them have their keys and values in the cache.
        draft: tokens that speculation proposes to follow.
        blocks: of the cache.
        after: another completion of the same request, that computes the prompt first.
        room: how many tokens the whole may have.
        cached: tokens of the prompt that were found in the cache at first.
        started: when it was let in at first, on `time.monotonic`'s clock.
        text: what its tokens say; None without a tokenizer.
        matcher: how far it has come in the form that it must have.
        grams: places behind tokens that stood together, for speculation by look-up.
    """

    def __init__(self, request: Request, index: int, room: int, adapter: int = 0) -> None:
        self.request, self.index, self.adapter = request, index, adapter
        self.order = (request.priority, 0, 0)
        self.tokens = list(request.prompt)
        self.computed = 0
        self.draft: list[int] = []
        self.blocks: list[int] = []
        self.filled = 0  # blocks that were told to be full
        self.given_back = 0  # blocks that lie behind the window
        self.after: Sequence | None = None
        self.room = room
        self.cached: int | None = None
        self.started: float | None = None
        self.text: TextStream | None = None
        grammar = cast("Grammar | None", request.grammar)  # where it is compiled
        self.matcher: Matcher | None = grammar.matcher() if grammar else None
        self.grams: dict[tuple[int, ...], int] = {}
        self.prompt_logprobs: list[TokenLogprob | None] = [None]
        self._random = random_stream(request.sampling.seed, request.prompt, index)
        self._draws: list[float] = []

    @property
    def num_new(self) -> int:
        """Tokens of the completion."""
        return len(self.tokens) - len(self.request.prompt)

    @property
    def waiting(self) -> int:
        """Tokens that the model has not seen: of a prompt many, then one."""
        return len(self.tokens) - self.computed

    @property
    def begun(self) -> bool:
        """Whether the prompt is computed."""
        return self.num_new > 0

    def draw(self, number: int) -> float:
        """In [0, 1), of the new token of this number. A draft that is thrown away uses up none."""
        while len(self._draws) <= number:
            self._draws.append(self._random.random())
        return self._draws[number]

    def push(self, token: int) -> tuple[Finish | None, str, str | int | None]:
        """Add a token: why the completion ends with it, the text it adds, and what stopped it."""
        self.tokens.append(token)
        sampling, stream = self.request.sampling, self.text
        if self.matcher is not None:
            self.matcher.push(token)
            if self.matcher.error:
                return "error", "", None
        if token in sampling.ends and self.num_new > sampling.min_tokens:
            return "stop", stream.close() if stream else "", token
        text = stream.push(token, self.num_new) if stream else ""
        if stream and stream.stopped_by is not None:
            return "stop", text, stream.stopped_by
        complete = self.matcher is not None and self.matcher.stopped
        if complete or len(self.tokens) >= self.room:
            return "stop" if complete else "length", text + (stream.close() if stream else ""), None
        return None, text, None

    @property
    def wants_prompt(self) -> bool:
        """Whether logits of the prompt are asked for, and not all there yet."""
        wanted = self.request.prompt_logprobs is not None and self.index == 0
        return wanted and len(self.prompt_logprobs) < len(self.request.prompt)


def random_stream(seed: int | None, prompt: Row[int], index: int) -> random.Random:
    """The random numbers of one completion: a function of the seed, its prompt's ids and which of `n` it is; never of
    what else is in the batch, nor of the device."""
    if seed is None:
        return random.Random()
    key = hashlib.blake2b(f"{seed}:{index}:".encode() + struct.pack(f"<{len(prompt)}q", *prompt), digest_size=8)
    return random.Random(int.from_bytes(key.digest(), "little"))
