"""Memory over time, and what holds it when there is most. Torch-free.

Every allocation is in the trace with the operation that asked for it, and with its address until it is given back. What
was there before the trace began — weights, moments — is what the capture wrote down.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from weft.profile.attribution import ITEM_BYTES, NOTHING, Attribution, Mark, sizes
from weft.profile.breakdown import part_of
from weft.profile.names import PREFIX
from weft.profile.trace import Event, Segments


@dataclass(frozen=True)
class Allocation:
    """Attributes: start, stop: seconds; stop is infinite where the trace ends first."""

    start: float
    stop: float
    bytes: int
    what: str
    part: str


@dataclass(frozen=True)
class Memory:
    """Bytes of the tensors of one process.

    Attributes:
        curve: (time, bytes), at every change.
        peak: the largest of them, in the last step of the trace; `at`: its moment.
        moment: what was done then.
        holders: what → bytes at the peak; they add up to `peak`.
        parts: of activations, module → bytes at the peak.
    """

    curve: tuple[tuple[float, int], ...]
    peak: int
    at: float
    moment: str
    holders: Counter[str]
    parts: Counter[str]


def memory_of(attribution: Attribution, facts: Mapping[str, Any]) -> Memory | None:
    """None: the trace has no memory in it."""
    trace = attribution.trace
    on_gpu = any(record[4] for record in trace.memory)
    records = [record for record in trace.memory if record[4] == on_gpu]
    if not records:
        return None
    allocations = _allocations(attribution, records)
    held = Counter({name: int(size) for name, size in facts.get("held", {}).items() if size})
    before = held.total()
    if on_gpu:  # the allocator's own count is of everything
        _, _, size, _, _, total = records[0]
        others = total - size - before
        held["other, from before"] = max(0, others)
        before += max(0, others)
    curve, now = [], before
    for time, change in sorted(_changes(allocations)):
        now += change
        curve.append((time, now))
    start, stop = (trace.steps[-1].start, trace.steps[-1].stop) if trace.steps else (curve[0][0], curve[-1][0])
    inside = [point for point in curve if start <= point[0] <= stop] or curve
    at, peak = max(inside, key=lambda point: point[1])
    live = [it for it in allocations if it.start <= at < it.stop]
    holders, parts = Counter(held), Counter[str]()
    for it in live:
        holders[it.what] += it.bytes
        if it.what == "activations":
            parts[it.part] += it.bytes
    return Memory(tuple(curve), peak, at, _moment(attribution, at), holders, parts)


def _changes(allocations: list[Allocation]) -> list[tuple[float, int]]:
    starts = [(it.start, it.bytes) for it in allocations]
    return starts + [(it.stop, -it.bytes) for it in allocations if it.stop < float("inf")]


def _allocations(attribution: Attribution, records: list[tuple]) -> list[Allocation]:
    """What was asked for in the trace. What is given back and was there before is not among it."""
    trace = attribution.trace
    segments = {thread: Segments(events) for thread, events in trace.threads.items()}
    ends = [event.stop for event in trace.events(f"{PREFIX}op:B") or trace.events("autograd::engine::evaluate")]
    last_step = trace.steps[-1].start if trace.steps else 0.0
    messages = _messages(attribution)
    open_: dict[int, tuple[float, int, Event | None]] = {}
    found = []

    def close(address: int, stop: float, seen: bool) -> None:
        start, size, event = open_.pop(address)
        if not seen and not (start >= last_step and holder(event, True)[0] == "gradients"):  # which go after the trace
            stop = min([stop, *(over for asked, over, carried in messages if asked >= start and size in carried)])
        what, part = holder(event, _outlives(ends, start, stop))
        found.append(Allocation(start, stop, size, what, part))

    for time, thread, size, address, _, _ in records:
        if address in open_:
            close(address, time, seen=size < 0)
        if size > 0:
            open_[address] = (time, size, segments[thread].at(time) if thread in segments else None)
    for address in list(open_):
        close(address, float("inf"), seen=False)
    return found


def _messages(attribution: Attribution) -> list[tuple[float, float, set[int]]]:
    """Of each message of gloo's: when it was asked for, when it was over, the bytes of each tensor in it.

    gloo's thread may be the last that holds one of them, and no profiler hears of what that thread gives back.
    """
    found = []
    for asked, message in attribution.carried:
        item = ITEM_BYTES.get(str((message.args.get("Input type") or [""])[0]), 0)
        carried = {item * numbers for numbers in sizes(asked.args.get("Input Dims") or [])}
        found.append((asked.start, message.stop, carried))
    return found


def _outlives(ends: list[float], start: float, stop: float) -> bool:
    """Whether something lives beyond the end of the backward pass that it was made in."""
    after = next((end for end in ends if end > start), None)
    return after is not None and stop > after


def holder(event: Event | None, outlives: bool) -> tuple[str, str]:
    """What an allocation is, by where it was asked for: (what, module)."""
    mark: Mark = event.mark if event is not None and event.mark is not None else NOTHING
    names = [it.name for it in event.ancestors()] if event is not None else []
    if any(name.startswith("FSDP::") and "gather" in name for name in names) or "prefetch" in " ".join(names):
        return "gathered weights", mark.part
    if any("post_backward" in name for name in names):
        return ("gradients" if outlives else "temporary"), mark.part
    if mark.scope in ("optimizer", "clip"):
        return "optimizer's workspace", ""
    if mark.scope:
        return mark.scope, ""
    if mark.part in ("head", "loss") or mark.kind == "loss":
        return "logits and loss", mark.part
    if mark.axis and not mark.part:
        return "messages", ""
    if mark.phase == "backward":
        return ("gradients" if outlives else "temporary"), mark.part
    if mark.phase == "recompute":
        return "recomputed", mark.part
    return ("activations" if mark.phase == "forward" else "other"), mark.part


def _moment(attribution: Attribution, at: float) -> str:
    event = Segments(attribution.trace.threads.get(attribution.main, [])).at(at)
    mark = event.mark if event is not None else NOTHING
    where = part_of(mark) or ("the step" if mark.phase else "step")
    return f"{mark.phase} of {where}" if mark.phase else where
