"""One process of a run: its rank, its device, its process group."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import HashStore, TCPStore  # type: ignore[attr-defined]

from weft.config.layout import Layout
from weft.launch.cores import num_cores
from weft.launch.local import LISTEN_FD


@dataclass(frozen=True)
class Process:
    """Where this process stands in the run."""

    rank: int
    world: int
    local_rank: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this is the process that prints and writes the log."""
        return self.rank == 0


def start_process(device: str = "auto", *, layout: Layout | None = None, timeout: float = 600.0) -> Process:
    """Take this process's device, and join the others of the run.

    Reads what `weft train` or `torchrun` put into the environment; with nothing there, this is a run of one process.
    That one has a process group too, without a port: sharding over one process takes the same path as over many.

    Args:
        device: cpu, cuda, or auto: cuda where each process on this machine can have a GPU of its own.
        layout: checked against the number of processes, before anything is started.
        timeout: seconds after which a collective that does not finish is an error.

    Raises:
        ValueError: an environment that is not whole, too few GPUs, or not as many processes as the layout takes.
    """
    rank, world = _env_int("RANK", 0), _env_int("WORLD_SIZE", 1)
    local_rank, local_world = _env_int("LOCAL_RANK", rank), _env_int("LOCAL_WORLD_SIZE", world)
    if ("RANK" in os.environ) != ("WORLD_SIZE" in os.environ) or not 0 <= rank < world:
        raise ValueError(
            f"RANK = {os.environ.get('RANK')} and WORLD_SIZE = {os.environ.get('WORLD_SIZE')} do not name a process: "
            "start with torchrun, which sets both, or unset both for a single process"
        )
    if layout is not None and layout.world != world:
        raise ValueError(
            f"layout {layout} takes {_processes(layout.world)}, and {_processes(world)} "
            f"{'was' if world == 1 else 'were'} started: change the layout, or start {layout.world}"
        )
    chosen = _device(device, local_rank, local_world)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if local_world > 1 and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, num_cores() // local_world))
    if not dist.is_initialized():
        _join(rank, world, chosen, timedelta(seconds=timeout))
    return Process(rank, world, local_rank, chosen)


def stop_process() -> None:
    """Leave the process group, where there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def _join(rank: int, world: int, device: torch.device, timeout: timedelta) -> None:
    # gloo stays beside nccl: objects and flags are agreed on from the CPU without a pause of the GPU
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if "MASTER_ADDR" not in os.environ and world == 1:
        store: HashStore | TCPStore = HashStore()
    elif LISTEN_FD in os.environ:
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        listen_fd = int(os.environ[LISTEN_FD]) if rank == 0 else None
        store = TCPStore(host, port, world, rank == 0, timeout, wait_for_workers=False, master_listen_fd=listen_fd)
    else:
        dist.init_process_group(backend, timeout=timeout)
        return
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout)


def _device(name: str, local_rank: int, local_world: int) -> torch.device:
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "cpu" or (name == "auto" and gpus < local_world):
        return torch.device("cpu")
    if name not in ("auto", "cuda"):
        raise ValueError(f"train.device = {name!r} is not known: auto, cpu or cuda")
    if gpus < local_world:
        raise ValueError(
            f"train.device = cuda takes one GPU for each process; {_processes(local_world)} on this machine, "
            f"{gpus} GPUs seen: start fewer processes, or set train.device = cpu"
        )
    return torch.device("cuda", local_rank)


def _env_int(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"{name} = {text!r} in the environment is not a number") from None


def _processes(count: int) -> str:
    return f"{count} process" if count == 1 else f"{count} processes"
