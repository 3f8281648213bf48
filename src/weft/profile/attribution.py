"""Attribution: to which part of the model, which pass and which kind of work each event of a trace belongs. Torch-free.

On the way down a thread, an event has what the one around it has, but for what its own name says. Backward passes have no
ranges of modules: autograd gives an operation's node and its backward one number, which leads back to the forward pass.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from weft.profile.names import PREFIX, SCOPES, is_message, kernel_kind, message_kind, op_kind
from weft.profile.trace import Event, Trace

BACKWARD = "autograd::engine::evaluate_function"
ITEM_BYTES = {
    "double": 8, "float": 4, "c10::BFloat16": 2, "c10::Half": 2, "long int": 8, "int": 4, "bool": 1, "unsigned char": 1,
    "signed char": 1, "c10::Float8_e4m3fn": 1, "c10::Float8_e5m2": 1,
    "Float": 4, "BFloat16": 2, "Half": 2, "Double": 8, "Long": 8, "Int": 4, "Byte": 1, "Bool": 1,
}  # fmt: skip
"""As Kineto and NCCL's records spell them."""


INSIDE = {"reduce_scatter": "all_reduce"}
"""What gloo makes of a message that it has no own way for."""


class Op(NamedTuple):
    """Of a pipeline: F, B or W of a stage and a micro-batch."""

    kind: str
    stage: int
    micro_batch: int


@dataclass(frozen=True)
class Mark:
    """What is known of an event.

    Attributes:
        part: module name, as blocks.3.attention; empty: none.
        phase: forward, backward, recompute; empty: neither.
        kind: of names.WORK, or host.
        scope: what of a step it is, where that is not the model: names.SCOPES.
        axis: whose message it is about; empty: not known.
        waits: in it, a message is started or awaited.
        message: of a message itself, its kind: all_reduce, all_gather, …
        op: of the pipeline.
    """

    part: str = ""
    phase: str = ""
    kind: str = "host"
    scope: str = ""
    axis: str = ""
    waits: bool = False
    message: str = ""
    op: Op | None = None


NOTHING = Mark()


class Attribution:
    """Marks the events of a trace.

    Args:
        groups: name of a process group → axis.
        only_axis: the axis of messages that nothing else tells apart; empty: there are several.
    """

    def __init__(self, trace: Trace, groups: Mapping[str, str], only_axis: str = "") -> None:
        self.trace, self.groups, self.only_axis = trace, groups, only_axis
        self.parts: dict[int, str] = {}  # number of autograd's → module of the forward pass
        self.main = main_thread(trace)
        others = [thread for thread in trace.threads if thread != self.main]
        for thread in [self.main, *others] if self.main is not None else others:
            self._mark(trace.threads[thread], thread == self.main)
        self.carried = self._carried()
        for kernel in trace.kernels:
            kernel.mark = self._kernel(kernel)

    def _mark(self, events: Sequence[Event], main: bool) -> None:
        last = ""  # nodes without a number follow the one that has them done
        for event in events:
            mark = event.parent.mark if event.parent is not None else NOTHING
            name = event.name
            if name.startswith(BACKWARD):
                last = self.parts.get(event.args.get("Sequence number", -1), "") or last
                mark = replace(mark, phase="backward", part=last)
            elif name.startswith(PREFIX):
                mark = _ranged(mark, name.removeprefix(PREFIX))
            elif name.startswith("FSDP::"):
                part = name.partition("(")[2].rstrip(")")
                mark = replace(mark, axis="fsdp", part=part or mark.part)
            elif is_message(name):
                mark = replace(mark, waits=True, axis=mark.axis or self._axis(event, mark))
            elif event.cat == "cpu_op" and (kind := op_kind(name)):
                keeps = mark.kind in ("norm", "loss") and kind in ("element-wise", "norm", "loss")
                mark = mark if keeps or kind == mark.kind else replace(mark, kind=kind)
            event.mark = mark
            if main and event.cat == "cpu_op" and mark.phase != "backward" and "Sequence number" in event.args:
                part = mark.part or ("loss" if mark.kind == "loss" else "")
                self.parts[event.args["Sequence number"]] = part  # the last to see a number is who makes the node

    def _axis(self, event: Event, mark: Mark) -> str:
        """Of a message that no range of ours is around."""
        named = self.groups.get(str(event.args.get("Process Group Name")))
        if named:
            return named
        kind = message_kind(event.name)
        if kind == "send/recv":
            return "pp"
        if mark.scope:
            return "dp" if mark.scope == "reduce" else "all" if mark.scope == "agree" else ""
        return self.only_axis if kind != "message" else ""

    # -- messages on the host -----------------------------------------------------------------------------------------

    def _carried(self) -> list[tuple[Event, Event]]:
        """(The operation that asked for it, gloo's message, which it marks): the n-th of a kind by the n-th."""
        own = {message_kind(message.name) for message in self.trace.messages}
        asked: dict[str, deque[Event]] = defaultdict(deque)
        for event in self.trace.events("c10d::"):
            kind = message_kind(event.name)
            asked[kind if kind in own else INSIDE.get(kind, kind)].append(event)
        carried = []
        for message in self.trace.messages:
            kind = message_kind(message.name)
            axis, told = "pp" if kind == "send/recv" else "all", kind
            if asked[kind]:
                asker = asked[kind].popleft()
                axis, told = asker.mark.axis or axis, message_kind(asker.name)
                carried.append((asker, message))
            message.mark = Mark(axis=axis, waits=True, message=told)
        return carried

    def awaited(self, event: Event) -> str:
        """The axis of the message that a wait on the host is for: of those under way, the one that ends with it."""
        found = event.mark.axis
        if found:
            return found
        near = [it for it in self.trace.messages if it.start <= event.stop and it.stop >= event.start]
        return min(near, key=lambda it: abs(it.stop - event.stop)).mark.axis if near else "all"

    # -- kernels ------------------------------------------------------------------------------------------------------

    def _kernel(self, kernel: Event) -> Mark:
        """Of the operation that launched it; its own name says the kind where that one does not."""
        launch = self.trace.launches.get(kernel.args.get("correlation"))
        mark = launch.mark if launch is not None else NOTHING
        if "nccl" in kernel.name.lower():
            group = self.groups.get(str(kernel.args.get("Process Group Name")))
            described = str(kernel.args.get("Process Group Description", "")).removeprefix("mesh_")
            message = _nccl_kind(kernel, launch)
            told = (mark.axis, group) if message == "all_to_all" else (group, mark.axis)
            axis = told[0] or told[1] or (described if described in AXES else "") or self.only_axis
            axis = axis or ("pp" if message == "send/recv" else "all")
            return replace(mark, waits=True, axis=axis, message=message)
        kind = mark.kind if mark.kind != "host" else kernel_kind(kernel.name) or "element-wise"
        return replace(mark, kind=kind, waits=False)


def _nccl_kind(kernel: Event, launch: Event | None) -> str:
    """What a message is by NCCL's record, else by the operation that asked for it: an all-to-all's kernel is named as
    those of send and receive."""
    told = str(kernel.args.get("Collective name", ""))
    asked = (
        [it.name for it in launch.ancestors() if is_message(it.name) or it.name.startswith("nccl:")] if launch else []
    )
    return next(
        (kind for name in (told, *asked) if (kind := message_kind(name)) != "message"), message_kind(kernel.name)
    )


AXES = ("pp", "dp", "fsdp", "cp", "tp", "ep", "etp")


def _ranged(mark: Mark, name: str) -> Mark:
    kind, _, detail = name.partition(":")
    if kind == "module":
        again = mark.phase in ("backward", "recompute")
        return replace(mark, part=detail, phase="recompute" if again else "forward")
    if kind == "op":
        what, stage, micro_batch = detail.split(":")
        op = Op(what, int(stage), int(micro_batch))
        return replace(mark, op=op, phase="forward" if what == "F" else "backward")
    if kind == "comm":
        return replace(mark, axis=detail)
    if kind == "wait":
        return replace(mark, waits=True)
    return replace(mark, scope=kind) if kind in SCOPES else mark


def main_thread(trace: Trace) -> Any:
    """The one with the steps; else the one with most events."""
    if trace.steps:
        return trace.steps[0].tid
    return max(trace.threads, key=lambda thread: len(trace.threads[thread]), default=None)


def numel(dims: Sequence[Any]) -> int:
    """Numbers of the tensors in Kineto's `Input Dims`, which may be lists of tensors."""
    if not dims:
        return 0
    if all(isinstance(dim, int) for dim in dims):
        total = 1
        for dim in dims:
            total *= dim
        return total
    return sum(sizes(dims))


def sizes(dims: Sequence[Any]) -> list[int]:
    """Numbers of each tensor in them."""
    parts = [part for part in dims if isinstance(part, list) and part]
    return [size for part in parts for size in ([numel(part)] if isinstance(part[0], int) else sizes(part))]


def message_bytes(event: Event) -> int:
    """What a process puts into a message, of gloo's record or NCCL's."""
    if "In msg nelems" in event.args:
        return int(event.args["In msg nelems"]) * ITEM_BYTES.get(str(event.args.get("dtype")), 4)
    dims, types = event.args.get("Input Dims") or [], event.args.get("Input type") or [""]
    return numel(dims) * ITEM_BYTES.get(types[0], 4)
