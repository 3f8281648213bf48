"""How far the clocks of two machines are apart, by messages there and back (Cristian, 1989)."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
import torch.distributed as dist

ROUNDS = 12


def clock_offset(ranks: Sequence[int]) -> tuple[int, int]:
    """By how many ns this process's clock is ahead of the first of `ranks`, and how wrong that may be: (ahead, error).

    Of several messages there and back the quickest counts; the other clock was read at some moment between, so half of
    its way is the error. Every one of `ranks` calls this, and nobody else.
    """
    rank = dist.get_rank() if len(ranks) > 1 else ranks[0]
    if rank != ranks[0]:
        for _ in range(ROUNDS):
            message = torch.zeros(1, dtype=torch.int64)
            dist.recv(message, ranks[0])
            dist.send(torch.tensor([time.time_ns()]), ranks[0])
        answer = torch.zeros(2, dtype=torch.int64)
        dist.recv(answer, ranks[0])
        ahead, error = answer.tolist()
        return ahead, error
    for other in ranks[1:]:
        found = []
        for _ in range(ROUNDS):
            message = torch.zeros(1, dtype=torch.int64)
            left = time.time_ns()
            dist.send(message, other)
            dist.recv(message, other)
            back = time.time_ns()
            found.append(((back - left) // 2, int(message) - (left + back) // 2))
        error, ahead = min(found)
        dist.send(torch.tensor([ahead, error]), other)
    return 0, 0
