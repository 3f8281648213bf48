"""What makes a table a schedule."""

from __future__ import annotations

from collections import Counter

from weft.schedules.table import Op, Schedule
from weft.schedules.timeline import timeline


def check(schedule: Schedule) -> Schedule:
    """The schedule itself, when nothing is wrong with it.

    Messages are no question of their own: nobody waits to send, and each process takes in what another sends it in the
    order in which that one's operations make it. So what can be done in order is done.

    Raises:
        ValueError: something is there twice, or not at all, or in an order in which processes wait forever.
    """
    name, ops = schedule.name, [op for order in schedule.orders for op in order]
    for rank, order in enumerate(schedule.orders):
        if not order:
            raise ValueError(f"schedule {name}: process {rank} has nothing to do")
        for op in order:
            if schedule.place[op.stage] != rank:
                places = f"processes {rank} and {schedule.place[op.stage]}"
                raise ValueError(f"schedule {name}: stage {op.stage} is on {places}; it can be on one only")
    stages, counts = range(schedule.num_stages), Counter(ops)
    if set(schedule.place) != set(stages):
        missing = min(set(range(max(schedule.place) + 1)) - set(schedule.place))
        raise ValueError(f"schedule {name}: no process has stage {missing}")
    chunks = Counter(schedule.place.values())
    if len(set(chunks.values())) > 1:
        raise ValueError(f"schedule {name}: processes have {sorted(set(chunks.values()))} stages; give each as many")
    for op, count in counts.items():
        if count > 1:
            raise ValueError(f"schedule {name}: {op} is there {count} times")
    for stage in stages:
        for index in range(schedule.num_micro_batches):
            for op in (Op("F", stage, index), Op("B", stage, index)):
                if not counts[op]:
                    rank = schedule.place[stage]
                    raise ValueError(f"schedule {name}: {op} is missing from process {rank}, which has that stage")
        forwards = [op.micro_batch for op in schedule.orders[schedule.place[stage]] if op[:2] == ("F", stage)]
        if forwards != sorted(forwards):
            raise ValueError(f"schedule {name}: stage {stage} takes its forwards out of order: {forwards}")
    timeline(schedule)
    return schedule
