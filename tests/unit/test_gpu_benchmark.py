"""benchmarks/gpu.py, rehearsed without a GPU: every path of it runs on a CPU with tiny models."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("gpu")


def run(out: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """As on a machine where weft is not installed: the script finds it by itself."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"OUT": str(out)}
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), *arguments]
    return subprocess.run(command, env=environment, cwd=out, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_rehearsal_runs_every_section(tmp_path: Path) -> None:
    done = run(tmp_path, "--device", "cpu", "--tiny")
    assert done.returncode == 0, done.stdout + done.stderr
    sections = json.loads((tmp_path / "gpu.json").read_text())["sections"]
    assert set(sections) == {"parity", "blocks", "gpt2", "parts", "serve", "peers"}
    rows = {f"{name} {row}": values for name, part in sections.items() for row, values in part["rows"].items()}
    assert not {name: row["failed"] for name, row in rows.items() if "failed" in row}
    assert [part["ended"] for part in sections.values()] == ["whole"] * 6
    compared = [row for name, row in rows.items() if name.startswith("parity") and "CPU" not in name]
    assert len(compared) == 30
    texts = [row for name, row in rows.items() if name.startswith("serve texts")]
    assert len(texts) == 6
    assert all(row["right"] for row in compared + texts)
    served = [row for name, row in rows.items() if name.startswith("serve decode")]
    assert [row["same_tokens"] for row in served] == 4 * [1.0]
    assert all(row["told"] in done.stdout for row in rows.values() if "told" in row)
    assert list(tmp_path.glob("gpu*")) == [tmp_path / "gpu.json"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    done = run(tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "there is no CUDA GPU here: nothing to measure\n"
    assert not list(tmp_path.iterdir())


def test_a_failed_row_is_written_down_and_the_next_goes_on(gpu: ModuleType, tmp_path: Path) -> None:
    def fail() -> dict:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    cpu = torch.device("cpu")
    section = gpu.Section("parity", cpu, gpu.TINY, tmp_path, time.monotonic() + 100, tiny=False)
    section.row("one", fail)
    section.row("two", lambda: {"told": "done"})
    section.deadline = time.monotonic() + 1
    section.row("three", fail)
    rows = json.loads((tmp_path / "gpu_parity.json").read_text())["rows"]
    assert rows["one"]["failed"].startswith("OutOfMemoryError: CUDA out of memory")
    assert "in fail" in rows["one"]["trace"]
    assert rows["two"]["told"] == "done"
    assert rows["three"]["skipped"] == "1 s were left of the time, 10 are needed"
    assert gpu.told(rows["one"]).startswith("FAILED: OutOfMemoryError")


def test_out_of_memory_means_fewer_layers(gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def row(section: object, layers: int, batch: int, seq: int, layout: str) -> dict:
        if layers > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return {"told": "fits"}

    monkeypatch.setattr(gpu, "block_row", row)
    section = gpu.Section("blocks", torch.device("cpu"), gpu.TINY, tmp_path, time.monotonic() + 100, tiny=True)
    gpu.blocks(section)
    told = {name: gpu.told(row) for name, row in section.rows.items()}
    assert told["2 blocks, 2 × 16 bf16"] == "FAILED: OutOfMemoryError: CUDA out of memory"
    assert told["1 blocks, 2 × 16 bf16"] == told["1 blocks, 2 × 16 full.bf16"] == "fits"


def test_layers_that_fit(gpu: ModuleType) -> None:
    """Of the real sizes, by the plan: an H100's memory takes several of Llama 3 8B's blocks, a larger one more."""
    found = [gpu.fitting(gpu.GPU, 2, 4096, limit * 2**30) for limit in (1, 70, 122)]
    assert found[0] == 1
    assert 4 <= found[1] < found[2] < 32
    assert gpu.planned(gpu.block_config(gpu.GPU, found[1], 2, 4096, "bf16")) <= 70 * 2**30


def test_the_plain_peer_is_gpt2(gpu: ModuleType) -> None:
    """As many parameters as weft's, and random weights know nothing: the loss is that of guessing."""
    shape = gpu.TINY.gpt2
    model = gpu.peers.PlainGPT2(shape)
    assert sum(p.numel() for p in model.parameters()) == shape.num_params
    tokens = torch.randint(shape.vocab, (2, 9), generator=torch.Generator().manual_seed(0))
    loss = gpu.peers.plain_loop(model, tokens, compiled=False, lr=1e-3, clip=1.0)()
    assert loss == pytest.approx(torch.tensor(shape.vocab).log().item(), rel=0.1)
