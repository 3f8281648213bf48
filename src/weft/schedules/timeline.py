"""When everything happens, if operations take the time they are said to and messages none."""

from __future__ import annotations

from dataclasses import dataclass

from weft.schedules.table import Op, Schedule


@dataclass(frozen=True)
class Costs:
    """Time of one stage's forward, backward of its input, backward of its weights. What is not split takes both."""

    forward: float = 1.0
    input: float = 1.0
    weights: float = 1.0

    def of(self, op: Op, schedule: Schedule) -> float:
        if op.kind == "F":
            return self.forward
        if op.kind == "W":
            return self.weights
        return self.input if op[1:] in schedule.put_off else self.input + self.weights


Stages = Costs | tuple[Costs, ...]
"""The costs of every stage: the same, or of each its own."""


@dataclass(frozen=True)
class Timeline:
    """Start and end of each operation, by process and in order."""

    spans: tuple[tuple[tuple[Op, float, float], ...], ...]

    @property
    def length(self) -> float:
        """From the first start to the last end."""
        return max(end for row in self.spans for _, _, end in row)

    @property
    def briefest(self) -> float:
        """What the operation takes that takes least, of those that take any time."""
        return min(end - start for row in self.spans for _, start, end in row if end > start)

    @property
    def bubble(self) -> float:
        """Share of all processes' time in which they wait."""
        busy = sum(end - start for row in self.spans for _, start, end in row)
        return 1 - busy / (self.length * len(self.spans))


def timeline(schedule: Schedule, costs: Stages | None = None) -> Timeline:
    """Let every process do its operations in order, each as soon as what it needs is done.

    Raises:
        ValueError: they wait for each other forever; the message says who for what.
    """
    costs = Costs() if costs is None else costs
    by_stage = costs if isinstance(costs, tuple) else (costs,) * schedule.num_stages
    ends: dict[Op, float] = {}
    spans: list[list[tuple[Op, float, float]]] = [[] for _ in schedule.orders]
    moved = True
    while moved:
        moved = False
        for row, order in zip(spans, schedule.orders, strict=True):
            while len(row) < len(order) and all(need in ends for need in schedule.needs(order[len(row)])):
                op, free = order[len(row)], row[-1][2] if row else 0.0
                start = max([free, *(ends[need] for need in schedule.needs(op))])
                ends[op] = start + by_stage[op.stage].of(op, schedule)
                row.append((op, start, ends[op]))
                moved = True
    stuck = [(rank, order[len(row)]) for rank, (row, order) in enumerate(zip(spans, schedule.orders, strict=True))
             if len(row) < len(order)]  # fmt: skip
    if stuck:
        waits = (
            f"process {rank} at {op} waits for {next(need for need in schedule.needs(op) if need not in ends)}"
            for rank, op in stuck
        )
        raise ValueError(f"schedule {schedule.name} never ends: {'; '.join(waits)}")
    return Timeline(tuple(tuple(row) for row in spans))
