"""What to change, largest gain first, each with its evidence. Torch-free.

What a change saves of memory comes from the planner's own model (plan/memory/moments.py), which counts weft's steps; what
it saves of time is what was measured, at most.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from typing import Any

from weft.config.load import make_config, merge
from weft.config.tree import Config
from weft.profile.case import LEAST_TIME, Advice, Case
from weft.profile.load import Profile
from weft.profile.memory import memory_of
from weft.profile.names import EXPOSED
from weft.profile.summary import pace, peers_of, stragglers
from weft.schedules.orders import ORDERS
from weft.schedules.timeline import timeline
from weft.units import gibibytes, percent

LEAST_MEMORY = 0.05
"""Of the peak, below which a gain is not worth a line."""
SCARCE = 0.5
"""Of a device's memory, at the peak, below which nobody needs to save any."""
WITHOUT_BF16 = ("V100", "T4")
"""Cards whose matrix units know fp16 alone of 16 bits."""

Adviser = Callable[[Case], Iterator[Advice]]


def advise(profile: Profile) -> list[Advice]:
    """All that applies, largest share first."""
    memories = [(memory_of(rank.breakdown.attribution, rank.facts), rank) for rank in profile.ranks]
    known = [(memory, rank) for memory, rank in memories if memory is not None]
    memory, rank = max(known, key=lambda pair: pair[0].peak) if known else (None, None)
    case = Case(profile, memory, rank)
    found = [it for adviser in ADVISERS for it in adviser(case)]
    return sorted(found, key=lambda it: -it.share)


# -- time -------------------------------------------------------------------------------------------------------------


def about_stragglers(case: Case) -> Iterator[Advice]:
    profile = case.profile
    for number, why in stragglers(profile).items():
        paces = {rank.number: pace(profile, rank) for rank in profile.ranks}
        usual = statistics.median(it for other, it in paces.items() if other != number)
        [rank] = [it for it in profile.ranks if it.number == number]
        late = rank.busy * (1 - usual / paces[number])
        yield from case.time(
            f"look at rank {number}'s machine", late / case.step,
            f"{why}; all others wait for it: clocks, temperature, other processes on it",
        )  # fmt: skip


def about_stages(case: Case) -> Iterator[Advice]:
    """Stages of unequal work, as blocks count, whoever does them."""
    config, groups = case.profile.config, peers_of(case.profile)
    if config is None or len(groups) < 2 or stragglers(case.profile):
        return
    busy = {stage: statistics.mean(rank.busy for rank in peers) for stage, peers in groups.items()}
    most, mean = max(busy, key=lambda stage: busy[stage]), statistics.mean(busy.values())
    yield from case.time(
        f"fewer blocks on process {most} of the pipeline (layout.stages)", (busy[most] - mean) / case.step,
        f"it works {percent(busy[most] / mean - 1)} longer than the mean of the {len(groups)}",
    )  # fmt: skip


def about_bubble(case: Case) -> Iterator[Advice]:
    """Another schedule, or more micro-batches: as much less waiting as their timelines have."""
    config, share = case.profile.config, case.share("bubble")
    if config is None or share < LEAST_TIME:
        return
    layout, batch = config.layout, config.train.global_batch
    count = layout.num_micro_batches(batch)
    now = timeline(layout.table(count)).bubble
    best: tuple[float, str] | None = None
    smaller = layout.micro_batch_size(batch) // 2
    tries: list[dict[str, Any]] = [{"micro_batch": smaller}] if smaller else []
    tries += [{"schedule": name, "vp": 1} for name in ORDERS if name != layout.schedule]
    for change in tries:
        try:
            other = make_config(merge(config.model_dump(mode="json"), {"layout": change})).layout
            bubble = timeline(other.table(other.num_micro_batches(batch))).bubble
        except ValueError:  # not with these numbers
            continue
        if best is None or bubble < best[0]:
            best = bubble, ", ".join(f"layout.{key} = {value}" for key, value in change.items() if key != "vp")
    if best is not None and best[0] < now:
        yield from case.time(
            best[1], share * (1 - best[0] / now),
            f"stages wait {percent(share)} of the step; of equal stages this order waits {percent(now)}, "
            f"that one {percent(best[0])} (weft plan schedule)",
        )  # fmt: skip


def about_messages(case: Case) -> Iterator[Advice]:
    """Who waits least for an axis waits for its messages alone; what others wait more, they wait for a slower rank."""
    for kind in case.profile.kinds:
        if not kind.endswith(EXPOSED) or kind == f"all{EXPOSED}":
            continue
        axis, least = kind.removesuffix(EXPOSED), min(rank.kinds[kind] for rank in case.profile.ranks)
        evidence = (
            f"{axis}'s messages are exposed for {percent(least / case.step)} of the step on the rank that waits least "
        )
        evidence += f"for others; {percent(_hidden(case, axis))} of their time is hidden"
        yield from case.time(_against(axis, case.profile.config, case.on_gpu), least / case.step, evidence)


def _hidden(case: Case, axis: str) -> float:
    traffic = [it for rank in case.profile.ranks for it in rank.traffic if it.axis == axis]
    seconds = sum(it.seconds for it in traffic)
    return sum(it.overlapped for it in traffic) / seconds if seconds else 0.0


def _against(axis: str, config: Config | None, on_gpu: bool) -> str:
    """The setting that lets an axis send less, or beside other work."""
    layout = config.layout if config is not None else None
    if axis == "tp" and layout is not None and layout.sp and on_gpu and not layout.async_tp:
        return "layout.async_tp = true"
    if axis == "tp":
        return "a smaller layout.tp, with fsdp or pp in its place"
    if axis.startswith("fsdp") and config is not None and layout is not None:
        if layout.num_micro_batches(config.train.global_batch) > 1 and layout.zero == 3:
            return "layout.zero = 2, or larger micro-batches: weights are gathered in every one"
        return "more tokens a process (train.global_batch), or a smaller layout.fsdp with dp beside it"
    if axis == "cp":
        return "layout.cp_kind = ring, which sends while attention works, or a smaller layout.cp"
    if axis == "ep":
        return "a smaller layout.ep"
    return f"more tokens a step for what {axis} sends (train.global_batch)"


def about_data(case: Case) -> Iterator[Advice]:
    yield from case.time(
        "faster data: put data.paths on a local disk", case.share("data wait"),
        f"a step waits {percent(case.share('data wait'))} of its time for the next batch",
    )  # fmt: skip


def about_checkpoints(case: Case) -> Iterator[Advice]:
    yield from case.time(
        "checkpoint.asynchronous = true, and a larger checkpoint.every", case.share("checkpoint"),
        f"saves keep the profiled steps up for {percent(case.share('checkpoint'))} of their time",
    )  # fmt: skip


def about_host(case: Case) -> Iterator[Advice]:
    """Launches and Python; and many small kernels."""
    config, share = case.profile.config, case.share("host")
    compiled = config is not None and config.layout.compile
    fuses = not compiled and case.takes(layout={"compile": True})
    if share >= 0.1:
        what = "nothing runs on the GPU" if case.on_gpu else "no operation runs"
        changes = ["layout.compile = true"] if fuses else []
        larger, room = _larger(case, share)
        if larger or not compiled:
            changes.append(larger or "larger micro-batches")
        yield from case.time(
            ", or ".join(changes) or "less work between launches: larger layers, fewer tensors", share,
            f"{what} for {percent(share)} of the step: the host is not fast enough for operations as small as these"
            f"{_launched(case)}{room}",
        )  # fmt: skip
    small = sum(case.share(kind) for kind in ("element-wise", "norm"))
    if small >= 0.15 and fuses:
        yield from case.time(
            "layout.compile = true", small / 2,
            f"element-wise operations and norms take {percent(small)} of the step; fused, about half of what they move "
            "stays in registers",
        )  # fmt: skip


def _launched(case: Case) -> str:
    """How much a step launches, and how short that is."""
    if not case.on_gpu:
        return ""
    steps = [(rank.trace, step) for rank in case.profile.ranks for step in rank.breakdown.steps]
    found = [it for trace, step in steps for it in trace.kernels if step.start <= it.start < step.stop]
    if not found:
        return ""
    mean = sum(it.stop - it.start for it in found) / len(found)
    return f"; it launches {len(found) / len(steps):,.0f} kernels a step, of {1e6 * mean:,.0f} µs in the mean"


def _larger(case: Case, idle: float) -> tuple[str, str]:
    """A micro-batch, in doublings, large enough that a device that idles for this share of a step would be busy, or as
    near to it as there is memory for by the planner; and what it takes. Empty: none."""
    config, capacity = case.profile.config, case.profile.about.get("memory", 0)
    if config is None or case.memory is None or not capacity:
        return "", ""
    layout, batch = config.layout, config.train.global_batch
    size, best = layout.micro_batch_size(batch), ("", "")
    for factor in (2, 4, 8, 16, 32, 64):
        change: dict[str, Any] = {"layout": {"micro_batch": factor * size}}
        words = f"layout.micro_batch = {factor * size}"
        if batch % (factor * size * layout.dp * layout.fsdp):
            change["train"] = {"global_batch": factor * batch}
            words += f" with train.global_batch = {factor * batch}"
        more = case.saved(**change)
        if more is None or case.memory.peak - more >= 0.8 * capacity:
            break
        best = words, f"; larger, it takes {gibibytes(case.memory.peak - more)} of {gibibytes(capacity)} (planner)"
        if factor * (1 - idle) >= 1:
            break
    return best


def about_precision(case: Case) -> Iterator[Advice]:
    config = case.profile.config
    if case.on_gpu and config is not None and config.layout.precision == "fp32":
        precision = "fp16" if any(card in case.profile.about.get("device", "") for card in WITHOUT_BF16) else "bf16"
        yield from case.time(
            f"layout.precision = {precision}", 0.5 * case.share("gemm"),
            f"matrix products take {percent(case.share('gemm'))} of the step, in fp32",
        )  # fmt: skip


def about_recompute(case: Case) -> Iterator[Advice]:
    """What is computed again although it would fit."""
    config, profile = case.profile.config, case.profile
    again = case.phase("recompute")
    capacity = profile.about.get("memory", 0)
    if config is None or not capacity or case.memory is None or again < LEAST_TIME:
        return
    more = case.saved(layout={"recompute": "none"})
    if more is not None and case.memory.peak - more < 0.9 * capacity:
        yield from case.time(
            "layout.recompute = none", again,
            f"{percent(again)} of the step computes activations again; kept, they take {gibibytes(-more)} more, and "
            f"{gibibytes(capacity - case.memory.peak)} are free",
        )  # fmt: skip


# -- memory -----------------------------------------------------------------------------------------------------------


def about_memory(case: Case) -> Iterator[Advice]:
    """Changes that hold less, for the largest holders at the peak, where that is a good part of what there is."""
    config, memory = case.profile.config, case.memory
    if config is None or memory is None or memory.peak < SCARCE * case.profile.about.get("memory", 0):
        return
    layout = config.layout
    changes: list[tuple[str, dict[str, Any], str]] = []
    if layout.loss == "whole":
        changes.append(("logits and loss", {"loss": "chunked"}, "layout.loss = chunked"))
    if layout.recompute == "none":
        changes.append(("activations", {"recompute": "selective"}, "layout.recompute = selective"))
        changes.append(("activations", {"recompute": "full"}, "layout.recompute = full"))
    if layout.micro_batch_size(config.train.global_batch) > 1:
        half = layout.micro_batch_size(config.train.global_batch) // 2
        changes.append(("activations", {"micro_batch": half}, f"layout.micro_batch = {half}"))
    if layout.dp > 1:
        moved = {"dp": 1, "fsdp": layout.dp * layout.fsdp}
        changes.append(("optimizer", moved, f"layout.fsdp = {layout.dp * layout.fsdp} in the place of dp"))
    best: dict[str, Advice] = {}
    for what, change, words in changes:
        held, saved = memory.holders[what] / memory.peak, case.saved(layout=change)
        if saved is None or held < 0.1 or saved < LEAST_MEMORY * memory.peak:
            continue
        evidence = f"{what} take {percent(held)} of the peak of {gibibytes(memory.peak)}"
        evidence += f" on rank {case.memory_rank.number}" if case.memory_rank is not None else ""
        if "recompute" in change:
            evidence += (
                f"; the forward pass, which is done again in part or whole, takes {percent(case.phase('forward'))}"
            )
        room = max(memory.peak, case.profile.about.get("memory", 0))
        found = Advice(words, f"saves {gibibytes(saved)} (planner)", evidence, saved / room)
        if what not in best or found.share > best[what].share:
            best[what] = found
    yield from best.values()


ADVISERS: tuple[Adviser, ...] = (
    about_stragglers, about_stages, about_bubble, about_messages, about_data, about_checkpoints, about_host,
    about_precision, about_recompute, about_memory,
)  # fmt: skip
