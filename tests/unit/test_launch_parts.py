import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from weft.config.layout import Layout
from weft.launch.failure import Failure, describe, first_cause, is_peer_error, of_exception, of_exit
from weft.launch.local import launch
from weft.launch.process import Process, start_process, stop_process
from weft.launch.watch import End, wait_all

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture(autouse=True)
def _bare_environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    yield
    stop_process()


def test_a_single_process_has_a_group_of_one() -> None:
    process = start_process("cpu", layout=Layout())
    assert process == Process(rank=0, world=1, local_rank=0, device=torch.device("cpu"))
    assert process.is_main
    value = torch.ones(2)
    dist.all_reduce(value)
    assert value.tolist() == [1.0, 1.0]
    assert start_process("cpu") == process  # again is no harm
    stop_process()
    assert not dist.is_initialized()
    stop_process()


def test_the_layout_must_fit_the_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"layout fsdp2.tp2 takes 4 processes, and 1 process was started"):
        start_process("cpu", layout=Layout.parse("fsdp2.tp2"))
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"takes 1 process, and 2 processes were started: .* or start 1"):
        start_process("cpu", layout=Layout())


@pytest.mark.parametrize("settings", [{"RANK": "1"}, {"WORLD_SIZE": "2"}, {"RANK": "2", "WORLD_SIZE": "2"}])
def test_half_an_environment_is_refused(monkeypatch: pytest.MonkeyPatch, settings: dict[str, str]) -> None:
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="do not name a process: start with torchrun"):
        start_process("cpu")


def test_an_environment_that_is_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "first")
    with pytest.raises(ValueError, match="RANK = 'first' in the environment is not a number"):
        start_process("cpu")


def test_too_few_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"one GPU for each process; 1 process on this machine, 0 GPUs seen"):
        start_process("cuda")
    with pytest.raises(ValueError, match="'tpu' is not known"):
        start_process("tpu")


def test_one_process_is_the_caller_itself(tmp_path: Path) -> None:
    seen: list[list[str]] = []

    def entry(args: list[str]) -> int:
        seen.append(args)
        return 3

    assert launch(1, entry, ["a", "b"], logs=tmp_path / "logs") == 3
    assert seen == [["a", "b"]]
    assert not (tmp_path / "logs").exists()


@pytest.mark.parametrize(
    ("error", "peer"),
    [
        (RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:4242"), True),
        (RuntimeError("Connection reset by peer"), True),
        (dist.DistBackendError("NCCL error: remote process exited"), True),
        (dist.DistNetworkError("The client socket has timed out"), True),
        (BrokenPipeError(32, "Broken pipe"), True),
        (RuntimeError("shapes cannot be multiplied"), False),
        (ValueError("train.steps: NCCL is not a number"), False),
    ],
)
def test_errors_about_a_lost_connection_are_known(error: Exception, peer: bool) -> None:
    assert is_peer_error(error) is peer
    wrapped = RuntimeError("while saving")
    wrapped.__cause__ = error
    assert is_peer_error(wrapped) is peer


def test_the_first_cause_is_the_earliest_that_is_not_a_lost_connection() -> None:
    peer = Failure(0, 1.0, "RuntimeError: Connection closed by peer", peer=True)
    cause, later = Failure(2, 2.0, "RuntimeError: boom", detail="Traceback: boom"), Failure(1, 3.0, "ended by SIGABRT")
    assert first_cause([peer, later, cause]) is cause
    assert first_cause([peer]) is peer
    assert "rank 2 of 4: RuntimeError: boom\n\nTraceback: boom" in describe(cause, [peer, cause], 4, Path("logs"))
    assert "no process left an error of its own" in describe(peer, [peer], 4, Path("logs"))


def test_a_failure_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    try:
        raise KeyError("lr")
    except KeyError as error:
        failure = of_exception(error, rank=3)
    failure.save(tmp_path)
    assert of_exit(1, 3, tmp_path, noticed=0.0) == failure
    assert failure.message == "KeyError: 'lr'"
    assert failure.detail.endswith("KeyError: 'lr'\n")


def test_a_process_that_left_nothing_is_told_by_its_exit_code(tmp_path: Path) -> None:
    (tmp_path / "rank1.log").write_text("\n".join(map(str, range(100))))
    failure = of_exit(-signal.SIGSEGV, 1, tmp_path, noticed=5.0)
    assert failure.message == "the process was ended by SIGSEGV"
    assert failure.detail.splitlines() == [str(line) for line in range(80, 100)]
    assert "exit code 7" in of_exit(7, 0, tmp_path, noticed=5.0).message


def test_a_signal_that_ended_what_has_nothing_to_save_says_no_more_than_that(tmp_path: Path) -> None:
    """Be it training that had not begun, a calibration, or the trace of a proof."""
    processes = [subprocess.Popen(["sleep", "60"], start_new_session=True) for _ in range(2)]
    end = wait_all(processes, [(time.monotonic(), signal.SIGTERM)], tmp_path)
    assert end == End(stopped="ended by SIGTERM before there was anything to save")


def test_a_save_may_take_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A launcher that ended what still ran 600 s after a signal lost it."""
    save = f"trap 'sleep 1; kill $!; exit 0' TERM; touch {tmp_path}/$0; sleep 60 & wait"
    processes = [subprocess.Popen(["sh", "-c", save, str(rank)], start_new_session=True) for rank in range(2)]
    while len(list(tmp_path.iterdir())) < 2:
        time.sleep(0.01)
    real = time.monotonic
    monkeypatch.setattr(time, "monotonic", lambda: 10_000 * real())
    assert wait_all(processes, [(time.monotonic(), signal.SIGTERM)], tmp_path) == End()
    assert [process.returncode for process in processes] == [0, 0]


def test_ctrl_c_is_the_same_to_several_processes_as_to_one(tmp_path: Path) -> None:
    """`weft plan calibrate` exited with 1, where every other verb says that it was stopped, and exits with 130."""
    processes = [subprocess.Popen(["sleep", "60"], start_new_session=True) for _ in range(2)]
    with pytest.raises(KeyboardInterrupt):
        wait_all(processes, [(time.monotonic(), signal.SIGINT)], tmp_path)
    assert all(process.poll() == -signal.SIGINT for process in processes)
