"""An engine that begins its own processes, and what happens when one of them dies."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path

import pytest
import torch

import weft.serve.cut.ranks as ranks
import weft.serve.cut.workers as workers
import weft.serve.engine as engines
from weft.checkpoint.region import Region
from weft.checkpoint.weights import create_weights_folder, load_decoder
from weft.models.parameters import stored_sizes
from weft.models.shape import Shape
from weft.serve.config import EngineConfig
from weft.serve.desk import DeadError
from weft.serve.engine import Engine
from weft.serve.generate import complete
from weft.serve.loop import EngineLoop
from weft.serve.requests.request import Output, Request, Sampling

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
    processes = engine.ranks.workers.processes
    assert engine.ranks.meeting is not None
    meeting = engine.ranks.meeting.store.parent
    assert meeting.is_dir()
    engine.add(Request("a", [1, 2, 3], Sampling(max_tokens=12)))
    text = [token for _ in range(12) for output in engine.step() for token in output.tokens]
    assert text == complete(whole, [[1, 2, 3]], Sampling(max_tokens=12))[0]
    engine.close()
    assert [process.poll() for process in processes] == [0]
    assert not meeting.exists()


def test_processes_meet_where_no_other_machine_can_reach_them(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the machine's name or the environment say: between them anybody is believed."""
    for interface in Path("/sys/class/net").iterdir():
        if interface.name != "lo" and (interface / "operstate").read_text().strip() == "up":
            monkeypatch.setenv("GLOO_SOCKET_IFNAME", interface.name)
    engine = Engine.load(folder, EngineConfig(tp=2, device="cpu"))
    assert engine.ranks is not None
    processes = [os.getpid(), *(process.pid for process in engine.ranks.workers.processes)]
    found = [address for process in processes for address in listening(process)]
    engine.close()
    assert len(found) >= 2
    assert all(address.is_loopback for address in found)


def listening(process: int) -> list[IPv4Address | IPv6Address]:
    """Addresses at which a process takes connections, by what Linux says of its sockets."""
    own, found = set(), list[IPv4Address | IPv6Address]()
    for file in Path(f"/proc/{process}/fd").iterdir():
        with suppress(OSError):
            own.add(os.readlink(file))
    for family in ("tcp", "tcp6"):
        for line in Path(f"/proc/{process}/net/{family}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in own:  # TCP_LISTEN
                words = bytes.fromhex(fields[1].partition(":")[0])
                found.append(ip_address(b"".join(words[at : at + 4][::-1] for at in range(0, len(words), 4))))
    return found


def test_a_process_that_stands_still_holds_up_no_end(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "SILENT_SECONDS", 1.0)
    engine = Engine.load(folder, EngineConfig(tp=2, device="cpu"))
    assert engine.ranks is not None
    [process] = engine.ranks.workers.processes
    os.kill(process.pid, signal.SIGSTOP)
    engine.close()  # nobody watches over an engine without a loop
    assert process.poll() == -signal.SIGKILL


def test_fewer_gpus_than_processes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "pick_device", lambda name: torch.device("cuda"))
    monkeypatch.setattr(engines, "pick_device", lambda name: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [ranks.rank_device(EngineConfig(tp=4), index).index for index in (0, 1)] == [0, 1]
    with pytest.raises(ValueError, match=r"tp · pp is 4, a GPU for each process, and there are 2: choose less"):
        Engine.load(folder, EngineConfig(tp=2, pp=2))


def test_a_process_serves_several_cut_models(folder: Path) -> None:
    """Each has a group of its own; closing one leaves the other alone."""
    _, whole = load_decoder(folder)
    config = EngineConfig(tp=2, device="cpu")
    engines = [Engine.load(folder, config) for _ in range(2)]
    expected = complete(whole, [[1, 2, 3]], Sampling(max_tokens=12))[0]
    for engine in [*engines, engines[0]]:
        engine.add(Request("a", [1, 2, 3], Sampling(max_tokens=12)))
        assert [token for _ in range(12) for output in engine.step() for token in output.tokens] == expected
        if engine is engines[1]:
            engine.close()
    engines[0].close()


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize("busy", [True, False])
def test_a_death_ends_the_streams(
    folder: Path, busy: bool, end: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At once, as the one who waits for it need not notice: told within a second of the closed pipe. A process that was
    stopped is a death after a while of silence."""
    monkeypatch.setattr(workers, "SILENT_SECONDS", 2.5)
    loop = EngineLoop(Engine.load(folder, EngineConfig(tp=2, device="cpu")))
    loop.start()
    outputs: list[Output] = []
    told: list[float] = []
    assert loop.engine.ranks is not None
    staff = loop.engine.ranks.workers
    if busy:

        def deliver(output: Output) -> None:
            outputs.append(output)
            if output.finish is not None:
                told.append(time.monotonic())

        loop.submit(Request("a", [1, 2, 3], Sampling(max_tokens=2000)), deliver)
        while not outputs:
            time.sleep(0.01)
    os.kill(staff.processes[0].pid, end)
    limit = time.monotonic() + 60
    while loop.alive or staff.noticed is None:
        time.sleep(0.01)
        assert time.monotonic() < limit
    if busy:
        assert outputs[-1].finish == "error"
        assert "the engine failed" in str(outputs[-1].error)
        assert told[0] - staff.noticed < 1  # negative, where the engine's thread saw it first
    why = "gave no sign of life for 2.5 s, and was ended" if end == signal.SIGSTOP else "ended with exit code -9"
    assert str(loop.error) == f"process 1 of 2 {why}"
    with pytest.raises(DeadError, match="the engine has ended"):
        loop.submit(Request("b", [1]), outputs.append)
    loop.close()
    assert staff.processes[0].poll() == -signal.SIGKILL


def test_processes_end_with_the_first(folder: Path) -> None:
    """However that one ended: nobody is left to hold memory."""
    code = (
        "import sys, time; from pathlib import Path; from weft.serve.config import EngineConfig\n"
        "from weft.serve.engine import Engine\n"
        f"engine = Engine.load(Path({str(folder)!r}), EngineConfig(tp=2, device='cpu'))\n"
        "print(engine.ranks.workers.processes[0].pid, flush=True); time.sleep(100)"
    )
    first = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert first.stdout is not None
    other = int(first.stdout.readline())
    first.kill()
    first.wait()
    first.stdout.close()
    limit = time.monotonic() + 30
    while Path(f"/proc/{other}").exists() and "State:\tZ" not in Path(f"/proc/{other}/status").read_text():
        time.sleep(0.05)
        assert time.monotonic() < limit
