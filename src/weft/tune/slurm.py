"""Slurm: how a trial is started on all nodes of the allocation that this process is in. Torch-free."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence

PORTS = range(29500, 30500)
"""Where torchrun's agents meet; which of these is a matter of the job's number, so that two jobs do not meet."""


def num_nodes(env: Mapping[str, str] = os.environ) -> int:
    """Of the allocation; 1 where there is none."""
    return int(env.get("SLURM_JOB_NUM_NODES", "1"))


def srun(world: int, entry: str, arguments: Sequence[str], env: Mapping[str, str] = os.environ) -> list[str]:
    """The command that runs `entry(arguments)` in `world` processes over all nodes: torchrun on each.

    Raises:
        ValueError: the processes are not as many on each node.
    """
    nodes = num_nodes(env)
    if world % nodes:
        raise ValueError(f"{world} processes do not go evenly over the {nodes} nodes of this Slurm allocation")
    job = env["SLURM_JOB_ID"]
    port = PORTS[int(job) % len(PORTS)]
    return [
        "srun", f"--nodes={nodes}", f"--ntasks={nodes}", "--ntasks-per-node=1", "--kill-on-bad-exit=1",
        sys.executable, "-m", "torch.distributed.run", f"--nnodes={nodes}", f"--nproc-per-node={world // nodes}",
        "--rdzv-backend=c10d", f"--rdzv-endpoint={_first_host(env)}:{port}", f"--rdzv-id={job}",
        "-m", "weft.launch.worker", entry, *arguments,
    ]  # fmt: skip


def _first_host(env: Mapping[str, str]) -> str:
    hosts = subprocess.run(
        ["scontrol", "show", "hostnames", env["SLURM_JOB_NODELIST"]], capture_output=True, text=True, check=True
    )
    return hosts.stdout.split()[0]
