"""Variants: changes to a layout that cost nothing but a try, since no plan knows what they are worth. Torch-free."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from weft.config.layout import Layout

Knob = Callable[[Layout, int], Iterator[Layout]]
"""From a layout and the sequences of a step to what may be tried in its place; not all of it may be possible."""


def micro_batches(layout: Layout, global_batch: int) -> Iterator[Layout]:
    """Half and twice as many sequences in a pass: other kernels, other messages."""
    size, local = layout.micro_batch_size(global_batch), global_batch // layout.replicas
    for other in (size // 2, 2 * size):
        if 1 <= other <= local and local % other == 0:
            yield layout.model_copy(update={"micro_batch": other})


def compiled(layout: Layout, _: int) -> Iterator[Layout]:
    """torch.compile on, or off."""
    yield layout.model_copy(update={"compile": not layout.compile})


def overlapped(layout: Layout, _: int) -> Iterator[Layout]:
    """Under sp: products and the messages beside them in pieces, or whole."""
    if layout.sp and not layout.compile:
        yield layout.model_copy(update={"async_tp": not layout.async_tp})


KNOBS: tuple[Knob, ...] = (micro_batches, compiled, overlapped)
"""In the order in which they are tried."""
