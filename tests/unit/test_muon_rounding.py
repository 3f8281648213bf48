"""The bound of Muon's updates on a GPU, where matrices are made orthogonal in bf16: bf16 on a CPU stands in for it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from weft.config.load import make_config
from weft.train.muon import newton_schulz
from weft.verify.layout import _updates

NAME = "blocks.0.attention.out.weight"
SHAPE = {"num_layers": 1, "hidden": 96, "num_heads": 4, "ffn": 160, "vocab": 64, "max_seq": 16}
LR = 1e-3


def gradient(spectrum: str) -> Tensor:
    x = torch.randn(96, 96, generator=torch.Generator().manual_seed(0))
    left, values, right = torch.linalg.svd(x)
    number = torch.arange(1, 97.0)
    values = {"random": values, "1/n": 1 / number, "1/n²": number**-2, "low rank": (number < 8) + 1e-3}[spectrum]
    return left * values @ right


def trace(direction: Tensor, grad: Tensor, device: str) -> Any:
    """One step from a weight of zeros; other weights have no gradient and do not move."""
    step = SimpleNamespace(loss=1.0, grad_norm=float(grad.norm()), lr=LR, device=device)
    moved = {"grad": grad, "weight": -LR * 0.2 * 96**0.5 * direction}

    def read(number: int, name: str) -> Tensor:
        kind, _, weight = name.partition(".")
        return moved[kind] if number and weight == NAME else torch.zeros(96, 96)

    return SimpleNamespace(steps=[step], read=read)


def right(direction: Tensor, grad: Tensor, device: str = "cuda") -> bool:
    optimizer = {"kind": "muon", "weight_decay": 0.0, "clip_norm": 0.0}
    config = make_config({"model": SHAPE, "optimizer": optimizer})
    [found] = [it for it in _updates(config, trace(direction, grad, device)) if it.name == NAME]
    return found.right


@pytest.mark.parametrize("spectrum", ["random", "1/n", "1/n²", "low rank"])
def test_rounding_is_within_its_bound(spectrum: str) -> None:
    grad = gradient(spectrum)
    ahead = 1.95 * grad
    order = torch.randperm(96, generator=torch.Generator().manual_seed(1))  # other sums, as another device has
    shuffled = newton_schulz(ahead[order][:, order].bfloat16()[None])[0].float()
    back = order.argsort()
    direction = shuffled[back][:, back]
    assert right(direction, grad)
    assert not right(direction, grad, "cpu")
    assert right(newton_schulz(ahead[None])[0], grad)


@pytest.mark.parametrize("spectrum", ["random", "1/n"])
@pytest.mark.parametrize("wrong", ["scale", "sign of a row", "plain momentum", "four steps"])
def test_what_is_wrong_is_not(spectrum: str, wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    grad = gradient(spectrum)
    if wrong == "four steps":
        monkeypatch.setattr("weft.train.muon.STEPS", 4)
    direction = newton_schulz(grad.bfloat16()[None])[0].float()
    if wrong == "scale":
        direction = direction * 1.2
    elif wrong == "sign of a row":
        direction[3] *= -1
    elif wrong == "plain momentum":
        direction = grad / grad.norm() * 96**0.5
    assert not right(direction, grad)
