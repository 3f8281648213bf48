import math

import pytest
import torch

from weft.train.step import clip_factor, squares, squares_by_rows


@pytest.mark.parametrize("dims", [(), (7,), (0, 5), (4096,), (3, 4097), (20000, 768)])
def test_squares_are_exact(dims: tuple[int, ...]) -> None:
    x = torch.randn(dims, generator=torch.Generator().manual_seed(0))
    assert float(squares_by_rows(x)) == pytest.approx(float(x.double().square().sum()), rel=1e-6)


def test_squares_of_several_tensors_are_added_up() -> None:
    tensors = [torch.full((3, 2), 2.0), torch.zeros(0), torch.tensor(3.0)]
    assert squares(tensors).dtype == torch.float64
    assert float(squares(tensors)) == pytest.approx(6 * 4 + 9)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_a_gpus_norm_is_exact() -> None:
    tensors = [torch.randn(50257, 768, device="cuda"), torch.zeros(0, device="cuda"), torch.tensor(3.0, device="cuda")]
    exact = sum(float(x.double().square().sum()) for x in tensors)
    assert float(squares(tensors)) == pytest.approx(exact, rel=1e-5)


def test_the_stock_norm_is_not() -> None:
    """Why `squares_by_rows` exists. If this fails, torch has mended its norm: use it again."""
    x = torch.randn(50257, 768, generator=torch.Generator().manual_seed(0))
    stock = float(torch._foreach_norm([x])[0])
    assert abs(stock / math.sqrt(float(squares([x]))) - 1) > 1e-4


def test_clip_factor() -> None:
    assert clip_factor(0.5, 1.0) == 1.0
    assert clip_factor(4.0, 1.0) == pytest.approx(0.25)
    assert clip_factor(1e9, 0.0) == 1.0
