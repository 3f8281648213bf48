"""The systems by name: whom a plan is written for, and what is read back. Torch-free."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import ceil
from pathlib import Path

from weft.config.layout import Layout
from weft.config.load import read_text
from weft.config.toml import config_toml
from weft.config.tree import Config, TrainConfig
from weft.models.shape import Shape
from weft.plan.emit import deepspeed, megatron, megatron_read, nemo, torchtitan
from weft.plan.emit.settings import Written
from weft.plan.numbers import Job
from weft.plan.plan import Plan
from weft.plan.search import Search

WRITERS = {
    "weft": lambda config, _: Written(config_toml(config), ()),
    "megatron": megatron.write,
    "deepspeed": deepspeed.write,
    "torchtitan": torchtitan.write,
    "nemo": nemo.write,
}
TRIED = 2000
"""Layouts of a search, the fastest first, of which one is written."""


def run_of(shape: Shape, layout: Layout, job: Job) -> Config:
    """What a plan is a plan of, all else as weft has it by default."""
    steps = max(1, ceil(job.tokens / (job.global_batch * job.seq)))
    return Config(
        model=shape, layout=layout, train=TrainConfig(steps=steps, global_batch=job.global_batch, seq=job.seq)
    )


def check(system: str) -> None:
    """Raises: ValueError: there is no such system."""
    if system not in WRITERS:
        raise ValueError(f"--emit {system}: weft writes for {', '.join(WRITERS)}")


def fastest(found: Search, system: str) -> tuple[Plan, Written]:
    """The fastest layout that a system can run, of the first TRIED.

    Raises:
        ValueError: it can run none of them; says why not the very fastest.
    """
    check(system)
    refusal: ValueError | None = None
    for _, layout in found.layouts(found.order[:TRIED]):
        try:
            written = write(run_of(found.shape, layout, found.job), system, found.cluster.per_node)
        except ValueError as error:
            refusal = refusal or error
            continue
        return found.plan(layout), written
    raise refusal or ValueError(f"--emit {system}: there is no layout to write")


def write(config: Config, system: str, per_node: int = 8) -> Written:
    """Raises: ValueError: no such system, or one that cannot run this; names the setting."""
    check(system)
    written = WRITERS[system](config, per_node)
    if config.layout.async_tp and system != "weft":
        return replace(written, remarks=(*written.remarks, "layout.async_tp is not written: this system has its own"))
    return written


def read(
    path: Path, model: Shape | None = None, gpus: int | None = None, given: Sequence[str] = ()
) -> tuple[Config, list[str]]:
    """A run, and what of the file was not understood: a JSON is DeepSpeed's, all else Megatron-LM's arguments.

    Raises:
        ValueError: there is no such file, or something that weft must know is not in it; names it.
    """
    text = read_text(path)
    try:
        if not text.lstrip().startswith("{"):
            return megatron_read.read(text, model, gpus, given)
        if given:
            raise ValueError(f"a DeepSpeed JSON is not started with anything: leave {' '.join(given)} out")
        return deepspeed.read(text, model, gpus)
    except RecursionError:
        raise ValueError(f"{path}: what it says lies too deep inside of itself") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
