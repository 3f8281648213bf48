"""A run's tokenizer is that of its data: another one is refused before any process is started."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from weft.cli.train import check
from weft.config.load import make_config, merge
from weft.config.tree import Config
from weft.data.prepare import prepare
from weft.train.data import open_loader
from weft.train.words import special_tokens

WORDS = ["one", "two", "three", "four", "."]


def write_tokenizer(folder: Path, words: list[str], **settings: bool) -> Path:
    folder.mkdir()
    tokenizer = Tokenizer(WordLevel({word: number for number, word in enumerate(words)}, unk_token="one"))
    tokenizer.save(str(folder / "tokenizer.json"), **settings)
    return folder


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """Data of ten documents, made with `right`, whose documents end with a token that nothing but --eod names."""
    for number in range(10):
        (tmp_path / f"{number}.txt").write_text("two")
    prepare(
        [tmp_path / f"{n}.txt" for n in range(10)],
        tmp_path / "text",
        write_tokenizer(tmp_path / "right", WORDS),
        eod=".",
    )
    return tmp_path


def config(made: Path, tokenizer: str | None, vocab: int = 8) -> Config:
    model = {"family": "llama", "num_layers": 1, "hidden": 8, "num_heads": 2, "ffn": 16, "vocab": vocab, "max_seq": 4}
    data = {"paths": [str(made / "text")], "tokenizer": tokenizer and str(made / tokenizer)}
    tree = {"model": model, "data": data, "train": {"steps": 1, "global_batch": 1, "seq": 4}}
    return make_config(merge({}, tree))


def test_the_data_s_own_tokenizer_is_taken_wherever_it_lies(made: Path) -> None:
    check(config(made, "right"), resume=False)
    os.rename(made / "right", made / "moved")
    check(config(made, "moved"), resume=False)
    check(config(made, None), resume=False)


def test_one_that_gives_all_tokens_the_same_ids_is_taken(made: Path) -> None:
    write_tokenizer(made / "longer", [*WORDS, "five"], pretty=True)
    check(config(made, "longer"), resume=False)
    (made / "right" / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match="is not the one that"):
        check(config(made, "longer"), resume=False)


def test_another_one_is_refused_as_long_as_the_report_says_so(made: Path) -> None:
    write_tokenizer(made / "other", ["two", "one", "three", "four", "."])
    with pytest.raises(ValueError, match=rf"/other is not the one that {made}/text was made with, {made}/right/tok"):
        check(config(made, "other"), resume=False)
    (made / "text.json").unlink()
    check(config(made, "other"), resume=False)


def test_one_larger_than_the_model_is_refused(made: Path) -> None:
    write_tokenizer(made / "large", [str(number) for number in range(9)])
    with pytest.raises(ValueError, match=r"data\.tokenizer = .* has 9 tokens, more than model\.vocab = 8: name the"):
        check(config(made, "large"), resume=False)


def test_a_checkpoint_s_texts_end_as_the_data_s_documents(made: Path) -> None:
    settings = config(made, "right")
    loader = open_loader(settings, "train", check_tokens=False)
    assert special_tokens(settings, loader) == {"eos_token_id": WORDS.index(".")}
    assert special_tokens(config(made, None), loader) is None
    (made / "text.json").unlink()
    assert special_tokens(settings, loader) == {"eos_token_id": None}
