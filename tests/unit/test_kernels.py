"""Which kernels of torch's a process takes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch.backends import cuda

from weft.train.kernels import ATTENTION, choose_attention


def allowed() -> list[bool]:
    return [
        cuda.flash_sdp_enabled(), cuda.cudnn_sdp_enabled(), cuda.mem_efficient_sdp_enabled(), cuda.math_sdp_enabled()
    ]  # fmt: skip


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    before = allowed()
    yield
    for allow, was in zip((*ATTENTION.values(), cuda.enable_math_sdp), before, strict=True):
        allow(was)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("flash", [True, False, False, False]),
        ("cudnn", [False, True, False, False]),
        ("efficient", [False, False, True, False]),
        ("auto", [True, True, True, True]),
    ],
)
def test_a_named_kernel_of_attention_is_the_only_one(name: str, expected: list[bool]) -> None:
    choose_attention(name, torch.device("cuda"))  # type: ignore[arg-type]
    assert allowed() == expected


def test_on_a_cpu_nothing_is_chosen() -> None:
    before = allowed()
    choose_attention("flash", torch.device("cpu"))
    assert allowed() == before
