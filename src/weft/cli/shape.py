"""The model that a verb is asked about: a preset's, or that of a Hugging Face config.json."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from weft.models.shape import Shape


SEQ = 4096
"""Tokens of a sequence, where nobody says how many."""


def length(seq: int | None, shape: Shape) -> int:
    """Of a sequence: what is asked for, or SEQ; or all positions of a model that is made for fewer."""
    return seq or min(SEQ, shape.max_seq)


def read_shape(model: str, *, instead: bool = False) -> Shape:
    """
    Args:
        instead: of a model that weft does not know, blocks of the same sizes will do.

    Raises:
        ValueError: there is no such preset or file, or it is no model that weft knows.
    """
    import json

    from weft.config.load import read_text
    from weft.models.huggingface import shape_from_config
    from weft.plan.stand_in import stand_in
    from weft.presets import preset_shape

    path = Path(model)
    if path.suffix != ".json":
        return preset_shape(model)
    try:
        config = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is no JSON: {error}") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path} is no config.json: that is an object, of a model's settings")
    if config.pop("quantization_config", None):  # DeepSeek-V3's
        print(
            "quantization_config is of weights that are served; the plan is of those that are trained", file=sys.stderr
        )
    try:
        return shape_from_config(config)
    except ValueError as error:
        if not instead:
            raise
        why = error
    try:
        shape, remarks = stand_in(config)
    except ValueError as error:
        raise ValueError(f"{why}. Nor can a plan take it for another: {error}") from None
    print(f"{why}. So {'; '.join(remarks)}", file=sys.stderr)
    return shape
