"""A few hundred of `benchmarks/serve_fuzz.py`'s requests: nonsense is never the server's mistake."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import pytest
from served import make_folder, model, served

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from serve_fuzz import fuzz, make_call, make_request

pytestmark = pytest.mark.slow


def test_nonsense_on_every_route(tmp_path: Path) -> None:
    assert make_request(1, 7) == make_request(1, 7) != make_request(2, 7)
    assert make_call(1, 7) == make_call(1, 7)
    with served(model(make_folder(tmp_path / "tiny"), max_waiting=64), grpc_port=0, apart=True) as server:
        result = asyncio.run(fuzz(server.url, f"127.0.0.1:{server.grpc_port}", requests=400, seed=1))
        assert not result["failures"]
        assert result["statuses"]["gRPC OK"] > 5
        assert result["statuses"]["gRPC INVALID_ARGUMENT"] > 5
        assert result["statuses"]["200"] > 50
        assert result["statuses"]["400"] > 50
        assert server.catalogue.models["tiny"].restarts == 0
        stats = server.catalogue.models["tiny"].current.desk.stats()
        assert (stats.running, stats.waiting, stats.cache_used) == (0, 0, 0)
