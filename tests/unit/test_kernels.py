"""Which kernels of torch's a process takes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch.backends import cuda

from weft.config.load import make_config
from weft.train.kernels import ATTENTION, be_deterministic, choose_attention
from weft.verify import resume


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


def test_on_a_cpu_nothing_becomes_deterministic(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    be_deterministic(torch.device("cpu"))
    assert not torch.are_deterministic_algorithms_enabled()
    assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ


def test_on_a_gpu_all_switches_are_set() -> None:
    """In a process of its own, for there is no way back."""
    script = (
        "import os, torch, torch._inductor.config as inductor\n"
        "from weft.train.kernels import be_deterministic\n"
        "be_deterministic(torch.device('cuda'))\n"
        "print(torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled(),\n"
        "    torch.utils.deterministic.fill_uninitialized_memory, torch.backends.cudnn.deterministic,\n"
        "    inductor.deterministic, os.environ['CUBLAS_WORKSPACE_CONFIG'])\n"
    )
    env = {name: value for name, value in os.environ.items() if name != "CUBLAS_WORKSPACE_CONFIG"}
    found = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["True", "False", "False", "True", "True", ":4096:8"]


def test_cudnns_attention_is_refused_where_bits_count() -> None:
    small = {"num_layers": 1, "hidden": 16, "num_heads": 2, "ffn": 32, "vocab": 32, "max_seq": 16}
    with pytest.raises(ValueError, match=r"train\.attention = flash"):
        make_config({"model": small, "train": {"deterministic": True, "attention": "cudnn"}})


@pytest.mark.parametrize(
    ("device", "gpu", "wanted"), [("cpu", True, False), ("auto", False, False), ("auto", True, True)]
)
def test_a_resume_is_verified_with_the_same_bits(
    device: str, gpu: bool, wanted: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    small = {"num_layers": 1, "hidden": 16, "num_heads": 2, "ffn": 32, "vocab": 32, "max_seq": 16}
    config = make_config({"model": small, "train": {"device": device}})
    assert resume.settings_of(config, 2, tmp_path).train.deterministic is wanted
