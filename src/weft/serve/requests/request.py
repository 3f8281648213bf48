"""What goes into the engine and what comes out of it. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal, TypeAlias

if TYPE_CHECKING:
    from weft.serve.requests.forms import Form
    from weft.serve.requests.grammar import Grammar

    Compiled: TypeAlias = Grammar | Form

__all__ = ["MAX_LOGPROBS", "Finish", "Output", "RefusedError", "Request", "Sampling", "TokenLogprob"]

MAX_LOGPROBS = 20
"""Most probable tokens that a request may ask for at each place."""

COLD = 1e-5
"""A temperature below is as good as 0."""

Finish = Literal["stop", "length", "cancelled", "deadline", "error"]
"""Why a completion ended: an end token or stop text came, or its form is complete; there was no more room;
`Engine.cancel`; `Request.deadline`; or the engine failed (`Output.error` says how)."""


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen, and when a sequence ends.

    The logits go through these in this order: `bias`, the penalties, `temperature`, `top_k`, `top_p`, `min_p`.

    Attributes:
        temperature: divides the logits; 0, or less than COLD, takes the most probable token.
        top_k: choose among this many most probable tokens (ties of the last one included); None: all.
        top_p: choose among the fewest tokens whose probabilities reach this sum (Holtzman et al., 2019); 1: all.
        seed: makes the choice repeatable, whatever else is in the batch; None: another one each time.
        max_tokens: new tokens of one sequence at most; the model's context ends it too.
        stop: texts that end a sequence; they are not part of the result. They need the engine's tokenizer.
        eos: ids that end a sequence, unless `ignore_eos`. Their text is not part of the result, their ids are.
        min_p: leave out tokens less probable than this share of the most probable one's (Nguyen et al., 2024); 0: none.
        repetition_penalty: logits of tokens that the prompt or the text has are divided by it where positive, multiplied
            where negative (Keskar et al., CTRL, 2019); 1: none.
        frequency_penalty: taken from a token's logit for every time that the text (not the prompt) has it.
        presence_penalty: taken once from the logit of every token that the text (not the prompt) has.
        bias: added to the logits of these tokens.
        stop_ids: more ids that end a sequence, whatever `ignore_eos` says.
        min_tokens: no id of `eos` or `stop_ids` before so many tokens; stop texts are not looked for either.
        ignore_eos: `eos` ends nothing.
        special: special tokens are written out in the text.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    seed: int | None = None
    max_tokens: int = 128
    stop: tuple[str, ...] = ()
    eos: tuple[int, ...] = ()
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    bias: Mapping[int, float] = field(default_factory=dict)
    stop_ids: tuple[int, ...] = ()
    min_tokens: int = 0
    ignore_eos: bool = False
    special: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.temperature <= 100:  # what fp32 cannot divide by would choose no token at all
            raise ValueError(f"temperature is {self.temperature}; it must be from 0 (most probable token) to 100")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k is {self.top_k}; it must be at least 1, or left out to choose among all tokens")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; it must be above 0 and at most 1")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p is {self.min_p}; it must be from 0 to 1")
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens is {self.max_tokens}; it must be at least 1")
        if not 0 <= self.min_tokens <= self.max_tokens:
            raise ValueError(f"min_tokens is {self.min_tokens}; it must be from 0 to max_tokens ({self.max_tokens})")
        if "" in self.stop:
            raise ValueError("a stop text is empty; it would end every sequence before it begins")
        if not 0.01 <= self.repetition_penalty <= 100:
            raise ValueError(
                f"repetition_penalty is {self.repetition_penalty}; it must be from 0.01 to 100; 1 changes nothing"
            )
        for name in ("frequency_penalty", "presence_penalty"):
            if not -2 <= getattr(self, name) <= 2:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be from -2 to 2")
        for token, value in self.bias.items():
            if not -100 <= value <= 100:
                raise ValueError(f"the logit bias of token {token} is {value}; it must be from -100 to 100")

    @property
    def ends(self) -> tuple[int, ...]:
        """All ids that end a sequence."""
        return self.stop_ids if self.ignore_eos else self.eos + self.stop_ids

    @property
    def penalizes(self) -> bool:
        return (self.repetition_penalty, self.frequency_penalty, self.presence_penalty) != (1, 0, 0)


@dataclass(frozen=True)
class Request:
    """A prompt, and what is wanted of it.

    Attributes:
        id: names the request in outputs and in `cancel`; no two live ones share it.
        prompt: token ids, at least one.
        sampling: how to continue.
        n: completions, told apart by `Output.index`; they share the prompt's computation.
        priority: smaller goes first; among equals tenants take turns, and of one tenant's, whoever came first.
        deadline: on `time.monotonic`'s clock; whatever is unfinished then ends as "deadline". None: none.
        tenant: whose it is. Tenants take turns, and no one's prompts hold up another's texts for long; they share no cached
            blocks, so that nobody can tell by the time it takes what others have asked.
        salt: of one tenant's, prompts share cached blocks only with those of the same salt.
        adapter: of `EngineConfig.adapters`; None: the model as it is.
        logprobs: None: none; 0: of each chosen token; k: and of the k most probable ones (at most MAX_LOGPROBS).
        prompt_logprobs: the same for the prompt's tokens. None: none.
        grammar: the form that the text must have, by `Desk.grammars`.compile; None: any.
    """

    id: str
    prompt: Sequence[int]
    sampling: Sampling = Sampling()
    n: int = 1
    priority: int = 0
    deadline: float | None = None
    tenant: str = ""
    salt: str = ""
    adapter: str | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    grammar: Compiled | None = None

    @property
    def shared_by(self) -> str:
        """Requests of the same have the same keys and values for the same tokens, and may know of each other."""
        return f"{self.adapter or ''}\0{self.tenant}\0{self.salt}"


@dataclass(frozen=True)
class TokenLogprob:
    """A token's log-probability in the model's own distribution: before bias, penalties and temperature.

    Attributes:
        top: the most probable tokens there, as many as were asked for, the likeliest first: (id, logprob).
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Output:
    """What a step added to one completion. A completion's last output, and no other, has `finish`.

    Attributes:
        id, index: the request, and which of its `n` completions.
        tokens: new ids, in order; mostly one, more under speculation, none where only the ending is told.
        text: to append; "" without a tokenizer, or while a character or a stop text may be incomplete.
        logprobs: one for each of `tokens`, where asked for.
        prompt_logprobs: one for each token of the prompt, None for the first; in index 0's first output, where asked for.
        finish: why it ended; None: it goes on.
        stopped_by: the stop text or id that ended it, where `finish` is "stop"; None: its form is complete.
        error: what happened, where `finish` is "error".
        cached: tokens of the prompt whose keys and values were found in the cache.
        started: when the prompt's turn came, on `time.monotonic`'s clock; in a completion's first output with tokens.
    """

    id: str
    index: int = 0
    tokens: tuple[int, ...] = ()
    text: str = ""
    logprobs: tuple[TokenLogprob, ...] | None = None
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None
    finish: Finish | None = None
    stopped_by: str | int | None = None
    error: str | None = None
    cached: int = 0
    started: float | None = None

    def and_then(self, more: Output) -> Output:
        """What two steps added to a completion, as one. `more` must not say that it was cut off: that is news by itself."""
        logprobs = self.logprobs if more.logprobs is None else (self.logprobs or ()) + more.logprobs
        return replace(
            self, tokens=self.tokens + more.tokens, text=self.text + more.text, logprobs=logprobs, finish=more.finish,
            stopped_by=more.stopped_by, prompt_logprobs=more.prompt_logprobs or self.prompt_logprobs,
        )  # fmt: skip


class TooLongError(ValueError):
    """The context has no room for a prompt."""


class NumbersError(ValueError):
    """The model's fault, not that of who asked."""


class RefusedError(RuntimeError):
    """The engine takes no more requests now: its queue is full, or it is draining. Nothing was begun.

    Attributes:
        retry_after: seconds after which to try again.
    """

    def __init__(self, why: str, retry_after: float) -> None:
        super().__init__(why)
        self.retry_after = retry_after

    def __reduce__(self) -> tuple[type[RefusedError], tuple[str, float]]:
        return RefusedError, (str(self), self.retry_after)
