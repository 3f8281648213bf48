"""A model's tokenizer, as a server needs it. Torch-free."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Sequence
from functools import cache, lru_cache
from typing import Any

from weft.serve.server.errors import FieldError, LongFieldError

LONG = 8192
"""Characters above which a text is tokenized beside the event loop, not in it."""


class Words:
    """Text to tokens and back.

    Attributes:
        tokenizer: of `tokenizers`.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._plain: Any = None
        self._making = asyncio.Lock()
        table = json.loads(tokenizer.to_str())
        added = table.get("added_tokens") or []
        self._added = {one["id"]: one["content"] for one in added}
        self.special = tuple(one["content"] for one in added if one["special"] and one["content"])
        self._bytewise = "ByteLevel" in json.dumps([table.get("decoder"), table.get("pre_tokenizer")])
        self._longest = max((len(text.encode()) for text in tokenizer.get_vocab()), default=1)

    async def encode(self, text: str, most: int, special: bool = True) -> list[int]:
        """The tokens of a text.

        Args:
            most: tokens that there is room for; a text that cannot fit is refused before it is tokenized.
            special: with the tokens that the tokenizer puts around a text.

        Raises:
            ValueError: it does not fit, or is not text at all (half of a surrogate pair).
        """
        if len(text) > most * self._longest:
            raise LongFieldError(
                f"the prompt has {len(text)} characters, more than {most} tokens, the model's context, can say: shorten it",
                "prompt",
            )
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise FieldError(f"the prompt is not Unicode text: {error.reason}", "prompt") from None
        if len(text) > LONG:
            return await asyncio.to_thread(self._encode, text, special)
        return self._encode(text, special)

    async def encode_plain(self, text: str) -> list[int]:
        """Special tokens are letters like others: what a client writes is none."""
        async with self._making:  # seconds, for a large vocabulary; hardly ever needed
            self._plain = self._plain or await asyncio.to_thread(make_plain, self.tokenizer)
        return list(self._plain.encode(text, add_special_tokens=False).ids)

    def _encode(self, text: str, special: bool) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=special).ids)

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=skip_special))

    def bytes_of(self, id: int) -> bytes:
        """The bytes that a token stands for; none, for an id that has no token."""
        if id in self._added and self._bytewise:
            return str(self._added[id]).encode()
        token = self.tokenizer.id_to_token(id)
        if token is None:
            return b""
        if self._bytewise:
            alphabet = byte_alphabet()
            return b"".join(bytes([alphabet[char]]) if char in alphabet else char.encode() for char in token)
        if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            return bytes([int(token[3:5], 16)])
        return str(token).replace("\u2581", " ").encode()

    def text_of(self, id: int) -> str:
        """A token's text; where that is a part of a character, its bytes, in OpenAI's way of writing them."""
        found = self.bytes_of(id)
        try:
            return found.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in found)


def make_plain(tokenizer: Any) -> Any:
    """The same tokenizer, for which special tokens are words like others."""
    plain = type(tokenizer).from_str(tokenizer.to_str())
    plain.encode_special_tokens = True
    return plain


@lru_cache(maxsize=16)
def any_of(texts: tuple[str, ...]) -> re.Pattern[str]:
    """Finds each of some texts, the longest first: a model may have a thousand special tokens, so it is kept."""
    return re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True))) or "(?!)")


@cache
def byte_alphabet() -> dict[str, int]:
    """The characters that byte-level BPE writes bytes with (GPT-2's encoder.json): printable ones stand for themselves,
    the others for U+0100 and on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + at): byte for at, byte in enumerate(others)}
