"""Names in a trace, and what they mean: weft's own ranges, operations, kernels. Torch-free."""

from __future__ import annotations

import re
from functools import lru_cache

PREFIX = "weft:"
"""Of weft's own ranges: `weft:KIND:DETAIL`."""
SCOPES = {
    "data": "data wait", "checkpoint": "checkpoint", "evaluation": "evaluation", "optimizer": "optimizer",
    "clip": "optimizer", "agree": "agree", "reduce": "reduce",
}  # fmt: skip
"""Ranges of a step that are no part of the model → what their time is."""
WORK = ("gemm", "attention", "norm", "element-wise", "loss", "embedding", "optimizer", "compiled", "copy")
"""Kinds in which the device works."""
LOST = ("bubble", "data wait", "checkpoint", "evaluation", "host")
"""Kinds in which it does not; messages that nothing hides come beside these, as `tp exposed`."""
EXPOSED = " exposed"

GEMM = {
    "mm", "addmm", "bmm", "baddbmm", "_scaled_mm", "mv", "addmv", "dot", "_grouped_mm", "_scaled_grouped_mm",
    "mkldnn_linear", "_weight_int8pack_mm", "_int_mm", "convolution", "mkldnn_convolution", "linear", "matmul",
    "deferred_linear", "deferred_linear_backward", "addmm_", "addbmm_", "fused_all_gather_matmul",
    "fused_matmul_reduce_scatter",
}  # fmt: skip
CONVOLUTION = re.compile(r"convolution|conv\d|conv_(transpose|depthwise|tbc)")
EMBEDDING = {"embedding", "index_select", "embedding_dense_backward", "embedding_backward"}
NOTHING = {
    "view", "as_strided", "transpose", "t", "reshape", "detach", "empty", "empty_like", "empty_strided", "slice",
    "select", "unsqueeze", "squeeze", "expand", "resolve_conj", "resolve_neg", "to", "_to_copy", "alias", "flatten",
    "unflatten", "split", "chunk", "narrow", "view_as", "_unsafe_view", "result_type", "item", "is_nonzero", "permute",
    "new_empty", "split_with_sizes", "unbind", "movedim", "lift_fresh", "set_", "resize_", "contiguous", "_reshape_alias",
    "_local_scalar_dense", "new_empty_strided", "expand_as", "type_as", "record_stream", "numpy_T", "clone",
}  # fmt: skip
"""Operations that only describe a tensor anew, or call another one that does the work: their own time is the host's."""
NORM = re.compile(r"(layer|rms|group|batch)_?norm", re.IGNORECASE)
ATTENTION = re.compile(
    r"scaled_dot_product|flash_attn|_flash_attention|efficient_attention|flex_attention|context_attention|_cudnn_attention"
)
LOSS = re.compile(r"cross_?entropy|nll_loss|log_softmax", re.IGNORECASE)
KERNEL_GEMM = re.compile(
    r"gemm|cutlass|xmma|nvjet|cublas|wgmma|mma_f|splitk|convol|dgrad|wgrad|fprop|winograd", re.IGNORECASE
)
KERNEL_EMBEDDING = re.compile(r"embedding", re.IGNORECASE)
KERNEL_ATTENTION = re.compile(r"flash|fmha|attention|sdpa", re.IGNORECASE)
KERNEL_OPTIMIZER = re.compile(r"adam|multi_tensor_apply.*(sgd|lamb)", re.IGNORECASE)
MESSAGE = re.compile(
    r"all_?reduce|all_?gather|reduce_?scatter|all_?to_?all|broadcast|send_?recv|\bsend\b|\brecv\b|barrier",
    re.IGNORECASE,
)
MESSAGES = (
    ("reduce_scatter", re.compile("reduce_?scatter", re.IGNORECASE)),
    ("all_gather", re.compile("all_?gather", re.IGNORECASE)),
    ("all_to_all", re.compile("all_?to_?all", re.IGNORECASE)),
    ("all_reduce", re.compile("all_?reduce", re.IGNORECASE)),
    ("broadcast", re.compile("broadcast", re.IGNORECASE)),
    ("send/recv", re.compile("send|recv", re.IGNORECASE)),
    ("barrier", re.compile("barrier", re.IGNORECASE)),
)


@lru_cache(maxsize=4096)
def op_kind(name: str) -> str | None:
    """What an operation on the CPU does: a kind of WORK, `host` where it only calls others; None: it is no operation
    that says it."""
    if name.startswith(("aten::", "weft::", "symm_mem::", "fsdp::")):
        short = name.split("::")[1]
        if short in GEMM or CONVOLUTION.search(short):
            return "gemm"
        if ATTENTION.search(short):
            return "attention"
        if short in NOTHING:
            return "host"
        if NORM.search(short):
            return "norm"
        if LOSS.search(short):
            return "loss"
        if short in EMBEDDING:
            return "embedding"
        if "adam" in short:
            return "optimizer"
        return "element-wise"
    if name.startswith(("_RMSNorm", "_LayerNorm")):
        return "norm"
    if LOSS.search(name):
        return "loss"
    if "Torch-Compiled" in name or name.startswith(("CompiledFunction", "triton_", "graph_")):
        return "compiled"
    return None


@lru_cache(maxsize=4096)
def kernel_kind(name: str) -> str | None:
    """What a kernel's own name says; None: nothing."""
    if KERNEL_ATTENTION.search(name):
        return "attention"
    if KERNEL_GEMM.search(name):
        return "gemm"
    if KERNEL_OPTIMIZER.search(name):
        return "optimizer"
    if "triton" in name.lower():
        return "compiled"
    if KERNEL_EMBEDDING.search(name):
        return "embedding"
    if NORM.search(name):
        return "norm"
    return "copy" if "memcpy" in name.lower() or "memset" in name.lower() else None


@lru_cache(maxsize=1024)
def message_kind(name: str) -> str:
    """all_reduce, all_gather, … of any spelling."""
    return next((kind for kind, pattern in MESSAGES if pattern.search(name)), "message")


def is_message(name: str) -> bool:
    """Whether an operation on the CPU starts or awaits a message."""
    return name.startswith(("c10d::", "_c10d_functional::", "c10d_functional::"))
