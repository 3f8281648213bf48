"""Breakdown: a step cut into slices that follow each other without a gap, each with what the time went to. Torch-free.

On a GPU a moment belongs to the kernel that computes; where none does, to the message that is under way; where there is
none either, to what the host does meanwhile. On a CPU it belongs to the innermost operation of the thread that trains.
So the kinds of a step add up to its wall time, and what two streams do at once is counted once.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from weft.profile.attribution import Attribution, Mark, message_bytes
from weft.profile.names import EXPOSED, SCOPES
from weft.profile.trace import Event, Segments

Span = tuple[float, float]
OWN_SCOPES = ("data", "checkpoint", "evaluation")
"""In these, whatever is done counts as theirs."""


class Slice(NamedTuple):
    """Seconds from `start` to `stop` of one kind: names.WORK, names.LOST, or an axis and ` exposed`."""

    start: float
    stop: float
    kind: str
    part: str
    phase: str
    name: str


@dataclass(frozen=True)
class Traffic:
    """Messages of one axis and kind in a step.

    Attributes:
        seconds: in which one was under way.
        exposed: that this process stood still for them, calls and waits before and behind them included: those of an
            axis' kinds add up to what its kind of a step takes.
        overlapped: of `seconds`, in which something else was done.
        bytes: that this process gave away.
    """

    axis: str
    kind: str
    count: float
    seconds: float
    exposed: float
    overlapped: float
    bytes: float


@dataclass(frozen=True)
class Step:
    """One step of one process."""

    number: int
    start: float
    stop: float
    slices: tuple[Slice, ...]

    @property
    def seconds(self) -> float:
        return self.stop - self.start

    @cached_property
    def kinds(self) -> Counter[str]:
        return _sums((it.kind, it) for it in self.slices)

    @cached_property
    def parts(self) -> Counter[tuple[str, str, str]]:
        """(part, phase, kind) → seconds."""
        return _sums(((it.part, it.phase, it.kind), it) for it in self.slices)


def _sums(pairs: Iterable[tuple]) -> Counter:
    total: Counter = Counter()
    for key, it in pairs:
        total[key] += it.stop - it.start
    return total


class Breakdown:
    """The steps of one process's trace, and its messages."""

    def __init__(self, attribution: Attribution) -> None:
        self.attribution, self.trace = attribution, attribution.trace
        self.segments = Segments(self.trace.threads[attribution.main]) if attribution.main is not None else Segments([])
        tile = self._on_device if self.trace.on_gpu else self._on_host
        self.steps = [Step(number, start, stop, tuple(tile(start, stop))) for number, start, stop in self._step_spans()]

    def _step_spans(self) -> Iterator[tuple[int, float, float]]:
        """From the beginning of a step to that of the next; the last one to its own end."""
        found = [event for event in self.trace.steps if event.tid == self.attribution.main]
        for event in found:
            yield int(re.split("[:#]", event.name)[-1]), event.start, event.stop
        if found:
            return
        everything = [*self.trace.kernels, *(it for events in self.trace.threads.values() for it in events)]
        if everything:
            yield 1, min(it.start for it in everything), max(it.stop for it in everything)

    # -- on a CPU -----------------------------------------------------------------------------------------------------

    def _on_host(self, start: float, stop: float) -> Iterator[Slice]:
        for begin, end, event in self.segments.between(start, stop):
            yield self._host_slice(begin, end, event)

    def _host_slice(self, begin: float, end: float, event: Event | None) -> Slice:
        mark: Mark = event.mark if event is not None else Mark()
        name = event.name if event is not None else ""
        return Slice(begin, end, self._host_kind(event, mark), part_of(mark), mark.phase, name)

    def _host_kind(self, event: Event | None, mark: Mark) -> str:
        if mark.scope in OWN_SCOPES:
            return SCOPES[mark.scope]
        if mark.waits:
            assert event is not None
            axis = self.attribution.awaited(outermost_wait(event))
            return "bubble" if axis == "pp" else axis + EXPOSED
        if mark.kind == "host":
            return "host"
        return "optimizer" if SCOPES.get(mark.scope) == "optimizer" else mark.kind

    # -- on a GPU -----------------------------------------------------------------------------------------------------

    def _on_device(self, start: float, stop: float) -> Iterator[Slice]:
        kernels = within(self.trace.kernels, start, stop)
        layers: list[list[Slice]] = [
            [_kernel_slice(it) for it in kernels if not it.mark.waits],
            [_kernel_slice(it) for it in kernels if it.mark.waits],
            [it for it in self._on_host(start, stop) if it.kind in ("data wait", "checkpoint", "evaluation")],
        ]
        found: list[Slice] = []
        gaps: list[Span] = [(start, stop)]
        for layer in layers:
            painted, gaps = paint(gaps, layer)
            found += painted
        found += [Slice(*gap, "host", "", "", "") for gap in gaps]
        yield from sorted(found)

    # -- messages -----------------------------------------------------------------------------------------------------

    def traffic(self) -> list[Traffic]:
        """Of a step, on average; the axis with most exposed first. Pipelines' messages wait for work, not for links: on a
        CPU, where they are posted early, their time says nothing, and they are left out."""
        on_gpu = self.trace.on_gpu
        messages = [it for it in self.trace.kernels if it.mark.waits] if on_gpu else self.trace.messages
        grouped: dict[tuple[str, str], list[Event]] = defaultdict(list)
        for step in self.steps:
            for it in within(messages, step.start, step.stop):
                if on_gpu or it.mark.axis != "pp":
                    grouped[it.mark.axis, it.mark.message].append(it)
        count, found = max(1, len(self.steps)), []
        for axis in dict.fromkeys(axis for axis, _ in grouped):
            still = merged(self._still(axis))
            kinds = {kind: events for (its, kind), events in grouped.items() if its == axis}
            spans = {kind: merged([(it.start, it.stop) for it in events]) for kind, events in kinds.items()}
            alone = {kind: overlap(spans[kind], still) for kind in kinds}
            for kind, events in kinds.items():
                seconds = length(spans[kind])
                share = alone[kind] / sum(alone.values()) if any(alone.values()) else 1 / len(kinds)
                size = sum(map(message_bytes, events))
                parts = (len(events), seconds, share * length(still), seconds - alone[kind], size)
                found.append(Traffic(axis, kind, *(it / count for it in parts)))
        return sorted(found, key=lambda it: (-it.exposed, -it.seconds))

    def _still(self, axis: str) -> list[Span]:
        """When this process stood still for an axis' messages."""
        kind = "bubble" if axis == "pp" else axis + EXPOSED
        return [(it.start, it.stop) for step in self.steps for it in step.slices if it.kind == kind]


def part_of(mark: Mark) -> str:
    """What a mark belongs to, in words: a module, or what of the step it is."""
    if mark.scope in OWN_SCOPES or SCOPES.get(mark.scope) == "optimizer":
        return SCOPES[mark.scope]
    return mark.part or ("loss" if mark.kind == "loss" else "")


def outermost_wait(event: Event) -> Event:
    """The whole of a wait that an event is inside of."""
    found = event
    for outer in event.ancestors():
        if not outer.mark.waits:
            break
        found = outer
    return found


def _kernel_slice(kernel: Event) -> Slice:
    mark: Mark = kernel.mark
    if mark.scope in OWN_SCOPES:
        kind = SCOPES[mark.scope]
    elif mark.waits:
        kind = "bubble" if mark.axis == "pp" else mark.axis + EXPOSED
    else:
        kind = "optimizer" if SCOPES.get(mark.scope) == "optimizer" else mark.kind
    return Slice(kernel.start, kernel.stop, kind, part_of(mark), mark.phase, kernel.name)


def within(events: Sequence[Event], start: float, stop: float) -> list[Event]:
    """Those that begin in a span. Sorted by their beginning."""
    first = bisect_left(events, start, key=lambda it: it.start)
    return list(events[first : bisect_left(events, stop, key=lambda it: it.start)])


def paint(gaps: Sequence[Span], slices: Sequence[Slice]) -> tuple[list[Slice], list[Span]]:
    """Fill gaps with slices, sorted by their beginning; of two that overlap the earlier has the moment. What is left of
    the gaps comes back too."""
    painted, left, place = [], [], 0
    for begin, end in gaps:
        at = begin
        while place > 0 and slices[place - 1].stop > at:  # one that reaches over several gaps
            place -= 1
        while place < len(slices) and slices[place].start < end:
            it = slices[place]
            start, stop = max(it.start, at), min(it.stop, end)
            if stop > start:
                if start > at:
                    left.append((at, start))
                painted.append(it._replace(start=start, stop=stop))
                at = stop
            place += 1
        if at < end:
            left.append((at, end))
    return painted, left


def merged(spans: Iterable[Span]) -> list[Span]:
    """Spans as a sorted union."""
    found: list[Span] = []
    for start, stop in sorted(spans):
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(found[-1][1], stop))
        else:
            found.append((start, stop))
    return found


def length(spans: Sequence[Span]) -> float:
    """Seconds of a union."""
    return sum(stop - start for start, stop in spans)


def overlap(one: Sequence[Span], other: Sequence[Span]) -> float:
    """Seconds that two unions have in common."""
    total, place = 0.0, 0
    for start, stop in one:
        while place < len(other) and other[place][1] <= start:
            place += 1
        index = place
        while index < len(other) and other[index][0] < stop:
            total += min(stop, other[index][1]) - max(start, other[index][0])
            index += 1
    return total
