"""All ranks of a profile in one trace, on one clock, for ui.perfetto.dev or chrome://tracing. Torch-free."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

from weft.profile.load import Profile, Rank
from weft.profile.names import PREFIX

SPACING = 1_000_000
"""Between the process numbers of two ranks: streams and threads of one stay together."""


def write_merged(profile: Profile, file: Path) -> str:
    """Write it, gzipped if its name ends so. Returns how well the clocks agree, in words."""
    first = min(rank.to_wall for rank in profile.ranks)
    events: list[dict[str, Any]] = []
    for rank in profile.ranks:
        shift = (rank.to_wall - first) / 1000  # µs
        events += [_moved(raw, rank, shift) for raw in _raw(rank.file)["traceEvents"] if raw.get("ph") != "M"]
        events += _names(rank)
    document = {"displayTimeUnit": "ms", "baseTimeNanoseconds": round(first), "traceEvents": events}
    data = json.dumps(document, separators=(",", ":")).encode()
    file.write_bytes(gzip.compress(data, 5) if file.suffix == ".gz" else data)
    return clock_words(profile)


def clock_words(profile: Profile) -> str:
    """How far two ranks' times may be apart in it."""
    if len(profile.ranks) == 1:
        return "one rank"
    if not all("clock_error_ns" in rank.facts for rank in profile.ranks):
        return "clocks as the machines have them: nothing says how far they are apart"
    worst = max(rank.facts["clock_error_ns"] + kineto_error(rank) for rank in profile.ranks)
    return f"clocks agree within {worst / 1000:,.0f} µs"


def kineto_error(rank: Rank) -> float:
    """By how many ns Kineto's clock strays from the machine's over the trace."""
    marks = rank.trace.events(f"{PREFIX}clock:")
    offsets = [int(it.name.rpartition(":")[2]) - round(it.start * 1e9) for it in marks]
    return (max(offsets) - min(offsets)) / 2 if offsets else 0.0


def _raw(file: Path) -> dict[str, Any]:
    data = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    document: dict[str, Any] = json.loads(data)
    return document


def _moved(raw: dict[str, Any], rank: Rank, shift: float) -> dict[str, Any]:
    moved = {**raw, "pid": _process(raw.get("pid"), rank)}
    if "ts" in raw:
        moved["ts"] = round(raw["ts"] + shift, 3)
    if "id" in raw:  # of arrows between events: each rank's are its own
        moved["id"] = f"{rank.number}.{raw['id']}"
    return moved


def _process(pid: Any, rank: Rank) -> int:
    """The host is one process, and each GPU one (Kineto numbers these from 0)."""
    device = pid if isinstance(pid, int) and pid < 1000 else None
    return rank.number * SPACING + (1 + device if device is not None else 0)


def _names(rank: Rank) -> list[dict[str, Any]]:
    host = rank.number * SPACING
    names = {host: f"rank {rank.number}: host"}
    if rank.trace.on_gpu:
        devices = {it.args.get("device", 0) for it in rank.trace.kernels}
        names |= {host + 1 + device: f"rank {rank.number}: GPU {device}" for device in devices}
    told = []
    for pid, name in names.items():
        told.append({"ph": "M", "name": "process_name", "pid": pid, "args": {"name": name}})
        told.append({"ph": "M", "name": "process_sort_index", "pid": pid, "args": {"sort_index": pid}})
    return told
