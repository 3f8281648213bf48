"""NVIDIA's AIPerf and Triton's perf_analyzer, by their own commands, from where scripts/ has put them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

AIPERF = Path(sys.prefix) / "aiperf" / "bin" / "aiperf"
needs_aiperf = pytest.mark.skipif(not AIPERF.is_file(), reason="aiperf is not there: scripts/aiperf.sh")
ANALYZER = Path(sys.prefix) / "perf_analyzer" / "run"
needs_perf_analyzer = pytest.mark.skipif(
    not ANALYZER.is_file(), reason="perf_analyzer is not there: scripts/perf_analyzer.sh"
)

REQUESTS, TOKENS = 20, 8
LETTERS = "[a-z]{20}"
"""The form of more than so many tokens of bytes: an answer without a letter, which AIPerf takes for none, cannot be."""


def profile(url: str, model: str, tokenizer: Path, out: Path, *more: str) -> dict[str, Any]:
    """What it measured with four requests at once, of eight tokens each; none may have failed."""
    command = [
        str(AIPERF), "profile", "--model", model, "--url", url, "--tokenizer", str(tokenizer), "--streaming", "--isl", "20",
        "--osl", str(TOKENS), "--request-count", str(REQUESTS), "--concurrency", "4", "--ui", "none", "--no-gpu-telemetry",
        "--no-server-metrics", "--output-artifact-dir", str(out), *more,
    ]  # fmt: skip
    # told to be offline, it takes the tokenizer's folder for a name on the hub; and weft's path is not its own
    names = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "PYTHONPATH")
    environment = {name: value for name, value in os.environ.items() if name not in names} | {
        "HF_HOME": str(out / "hub")
    }
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    told = json.loads((out / "profile_export_aiperf.json").read_text())
    assert told["error_summary"] == [], told["error_summary"]
    assert told["request_count"]["avg"] == REQUESTS
    assert 0 < told["time_to_first_token"]["avg"] <= told["request_latency"]["avg"]
    return told


def analyze(url: str, model: str, out: Path, data: dict[str, Any], *more: str) -> list[dict[str, Any]]:
    """What perf_analyzer wrote down of so many requests with these inputs, four at once, each with its responses; none may
    have failed."""
    out.mkdir()
    (out / "in.json").write_text(json.dumps({"data": [data]}))
    command = [
        str(ANALYZER), "-m", model, "-u", url, "--input-data", str(out / "in.json"), "--concurrency-range", "4",
        "--request-count", str(REQUESTS), "--profile-export-file", str(out / "told.json"), *more,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    [experiment] = json.loads((out / "told.json").read_text())["experiments"]
    requests: list[dict[str, Any]] = experiment["requests"]
    assert len(requests) >= REQUESTS
    assert all(request["timestamp"] < min(request["response_timestamps"]) for request in requests)
    return requests
