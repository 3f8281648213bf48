"""An engine that begins its own processes, and what happens when one of them dies."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from weft.checkpoint.region import Region
from weft.checkpoint.weights import create_weights_folder, load_decoder
from weft.models.parameters import stored_sizes
from weft.models.shape import Shape
from weft.serve.config import EngineConfig
from weft.serve.engine import Engine
from weft.serve.generate import complete
from weft.serve.loop import DeadError, EngineLoop
from weft.serve.request import Output, Request, Sampling

SHAPE = Shape(family="llama", num_layers=2, hidden=32, num_heads=4, num_kv_heads=2, ffn=48, vocab=67, max_seq=2048)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("served") / "model"
    numbers = torch.Generator().manual_seed(0)
    with create_weights_folder(path, SHAPE, torch.float32) as weights:
        for name, dims in stored_sizes(SHAPE).items():
            weights.write(Region.whole(name, dims), 0.3 * torch.randn(dims, generator=numbers) + ("norm" in name))
    return path


@pytest.mark.parametrize(("tp", "pp"), [(2, 1), (1, 2)])
def test_an_engine_of_two_processes_comes_and_goes(folder: Path, tp: int, pp: int) -> None:
    _, whole = load_decoder(folder)
    engine = Engine.load(folder, EngineConfig(tp=tp, pp=pp, device="cpu"))
    assert engine.ranks is not None
    processes = engine.ranks.processes
    assert engine.ranks.folder is not None
    meeting = Path(engine.ranks.folder.name)
    assert meeting.is_dir()
    with pytest.raises(ValueError, match="this process serves a cut model already"):
        Engine.load(folder, EngineConfig(tp=2, device="cpu"))
    engine.add(Request("a", [1, 2, 3], Sampling(max_tokens=12)))
    text = [token for _ in range(12) for output in engine.step() for token in output.tokens]
    assert text == complete(whole, [[1, 2, 3]], Sampling(max_tokens=12))[0]
    engine.close()
    assert [process.poll() for process in processes] == [0]
    assert not meeting.exists()
    assert not dist.is_initialized()


def test_a_death_ends_the_streams_and_another_engine_can_begin(folder: Path) -> None:
    for busy in (True, False):
        loop = EngineLoop(Engine.load(folder, EngineConfig(tp=2, device="cpu")))
        loop.start()
        outputs: list[Output] = []
        assert loop.engine.ranks is not None
        [process] = loop.engine.ranks.processes
        if busy:
            loop.submit(Request("a", [1, 2, 3], Sampling(max_tokens=2000)), outputs.append)
            while not outputs:
                time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        died = time.monotonic()
        while loop.alive:
            time.sleep(0.01)
            assert time.monotonic() - died < 5
        if busy:
            assert outputs[-1].finish == "error"
            assert "the engine failed" in str(outputs[-1].error)
        with pytest.raises(DeadError, match="the engine has ended"):
            loop.submit(Request("b", [1]), outputs.append)
        loop.close()
        assert not dist.is_initialized()
