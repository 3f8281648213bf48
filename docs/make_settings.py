"""Writes the tables of settings.md from the models that the settings are checked with: python docs/make_settings.py"""

from __future__ import annotations

import re
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from weft.config.tree import Config

PAGE = Path(__file__).with_name("settings.md")
BEGIN = "<!-- The tables from here on are made by docs/make_settings.py. -->\n"

NOTES = {
    "model.family": "Hugging Face architecture that the weights are written as; brings its switches along",
    "model.num_layers": "blocks",
    "model.hidden": "width between the blocks",
    "model.num_heads": "query heads",
    "model.num_kv_heads": "key and value heads; each serves num_heads / num_kv_heads query heads; left out: num_heads",
    "model.head_dim": "numbers of one head; left out: hidden / num_heads, or as model.latent says",
    "model.ffn": "width inside of the MLP; left out with gelu: 4 · hidden",
    "model.vocab": "tokens in the vocabulary",
    "model.max_seq": "the context: positions that the model knows",
    "model.positions": "rotary, or a learned vector for each position",
    "model.rope_theta": "base of the rotary frequencies",
    "model.rope_scaling": "Llama 3.1's stretch of the frequencies: a table, see below",
    "model.yarn": "DeepSeek's stretch of the frequencies: a table, see below",
    "model.experts": "MLPs that a token meets a few of: a table, see below",
    "model.latent": "attention by way of latent vectors: a table, see below",
    "model.norm": "kind of every norm",
    "model.norm_eps": "added under the root",
    "model.activation": "swiglu has three matrices in the MLP, gelu two",
    "model.qkv_bias": "biases of the query, key and value matrices",
    "model.out_bias": "biases of the attention's output and of the MLP",
    "model.qk_norm": "RMSNorm of each head's queries and keys",
    "model.tied": "the head is the token embedding",
    "model.sliding_window": "tokens that each token sees, itself included; left out: all before it",
    "model.init_std": "standard deviation of initial matrices",
    "optimizer.betas": "of the two moments",
    "optimizer.eps": "added to the root of the second moment",
    "optimizer.weight_decay": "of matrices",
    "train.steps": "updates in the whole run",
    "train.device": "auto: cuda where every process on the machine can have a GPU of its own",
    "log.tensorboard": "write TensorBoard's files beside log.jsonl",
}
"""Words for settings whose model has none of its own."""

FROM_MODEL = "from the family, or from others"


def made(page: Path = PAGE) -> str:
    """The page as it should be: what is written by hand, then one table for each section."""
    head, begin, _ = page.read_text(encoding="utf-8").partition(BEGIN)
    assert begin, f"{page} has lost its line {BEGIN!r}"
    return head + BEGIN + "".join(sections(Config))


def sections(root: type[BaseModel]) -> list[str]:
    """`run`, which stands above all tables, and each table."""
    top = {name: field for name, field in root.model_fields.items() if not nested(field)}
    out = [table("run", "", top)]
    for name, field in root.model_fields.items():
        if model := nested(field):
            out.append(table(f"[{name}]", f"{name}.", model.model_fields))
            for inner, found in model.model_fields.items():
                if inside := nested(found):
                    out.append(table(f"[{name}.{inner}]", f"{name}.{inner}.", inside.model_fields))
    return out


def table(title: str, path: str, fields: dict[str, FieldInfo]) -> str:
    lines = [f"\n## {title}\n", "| setting | values | default | meaning |", "|---|---|---|---|"]
    for name, field in fields.items():
        meaning = field.description or NOTES.get(path + name, "")
        lines.append(f"| `{path}{name}` | {values(field)} | {default(field)} | {meaning} |")
    return "\n".join(lines) + "\n"


def nested(field: FieldInfo) -> type[BaseModel] | None:
    kinds = (field.annotation, *get_args(field.annotation))
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), None)


def values(field: FieldInfo) -> str:
    """What may stand there."""
    return kind_of(field.annotation) + "".join(
        f" {sign} {getattr(bound, name):g}"
        for bound in field.metadata
        for name, sign in (("ge", "≥"), ("gt", ">"), ("le", "≤"))
        if hasattr(bound, name)
    )


def kind_of(kind: Any) -> str:
    origin, inside = get_origin(kind), get_args(kind)
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in inside)
    if origin in (Union, UnionType):
        return " or ".join(kind_of(part) for part in inside if part is not NoneType)
    if origin is tuple:
        return f"list of {NAMES[inside[0]]}s" if inside[-1] is ... else f"{len(inside)} {NAMES[inside[0]]}s"
    return NAMES.get(kind, "table")


NAMES: dict[Any, str] = {bool: "true or false", int: "whole number", float: "number", str: "text"}


def default(field: FieldInfo) -> str:
    if field.default is PydanticUndefined:
        return "–"
    if field.default is None:
        return "not set"
    text = repr(list(field.default) if isinstance(field.default, tuple) else field.default)
    return f"`{re.sub(r'^True$', 'true', re.sub(r'^False$', 'false', text)).replace(chr(39), chr(34))}`"


if __name__ == "__main__":
    PAGE.write_text(made(), encoding="utf-8")
