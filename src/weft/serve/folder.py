"""What `weft generate` is pointed at: a checkpoint, a run, or any Hugging Face directory. Torch-free."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from weft.checkpoint.folder import MANIFEST, MODEL, checkpoints, step_of
from weft.checkpoint.inspection import glance
from weft.checkpoint.sidecars import read_json
from weft.serve.requests.request import Sampling

if TYPE_CHECKING:
    from tokenizers import Tokenizer

CONFIG = "config.json"
ADVISED = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


def find_model(path: Path) -> tuple[Path, list[str]]:
    """The Hugging Face directory of a checkpoint (`step-…`), of a run's newest whole checkpoint, or the path itself;
    and what is damaged in the newer checkpoints that were passed over.

    A checkpoint is held against its manifest by names and sizes; `weft verify` compares every byte.

    Raises:
        ValueError: the path does not exist, holds none of these, or only damaged checkpoints.
    """
    if not path.is_dir():
        raise ValueError(f"there is no folder {path}: give a checkpoint, a run or a Hugging Face directory")
    if (path / CONFIG).is_file():
        return path, []
    one = step_of(path) is not None or (path / MANIFEST).is_file()
    steps = [path] if one else checkpoints(path / "checkpoints")
    damage: list[str] = []
    for step in steps:
        found = [str(finding) for finding in glance(step) if finding.file == MANIFEST or finding.file.startswith(MODEL)]
        if not found:
            return step / MODEL, damage
        damage += found
    if damage:
        raise ValueError(f"no whole checkpoint in {path}: {'; '.join(damage)}")
    raise ValueError(
        f"{path} holds no model: it has no {CONFIG}, is no checkpoint (step-…) and has none in checkpoints/"
    )


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a Hugging Face directory.

    Raises:
        ValueError: the directory has no tokenizer.json, or it is damaged.
    """
    from tokenizers import Tokenizer

    file = folder / "tokenizer.json"
    if not file.is_file():
        raise ValueError(f"{folder} has no tokenizer.json: copy in the tokenizer that the model was trained with")
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # noqa: BLE001 (the library raises nothing more special)
        raise ValueError(f"{file} is no tokenizer: {error}") from None


def advised_sampling(folder: Path) -> dict[str, float]:
    """What a model's makers advise where a request says nothing, by the names of `Sampling`: generation_config.json's.

    Raises:
        ValueError: a value cannot be, or the file is no table.
    """
    file = folder / "generation_config.json"
    table = read_json(file) if file.is_file() else {}
    found = {name: table[name] for name in ADVISED if type(table.get(name)) in (int, float)}
    if found.get("top_k") == 0:  # transformers' word for all
        del found["top_k"]
    try:
        Sampling(**found)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
    return found


def end_tokens(folder: Path) -> tuple[int, ...]:
    """Ids that end a text: `eos_token_id` of generation_config.json, else of config.json; none where neither says."""
    for name in ("generation_config.json", CONFIG):
        file = folder / name
        ids = read_json(file).get("eos_token_id") if file.is_file() else None
        if ids is not None:
            return tuple(ids) if isinstance(ids, list) else (ids,)
    return ()
