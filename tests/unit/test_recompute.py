"""What `layout.recompute` says: forms, blocks, refusals."""

from __future__ import annotations

import pytest

from weft.config.layout import Layout
from weft.config.load import make_config
from weft.config.recompute import OPERATIONS, Recompute
from weft.parallel import recompute


@pytest.mark.parametrize(
    ("text", "found", "blocks"),
    [
        ("none", Recompute(first=0), []),
        ("full", Recompute(), [0, 1, 2, 3, 4]),
        ("full/2", Recompute(every=2), [0, 2, 4]),
        ("selective:2", Recompute(keeps=OPERATIONS, first=2), [0, 1]),
        ("keep-attention+network", Recompute(keeps=("attention", "network")), [0, 1, 2, 3, 4]),
        ("redo-mlp/3", Recompute(redone=("mlp",), every=3), [0, 3]),
        ("redo-attention+experts", Recompute(redone=("attention", "experts")), [0, 1, 2, 3, 4]),
        ("full:9", Recompute(first=9), [0, 1, 2, 3, 4]),
    ],
)
def test_forms(text: str, found: Recompute, blocks: list[int]) -> None:
    assert Recompute.parse(text) == found
    assert list(found.blocks(5)) == blocks
    assert Layout.parse(f"dp2.{text}").recompute == text if text != "none" else True


def test_budgets() -> None:
    assert Recompute.parse("fit40g").budget == 40 * 2**30
    assert Recompute.parse("fit500m").budget == 500 * 2**20


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("most", "'most' is not understood. Forms: none, full"),
        ("full/1", "not understood"),
        ("full:0", "not understood"),
        ("none/2", "not understood"),
        ("fit40", "not understood"),
        ("fit40g/2", "not understood"),
        ("keep-", "not understood"),
        ("keep-norm", "after the dash stand some of matmul.attention.network, each once"),
        ("redo-mlp+mlp", "after the dash stand some of attention.mlp.experts, each once"),
        ("redo-mlp+attention", "in this order: attention.mlp"),
        ("redo-mlp+experts", "experts are a part of the mlp; name one of the two"),
    ],
)
def test_nonsense_is_refused(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Layout(recompute=text)


def test_the_same_operations_in_both_rooms() -> None:
    assert tuple(recompute.OPERATIONS) == OPERATIONS


def test_experts_alone_are_asked_of_a_mixture() -> None:
    config = {
        "model": {
            "family": "llama",
            "num_layers": 2,
            "hidden": 64,
            "num_heads": 4,
            "ffn": 160,
            "vocab": 100,
            "max_seq": 64,
        }
    }
    with pytest.raises(ValueError, match="redo-experts: this model has no experts"):
        make_config(config | {"layout": "redo-experts", "train": {"global_batch": 1, "seq": 64}})
