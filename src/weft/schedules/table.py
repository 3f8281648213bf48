"""A pipeline schedule: what each process does, in which order."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

Kind = Literal["F", "B", "W"]


class Op(NamedTuple):
    """One piece of work.

    F: forward. B: backward; where the table has a W for the same stage and micro-batch, of the input alone. W: backward
    of the weights, put off.

    `stage` counts through the whole model, from the embedding's 0 to the head's: a process has one or several of them.
    """

    kind: Kind
    stage: int
    micro_batch: int

    def __str__(self) -> str:
        return f"{self.kind} of stage {self.stage}, micro-batch {self.micro_batch}"


@dataclass(frozen=True, eq=False)
class Schedule:
    """Every process's operations, in order. Whatever is made or read is `check`ed first: schedules/check.py."""

    name: str
    orders: tuple[tuple[Op, ...], ...]

    @cached_property
    def place(self) -> dict[int, int]:
        """Stage → the process that has it."""
        return {op.stage: rank for rank, order in enumerate(self.orders) for op in order}

    @cached_property
    def num_stages(self) -> int:
        return len(self.place)

    @property
    def num_chunks(self) -> int:
        """Stages of each process."""
        return self.num_stages // len(self.orders)

    def stages_of(self, rank: int) -> list[int]:
        """The stages of one process, in the order of the model."""
        return sorted(stage for stage, where in self.place.items() if where == rank)

    @cached_property
    def num_micro_batches(self) -> int:
        return 1 + max(op.micro_batch for order in self.orders for op in order)

    @cached_property
    def put_off(self) -> frozenset[tuple[int, int]]:
        """(stage, micro-batch) whose weights have a backward of their own."""
        return frozenset(op[1:] for order in self.orders for op in order if op.kind == "W")

    @property
    def splits(self) -> bool:
        return bool(self.put_off)

    def needs(self, op: Op) -> list[Op]:
        """What must be done before, anywhere."""
        _, stage, index = op
        if op.kind == "F":
            return [Op("F", stage - 1, index)] if stage else []
        if op.kind == "W":
            return [Op("B", stage, index)]
        own = [Op("F", stage, index)]
        return own if stage == self.num_stages - 1 else [*own, Op("B", stage + 1, index)]

    def source(self, op: Op) -> Op | None:
        """The operation of another stage whose result this one works on; None for the first forward and backward."""
        return next((need for need in self.needs(op) if need.stage != op.stage), None)

    def result_to(self, op: Op) -> int | None:
        """The process that works on this operation's result."""
        if op.kind == "W":
            return None
        return self.place.get(op.stage + (1 if op.kind == "F" else -1))


def placement(name: str, num_ranks: int, num_chunks: int) -> tuple[int, ...]:
    """Stage → process. In loops, 0 1 2 0 1 2; a V goes down and comes back up, 0 1 2 2 1 0."""
    if name in V_SCHEDULES:
        return (*range(num_ranks), *reversed(range(num_ranks)))
    return tuple(stage % num_ranks for stage in range(num_ranks * num_chunks))


V_SCHEDULES = ("zbv", "dualpipev")
LOOPED = ("interleaved", "bfs")


class Held(NamedTuple):
    """Micro-batches of each stage of one process: whose activations it has, and of whose weights' gradients it has but
    what they will be made of; and how many have had their backward pass."""

    forward: dict[int, int]
    put_off: dict[int, int]
    backward: dict[int, int]

    @property
    def total(self) -> int:
        return sum(self.forward.values()) + sum(self.put_off.values())


def held(schedule: Schedule, rank: int) -> Iterator[Held]:
    """What a process holds after each of its operations."""
    stages = schedule.stages_of(rank)
    now = Held(*(dict.fromkeys(stages, 0) for _ in Held._fields))
    for op in schedule.orders[rank]:
        forward, put_off, backward = (dict(counts) for counts in now)
        if op.kind == "W":
            put_off[op.stage] -= 1
        else:
            forward[op.stage] += 1 if op.kind == "F" else -1
            put_off[op.stage] += op.kind == "B" and op[1:] in schedule.put_off
            backward[op.stage] += op.kind == "B"
        now = Held(forward, put_off, backward)
        yield now


def peaks(schedule: Schedule) -> list[int]:
    """Most (stage, micro-batch) pairs that each process holds something of at once."""
    return [max(now.total for now in held(schedule, rank)) for rank in range(len(schedule.orders))]
