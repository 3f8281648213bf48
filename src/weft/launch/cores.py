"""The cores of this machine that we may use. Torch-free."""

from __future__ import annotations

import os


def num_cores() -> int:
    """Cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
