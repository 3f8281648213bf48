"""A layout in words: what each axis does, and which ranks it joins. Torch-free."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from weft.config.layout import Layout
from weft.config.recompute import Recompute
from weft.config.tree import Config
from weft.units import gibibytes

ORDER = ("pp", "dp", "fsdp", "cp", "tp")
"""The axes as parallel/mesh.py numbers ranks, outermost first: tp neighbours are adjacent."""


def describe(config: Config) -> Iterator[tuple[str, str]]:
    """Pairs of a part of the layout, as its short form writes it, and a sentence."""
    layout, train = config.layout, config.train
    local = train.global_batch // layout.replicas
    if layout.world == 1:
        yield "single", "one process holds the whole model and works on the whole batch"
    if layout.pp > 1:
        sizes = [len(blocks) for blocks in layout.stage_blocks(config.model)]
        what = f"{layout.num_stages} stages of {_counts(sizes)} blocks, one after the other"
        what += f", {layout.num_chunks} on each process" if layout.num_chunks > 1 else ""
        yield f"pp{layout.pp}", f"{what}; {ranks(layout, 'pp')}"
        yield layout.schedule, SCHEDULES.get(layout.schedule, "a schedule of your own")
    if layout.dp > 1:
        what = f"{layout.dp} replicas add up their gradients once a step"
        yield f"dp{layout.dp}", f"{what}; {ranks(layout, 'dp')}"
    if layout.fsdp > 1:
        yield f"fsdp{layout.fsdp}", f"{layout.fsdp} processes share {ZERO[layout.zero]}; {ranks(layout, 'fsdp')}"
    if layout.cp > 1:
        what = f"every sequence is cut {layout.cp} ways, {CP_KINDS[layout.cp_kind]}; {ranks(layout, 'cp')}"
        yield f"cp{layout.cp}", what
    if layout.tp > 1:
        heads = config.model.num_heads // layout.tp
        what = f"every matrix is cut {layout.tp} ways, {heads} heads each; {ranks(layout, 'tp')}"
        yield f"tp{layout.tp}", what
    if layout.sp:
        share = config.seq // layout.cp // layout.tp
        yield "sp", f"between the matrices each tp process has {share:,} of {config.seq:,} tokens"
    micro_batch, count = layout.micro_batch_size(train.global_batch), layout.num_micro_batches(train.global_batch)
    passes = "one forward pass" if count == 1 else f"{count} micro-batches of {micro_batch}"
    yield "batch", f"{train.global_batch:,} sequences: {local:,} for each of {layout.replicas}, in {passes}"
    if layout.recompute != "none":
        yield layout.recompute, _recompute(Recompute.parse(layout.recompute))
    if layout.offload:
        yield "offload", "what blocks keep for backward waits in the CPU's memory; one block more is on its way back"
    if layout.offload_weights:
        yield "offloadweights", "weights, reduced gradients and moments lie in the CPU's memory, which updates them"
    if layout.offload_optimizer:
        yield "offloadoptimizer", "AdamW's moments lie in the CPU's memory, which updates copies of the weights"
    if layout.loss == "chunked":
        yield "chunked", "logits exist for some positions at a time; their gradients are worked out with the loss"
    if layout.compute != "fp32":
        fp8 = FP8_WORDS.get(layout.precision, "")
        yield layout.precision, f"computed in {layout.compute}{fp8}; weights, gradients and moments stay fp32"
    if layout.gradients == "bf16":
        yield "bf16grads", "gradients are reduced, and before that added up, in bf16"
    if layout.compile:
        yield "compile", "each block is one compiled function"


SCHEDULES = {
    "gpipe": "all forward passes, then all backward passes: activations of every micro-batch are held",
    "1f1b": "forward and backward in turn: activations of at most as many micro-batches as stages from here to the end",
    "interleaved": "1f1b in rounds over a process's stages: less waiting, more messages, more activations",
    "bfs": "every micro-batch through one stage, then through the process's next: less waiting, all activations are held",
    "zbh1": "1f1b whose gradients of weights wait until nothing else can be done: a third of the waiting",
    "zbv": "two stages on each process, there and back, and gradients of weights put off: almost no waiting",
    "dualpipev": "two stages on each process, there and back, forwards of one beside backwards of the other",
}
FP8_WORDS = {
    "fp8": ", matrices of all blocks but the first and last multiplied in fp8, with a scale for each tensor",
    "fp8row": ", matrices of all blocks but the first and last multiplied in fp8, with a scale for each row",
}
CP_KINDS = {
    "allgather": "keys and values are gathered for each attention",
    "ring": "keys and values go round while attention works",
    "ulysses": "for each attention it is cut by head instead",
}
ZERO = {
    1: "the optimizer states; weights and gradients are whole on each during a step",
    2: "gradients and optimizer states; weights are whole on each during a step",
    3: "weights, gradients and optimizer states; a block's weights are gathered when it is its turn",
}


def ranks(layout: Layout, axis: str) -> str:
    """The ranks that one axis joins, for the first group of them: `ranks 0, 8, 16, … 120`."""
    inside = ORDER[ORDER.index(axis) + 1 :]
    stride = 1
    for name in inside:
        stride *= getattr(layout, name)
    members = [index * stride for index in range(getattr(layout, axis))]
    groups = layout.world // len(members)
    text = ", ".join(map(str, members)) if len(members) <= 4 else f"{members[0]}, {members[1]}, … {members[-1]}"
    return f"ranks {text}" if groups == 1 else f"ranks {text}, and so on: {groups} such groups"


def _recompute(recompute: Recompute) -> str:
    if recompute.budget is not None:
        return f"as many blocks are computed again in backward as keep a process within {gibibytes(recompute.budget)}"
    of = f"of every {recompute.every} blocks the first" if recompute.every > 1 else "each block"
    of = f"of the first {recompute.first} blocks of a stage each" if recompute.first else of
    if recompute.redone:
        parts = " and ".join(recompute.redone)
        return f"{of} computes its {parts} again in backward"
    results = ", ".join(recompute.keeps)
    kept = f"its input and the results of {results}" if results else "its input alone"
    return f"{of} keeps {kept}; the rest is computed again in backward"


def _counts(sizes: Sequence[int]) -> str:
    if len(set(sizes)) == 1:
        return str(sizes[0])
    return "+".join(map(str, sizes)) if len(sizes) <= 4 else f"{min(sizes)} to {max(sizes)}"
