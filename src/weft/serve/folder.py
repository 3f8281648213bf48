"""What `weft generate` is pointed at: a checkpoint, a run, or any Hugging Face directory. Torch-free."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from weft.checkpoint.folder import MODEL, checkpoints

if TYPE_CHECKING:
    from tokenizers import Tokenizer


def find_model(path: Path) -> Path:
    """The Hugging Face directory in a checkpoint (`step-…`), of a run's newest checkpoint, or the path itself.

    Raises:
        ValueError: the path does not exist, or holds none of these.
    """
    if not path.is_dir():
        raise ValueError(f"there is no folder {path}: give a checkpoint, a run or a Hugging Face directory")
    for folder in (path, path / MODEL, *(step / MODEL for step in checkpoints(path / "checkpoints"))):
        if (folder / "config.json").is_file():
            return folder
    raise ValueError(
        f"{path} holds no model: looked for config.json in it, in model/ (a checkpoint) "
        "and in checkpoints/step-*/model/ (a run)"
    )


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a Hugging Face directory.

    Raises:
        ValueError: the directory has no tokenizer.json.
    """
    from tokenizers import Tokenizer

    file = folder / "tokenizer.json"
    if not file.is_file():
        raise ValueError(f"{folder} has no tokenizer.json: copy in the tokenizer that the model was trained with")
    return Tokenizer.from_file(str(file))


def end_tokens(folder: Path) -> tuple[int, ...]:
    """Ids that end a text: `eos_token_id` of generation_config.json, else of config.json; none where neither says."""
    for name in ("generation_config.json", "config.json"):
        file = folder / name
        ids = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id") if file.is_file() else None
        if ids is not None:
            return tuple(ids) if isinstance(ids, list) else (ids,)
    return ()
