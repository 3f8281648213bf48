"""Shapes drawn at random, of every family: written for transformers, they compute and continue alike there.

WEFT_EXAMPLES=1000 python -m pytest tests/unit/test_drawn_shapes.py    # minutes; others each time
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, get_args

import torch
from hypothesis import given
from hypothesis import strategies as st

from draws import draws
from weft.checkpoint.region import Region
from weft.checkpoint.weights import create_weights_folder
from weft.models.parameters import buffer_sizes, parameter_sizes
from weft.models.places import EXPERT_FAMILIES, LATENT_FAMILIES, check_expressible
from weft.models.shape import Family, Shape
from weft.verify.export import verify_export

WINDOWED = ("mistral", "qwen2", "qwen3", "mixtral", "qwen3_moe")


@st.composite
def shapes(draw: Any) -> Shape | None:
    """None where the family has no such model."""

    def one(*values: Any) -> Any:
        return draw(st.sampled_from(values))

    family = one(*get_args(Family))
    sizes = {
        "family": family, "num_layers": one(1, 2, 3), "num_heads": one(1, 2, 3, 4, 6), "vocab": one(31, 67, 128),
        "max_seq": one(16, 40, 64, 128), "ffn": one(16, 20, 48), "tied": one(False, True),
    }  # fmt: skip
    sizes["hidden"] = sizes["num_heads"] * one(4, 8, 10) if family == "gpt2" else one(16, 24, 40)
    if family in LATENT_FAMILIES:
        ranks = {"q_rank": one(None, 8, 12), "kv_rank": one(8, 16)}
        sizes["latent"] = {**ranks, "nope_dim": one(4, 6, 8), "rope_dim": one(2, 4), "value_dim": one(4, 6)}
        sizes["yarn"] = one(None, {"factor": one(1, 4), "original_max_seq": 8, "mscale": 0.7, "mscale_all_dim": 1.2})
    elif family != "gpt2":
        heads = [count for count in range(1, sizes["num_heads"] + 1) if sizes["num_heads"] % count == 0]
        own = sizes["hidden"] // sizes["num_heads"] if family == "qwen2" else one(4, 8, 10, 16)
        sizes |= {
            "num_kv_heads": one(*heads),
            "head_dim": own,
            "rope_theta": one(1e4, 1e6),
            "norm_eps": one(1e-5, 1e-6),
        }
        stretch = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_seq": 8}
        sizes["rope_scaling"] = one(None, stretch)
        if family in WINDOWED:  # transformers' cache for a window of 1 keeps not even that token
            sizes["sliding_window"] = one(None, 2, 5, 64)
    if family in EXPERT_FAMILIES:
        experts = {"num_experts": one(4, 8), "per_token": one(1, 2, 3)}
        if family != "mixtral":
            experts |= {
                "ffn": one(8, 12),
                "dense_layers": one(0, 1),
                "norm_topk": family != "deepseek_v2" and one(False, True),
            }
        if family in LATENT_FAMILIES:
            experts |= {"shared": one(1, 2), "groups": one(1, 2), "top_groups": 1, "scaling": one(1.0, 2.5)}
            experts["scores"] = "sigmoid" if family == "deepseek_v3" else "softmax"
        sizes["experts"] = experts
    try:
        shape = Shape(**sizes)
        check_expressible(shape)
    except ValueError:
        return None
    return shape


@draws(25)
@given(shape=shapes().filter(bool))
def test_transformers_computes_whatever_is_written(shape: Shape) -> None:
    numbers = torch.Generator().manual_seed(0)
    with TemporaryDirectory() as folder:
        with create_weights_folder(Path(folder) / "model", shape, torch.float32) as weights:
            for name, dims in {**parameter_sizes(shape), **buffer_sizes(shape)}.items():
                drawn = torch.randn(dims, generator=numbers) * 0.15
                weights.write(Region.whole(name, dims), drawn + 1.0 * name.endswith("norm.weight"))
        report = verify_export(Path(folder) / "model")
    assert report.right, f"{report.first_wrong()}: {report.stages}"
