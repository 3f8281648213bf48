"""A trace of one process, as Kineto writes it: events with their place in one another. Torch-free.

The format is Chrome's trace events; what Kineto puts into them is told in its libkineto/README and output_json.cpp:
`cpu_op` and `user_annotation` on threads of the host, `cuda_runtime` with a `correlation` to the `kernel` it launches,
which lies on a stream.
"""

from __future__ import annotations

import gzip
import json
import zlib
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from weft.profile.names import PREFIX

ON_HOST = {"cpu_op", "user_annotation", "cuda_runtime", "cuda_driver", "python_function"}
ON_DEVICE = {"kernel", "gpu_memcpy", "gpu_memset"}


class Event:
    """Something with a beginning and an end, in seconds.

    Attributes:
        parent: what it lies in, on its thread.
        cat, args: as Kineto has them.
        mark: what profile/attribution.py found out about it.
    """

    __slots__ = ("args", "cat", "mark", "name", "parent", "start", "stop", "tid")

    def __init__(self, name: str, cat: str, start: float, stop: float, tid: Any, args: dict[str, Any]) -> None:
        self.name, self.cat, self.start, self.stop, self.tid, self.args = name, cat, start, stop, tid, args
        self.parent: Event | None = None
        self.mark: Any = None

    def ancestors(self) -> Iterator[Event]:
        """Itself, then what it lies in, outwards."""
        event: Event | None = self
        while event is not None:
            yield event
            event = event.parent


class Trace:
    """The events of one process.

    Attributes:
        threads: thread → its events of the host, in the order in which they begin, outer ones first.
        kernels: of all streams, in the order in which they begin.
        messages: gloo's, from when they are asked for or begun to when they are done; on no thread of the program.
        launches: correlation → the runtime's call.
        memory: (time, thread, bytes, address, is on the GPU, bytes in all), as it was asked for and given back.
        base: wall clock of time 0, ns.
        devices: what Kineto says of the GPUs.
    """

    def __init__(self, document: dict[str, Any]) -> None:
        self.base = int(document.get("baseTimeNanoseconds", 0))
        self.devices: list[dict[str, Any]] = document.get("deviceProperties") or []
        self.distributed: dict[str, Any] = document.get("distributedInfo") or {}
        self.threads: dict[Any, list[Event]] = defaultdict(list)
        self.kernels: list[Event] = []
        self.messages: list[Event] = []
        self.memory: list[tuple[float, Any, int, int, bool, int]] = []
        for raw in document["traceEvents"]:
            self._sort_in(raw)
        for events in self.threads.values():
            events.sort(key=lambda event: (event.start, -event.stop))
            nest(events)
        self.kernels.sort(key=lambda event: event.start)
        self.messages.sort(key=lambda event: event.start)
        self.memory.sort(key=lambda record: record[0])
        self.launches = {
            event.args["correlation"]: event
            for events in self.threads.values()
            for event in events
            if event.cat.startswith("cuda_") and "correlation" in event.args
        }

    def _sort_in(self, raw: dict[str, Any]) -> None:
        cat, args = raw.get("cat"), raw.get("args") or {}
        if raw.get("ph") == "X" and (cat in ON_HOST or cat in ON_DEVICE):
            start = float(raw["ts"]) / 1e6
            event = Event(raw["name"], cat, start, start + float(raw.get("dur", 0)) / 1e6, raw.get("tid"), args)
            if cat in ON_DEVICE:
                self.kernels.append(event)
            elif event.name.startswith("gloo:"):
                self.messages.append(event)
            else:
                self.threads[event.tid].append(event)
        elif raw.get("name") == "[memory]" and "Bytes" in args:
            on_gpu = args.get("Device Type", 0) != 0
            record = (float(raw["ts"]) / 1e6, raw.get("tid"), args["Bytes"], args["Addr"], on_gpu)
            self.memory.append((*record, args.get("Total Allocated", 0)))

    @property
    def on_gpu(self) -> bool:
        return bool(self.kernels)

    @cached_property
    def steps(self) -> list[Event]:
        """weft's own ranges of them; where there are none, those that torch's profiler counts."""
        return self.events(f"{PREFIX}step:") or self.events("ProfilerStep#")

    def events(self, start: str) -> list[Event]:
        """Of the host, whose name starts so; in the order of time."""
        found = [event for events in self.threads.values() for event in events if event.name.startswith(start)]
        return sorted(found, key=lambda event: event.start)


def nest(events: Sequence[Event]) -> None:
    """Give each event its parent. What reaches beyond its parent, by rounding or because it ends elsewhere, is cut."""
    stack: list[Event] = []
    for event in events:
        while stack and stack[-1].stop <= event.start:
            stack.pop()
        if stack:
            event.parent = stack[-1]
            event.stop = min(event.stop, stack[-1].stop)
        stack.append(event)


def read_trace(file: Path) -> Trace:
    """Raises: ValueError: the file is no trace, or was cut off."""
    try:
        data = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
        document = json.loads(data)
    except OSError as error:
        raise ValueError(f"{file}: {error.strerror or error}") from None
    except (json.JSONDecodeError, UnicodeDecodeError, EOFError, zlib.error) as error:
        raise ValueError(f"{file} is no whole trace: {error}") from None
    if isinstance(document, list):  # the other form of the format
        document = {"traceEvents": document}
    if not isinstance(document, dict) or not isinstance(document.get("traceEvents"), list):
        raise ValueError(f"{file} has no traceEvents: is it a trace of torch.profiler?")
    if not all(isinstance(event, dict) for event in document["traceEvents"]):
        raise ValueError(f"{file} has traceEvents that are no events: is it a trace of torch.profiler?")
    return Trace(document)


class Segments:
    """The innermost event of a thread at each moment: times at which it changes, and what it is from there on."""

    def __init__(self, events: Sequence[Event]) -> None:
        self.times: list[float] = []
        self.tops: list[Event | None] = []
        stack: list[Event] = []
        for event in events:
            while stack and stack[-1].stop <= event.start:
                self._change(stack.pop().stop, stack[-1] if stack else None)
            self._change(event.start, event)
            stack.append(event)
        while stack:
            self._change(stack.pop().stop, stack[-1] if stack else None)

    def _change(self, time: float, top: Event | None) -> None:
        if self.times and self.times[-1] == time:
            self.tops[-1] = top
        else:
            self.times.append(time)
            self.tops.append(top)

    def at(self, time: float) -> Event | None:
        place = bisect_right(self.times, time) - 1
        return self.tops[place] if place >= 0 else None

    def between(self, start: float, stop: float) -> Iterator[tuple[float, float, Event | None]]:
        """(from, to, innermost event), one after the other, without a gap."""
        place = bisect_right(self.times, start) - 1
        while start < stop:
            after = min(self.times[place + 1], stop) if place + 1 < len(self.times) else stop
            if after > start:
                yield start, after, self.tops[place] if place >= 0 else None
            start, place = max(start, after), place + 1
