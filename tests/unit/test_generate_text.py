"""Text from tokens as they come: no broken character, no stop text, and the whole text in the end."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from weft.models.decoder import Decoder
from weft.models.shape import Shape
from weft.serve.config import EngineConfig
from weft.serve.engine import Engine
from weft.serve.generate import generate
from weft.serve.requests.request import Output, Sampling
from weft.serve.requests.tokens import Detokenizer, StopTexts

HARD = [
    "naïve café",
    "日本語の文章です。",
    "👩‍👩‍👧‍👦 family 🇫🇷",
    "a🙂b",
    "mixed 中文 and العربية",
    " leading and  double ",
    "\n\t",
    "\ufffd",
]


@cache
def byte_tokenizer(merged: str = "") -> Tokenizer:
    """Byte-level BPE with a token for every byte, and for the pairs of bytes of `merged`."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bytes_ = "".join(piece for piece, _ in level.pre_tokenize_str(merged)) if merged else ""
    merges = list(dict.fromkeys(zip(bytes_[0::2], bytes_[1::2], strict=False)))
    vocab = {piece: index for index, piece in enumerate([*alphabet, *dict.fromkeys(a + b for a, b in merges)])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = level
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


@cache
def fallback_tokenizer() -> Tokenizer:
    """Llama 2's kind: words with a bar for the space, and a token for each byte of what is no word."""
    words = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁the", "▁cat", "s", "a", "b", "▁a"]
    merges = [("▁", "a")]
    vocab = {word: index for index, word in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def pushed(tokenizer: Tokenizer, ids: list[int], prompt: list[int] | None = None) -> list[str]:
    words = Detokenizer(tokenizer, prompt or [])
    return [words.push(token) for token in ids]


@pytest.mark.parametrize("tokenizer", [byte_tokenizer(), byte_tokenizer("".join(HARD)), fallback_tokenizer()])
@pytest.mark.parametrize("text", HARD)
def test_pieces_join_to_the_text_and_none_is_broken(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode("a").ids + tokenizer.encode(text).ids + tokenizer.encode("b").ids
    pieces = pushed(tokenizer, ids)
    assert "".join(pieces) == tokenizer.decode(ids)
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


def test_a_character_comes_with_its_last_byte() -> None:
    ids = byte_tokenizer().encode("é🙂").ids
    assert pushed(byte_tokenizer(), ids) == ["", "é", "", "", "", "🙂"]


def test_a_text_cut_inside_a_character_ends_before_it() -> None:
    ids = byte_tokenizer().encode("ab🙂").ids[:-1]
    assert "".join(pushed(byte_tokenizer(), ids)) == "ab"


@given(data=st.binary(max_size=24))
@settings(max_examples=150, deadline=None, derandomize=True)
def test_any_bytes_come_out_as_the_tokenizer_decodes_them(data: bytes) -> None:
    tokenizer = byte_tokenizer()
    level = dict(zip(sorted(bytes_to_unicode()), bytes_to_unicode().values(), strict=True))
    ids = [tokenizer.token_to_id(level[byte]) for byte in data]
    assert "".join(pushed(tokenizer, ids)) == tokenizer.decode(ids).rstrip("\ufffd")


def bytes_to_unicode() -> dict[int, str]:
    """GPT-2's characters for the 256 bytes, in order of the bytes."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return {byte: chr(byte) if byte in plain else chr(next(others)) for byte in range(256)}


def test_the_space_behind_the_prompt_is_kept() -> None:
    tokenizer = fallback_tokenizer()
    prompt, new = [tokenizer.token_to_id("▁the")], [tokenizer.token_to_id("▁cat"), tokenizer.token_to_id("s")]
    assert tokenizer.decode(new) == "cats", "alone, it loses the space"
    assert pushed(tokenizer, new, prompt) == [" cat", "s"]


def test_the_work_for_a_token_does_not_grow() -> None:
    words = Detokenizer(byte_tokenizer(), byte_tokenizer().encode("a long prompt").ids)
    lengths = []
    for token in byte_tokenizer().encode("日本語 and some more text " * 5).ids:
        words.push(token)
        lengths.append(len(words.ids))
    assert max(lengths[1:]) <= 13 + 4
    assert max(lengths[8:]) <= 8


@pytest.mark.parametrize("size", [1, 2, 3, 50])
@pytest.mark.parametrize(
    ("text", "stops", "expected"),
    [
        ("one two three", ["two"], "one "),
        ("one two three", ["three", "two"], "one "),
        ("ababac", ["abac"], "ab"),
        ("aaab", ["aab"], "a"),
        ("nothing", ["x"], "nothing"),
        ("ends half\n", ["\n\n"], "ends half\n"),
        ("no stops", [], "no stops"),
        ("first", ["first"], ""),
    ],
)
def test_text_ends_before_the_first_stop(size: int, text: str, stops: list[str], expected: str) -> None:
    cutter, out = StopTexts(stops), ""
    for at in range(0, len(text), size):
        new, stopped = cutter.push(text[at : at + size])
        out += new
        assert not any(stop in out for stop in stops)
        if stopped is not None:
            assert stopped in stops
            break
    assert out + cutter.held == expected


@cache
def model() -> Decoder:
    torch.manual_seed(0)
    return Decoder(Shape(num_layers=1, hidden=32, num_heads=2, ffn=64, vocab=256, max_seq=128, init_std=0.5))


def stream(prompts: list[str], sampling: Sampling) -> list[list[Output]]:
    """The outputs of each prompt."""
    tokenizer = byte_tokenizer()
    outputs: list[list[Output]] = [[] for _ in prompts]
    engine = Engine(model(), tokenizer, EngineConfig(cache_tokens=1024))
    for index, output in generate(engine, [tokenizer.encode(prompt).ids for prompt in prompts], sampling):
        outputs[index].append(output)
    return outputs


def test_texts_are_streamed_and_end_where_they_should() -> None:
    sampling = Sampling(temperature=1.5, seed=5, max_tokens=60)
    prompts = ["Hello", "日本語", "a🙂"]
    outputs = stream(prompts, sampling)
    assert [len(one) for one in outputs] == [60] * 3
    texts = ["".join(output.text for output in one) for one in outputs]
    assert [[output.finish for output in one if output.finish] for one in outputs] == [["length"]] * 3
    for one, text in zip(outputs, texts, strict=True):
        ids = [token for output in one for token in output.tokens]
        assert byte_tokenizer().decode(ids).rstrip("\ufffd").endswith(text[-3:])

    stop = texts[0][10:12]
    outputs = stream(prompts, Sampling(temperature=1.5, seed=5, max_tokens=60, stop=(stop,)))
    again = ["".join(output.text for output in one) for one in outputs]
    assert again == [text.split(stop)[0] for text in texts]
    assert len(again[0]) <= 10
    for one, text in zip(outputs, texts, strict=True):
        stopped = stop in text
        assert (one[-1].finish, one[-1].stopped_by) == (("stop", stop) if stopped else ("length", None))


def test_an_end_token_is_no_text() -> None:
    sampling = Sampling(temperature=1.5, seed=5, max_tokens=60, eos=tuple(range(0, 256, 8)))
    outputs = stream(["Hello"], sampling)[0]
    assert outputs[-1].finish == "stop"
    assert outputs[-1].text == ""
    assert outputs[-1].stopped_by == outputs[-1].tokens[-1]
    assert len(outputs) < 60


def test_before_min_tokens_no_stop_text_is_looked_for() -> None:
    whole = "".join(output.text for output in stream(["Hi"], Sampling(max_tokens=40))[0])
    stop = next(character for character in whole if whole.count(character) > 1)
    early = "".join(output.text for output in stream(["Hi"], Sampling(max_tokens=40, stop=(stop,)))[0])
    late = "".join(output.text for output in stream(["Hi"], Sampling(max_tokens=40, stop=(stop,), min_tokens=30))[0])
    assert stop not in early
    assert stop in late
