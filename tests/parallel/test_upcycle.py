"""A mixture of experts that starts from a dense model's weights computes what that one does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from harness import make, run_forked
from transformers import LlamaConfig, LlamaForCausalLM

from weft.config.tree import Config
from weft.train.step import eval_step
from weft.train.training import build
from weft.verify.trace import step_rows

MIXTURE = {
    "family": "mixtral", "num_layers": 4, "hidden": 32, "num_heads": 8, "num_kv_heads": 4, "head_dim": 4, "ffn": 48,
    "vocab": 67, "max_seq": 32, "norm_eps": 1e-5, "rope_theta": 1e4, "experts": {"num_experts": 4, "per_token": 2},
}  # fmt: skip


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("dense") / "llama"
    torch.manual_seed(5)
    sizes = {"num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 4, "intermediate_size": 48}
    config = LlamaConfig(
        hidden_size=32, vocab_size=67, max_position_embeddings=32, rms_norm_eps=1e-5, initializer_range=0.2, **sizes
    )
    LlamaForCausalLM(config).save_pretrained(path)
    return path


def loss(config: Config, file: Path) -> float:
    """Before the first step, on random tokens."""

    def work(rank: int) -> None:
        training = build(config, torch.device("cpu"))
        total, count = eval_step(training.woven, step_rows(training, None, 1))
        if rank == 0:
            file.write_text(repr(total / count))

    run_forked(config.layout.world, work)
    return float(file.read_text())


@pytest.mark.parametrize("layout", ["single", "fsdp2.ep2", "tp2.ep1.etp2.sp", "pp2.dp2.ep2.mb2"])
def test_the_same_loss(layout: str, dense: Path, tmp_path: Path) -> None:
    start = {"init_from": str(dense)}
    before = loss(make("llama", "single", train=start, model={"head_dim": 4}), tmp_path / "dense")
    after = loss(make("mixtral", layout, train=start, model=MIXTURE), tmp_path / "mixture")
    assert after == pytest.approx(before, rel=1e-5)
    other = loss(make("mixtral", layout, model=MIXTURE), tmp_path / "random")
    assert abs(other - before) > 0.01


def test_other_sizes_are_refused(dense: Path, tmp_path: Path) -> None:
    narrow = {
        **MIXTURE,
        "family": "qwen3_moe",
        "experts": {"num_experts": 4, "per_token": 2, "ffn": 24},
        "qk_norm": True,
    }
    with pytest.raises(AssertionError, match="qk_norm"):
        loss(make("mixtral", "single", train={"init_from": str(dense)}, model=narrow), tmp_path / "none")
    scaled = {**MIXTURE, "experts": {"num_experts": 4, "per_token": 2, "norm_topk": False}}
    with pytest.raises(AssertionError, match="norm_topk = False, should be True"):
        loss(make("mixtral", "single", train={"init_from": str(dense)}, model=scaled), tmp_path / "none")
