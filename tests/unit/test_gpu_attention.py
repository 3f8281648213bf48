"""Attention over the paged cache on a GPU: its kernels in Triton's interpreter, which is a process of its own, for Triton
reads that setting when it is imported; and how a batch is dealt out to them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from weft.models.triton import has_triton
from weft.serve.kernels.gpu_attention import available, make_tiles, num_splits


@pytest.mark.skipif(not has_triton(), reason="there is no Triton")
def test_the_kernels_do_what_torch_does() -> None:
    script = Path(__file__).with_name("attention_kernels.py")
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    found = subprocess.run([sys.executable, script], env=env, capture_output=True, text=True, timeout=300)
    assert found.returncode == 0, found.stderr[-3000:]
    assert found.stdout.strip() == "right"


def test_every_token_is_in_one_tile() -> None:
    counts, ends = [1, 70, 3, 1], [5, 100, 3, 1]
    ones, several = make_tiles(counts, ends, group=4)
    assert ones == [[0, 0, 1, 4], [3, 74, 1, 0]]
    assert several == [
        [1, 1, 16, 30], [1, 17, 16, 46], [1, 33, 16, 62], [1, 49, 16, 78], [1, 65, 6, 94], [2, 71, 3, 0],
    ]  # fmt: skip


def test_as_many_programs_as_keep_a_gpu_busy() -> None:
    assert num_splits(programs=8, longest=100, processors=132) == 1
    assert num_splits(programs=8, longest=8192, processors=132) == 64
    assert num_splits(programs=8, longest=131072, processors=132) == 99
    assert num_splits(programs=64 * 8, longest=8192, processors=132) == 1
    assert num_splits(programs=10**4, longest=8192, processors=132) == 1


def test_a_cpu_has_its_own() -> None:
    assert not available(torch.device("cpu"), torch.float32)
