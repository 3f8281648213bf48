"""Tokenizer training, loading and the end of a document; the fast encoder against the plain one."""

import json
import unicodedata
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as HfTokenizer
from transformers import AutoTokenizer

from weft.data import encode
from weft.data.encode import KNOWN, Encoder
from weft.data.tokenizer import load, train_bpe

TEXT = Path(__file__).read_text(encoding="utf-8") + " Grüße, мир, 世界 123 456 it's we'll\n\n\n  x" * 5
UINT16 = np.dtype("<u2")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tok")
    train_bpe([TEXT], 400, out)
    return out


def variant(folder: Path, kind: str) -> HfTokenizer:
    """The trained vocabulary behind each of the known pre-tokenizers, and some that are not known."""
    hf = HfTokenizer.from_file(str(folder / "tokenizer.json"))
    if kind != "gpt2":
        pattern = {"llama3": KNOWN[1], "qwen": KNOWN[2]}.get(kind, r"\s+|\S+")
        split = pre_tokenizers.Split(Regex(pattern), "isolated")
        hf.pre_tokenizer = pre_tokenizers.Sequence(
            [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        )
    if kind == "qwen":
        hf.normalizer = normalizers.NFC()
    if kind == "lower":
        hf.normalizer = normalizers.Lowercase()
    return hf


def test_training_is_repeatable(folder: Path, tmp_path: Path) -> None:
    train_bpe(iter([TEXT]), 400, tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()
    trained = load(folder)
    assert (trained.vocab, trained.eod) == (400, 0)


@settings(max_examples=60, deadline=None)
@given(text=st.text())
def test_any_text_comes_back(folder: Path, text: str) -> None:
    tokenizer = load(folder)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_transformers_loads_it(folder: Path) -> None:
    theirs = AutoTokenizer.from_pretrained(folder)
    assert theirs(TEXT)["input_ids"] == load(folder).encode(TEXT)
    assert theirs.eos_token_id == 0


def test_training_refuses(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"needs 257 tokens at least .* not 100: raise --vocab"):
        train_bpe(["a"], 100, tmp_path)
    with pytest.raises(ValueError, match="a vocabulary of 10,000,000,000,000,000,000 tokens is too large"):
        train_bpe(["a"], 10**19, tmp_path)
    with pytest.raises(ValueError, match="no text to train a tokenizer on"):
        train_bpe(["", ""], 300, tmp_path)


def test_training_looks_at_the_place_before_the_work(folder: Path, tmp_path: Path) -> None:
    """A tokenizer that data were encoded with is not replaced; what cannot be written is no work lost."""

    def texts() -> Iterator[str]:
        raise AssertionError("read")
        yield

    before = (folder / "tokenizer.json").read_bytes()
    with pytest.raises(ValueError, match=r"tokenizer.json exists already: choose another --out, or remove it"):
        train_bpe(texts(), 300, folder)
    assert (folder / "tokenizer.json").read_bytes() == before
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match=r"file cannot be made a folder \(File exists\): name another place"):
        train_bpe(texts(), 300, tmp_path / "file")


def test_end_of_document(folder: Path, tmp_path: Path) -> None:
    hf = HfTokenizer.from_file(str(folder / "tokenizer.json"))
    hf.add_special_tokens(["</s>", "<end>"])
    hf.enable_truncation(3)
    hf.enable_padding(length=9)
    hf.save(str(tmp_path / "tokenizer.json"))
    assert load(tmp_path).eod == 0  # by its name
    assert load(tmp_path, "<end>").eod == 401
    assert load(tmp_path, "7").eod == 7
    assert load(tmp_path, 8).eod == 8
    assert load(tmp_path).vocab == 402
    assert len(load(tmp_path).encode("a b c d e f")) > 3  # settings for inference have no say here
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"eos_token": {"content": "</s>"}}))
    assert load(tmp_path / "tokenizer.json").eod == 400
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<end>"}))
    assert load(tmp_path).eod == 401
    for wrong in ("<nowhere>", "999", 402, -1):
        with pytest.raises(ValueError, match=r"has no token .* \(its ids are 0 … 401\): .*--eod"):
            load(tmp_path, wrong)
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"tokenizer_config.json is not a JSON object"):
        load(tmp_path)


def test_loading_refuses(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"tokenizer.json does not exist: --tokenizer takes"):
        load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"is not a tokenizer.json"):
        load(tmp_path)
    HfTokenizer(models.BPE()).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match="empty vocabulary"):
        load(tmp_path)


@pytest.mark.parametrize("pattern", KNOWN)
def test_words_are_cut_alike_around_every_character(pattern: str) -> None:
    theirs = pre_tokenizers.Split(Regex(pattern), "isolated")
    bpe = HfTokenizer(models.BPE())
    bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([theirs, bytes_only])
    ours = Encoder(bpe, UINT16)
    assert ours.words is not None
    looked = 0
    for code in range(0x10000):
        char = chr(code)
        if unicodedata.category(char) in ("Cn", "Cs", "Co"):
            assert ours.strange.search(char), hex(code)
            continue
        # 0x4e00 … are 50,000 letters of one kind: a sample of them will do
        if (0x3400 < code < 0xA000 or 0xAC00 < code < 0xD7A0) and code % 64:
            continue
        text = f"a{char}b 1{char}2 {char} {char}{char}x'{char}  {char}\n{char}\n"
        expected = [text[a:b] for _, (a, b) in theirs.pre_tokenize_str(text)]
        assert ours.words.findall(text) == expected, hex(code)
        looked += 1
    assert looked > 15000


FRAGMENTS = st.sampled_from(
    [
        *(
            "a",
            "B",
            "the",
            " ",
            "  ",
            "\n",
            "\r\n",
            "\t",
            "'s",
            "'LL",
            "7",
            "1234",
            "_",
            "(",
            "!\n",
            "x\n",
            "é",
            "e\u0301",
        ),
        *(
            "世",
            "😀",
            "²",
            "Ⅷ",
            "ſ",
            "K",
            "\u00a0",
            "\u2028",
            "\x1c",
            "\u0378",
            "\ufeff",
            "\u200d",
            "<|endoftext|>",
            "<|",
        ),
    ]
)


@pytest.mark.parametrize("kind", ["gpt2", "llama3", "qwen", "lower", "unknown"])
@settings(max_examples=60, deadline=None)
@given(texts=st.lists(st.one_of(st.lists(FRAGMENTS, max_size=30).map("".join), st.text(max_size=20)), max_size=3))
def test_fast_is_plain(folder: Path, kind: str, texts: list[str]) -> None:
    encoder = Encoder(variant(folder, kind), UINT16)
    assert (encoder.words is None) == (kind in ("lower", "unknown"))
    fast, plain = encoder.encode(texts), encoder.encode_plain(texts)
    assert [a.tolist() for a in fast] == [a.tolist() for a in plain]


@pytest.mark.parametrize("kind", ["gpt2", "llama3", "qwen"])
def test_fast_is_plain_for_long_text_in_chunks(folder: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encode, "CHUNK", 300)
    monkeypatch.setattr(encode, "CACHE", 50)
    encoder = Encoder(variant(folder, kind), UINT16)
    texts = [TEXT + "😀\n" + TEXT, "word\n\n\n  next\n\r\nlast\n" * 99, "x" * 5000]
    assert [a.tolist() for a in encoder.encode(texts)] == [a.tolist() for a in encoder.encode_plain(texts)]
    assert len(encoder.cache) < 500


def test_dropout_and_prefix_space_take_the_plain_way(folder: Path) -> None:
    about = json.loads((folder / "tokenizer.json").read_text())
    about["pre_tokenizer"]["add_prefix_space"] = True
    assert Encoder(HfTokenizer.from_str(json.dumps(about)), UINT16).words is None
    about["pre_tokenizer"]["add_prefix_space"] = False
    about["model"]["dropout"] = 0.1
    assert Encoder(HfTokenizer.from_str(json.dumps(about)), UINT16).words is None
