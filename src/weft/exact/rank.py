"""One process of a layout, through one step: what it holds, says to the others, and works out.

It is the model that `weave` makes and the step that the trainer does, nothing beside them: parallel/weave.py and
train/step.py. So this room stands above train/, and not in plan/, which knows neither torch nor how anything is woven.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from unittest.mock import patch

import torch

from weft.config.tree import Config
from weft.exact.imagine import imagined
from weft.exact.ledger import Ledger
from weft.exact.messages import Line
from weft.exact.watch import Watch, watching
from weft.models import head
from weft.parallel import loss, offload
from weft.parallel.woven import Rows
from weft.plan.memory.moments import Device, Memory, StageMemory, stage_memory
from weft.plan.memory.stage import stages
from weft.train.step import find_gradients, update
from weft.train.training import Training, build

Progress = Callable[[int, int], None]
"""Passes through a block that are done, and all of them."""


@dataclass(frozen=True)
class Exact:
    """What was seen of one process.

    Attributes:
        parameters, buffers: numbers that it holds.
        flops: see exact/products.py.
        planned: the same process by the formulas of plan/memory/moments.py, or a larger one of its stage.
    """

    config: Config
    rank: int
    device: Device
    parameters: int
    buffers: int
    ledger: Ledger
    messages: tuple[Line, ...]
    flops: dict[str, float]
    planned: StageMemory

    @property
    def stage(self) -> int:
        """Its place in the pipeline."""
        return self.planned.stage.index

    @property
    def plan(self) -> Memory:
        """What the formulas say of the fullest moment. There is no saving of checkpoints here."""
        return max((it for it in self.planned.moments if "saving" not in it.moment), key=lambda it: it.tensors)

    def at_peak(self) -> Counter[str]:
        """Bytes of each kind, as Memory has them, when most was there."""
        found: Counter[str] = Counter()
        for holding in self.ledger.alive(self.ledger.peak_at):
            found[self.ledger.kind(holding)] += holding.size
        return found

    def by_module(self) -> Counter[tuple[str, str]]:
        """Bytes at the peak by the module that made them, blocks as one, and kind."""
        found: Counter[tuple[str, str]] = Counter()
        for holding in self.ledger.alive(self.ledger.peak_at):
            found[unnumbered(holding.module), self.ledger.kind(holding)] += holding.size
        return found

    def formula_flops(self, *, causal: bool) -> float:
        """Model FLOPs of a step, an even share of them for each process: Shape's formula."""
        tokens = self.config.train.global_batch * self.config.seq
        return self.config.model.flops_per_token(self.config.seq, causal=causal) * tokens / self.config.layout.world


def unnumbered(module: str) -> str:
    """blocks.3.mlp.up → blocks.mlp.up"""
    return ".".join(part for part in module.split(".") if not part.isdigit())


def imagine_rank(config: Config, rank: int, device: Device = "cuda", progress: Progress | None = None) -> Exact:
    """A process of any layout, whatever it takes: in this one, and in next to no memory.

    Args:
        device: as what the memory is counted. The operations are those of a CPU; on a GPU the loss needs no
            fp32 copy, and what is offloaded is elsewhere.

    Raises:
        ValueError: the layout has no such rank, or the settings have a part that cannot be imagined.
    """
    check(config, rank)
    if config.layout.offload_weights and device == "cuda":
        raise ValueError(
            "an exact plan takes all memory for one, and layout.offload_weights divides it: leave offload_weights out, or "
            "take the estimate of weft train --dry-run"
        )
    config = without_compiler(config)
    with imagined(rank, config.layout.world):
        return watch_step(config, rank, device, progress, fill=False)


def check(config: Config, rank: int) -> None:
    if not 0 <= rank < config.layout.world:
        raise ValueError(f"layout {config.layout} has ranks 0 to {config.layout.world - 1}, and no {rank}")
    if config.optimizer.kind == "muon" and config.layout.world > config.layout.pp:
        raise ValueError(
            "Muon's processes tell each other what they hold, and for an exact plan the others do not exist: set "
            "optimizer.kind = adamw, or take the estimate of weft train --dry-run"
        )


def without_compiler(config: Config) -> Config:
    """What the compiler keeps and what it drops is known only when it has run."""
    return config.model_copy(update={"layout": config.layout.model_copy(update={"compile": False})})


def watch_step(
    config: Config, rank: int, device: Device, progress: Progress | None = None, *, fill: bool = True
) -> Exact:
    """The first step of this process, real or imagined, on tensors of the CPU. Every process of the layout calls this.

    `fill`: give the weights their first values.
    """
    with ExitStack() as stack:
        watch = stack.enter_context(watching())
        ledger = watch.ledger
        if device == "cuda":
            stack.enter_context(as_on_a_gpu(ledger))
        training = build(config, torch.device("cpu"), fill=fill)
        name_what_is_there(training, watch, device)
        rows = some_rows(training)
        watch.follow(training.woven, _counting(config, training, progress))
        found = find_gradients(training.woven, training.scaler, rows)
        for weight in training.woven.weights:
            ledger.mark(weight.grad, "gradients")
        ledger.begin("update")
        update(
            training.woven, training.optimizer, training.scaler, found, lr=1e-3, clip_norm=config.optimizer.clip_norm
        )
        ledger.closed = True
    stage = stages(config.model, config.layout)[training.mesh.index("pp")]
    return Exact(
        config=config,
        rank=rank,
        device=device,
        parameters=sum(weight.data.numel() for weight in training.woven.weights),
        buffers=sum(buffer.numel() for buffer in training.woven.buffers.values()),
        ledger=ledger,
        messages=tuple(watch.messages.lines(training.mesh)),
        flops=dict(watch.products.found),
        planned=stage_memory(config, stage, device),
    )


def name_what_is_there(training: Training, watch: Watch, device: Device) -> None:
    """Before the first step: weights, their copies, buckets of gradients; all else is the optimizer's."""
    ledger = watch.ledger
    for weight in training.woven.weights:
        ledger.mark(weight.data, "weights")
    for chunk in training.woven.chunks.values():
        for buffer in chunk.model.buffers():
            ledger.mark(buffer, "weights")
        for copy in chunk.model.parameters() if chunk.lowered else ():
            ledger.mark(copy, "copies")
        for replicas in chunk.replicas:
            for bucket in replicas.buckets:
                ledger.mark(bucket, "gradients")
    if device == "cuda" and training.config.layout.offload_optimizer:
        optimizer = training.optimizer
        moments = (moment for state in optimizer.adamw.state.values() for moment in state.values())
        for x in (*optimizer.tensors, *(optimizer.gradients or []), *moments):
            ledger.dismiss(x)
    ledger.mark_rest("optimizer")


def some_rows(training: Training) -> Rows:
    """Rows of the global batch as a loader gives them; tokens are imagined too, however few they are."""
    config, dims = training.config, (len(training.rows), training.config.seq)

    def numbers(below: int) -> torch.Tensor:
        return torch.rand(dims).mul_(below).long()

    vocab, masked = config.model.vocab, config.data.document_mask
    return Rows(numbers(vocab), numbers(vocab), *((numbers(1), numbers(1)) if masked else ()))


@contextmanager
def as_on_a_gpu(ledger: Ledger) -> Iterator[None]:
    """Sizes of a GPU where a CPU's differ; what is offloaded is in another memory."""
    send = offload.Load._send

    def away(load: offload.Load, x: torch.Tensor) -> offload.Crate:
        crate = send(load, x)
        ledger.dismiss(crate.away)
        return crate

    with (
        patch.object(loss, "fused", lambda logits: True),
        patch.object(loss, "_look", lambda *given: None),  # kernels that hold nothing
        patch.object(loss, "_differentiated", lambda logits, *given: logits),
        patch.object(head, "ROUNDED", ("cpu",)),
        patch.object(offload.Load, "_send", away),
    ):
        yield


def _counting(config: Config, training: Training, progress: Progress | None) -> Callable[[], None]:
    mine = stages(config.model, config.layout)[training.mesh.index("pp")]
    total, done = 2 * mine.num_blocks * config.layout.num_micro_batches(config.train.global_batch), 0

    def one_more() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(min(done, total), total)

    return one_more
