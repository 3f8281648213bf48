"""Text in, text out: generation between a tokenizer's two halves."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from weft.models.decoder import Decoder
from weft.serve.generate import Generation
from weft.serve.sampling import Sampling
from weft.serve.tokens import Detokenizer, StopTexts

if TYPE_CHECKING:
    from tokenizers import Tokenizer


@dataclass(frozen=True)
class Piece:
    """What one new token added to a completion.

    Attributes:
        sequence: index of the prompt.
        text: to append; empty while a character or a stop text may be incomplete.
        finish: of the last piece: an end token or stop text came ("stop"), or there was no more room ("length").
    """

    sequence: int
    text: str
    finish: Literal["stop", "length"] | None = None


def stream_text(model: Decoder, tokenizer: Tokenizer, prompts: Sequence[str], sampling: Sampling) -> Iterator[Piece]:
    """Complete every prompt, one Piece for each new token.

    Raises:
        ValueError: a prompt has no tokens, or leaves no room in the model's context.
    """
    ids = [tokenizer.encode(prompt).ids for prompt in prompts]
    batch = Generation(model, ids, sampling)
    words = [Detokenizer(tokenizer, prompt) for prompt in ids]
    stops = [StopTexts(sampling.stop) for _ in ids]
    while batch.rows:
        step = batch.step()
        going, stopped = set(batch.rows), set()
        for index, token in step:
            ended = token in sampling.eos
            text, stop = ("", False) if ended else stops[index].push(words[index].push(token))
            if stop:
                stopped.add(index)
                yield Piece(index, text, "stop")
            elif index in going:
                yield Piece(index, text)
            else:
                yield Piece(index, text + stops[index].held, "stop" if ended else "length")
        batch.finish(stopped)
