"""What ranges are called in a trace: `weft:KIND:DETAIL`. Torch-free."""

from __future__ import annotations

PREFIX = "weft:"
