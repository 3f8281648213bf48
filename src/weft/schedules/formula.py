"""What is published about the waiting of each schedule, to hold the tables against."""

from __future__ import annotations

from weft.schedules.timeline import Costs


def published_bubble(name: str, num_ranks: int, num_chunks: int, num_micro_batches: int, costs: Costs) -> float | None:
    """Share of the time in which processes wait, of equal stages and with micro-batches enough; None where no formula
    is known. `costs` are those of one stage."""
    whole = costs.forward + costs.input + costs.weights
    equal = costs.forward == costs.input == costs.weights
    if name in ("gpipe", "1f1b", "interleaved", "bfs"):
        stair = whole
    elif name == "zbh1":  # Qi et al., 2023, section 2; where W is long, F or B alone is left
        stair = max(costs.forward, costs.input, costs.forward + costs.input - costs.weights)
    elif name in ("zbv", "dualpipev") and equal:  # nobody waits but for the first forward and after the last operation
        stair = costs.forward
    else:
        return None
    waiting = (num_ranks - 1) * stair
    return waiting / (waiting + num_micro_batches * num_chunks * whole)
