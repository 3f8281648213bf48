"""Variants: changes to a run that cost nothing but a try, since no plan knows what they are worth. Torch-free."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from weft.config.tree import Config
from weft.plan.memory.moments import Device

Knob = Callable[[Config, Device], Iterator[dict[str, Any]]]
"""From a run to changes of its settings that may be tried; not all of them may be possible."""
KERNELS = ("flash", "cudnn", "efficient")
VARIED = ("attention", "bucket_mib")
"""Of [train], what is varied."""


def micro_batches(config: Config, _: Device) -> Iterator[dict[str, Any]]:
    """The next fewer and the next more sequences in a pass that go: other kernels, other messages."""
    batch, layout = config.train.global_batch, config.layout
    size, local = layout.micro_batch_size(batch), batch // layout.replicas
    sizes = [other for other in range(1, local + 1) if local % other == 0]
    at = sizes.index(size)
    yield from ({"layout": {"micro_batch": other}} for other in (*sizes[:at][-1:], *sizes[at + 1 :][:1]))


def compiled(config: Config, _: Device) -> Iterator[dict[str, Any]]:
    """torch.compile on, or off."""
    yield {"layout": {"compile": not config.layout.compile}}


def overlapped(config: Config, _: Device) -> Iterator[dict[str, Any]]:
    """Under sp: products and the messages beside them in pieces, or whole."""
    if config.layout.sp:
        yield {"layout": {"async_tp": not config.layout.async_tp}}


def kernels(config: Config, device: Device) -> Iterator[dict[str, Any]]:
    """Of attention: torch's choice is not always the fastest."""
    if device == "cuda":
        yield from ({"train": {"attention": name}} for name in KERNELS if name != config.train.attention)


def buckets(config: Config, _: Device) -> Iterator[dict[str, Any]]:
    """Of replicas: smaller ones leave earlier, larger ones lose less to latency."""
    if config.layout.dp > 1 and not config.layout.sharded:
        yield {"train": {"bucket_mib": max(1, config.train.bucket_mib // 4)}}
        yield {"train": {"bucket_mib": 4 * config.train.bucket_mib}}


KNOBS: tuple[Knob, ...] = (micro_batches, compiled, overlapped, kernels, buckets)
"""In the order in which they are tried."""
