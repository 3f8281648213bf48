"""The data of a run, from its settings. Torch-free."""

from __future__ import annotations

from weft.config.tree import Config
from weft.data.loader import Loader
from weft.data.split import Part


def open_loader(config: Config, part: Part, *, check_tokens: bool) -> Loader:
    """The data of one part of the split.

    Raises:
        ValueError: they cannot be trained on; says why.
    """
    return Loader.open(
        config.data.paths,
        config.data.weights or None,
        seq=config.seq,
        global_batch=config.train.global_batch,
        seed=config.train.seed,
        split=config.data.split,
        part=part,
        document_mask=config.data.document_mask,
        vocab=config.model.vocab,
        check_tokens=check_tokens,
    )
