"""Products: the FLOPs of matrices and of attention, those that are worked out again apart."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch

aten = torch.ops.aten

ADDING = {aten.addmm, aten.addmm_, aten.baddbmm}
MATRICES = {aten.mm, aten.bmm, aten._scaled_mm, aten._grouped_mm} | ADDING
FORWARD = {
    aten._scaled_dot_product_flash_attention_for_cpu, aten._scaled_dot_product_flash_attention,
    aten._scaled_dot_product_efficient_attention, aten._scaled_dot_product_cudnn_attention,
}  # fmt: skip
BACKWARD = {
    aten._scaled_dot_product_flash_attention_for_cpu_backward, aten._scaled_dot_product_flash_attention_backward,
    aten._scaled_dot_product_efficient_attention_backward, aten._scaled_dot_product_cudnn_attention_backward,
}  # fmt: skip


class Products:
    """FLOPs by what they are for.

    Attributes:
        matmul, attention, attention_causal: of the model. Of attention two products forward and four backward, of which a
            kernel makes five: the scores again, which are no work of the model's. Causal: half of the scores where the
            mask is plain causal, as Shape counts.
        again: matmul and attention (causal) of what is recomputed.
    """

    def __init__(self) -> None:
        self.found: Counter[str] = Counter()

    def see(self, func: Any, args: Any, kwargs: Any, again: bool) -> None:
        kind = func.overloadpacket
        if kind in MATRICES:
            added = kind in ADDING  # what the product is added to comes first
            a, b = args[added : added + 2]
            flops = 2 * a.numel() * b.shape[-1]
            self.found["again" if again else "matmul"] += flops
        elif kind in FORWARD or kind in BACKWARD:
            first = 0 if kind in FORWARD else 1
            q, k, v = args[first : first + 3]
            pairs = q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2]
            flops = 2 * pairs * (q.shape[3] + v.shape[3]) * (1 if kind in FORWARD else 2)
            names = [argument.name for argument in func._schema.arguments]
            place = names.index("is_causal")
            causal = kwargs.get("is_causal", args[place] if place < len(args) else False)
            half = flops / 2 if causal else flops
            if again:
                self.found["again"] += half
            else:
                self.found["attention"] += flops
                self.found["attention_causal"] += half
