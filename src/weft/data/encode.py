r"""Text to ids, fast: the same ids as the tokenizer's own `encode`, at several times its speed.

A byte-level BPE never merges across the words its pre-tokenizer cuts, and text repeats its words. So the words are cut
here, by Python's `re`, and each distinct word goes to the tokenizer once; afterwards it is a dictionary look-up.
This holds only where the cut is known to be the same, so the fast way is taken only
- for the pre-tokenizers in `KNOWN` (GPT-2; Llama 3; Qwen 2 and 3), recognised by their exact text,
- for characters whose Unicode class Python knows (assigned, in the basic plane; ASCII alone where a normalizer runs),
- for text in which no added token occurs.
All else takes the plain way, `encode_batch_fast`. The test compares the two on every character of the basic plane.
"""

import functools
import itertools
import json
import re
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

KNOWN = (
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)
SPACE = r"\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"  # Unicode White_Space; Python's \s has more
# Between an ASCII letter or digit and a newline every pattern above cuts, whatever comes before or after
SEAM = re.compile(r"(?<=[A-Za-z0-9])(?=\n)")
CHUNK = 1 << 20  # characters cut into words at once: bounds the memory of one huge document
CACHE = 1 << 20  # words remembered
LONGEST = 64  # characters of a word worth remembering


class Encoder:
    """Encodes documents into arrays of `dtype`; keeps a cache of words, so make one per process and use it long."""

    def __init__(self, hf: Any, dtype: np.dtype[Any]) -> None:
        self.hf, self.dtype = hf, dtype
        self.words, self.strange = _patterns(json.loads(hf.to_str()))
        added = sorted(token.content for token in hf.get_added_tokens_decoder().values())
        self.added = re.compile("|".join(map(re.escape, added)) or r"(?!)")
        self.cache = _Words(self._bytes)

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of every text, without special tokens around them."""
        if self.words is None:
            return self.encode_plain(texts)
        return [np.frombuffer(self._encode(text), self.dtype) for text in texts]

    def encode_plain(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The reference: what the tokenizer itself gives."""
        encodings = self.hf.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, self.dtype) for encoding in encodings]

    def _bytes(self, text: str) -> bytes:
        return np.array(self.hf.encode(text, add_special_tokens=False).ids, self.dtype).tobytes()

    def _encode(self, text: str) -> bytes:
        if self.added.search(text):
            return self._bytes(text)
        if len(text) <= CHUNK and (text.isascii() or not self.strange.search(text)):
            return self._encode_words(text)
        runs = itertools.groupby(_chunks(text), key=lambda chunk: self.strange.search(chunk) is None)
        return b"".join(
            b"".join(map(self._encode_words, chunks)) if familiar else self._bytes("".join(chunks))
            for familiar, chunks in runs
        )

    def _encode_words(self, text: str) -> bytes:
        assert self.words is not None
        if len(self.cache) > CACHE:
            self.cache.clear()
        return b"".join(map(self.cache.__getitem__, self.words.findall(text)))


class _Words(dict[str, bytes]):
    """Word → its ids as bytes, asked of the tokenizer when first met."""

    def __init__(self, ask: Any) -> None:
        super().__init__()
        self.ask = ask

    def __missing__(self, word: str) -> bytes:
        ids: bytes = self.ask(word)
        if len(word) <= LONGEST:
            self[word] = ids
        return ids


def _chunks(text: str) -> Iterable[str]:
    """The text cut at seams into lines, and short lines of one kind joined up to CHUNK characters."""
    part: list[str] = []
    size = 0
    for line in SEAM.split(text):
        if part and (size + len(line) > CHUNK or line.isascii() != part[-1].isascii()):
            yield "".join(part)
            part, size = [], 0
        part.append(line)
        size += len(line)
    yield "".join(part)


def _patterns(about: dict[str, Any]) -> tuple[re.Pattern[str] | None, re.Pattern[str]]:
    """(what cuts words as this tokenizer does, what finds characters it may not be used on); (None, …) if unknown."""
    pattern = _word_pattern(about.get("pre_tokenizer") or {})
    normalizer = about.get("normalizer")
    if pattern not in KNOWN or about["model"].get("dropout") or (normalizer and normalizer["type"] != "NFC"):
        return None, re.compile(r"(?!)")
    letters, numbers, unknown = _classes()
    classes = {r"\p{L}": letters, r"\p{N}": numbers, r"\s": SPACE, r"\S": f"^{SPACE}"}
    spelled = re.split(r"(\[[^\]]*\])", pattern)  # even: outside brackets, where a class needs brackets of its own
    for i, piece in enumerate(spelled):
        for name, members in classes.items():
            piece = piece.replace(name, members if i % 2 else f"[{members}]")
        spelled[i] = piece
    return re.compile("".join(spelled)), re.compile(r"[^\x00-\x7f]" if normalizer else f"[{unknown}]")


def _word_pattern(pre: dict[str, Any]) -> str:
    """The pattern of a byte-level pre-tokenizer; empty for any other."""
    steps = pre.get("pretokenizers", [pre])
    last = steps[-1]
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space"):
        return ""
    if len(steps) == 1 and last.get("use_regex", True):
        return KNOWN[0]
    split = steps[0]
    if len(steps) != 2 or split.get("type") != "Split" or last.get("use_regex", True):
        return ""
    as_known = split["behavior"] == "Isolated" and not split["invert"]
    return str(split["pattern"].get("Regex", "")) if as_known else ""


@functools.cache
def _classes() -> tuple[str, str, str]:
    """Members, as ranges for a bracket, of letters, numbers, and what is unassigned or beyond the basic plane."""
    kinds = [unicodedata.category(chr(code)) for code in range(0x10000)]

    def ranges(wanted: Iterable[bool]) -> str:
        runs = itertools.groupby(enumerate(wanted), key=lambda pair: pair[1])
        spans = [[code for code, _ in run] for yes, run in runs if yes]
        return "".join(f"\\u{span[0]:04x}-\\u{span[-1]:04x}" for span in spans)

    letters, numbers = (ranges(kind[0] == first for kind in kinds) for first in "LN")
    return letters, numbers, ranges(kind in ("Cn", "Cs", "Co") for kind in kinds) + "\\U00010000-\\U0010ffff"
