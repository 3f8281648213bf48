"""The launcher with real processes: who is told what, and that nobody is left behind."""

import os
import pty
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import pytest

WORKER = """
import os, signal, sys, time
from pathlib import Path
import torch
import torch.distributed as dist
from weft.config.layout import Layout
from weft.launch.process import start_process, stop_process
from weft.train.signals import StopRequest

def main(args):
    mode, folder = args[0], Path(args[1])
    (folder / f"pid{os.environ.get('RANK', 0)}").write_text(str(os.getpid()))
    process = start_process("cpu", layout=Layout.parse("fsdp4") if mode == "layout" else None, timeout=60)
    value = torch.ones(1)
    dist.all_reduce(value)
    assert value.item() == process.world
    if process.rank == 1:
        if mode == "raise":
            raise RuntimeError("boom")
        if mode == "user":
            raise ValueError("data.paths: there is no file x.bin")
        if mode == "noisy":
            print("almost there", flush=True)
            os.abort()
    if mode in ("train", "deaf"):
        train(process, folder, deaf=mode == "deaf")
    elif mode != "ok":
        dist.all_reduce(value)  # in which the others are when one fails
    stop_process()
    if process.is_main:
        print(f"{sys.stdout.isatty()}: finished with", torch.get_num_threads(), "threads", flush=True)

def train(process, folder, deaf):
    with StopRequest() as stop:
        for step in range(10000):
            time.sleep(0.02)
            (folder / f"step{process.rank}").write_text(str(step))
            asked = torch.tensor([float(stop.requested)])
            dist.all_reduce(asked)
            if asked and not deaf:
                (folder / f"saved{process.rank}").write_text(f"{step} {stop.signal}")
                return

if __name__ == "__main__":
    main(sys.argv[1:])
"""

LAUNCHER = """
import sys
from pathlib import Path
from weft.launch import watch
from weft.launch.local import launch
watch.PEERS = 1.5
sys.exit(launch(int(sys.argv[1]), "toy_worker:main", sys.argv[2:], logs=Path(sys.argv[3]) / "logs"))
"""

Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def start(tmp_path: Path) -> Start:
    (tmp_path / "toy_worker.py").write_text(WORKER)
    (tmp_path / "toy_launcher.py").write_text(textwrap.dedent(LAUNCHER))
    env = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    env["PYTHONPATH"] = os.pathsep.join([str(tmp_path), env.get("PYTHONPATH", "")])

    def run(
        mode: str, world: int = 2, command: tuple[str, ...] = (), out: int = subprocess.PIPE
    ) -> subprocess.Popen[str]:
        command = command or (str(tmp_path / "toy_launcher.py"), str(world))
        return subprocess.Popen(
            [sys.executable, *command, mode, str(tmp_path)],
            stdout=out, stderr=subprocess.PIPE, text=True, env=env,
        )  # fmt: skip

    return run


def until(condition: Callable[[], bool], seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def pids(folder: Path, world: int) -> list[int]:
    return [int((folder / f"pid{rank}").read_text()) for rank in range(world)]


def training(folder: Path, world: int = 2) -> bool:
    return all((folder / f"step{rank}").exists() for rank in range(world))


def test_success_with_the_terminal_for_rank_0(start: Start, tmp_path: Path) -> None:
    terminal, inside = pty.openpty()
    run = start("ok", out=inside)
    os.close(inside)
    _, error = run.communicate(timeout=300)
    out = os.read(terminal, 1000).decode()
    os.close(terminal)
    threads = max(1, len(os.sched_getaffinity(0)) // 2)
    assert (run.returncode, error) == (0, "")
    assert out == f"True: finished with {threads} threads\r\n"
    assert (tmp_path / "logs" / "rank1.log").read_text() == ""


def test_an_exception_of_one_rank_is_shown_once(start: Start, tmp_path: Path) -> None:
    run = start("raise", world=3)
    out, error = run.communicate(timeout=300)
    assert run.returncode == 1
    assert out == ""
    assert error.startswith("weft: error: rank 1 of 3: RuntimeError: boom\n\nTraceback")
    assert error.count("Traceback") == 1
    assert 'raise RuntimeError("boom")' in error
    assert "launch/worker.py" not in error
    assert not any(alive(pid) for pid in pids(tmp_path, 3))


def test_a_mistake_of_the_user_is_a_sentence(start: Start) -> None:
    run = start("user")
    assert run.communicate(timeout=300) == ("", "weft: error: rank 1 of 2: data.paths: there is no file x.bin\n")
    assert run.returncode == 2


def test_the_same_mistake_on_all_ranks_names_none(start: Start) -> None:
    run = start("layout")
    expected = (
        "weft: error: layout fsdp4 takes 4 processes, and 2 processes were started: change the layout, or start 4\n"
    )
    assert run.communicate(timeout=300) == ("", expected)
    assert run.returncode == 2


def test_a_killed_rank_is_named_with_its_signal(start: Start, tmp_path: Path) -> None:
    run = start("train")
    until(lambda: training(tmp_path))
    os.kill(pids(tmp_path, 2)[1], signal.SIGKILL)
    _, error = run.communicate(timeout=20)
    assert run.returncode == 1
    assert error.startswith("weft: error: rank 1 of 2: the process was ended by SIGKILL (if nobody sent it")
    assert "Traceback" not in error


def test_a_crash_in_native_code_shows_what_its_rank_wrote(start: Start) -> None:
    run = start("noisy")
    _, error = run.communicate(timeout=300)
    assert error.startswith("weft: error: rank 1 of 2: the process was ended by SIGABRT")
    assert "almost there" in error
    assert "toy_worker.py" in error  # faulthandler's stack


def test_a_signal_reaches_every_rank_and_all_save_at_the_same_step(start: Start, tmp_path: Path) -> None:
    run = start("train")
    until(lambda: training(tmp_path))
    run.send_signal(signal.SIGTERM)
    run.send_signal(signal.SIGTERM)  # at once again, as terminals and wrappers do: still one request
    out, error = run.communicate(timeout=20)
    assert (run.returncode, error) == (0, "")
    assert out.startswith("False: finished")
    saved = [(tmp_path / f"saved{rank}").read_text() for rank in range(2)]
    assert saved[0] == saved[1]
    assert saved[0].endswith(f" {int(signal.SIGTERM)}")


def test_a_second_signal_ends_all_at_once(start: Start, tmp_path: Path) -> None:
    run = start("deaf")
    until(lambda: training(tmp_path))
    run.send_signal(signal.SIGINT)
    time.sleep(0.7)
    assert run.poll() is None
    run.send_signal(signal.SIGINT)
    _, error = run.communicate(timeout=5)
    assert run.returncode == 1
    assert error == "weft: ended by a second signal: what was not saved by then is lost\n"
    assert not any(alive(pid) for pid in pids(tmp_path, 2))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_killed_launcher_leaves_no_orphans(start: Start, tmp_path: Path) -> None:
    run = start("train")
    until(lambda: training(tmp_path))
    run.kill()
    until(lambda: not any(alive(pid) for pid in pids(tmp_path, 2)), seconds=5)
    run.communicate()


def test_a_frozen_rank_does_not_keep_the_others_waiting(start: Start, tmp_path: Path) -> None:
    run = start("train", world=3)
    until(lambda: training(tmp_path, 3))
    frozen, killed = pids(tmp_path, 3)[1:]
    os.kill(frozen, signal.SIGSTOP)
    os.kill(killed, signal.SIGKILL)
    _, error = run.communicate(timeout=20)
    assert error.startswith("weft: error: rank 2 of 3: the process was ended by SIGKILL")
    assert not alive(frozen)


def test_one_process_runs_in_the_launcher(start: Start, tmp_path: Path) -> None:
    run = start("ok", world=1)
    out, error = run.communicate(timeout=300)
    assert (run.returncode, error) == (0, "")
    assert out.startswith("False: finished")
    assert pids(tmp_path, 1) == [run.pid]


def test_plain_torchrun(start: Start, tmp_path: Path) -> None:
    torchrun = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d",
                "--rdzv-endpoint", "127.0.0.1:0", str(tmp_path / "toy_worker.py"))  # fmt: skip
    run = start("ok", command=torchrun)
    out, _ = run.communicate(timeout=300)
    assert run.returncode == 0
    assert out.startswith("False: finished")


def test_weft_worker_under_torchrun_names_the_cause(start: Start) -> None:
    torchrun = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d",
                "--rdzv-endpoint", "127.0.0.1:0", "-m", "weft.launch.worker", "toy_worker:main")  # fmt: skip
    run = start("user", command=torchrun)
    _, error = run.communicate(timeout=300)
    assert run.returncode == 1
    assert "data.paths: there is no file x.bin" in error
