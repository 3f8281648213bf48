"""A group of processes of its own: one process may be in several, each with other members that come and go.

torch's `init_process_group` makes one world for the life of a process. A server has a world for each cut model, and two of
one model while newer weights come; so groups are put together here from the parts that torch makes its own of.
"""

from __future__ import annotations

import tempfile
import threading
from datetime import timedelta
from itertools import count
from pathlib import Path
from typing import ClassVar

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store, _register_process_group, _unregister_process_group

FOREVER = timedelta(days=3650)
"""An engine may be idle for long; a process that dies closes its connections, which is noticed at once."""


class Meeting:
    """Where the processes of a model meet: a file whose name no other meeting of this process has while it lasts.

    Compiled code knows a group by its name, so names are few: the lowest number that is free. Whoever starts again finds
    what was compiled before.
    """

    taken: ClassVar[set[int]] = set()
    choosing: ClassVar[threading.Lock] = threading.Lock()

    def __init__(self) -> None:
        self.folder = tempfile.TemporaryDirectory(prefix="weft-serve-")
        with self.choosing:
            self.number = next(number for number in count() if number not in self.taken)
            self.taken.add(self.number)
        self.store = Path(self.folder.name) / f"weft-serve-{self.number}"

    def close(self) -> None:
        """Once: its number may be another's then."""
        self.taken.discard(self.number)
        self.folder.cleanup()


def meet(store: Store, name: str, index: int, size: int, device: torch.device) -> dist.ProcessGroup:
    """Wait for all members, each of which calls this; gloo for what is on the CPU, NCCL for what is on GPUs.

    All are of this machine. gloo asks nobody who he is, and by itself listens where the machine's name leads.

    Args:
        name: of no other group in any of these processes.
    """
    files = PrefixStore(name, store)
    group, kinds = dist.ProcessGroup(files, index, size), dist.ProcessGroup.BackendType
    options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    options._timeout = FOREVER
    options._devices = [dist.ProcessGroupGloo.create_device(hostname="127.0.0.1")]
    gloo = dist.ProcessGroupGloo(PrefixStore("cpu", files), index, size, options)
    gloo._set_sequence_number_for_group()
    group._set_default_backend(kinds.GLOO)
    group._register_backend(torch.device("cpu"), kinds.GLOO, gloo)
    if device.type == "cuda":
        fast = dist.ProcessGroupNCCL.Options()
        fast._timeout = FOREVER
        nccl = dist.ProcessGroupNCCL(PrefixStore("cuda", files), index, size, fast)
        nccl._set_sequence_number_for_group()
        group._register_backend(torch.device("cuda"), kinds.NCCL, nccl)
    group._set_group_name(name)  # type: ignore[arg-type]
    _register_process_group(name, group)  # type: ignore[arg-type]  # where torch's functional collectives look
    return group


def part(group: dist.ProcessGroup) -> None:
    """It is over, for this process. Whatever still waits in it is given up."""
    _unregister_process_group(group.group_name)
    group.abort()
