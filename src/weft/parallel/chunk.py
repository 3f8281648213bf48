"""Chunk: one stage of the model on its process, its weights, and what its gradients need after each backward pass."""

from __future__ import annotations

from contextlib import nullcontext

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from weft.config.layout import Layout
from weft.models.decoder import Decoder
from weft.models.dtypes import DTYPES
from weft.parallel.deferral import Deferral
from weft.parallel.lowered import Lowered
from weft.parallel.mesh import Mesh
from weft.parallel.replicate import replicate
from weft.parallel.shard import hold_gradients, prepare_backward, reduce_held


class Chunk:
    """A process has as many as the layout's `num_chunks`; each goes through its micro-batches by itself."""

    def __init__(self, model: Decoder, layout: Layout, mesh: Mesh, deferral: Deferral | None, bucket: int) -> None:
        self.model, self.layout, self.deferral = model, layout, deferral
        self.lowered = Lowered(model, DTYPES[layout.compute]) if layout.lowered else None
        self.replicas = [] if layout.sharded else replicate(model, self.lowered, layout, mesh, bucket)
        self.parameters: dict[str, nn.Parameter] = (
            self.lowered.weights if self.lowered else dict(model.named_parameters())
        )
        """What the optimizer updates, by name; of FSDP2 and of a lowered model not what is computed with."""

    def clear(self) -> None:
        """The start of a step: no gradients."""
        for parameter in self.parameters.values():
            parameter.grad = None
        for replicas in self.replicas:
            replicas.clear()

    def refresh(self) -> None:
        """Before a pass: it computes with the weights as they are now."""
        if self.lowered:
            self.lowered.refresh()

    def rest(self) -> None:
        """After a pass without a backward one, which would have given gathered weights back."""
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def backward(self, micro_batch: int, y: Tensor, grad: Tensor | None, put_off: bool, last: bool) -> None:
        """One backward pass; with `put_off`, products that give gradients of matrices wait for `weights`."""
        if self.deferral is None:
            if isinstance(self.model, FSDPModule):
                prepare_backward(self.model, self.layout, last)
            for replicas in self.replicas:
                replicas.last_pass = last
            y.backward(grad)
            return
        if isinstance(self.model, FSDPModule):
            hold_gradients(self.model, self.layout)
        for replicas in self.replicas:
            replicas.last_pass = False
        with self.deferral.put_off(micro_batch) if put_off or self.layout.compile else nullcontext():
            y.backward(grad)
        if not put_off and self.layout.compile:
            self.deferral.catch_up(micro_batch)
        if not put_off:
            self._reduce(last)

    def weights(self, micro_batch: int, last: bool) -> None:
        """The gradients that were put off."""
        assert self.deferral is not None
        self.deferral.catch_up(micro_batch)
        self._reduce(last)

    def _reduce(self, last: bool) -> None:
        """What otherwise happens inside of a backward pass, where a schedule puts gradients off."""
        if isinstance(self.model, FSDPModule):
            prepare_backward(self.model, self.layout, last)
            reduce_held(self.model, self.layout)
        if self.lowered:
            self.lowered.collect()
        for replicas in self.replicas if last else []:
            replicas.send()

    def finish(self) -> None:
        """The end of a step."""
        for replicas in self.replicas:
            replicas.finish()
        assert self.deferral is None or not self.deferral.queue, "weights were put off and never caught up with"
