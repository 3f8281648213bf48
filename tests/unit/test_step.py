import math

import pytest
import torch

from weft.train.step import clip_factor, squares


@pytest.mark.parametrize("dims", [(), (7,), (0, 5), (4096,), (3, 4097), (20000, 768)])
def test_squares_are_exact(dims: tuple[int, ...]) -> None:
    x = torch.randn(dims, generator=torch.Generator().manual_seed(0))
    assert float(squares(x)) == pytest.approx(float(x.double().square().sum()), rel=1e-6)


def test_the_stock_norm_is_not() -> None:
    """Why `squares` exists. If this fails, torch has mended its norm: use it again."""
    x = torch.randn(50257, 768, generator=torch.Generator().manual_seed(0))
    stock = float(torch._foreach_norm([x])[0])
    assert abs(stock / math.sqrt(float(squares(x))) - 1) > 1e-4


def test_clip_factor() -> None:
    assert clip_factor(0.5, 1.0) == 1.0
    assert clip_factor(4.0, 1.0) == pytest.approx(0.25)
    assert clip_factor(1e9, 0.0) == 1.0
