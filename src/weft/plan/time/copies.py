"""Weights that several processes have, or whose states they share. Torch-free."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from weft.plan.time.block import parameters
from weft.plan.work import Num, Work


class Copies(NamedTuple):
    """Weights that as many processes have: those that all blocks have and the vocabulary's, or those of experts.

    Attributes:
        weights: parameters on the process with most blocks, whole.
        shards: processes that share them, or their states; `replicas`: such groups.
        stride: from one of these processes to the next.
    """

    weights: Num
    shards: Num
    replicas: Num
    stride: Num

    def ways(self, zero: Num) -> Num:
        """Processes among which gradients are reduced once a step: under ZeRO 3 the shards have done their part before."""
        return self.replicas * np.where(zero == 3, 1, self.shards)

    def here(self, shared: Num) -> Num:
        """Parameters on a process, where the shards share them."""
        return self.weights / np.where(shared, self.shards, 1)


def copies(work: Work) -> tuple[Copies, Copies]:
    """Of what is not experts', and of experts: where these are spread over all processes, no other has the same."""
    s, c = work.sizes, work.cut
    common, experts, table = parameters(work)
    tables = table * np.where(c.pp > 1, 1, 2 - s.tied)
    replicas = np.maximum(1, c.dp * c.shards * c.tp / (c.ep * c.etp) / c.expert_shards)
    return (
        Copies(work.blocks * common + tables, c.shards, c.dp, c.tp),
        Copies(work.blocks * experts, c.expert_shards, replicas, c.ep * c.etp),
    )


def weight_bytes(work: Work) -> Num:
    """In which a parameter travels where it is gathered."""
    return 2 - work.software.gathers8 * work.cut.fp8
