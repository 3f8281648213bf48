"""Log-probabilities in OpenAI's two ways of writing them. Torch-free."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from weft.serve.requests.request import TokenLogprob
from weft.serve.server.words import Words


class Namer:
    """What a token is called: its text; or, without a tokenizer, `token_id:7`."""

    def __init__(self, words: Words | None) -> None:
        self.words = words

    def text(self, token: int) -> str:
        return self.words.text_of(token) if self.words is not None else f"token_id:{token}"

    def bytes(self, token: int) -> list[int] | None:
        return list(self.words.bytes_of(token)) if self.words is not None else None


class CompletionLogprobs:
    """Of /v1/completions: four lists side by side. `offset` is where the next token's text begins."""

    def __init__(self, namer: Namer, alternatives: int) -> None:
        self.namer, self.alternatives, self.offset = namer, alternatives, 0

    def table(self, told: Sequence[TokenLogprob | None], tokens: Sequence[int]) -> dict[str, list[Any]]:
        """Args: told: None for a text's first token, which nothing foretells; tokens: the same places' ids."""
        table: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for one, token in zip(told, tokens, strict=True):
            text = self.namer.text(token)
            table["tokens"].append(text)
            table["token_logprobs"].append(one.logprob if one is not None else None)
            table["top_logprobs"].append(self._top(one))
            table["text_offset"].append(self.offset)
            self.offset += len(text)
        return table

    def _top(self, one: TokenLogprob | None) -> dict[str, float] | None:
        """The likeliest tokens and, as OpenAI does, the chosen one too. Two tokens of one text are told apart by id."""
        if one is None:
            return None
        found: dict[str, float] = {}
        for token, logprob in ((one.token, one.logprob), *one.top[: self.alternatives]):
            text = self.namer.text(token)
            if text in found and token != one.token:
                text = f"token_id:{token}"
            found[text] = logprob
        return found


def chat_logprobs(namer: Namer, told: Sequence[TokenLogprob]) -> dict[str, Any]:
    """Of /v1/chat/completions: a list of tokens, each with its alternatives."""

    def entry(token: int, logprob: float) -> dict[str, Any]:
        return {"token": namer.text(token), "logprob": logprob, "bytes": namer.bytes(token)}

    content = [
        {**entry(one.token, one.logprob), "top_logprobs": [entry(token, logprob) for token, logprob in one.top]}
        for one in told
    ]
    return {"content": content, "refusal": None}


def prompt_table(namer: Namer, told: Sequence[TokenLogprob | None]) -> list[dict[str, Any] | None]:
    """vLLM's prompt_logprobs: for each token of the prompt a table from ids, the token itself first."""

    def entry(token: int, logprob: float, rank: int | None) -> dict[str, Any]:
        return {"logprob": logprob, "rank": rank, "decoded_token": namer.text(token)}

    found: list[dict[str, Any] | None] = []
    for one in told:
        if one is None:
            found.append(None)
            continue
        ranks = {token: number for number, (token, _) in enumerate(one.top, start=1)}
        table = {str(one.token): entry(one.token, one.logprob, ranks.get(one.token))}
        table.update({str(token): entry(token, logprob, ranks[token]) for token, logprob in one.top})
        found.append(table)
    return found
