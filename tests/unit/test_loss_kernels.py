"""The loss's Triton kernels, in Triton's interpreter: a process of its own, for Triton reads its setting when imported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from weft.models.triton import has_triton


@pytest.mark.skipif(not has_triton(), reason="there is no Triton")
def test_the_kernels_do_what_the_plain_way_does() -> None:
    script = Path(__file__).with_name("loss_kernels.py")
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    found = subprocess.run([sys.executable, script], env=env, capture_output=True, text=True, timeout=300)
    assert found.returncode == 0, found.stderr[-3000:]
    assert found.stdout.strip() == "right"
