"""Structured output: the form that a text must have, as a JSON schema, a regular expression or a grammar.

llguidance says at every step which tokens may follow; the others' logits become -inf. A form is compiled by whoever asks
for it, beside the engine and under a deadline, and kept for the next one who asks. `forms.py` tries it first.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from functools import cached_property
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from weft.serve.requests.forms import KEPT, Helpers, Kind, make_matcher, text_of
from weft.serve.requests.tokens import Tokenizer

MAX_SOURCE = 256 * 1024
"""Characters of a form."""


class Matcher:
    """How far one completion has come in its form.

    Attributes:
        stopped: the form is complete, and nothing may follow.
        error: what went wrong, mostly a form too complex; "" as long as nothing has.
    """

    def __init__(self, matcher: Any) -> None:
        self._matcher = matcher

    @property
    def stopped(self) -> bool:
        return self._matcher.is_stopped()

    @property
    def error(self) -> str:
        if not self._matcher.is_error():
            return ""
        return f"the text could not follow its form: {self._matcher.get_error().strip().splitlines()[0]}"

    def forbid(self, logits: Tensor) -> None:
        """Set the logits [V] of tokens that may not follow to -inf, in place."""
        bits = torch.frombuffer(bytearray(self._matcher.compute_bitmask()), dtype=torch.uint8).to(logits.device)
        places = torch.arange(8, dtype=torch.uint8, device=logits.device)
        forbidden = (bits[:, None] >> places & 1).flatten()[: len(logits)] == 0
        logits[: len(forbidden)].masked_fill_(forbidden, float("-inf"))
        logits[len(forbidden) :] = float("-inf")

    def push(self, token: int) -> None:
        """This token was chosen."""
        self._matcher.consume_token(token)


class Grammar:
    """A compiled form; any number of completions may follow it at once."""

    def __init__(self, start: Any) -> None:
        self._start = start

    def matcher(self) -> Matcher:
        return Matcher(self._start.deep_copy())


class GrammarCompiler:
    """Makes grammars for one tokenizer. May be used by any thread.

    Args:
        eos: ids that may end a text once its form is complete.
    """

    def __init__(self, tokenizer: Tokenizer, eos: Sequence[int]) -> None:
        self._words, self._eos = tokenizer, list(eos)
        self._tokenizer: Any = None
        self._kept: OrderedDict[tuple[Kind, str], Grammar] = OrderedDict()
        self._lock, self._reading = Lock(), Lock()  # event loops wait for the first one
        self._helpers = Helpers(lambda: self._source)

    def compile(self, kind: Kind, source: str | dict[str, Any] = "", timeout: float = 10.0) -> Grammar:
        """The grammar of a form. Blocks for `timeout` seconds at most, the first time for a start too: call it beside an
        event loop, not in one.

        Args:
            kind: json: any JSON object; json_schema: JSON of this schema; regex: text that matches as a whole; lark: a
                grammar in Lark's notation.

        Raises:
            ValueError: the form is malformed or too large, or took too long.
        """
        text = text_of(source)
        if len(text) > MAX_SOURCE:
            raise ValueError(f"the {kind} has {len(text)} characters; {MAX_SOURCE} at most are compiled")
        if (kept := self.kept(kind, text)) is not None:
            return kept
        self._helpers.check(kind, text, timeout)
        grammar = Grammar(make_matcher(self._tokens(), kind, text))
        with self._lock:
            self._kept[kind, text] = grammar
            while len(self._kept) > KEPT:
                self._kept.popitem(last=False)
        return grammar

    def kept(self, kind: Kind, text: str) -> Grammar | None:
        """The grammar of a form that was compiled of late; None: it was not."""
        with self._lock:
            if (kind, text) in self._kept:
                self._kept.move_to_end((kind, text))
            return self._kept.get((kind, text))

    def close(self) -> None:
        """End the processes that try forms, if any has begun."""
        self._helpers.close()

    @cached_property
    def _source(self) -> tuple[str, list[int]]:
        """tokenizer.json's text, with a token that ends a text: a second's work, of the thread that compiles first."""
        text = self._words.to_str()
        return (text, self._eos) if self._eos else with_end(text)

    def _tokens(self) -> Any:
        import llguidance

        with self._reading:
            if self._tokenizer is None:
                text, eos = self._source
                self._tokenizer = llguidance.LLTokenizer(text, eos_token=eos)
            return self._tokenizer


def with_end(tokenizer: str) -> tuple[str, list[int]]:
    """A tokenizer that has no end token, with one more token that is, and its id: llguidance wants one."""
    from tokenizers import Tokenizer

    known = Tokenizer.from_str(tokenizer)
    known.add_special_tokens(["<end of the form>"])
    return known.to_str(), [known.get_vocab_size() - 1]
