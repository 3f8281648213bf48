"""Tokenizers: load any `tokenizer.json`, train a byte-level BPE, find the token that ends a document."""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as HfTokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers

from weft.folder import make_folder
from weft.whole import write_whole

END = "<|endoftext|>"
MOST = 2**31
"""Tokens of a vocabulary: ids are int32 in token files."""
# Names the field gives to the end of a document, the most particular first
END_NAMES = (END, "<|end_of_text|>", "<|end▁of▁sentence|>", "<eos>", "</s>", "[EOS]", "<|eot|>", "[SEP]")


@dataclass(frozen=True)
class Tokenizer:
    """A loaded tokenizer and what the data needs to know of it.

    Attributes:
        hf: the `tokenizers.Tokenizer`, with truncation and padding off.
        vocab: largest id + 1, added tokens included.
        eod: id of the token that ends a document, or None if none was found.
        digest: SHA-256 of tokenizer.json.
    """

    hf: Any
    vocab: int
    eod: int | None
    path: str
    digest: str

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without the special tokens that a template would add around it."""
        return list(self.hf.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of some ids, special tokens written out."""
        return str(self.hf.decode([int(i) for i in ids], skip_special_tokens=False))


def load(path: str | Path, eod: str | int | None = None) -> Tokenizer:
    """Loads `tokenizer.json`, named itself or by the folder it is in.

    Args:
        eod: the token that ends a document, as text or id. If None it is looked for: `eos_token` of
            tokenizer_config.json or special_tokens_map.json, then the usual names.

    Raises:
        ValueError: there is no such file, it is not a tokenizer, or `eod` is not one of its tokens.
    """
    file = Path(path)
    if file.is_dir():
        file = file / "tokenizer.json"
    if not file.is_file():
        raise ValueError(f"{file} does not exist: --tokenizer takes a tokenizer.json or the folder it is in")
    raw = file.read_bytes()
    return loads(raw.decode("utf-8", "replace"), str(file), _find_eod(file, eod), hashlib.sha256(raw).hexdigest())


def loads(text: str, path: str, eod: str | int | None, digest: str) -> Tokenizer:
    """The tokenizer of the text of a `tokenizer.json`; `path` is for messages."""
    try:
        hf = HfTokenizer.from_str(text)
    except Exception as error:  # the Rust side raises bare Exception, nothing narrower
        raise ValueError(f"{path} is not a tokenizer.json: {error}") from error
    hf.no_truncation()
    hf.no_padding()
    known = hf.get_vocab(with_added_tokens=True)
    vocab = max(known.values(), default=-1) + 1
    if vocab == 0:
        raise ValueError(f"{path} has an empty vocabulary")
    if isinstance(eod, str) and eod.isdigit():  # an id: no digit ends a document
        eod = int(eod)
    number = known.get(eod) if isinstance(eod, str) else eod
    if eod is None:
        number = next((known[name] for name in END_NAMES if name in known), None)
    elif number is None or not 0 <= number < vocab:
        raise ValueError(
            f"{path} has no token {eod!r} (its ids are 0 … {vocab - 1}): name another end of document (--eod)"
        )
    return Tokenizer(hf, vocab, number, path, digest)


def _find_eod(file: Path, eod: str | int | None) -> str | int | None:
    """`eod` itself, or the end-of-sequence token that the files beside tokenizer.json declare."""
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        beside = file.with_name(name)
        if eod is None and beside.is_file():
            try:
                declared = json.loads(beside.read_text(encoding="utf-8")).get("eos_token")
            except (ValueError, AttributeError) as error:
                raise ValueError(f"{beside} is not a JSON object: {error}") from error
            eod = declared.get("content") if isinstance(declared, dict) else declared
    return eod


def train_bpe(texts: Iterable[str], vocab: int, out: str | Path, progress: bool = False) -> Tokenizer:
    """Trains a byte-level BPE with GPT-2's pre-tokenizer and writes a folder that transformers loads.

    The same texts in the same order give the same file. `<|endoftext|>` is id 0; the 256 bytes follow.

    Raises:
        ValueError: vocab is too small for the bytes or too large for token files, there is no text, or `out` holds a
            tokenizer already.
    """
    if vocab < 257:
        raise ValueError(
            f"a byte-level vocabulary needs 257 tokens at least (256 bytes and {END}), not {vocab}: raise --vocab"
        )
    if vocab > MOST:
        raise ValueError(
            f"a vocabulary of {vocab:,} tokens is too large: at most {MOST:,}; 32,000 to 256,000 are usual"
        )
    folder = Path(out)
    make_folder(folder)
    if (folder / "tokenizer.json").exists():
        raise ValueError(f"{folder}/tokenizer.json exists already: choose another --out, or remove it")
    hf = HfTokenizer(models.BPE())
    hf.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    hf.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=progress,
    )
    seen = 0

    def counted() -> Iterable[str]:
        nonlocal seen
        for text in texts:
            seen += len(text)
            yield text

    hf.train_from_iterator(counted(), trainer)
    if seen == 0:
        raise ValueError("no text to train a tokenizer on: all inputs are empty or not UTF-8")
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END,
        "eos_token": END,
        "unk_token": END,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 1_000_000_000,
    }
    write_whole(folder / "tokenizer_config.json", json.dumps(config, indent=2) + "\n")
    write_whole(folder / "tokenizer.json", hf.to_str(pretty=True))
    return load(folder)
