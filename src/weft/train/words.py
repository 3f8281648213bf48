"""The tokenizer that a run's checkpoints carry: it must be the data's. Torch-free."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from weft.config.tree import Config
from weft.data import tokenizer
from weft.data.loader import Loader
from weft.data.tokenizer import Tokenizer


def check_tokenizer(config: Config, loader: Loader) -> None:
    """
    Raises:
        ValueError: data.tokenizer has ids that the model has not, or gives the data's tokens other ids.
    """
    if config.data.tokenizer is None:
        return
    named = tokenizer.load(config.data.tokenizer)
    if named.vocab > config.model.vocab:
        raise ValueError(
            f"data.tokenizer = {config.data.tokenizer} has {named.vocab:,} tokens, more than model.vocab = "
            f"{config.model.vocab:,}: name the tokenizer of the data, or raise model.vocab"
        )
    for stream in loader.streams:
        report = stream.data.report()
        if report.get("tokenizer_digest", named.digest) != named.digest and not _keeps_ids(named, report):
            raise ValueError(
                f"data.tokenizer = {config.data.tokenizer} is not the one that {stream.data.prefix} was made with, "
                f"{report['tokenizer']}: the model would be read in words that it has not learned. Name that one, or "
                f"prepare the data again. (If you know better, remove {stream.data.prefix}.json, which says so.)"
            )


def _keeps_ids(named: Tokenizer, report: dict[str, Any]) -> bool:
    """Whether every token of the report's tokenizer, which must still be there, has its id in `named`, too."""
    try:
        made_with = tokenizer.load(Path(report["tokenizer"]))
    except ValueError:
        return False
    known = named.hf.get_vocab(with_added_tokens=True)
    ids = made_with.hf.get_vocab(with_added_tokens=True)
    return made_with.digest == report["tokenizer_digest"] and ids.items() <= known.items()


def special_tokens(config: Config, loader: Loader) -> dict[str, int | None] | None:
    """What a checkpoint's config.json says of its tokenizer: the token that the data's documents end with, which
    `weft data prepare --eod` may have named, else what the tokenizer declares. None: the run has no tokenizer."""
    if config.data.tokenizer is None:
        return None
    ends = {stream.data.report().get("eod") for stream in loader.streams} - {None}
    return {"eos_token_id": ends.pop() if len(ends) == 1 else tokenizer.load(config.data.tokenizer).eod}
