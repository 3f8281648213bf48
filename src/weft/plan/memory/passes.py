"""What the micro-batches in flight keep on one process, counted along its schedule's table. Torch-free."""

from __future__ import annotations

from typing import Literal

from weft.plan.memory.activations import Pass
from weft.plan.memory.stage import Stage
from weft.schedules.table import Held, Schedule, held

When = Literal["ever", "first", "later", "last", "put off"]


def in_flight(
    schedule: Schedule,
    stage: Stage,
    one: Pass,
    logits: int,
    when: When = "ever",
    gradients: tuple[int, int] = (0, 0),
) -> Held:
    """Micro-batches whose activations a process holds, at the moment of a step when they take most.

    Args:
        when: the moments that are looked at: before the first backward pass, before later ones, before the last, or before
            gradients that were put off are worked out.
        gradients: bytes of all, while backward passes go on and when they are over, which count in part where those of
            some stages have begun or are over.
    """
    states, order = list(held(schedule, stage.index)), schedule.orders[stage.index]
    before = [states[place - 1] for place, op in enumerate(order) if op.kind == "B"]
    looked_at = {
        "ever": states,
        "first": before[:1],
        "later": before[1:],
        "last": before[-1:],
        "put off": [states[place - 1] for place, op in enumerate(order) if op.kind == "W"],
    }

    def size(now: Held) -> float:
        begun, over = backward_shares(now, schedule, stage)
        return kept_bytes(now, schedule, stage, one, logits) + gradients[0] * (begun - over) + gradients[1] * over

    return max(looked_at[when], key=size)


def backward_shares(now: Held, schedule: Schedule, stage: Stage) -> tuple[float, float]:
    """Of the parameters of a process, those of stages whose backward passes have begun, and of those where they are
    over."""
    begun = [it for it, done in now.backward.items() if done]
    return stage.share(begun), stage.share([it for it in begun if now.backward[it] == schedule.num_micro_batches])


def kept_bytes(now: Held, schedule: Schedule, stage: Stage, one: Pass, logits: int) -> int:
    """Bytes of these micro-batches; `logits` is what the loss of each keeps."""
    forward = sum(count * stage_bytes(number, schedule, stage, one) for number, count in now.forward.items())
    put_off = sum(count * len(stage.stages[number]) * one.put_off for number, count in now.put_off.items())
    return forward + put_off + now.forward.get(schedule.num_stages - 1, 0) * logits


def stage_bytes(number: int, schedule: Schedule, stage: Stage, one: Pass) -> int:
    """What one micro-batch leaves behind on one stage, without logits.

    Beside the blocks: what went to the next stage is the root of the backward pass; on the last there are a norm and
    the head.
    """
    return one.blocks(len(stage.stages[number])) + (one.last if number == schedule.num_stages - 1 else one.hidden)
