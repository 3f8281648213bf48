"""A hundred steps of three models, whose losses are committed: a change of numbers anywhere shows here.

After a change that is meant: WEFT_WRITE_GOLDEN=1 .venv/bin/python -m pytest tests/golden, and say why in the commit.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from weft.config.load import make_config
from weft.data.indexed import IndexedWriter
from weft.launch.process import start_process, stop_process
from weft.train.data import open_loader
from weft.train.schedule import learning_rate
from weft.train.step import train_step
from weft.train.training import build

STEPS = 100
FILES = Path(__file__).parent
MODELS = {
    "gpt2": {"family": "gpt2", "num_layers": 3, "hidden": 64, "num_heads": 4, "vocab": 211, "max_seq": 64},
    "llama": {
        "family": "llama", "num_layers": 3, "hidden": 64, "num_heads": 4, "num_kv_heads": 2, "ffn": 176, "vocab": 211,
        "max_seq": 64,
    },
    "deepseek": {
        "family": "deepseek_v3", "num_layers": 3, "hidden": 64, "num_heads": 4, "ffn": 128, "vocab": 211, "max_seq": 64,
        "latent": {"q_rank": 24, "kv_rank": 32, "nope_dim": 12, "rope_dim": 8, "value_dim": 16},
        "experts": {
            "num_experts": 8, "per_token": 2, "ffn": 48, "dense_layers": 1, "shared": 1, "scores": "sigmoid",
            "groups": 4, "top_groups": 2, "scaling": 2.5,
        },
    },
}  # fmt: skip
BOUND = {"gpt2": 2e-3, "llama": 2e-3, "deepseek": 2e-2}
"""The order of sums differs from CPU to CPU, and a hundred steps carry it on; a router may send some tokens elsewhere."""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents with something to learn: each counts on in steps of its own, with some noise."""
    prefix = tmp_path_factory.mktemp("data") / "counting"
    numbers = np.random.Generator(np.random.PCG64(1))
    with IndexedWriter(str(prefix), np.uint16) as writer:
        for _ in range(600):
            length, stride = numbers.integers(20, 120), numbers.integers(1, 6)
            document = (numbers.integers(0, 211) + stride * np.arange(length)) % 211
            noisy = np.where(numbers.random(length) < 0.05, numbers.integers(0, 211, length), document)
            writer.add(noisy.astype(np.uint16))
    return prefix


@pytest.mark.parametrize("model", sorted(MODELS))
def test_losses_of_a_hundred_steps(model: str, corpus: Path) -> None:
    losses = train(model, corpus)
    file = FILES / f"{model}.json"
    if os.environ.get("WEFT_WRITE_GOLDEN"):
        file.write_text(json.dumps([round(loss, 6) for loss in losses]) + "\n")
    golden = json.loads(file.read_text())
    assert len(golden) == STEPS
    assert golden[-1] < 0.75 * golden[0], "there was something to learn"
    np.testing.assert_allclose(losses[:10], golden[:10], rtol=1e-5)
    np.testing.assert_allclose(losses, golden, rtol=BOUND[model])


def train(model: str, corpus: Path) -> list[float]:
    config = make_config(
        {
            "model": MODELS[model],
            "data": {"paths": [str(corpus)], "document_mask": model == "llama", "split": (1, 0, 0)},
            "train": {"steps": STEPS, "global_batch": 8, "seed": 3},
            "optimizer": {"lr": 3e-3},
            "schedule": {"warmup": 10},
            "layout": "mb4",
            "balance": {"sequence": 1e-2, "z": 1e-3} if model == "deepseek" else {},
        }
    )
    torch.set_num_threads(1)
    process = start_process("cpu")
    try:
        training, loader = build(config, process.device), open_loader(config, "train", check_tokens=True)
        losses = []
        for step in range(STEPS):
            rows = training.take(loader.batch(step * config.train.global_batch, training.rows))
            lr = learning_rate(step + 1, config.schedule, peak=config.optimizer.lr, steps=STEPS)
            parts = (training.woven, training.optimizer, training.scaler, rows)
            losses.append(train_step(*parts, lr=lr, clip_norm=config.optimizer.clip_norm).loss)
        return losses
    finally:
        stop_process()
