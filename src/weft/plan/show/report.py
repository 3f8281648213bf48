"""The plan of a run, as `weft train … --dry-run` prints it. Torch-free: nothing is started, nothing allocated.

Into a file or a pipe everything but the settings is written as comments: what comes out is a config file with its plan
above it, and `weft train` takes it as it is.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.syntax import Syntax
from rich.table import Table
from rich.text import Text

from weft.config.toml import config_toml
from weft.config.tree import Config
from weft.plan.memory.moments import Device, Memory, StageMemory, largest, layout_memory
from weft.plan.show.words import describe
from weft.schedules.timeline import timeline
from weft.units import gibibytes, percent, short

WIDTH = 118

ROWS = {
    "weights": "fp32",
    "optimizer": "moments, fp32",
    "gradients": "fp32",
    "copies": "gathered or low-precision weights",
    "activations": "kept for backward",
    "logits": "and the workspace of the loss",
    "temporary": "inside of this moment's operations",
    "staging": "of checkpoints in the background",
    "base": "interpreter and torch",
}
"""Term of the memory → what it is."""


def print_plan(config: Config, file: TextIO | None = None) -> None:
    """Print settings, sizes, the layout in words, memory, and FLOPs of a run.

    Args:
        file: standard output by default.
    """
    out = file or sys.stdout
    console = Console(file=out)
    if console.is_terminal:
        console.print(Syntax(config_toml(config), "toml", theme="ansi_dark", background_color="default"))
        console.print(plan(config))
        return
    plain = Console(width=WIDTH, no_color=True, force_terminal=False, legacy_windows=False)
    with plain.capture() as captured:
        plain.print(plan(config))
    for line in captured.get().strip("\n").splitlines():
        out.write(f"# {line}".rstrip() + "\n")
    out.write("\n" + config_toml(config))


def plan(config: Config) -> RenderableType:
    """Everything but the settings."""
    device = chosen_device(config)
    memories = layout_memory(config, device)
    most = largest(memories)
    parts = [
        _heading(f"{config.layout} on {_processes(config.layout.world)}"),
        _pairs(describe(config)),
        _heading("sizes"),
        _pairs(sizes(config, most)),
        _heading(f"memory of the largest process{_where(most, memories)}, fullest at the {most.peak.moment}"),
        _memory(most.peak, device),
        *([_stages(memories)] if len(memories) > 1 else []),
    ]
    return Group(*parts)


def sizes(config: Config, most: StageMemory) -> Iterator[tuple[str, str]]:
    """Parameters, tokens, FLOPs and the bubble."""
    shape, layout, train = config.model, config.layout, config.train
    held = f"{most.stage.shard:,} ({short(most.stage.shard)}) on the largest process"
    yield "parameters", f"{shape.num_params:,} ({short(shape.num_params)}); {held}"
    tokens = train.global_batch * config.seq
    run = f"{short(tokens * train.steps)} in {train.steps:,} steps"
    yield "tokens", f"{tokens:,} a step ({train.global_batch:,} × {config.seq:,}); {run}"
    causal, full = (shape.flops_per_token(config.seq, causal=causal) for causal in (True, False))
    yield "FLOPs", f"{large(causal)} per token ({large(full)} with the masked half of attention); no recompute counted"
    yield "", f"{large(causal * tokens)} per step, {large(causal * tokens / layout.world)} of them on each process"
    count = layout.num_micro_batches(train.global_batch)
    yield "micro-batches", f"{count} a step, of {layout.micro_batch_size(train.global_batch)} sequences"
    if layout.pp > 1:
        share = f"{percent(timeline(layout.table(count)).bubble)} of the step a process waits for others"
        yield "bubble", f"{share}, all stages being equally fast; more micro-batches make it smaller"


def large(number: float) -> str:
    """Three digits and an SI prefix, up to those that a training run takes: 5.29 E."""
    for size, letter in ((1e21, "Z"), (1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{short(number / size)} {letter}"
    return f"{short(number)} "


def chosen_device(config: Config) -> Device:
    """The device of `train.device`; for auto, a GPU where this machine has NVIDIA's driver."""
    if config.train.device == "auto":
        return "cuda" if Path("/proc/driver/nvidia/version").exists() else "cpu"
    return config.train.device


def _memory(memory: Memory, device: Device) -> RenderableType:
    table = Table(box=None, show_header=False, padding=(0, 2))
    table.add_column(style="bold")
    table.add_column(justify="right")
    table.add_column(style="dim")
    for name, what in ROWS.items():
        size = getattr(memory, name)
        if name == "base":
            what = what if device == "cpu" else "CUDA context, about; torch does not count it"
        if size and not (name == "staging" and device == "cuda"):
            table.add_row(name, gibibytes(size), what)
    total = memory.total if device == "cpu" else memory.total - memory.staging
    where = "resident in memory" if device == "cpu" else "on the GPU"
    table.add_row("total", gibibytes(total), where, style="bold cyan")
    if memory.staging and device == "cuda":
        table.add_row("staging", gibibytes(memory.staging), f"{ROWS['staging']}: in the memory of the CPU")
    return table


def _stages(memories: list[StageMemory]) -> RenderableType:
    totals = [f"{memory.stage.index}: {gibibytes(memory.peak.total)}" for memory in memories]
    shown = totals if len(totals) <= 8 else [*totals[:3], "…", *totals[-2:]]
    return Padding(Text("each stage  " + "   ".join(shown), "dim"), (0, 0, 0, 2))


def _pairs(pairs: Iterator[tuple[str, str]]) -> RenderableType:
    table = Table(box=None, show_header=False, padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    for name, text in pairs:
        table.add_row(name, text)
    return table


def _heading(text: str) -> RenderableType:
    return Padding(Text(text, "bold cyan"), (1, 0, 0, 0))


def _where(most: StageMemory, memories: list[StageMemory]) -> str:
    return f" (stage {most.stage.index} of {len(memories)})" if len(memories) > 1 else ""


def _processes(count: int) -> str:
    return "1 process" if count == 1 else f"{count:,} processes"
