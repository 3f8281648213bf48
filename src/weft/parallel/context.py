"""Context parallelism: every sequence is cut over processes, and attention brings them together.

Three ways (`layout.cp_kind`). All of them keep a T/n part of q, k, v and the result; only attention talks.

allgather: each process gathers all keys and values, and again in backward, where their gradients are summed and dealt
    out (as Llama 3 was trained: The Llama 3 Herd of Models, 2024, 3.3.2).
ring: keys and values go round from neighbour to neighbour, while attention to those at hand is worked out (Liu et al.,
    Ring Attention, 2023). In backward they go round again, and their gradients with them.
ulysses: two all-to-alls make of a part of the sequence, with all heads, all of the sequence with a part of the heads,
    and of the result the reverse (Jacobs et al., DeepSpeed Ulysses, 2023).

What a token may see is told by its true place in the sequence; which chunks a process has is in headtail.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.distributed_c10d import _resolve_process_group  # type: ignore[attr-defined]

from weft.models.attention import Attention, attend, attention_mask
from weft.models.decoder import Decoder
from weft.models.latent import LatentAttention
from weft.parallel.collectives import all_to_all, differentiable, ops
from weft.parallel.flash import Sight, merge
from weft.parallel.headtail import by_process, chunks_of, in_sequence


def cut_sequence(model: Decoder, group: dist.ProcessGroup, kind: str, window: int | None) -> None:
    """Make a model work on this process's chunks of every sequence.

    It must be told their true positions, and the documents of the whole sequence: headtail.py.
    """
    ways = group.size()
    if kind == "ulysses":
        model.attention_mask = lambda seq, *rest: attention_mask(seq * ways, *rest)
    else:  # masks are made part by part, where they are needed: a whole one has T²/n numbers
        model.attention_mask = lambda seq, window, documents, device: documents
    for block in model.blocks.values():
        attention = block.attention
        assert isinstance(attention, Attention | LatentAttention)
        attention.attend = attending(group, kind, window)  # type: ignore[method-assign]


def attending(group: dist.ProcessGroup, kind: str, window: int | None) -> Callable[..., Tensor]:
    """What takes the place of `attend` in every attention."""
    if kind == "ulysses":
        return partial(attend_by_head, group=group)
    return partial(attend_in_parts, window=window, kind=kind, group=group.group_name)


def attend_by_head(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None = None, *, group: dist.ProcessGroup
) -> Tensor:
    """Plain attention over whole sequences, of a part of the heads. `mask` [1 or B, 1, T, T]."""
    q, k, v = (SequenceToHeads.apply(x, group) for x in (q, k, v))
    return HeadsToSequence.apply(attend(q, k, v, mask, scale), group)


def attend_in_parts(
    q: Tensor, k: Tensor, v: Tensor, documents: Tensor | None, scale: float | None = None, *, window: int | None,
    kind: str, group: str,
) -> Tensor:  # fmt: skip
    """q [B, H, T/n, E], k and v [B, K, T/n, E] → [B, H, T/n, E]; v may be narrower than k."""
    scale, width, result = scale or q.shape[-1] ** -0.5, q.shape[-1], v.shape[-1]
    width = -(-width // 8) * 8 if q.is_cuda else width  # kernels want heads of one size, on a GPU a round one
    q, k, v = (F.pad(x, (0, width - x.shape[-1])) if x.shape[-1] < width else x for x in (q, k, v))
    return torch.ops.weft.context_attention(q, k, v, documents, window, kind, group, scale)[0][..., :result]


# -- by head ----------------------------------------------------------------------------------------------------------


def sequence_to_heads(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """A part of the sequence with all heads → all of it with a part of them: [B, H, T/n, E] → [B, H/n, T, E]."""
    ways = group.size()
    return in_sequence(all_to_all(x.unflatten(1, (ways, x.shape[1] // ways)).movedim(1, 0), group))


def heads_to_sequence(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The reverse."""
    return all_to_all(by_process(x, group.size()), group).movedim(0, 1).flatten(1, 2)


SequenceToHeads = differentiable(sequence_to_heads, heads_to_sequence)
HeadsToSequence = differentiable(heads_to_sequence, sequence_to_heads)


# -- who meets which keys ---------------------------------------------------------------------------------------------


class Meeting(NamedTuple):
    """One of this process's two chunks of queries, and keys that it may see."""

    chunk: int
    tokens: range  # of the keys
    keys: Tensor  # and values, [2, B, K, S, E]
    grads: Tensor | None  # what takes in their gradients, fp32; None in the forward pass


def gathered(keys: Tensor, grads: Tensor | None, sight: Sight, group: dist.ProcessGroup) -> Iterator[Meeting]:
    """Own keys while the others' arrive, then all that came before each chunk.

    `keys` are this process's own, [2, B, K, T/n, E]; `grads`, zeros, will hold their gradients when all is done.
    """
    ways = group.size()
    own = chunks_of(keys.shape[-2] * ways, ways, group.rank())
    arriving = ops.all_gather_into_tensor(keys, ways, group.group_name)
    for chunk, tokens in enumerate(own):
        yield Meeting(chunk, tokens, half(keys, chunk), half(grads, chunk))
    everyone = in_sequence(ops.wait_tensor(arriving).unflatten(0, (ways, 2)))
    sums = torch.zeros_like(everyone, dtype=torch.float32) if grads is not None else None
    for chunk, tokens in enumerate(own):
        before = sight.reach(tokens)
        there = (..., slice(before.start, before.stop), slice(None))
        yield Meeting(chunk, before, everyone[there], sums[there] if sums is not None else None)
    if grads is not None and sums is not None:
        shares = by_process(sums, ways).flatten(0, 1)
        grads += ops.wait_tensor(ops.reduce_scatter_tensor(shares, "sum", ways, group.group_name))


def passed_round(keys: Tensor, grads: Tensor | None, sight: Sight, group: dist.ProcessGroup) -> Iterator[Meeting]:
    """Own keys, then those of each process before this one in the ring. Arguments as of `gathered`.

    The next ones are on their way while these are attended to. Gradients follow their keys, and after the last step
    they are one process away from home.
    """
    ways, rank = group.size(), group.rank()
    going: Callable[[], Tensor] | None = None
    for step in range(ways):
        coming = pass_on(keys, group) if step + 1 < ways else None
        sums = torch.zeros_like(keys, dtype=torch.float32) if grads is not None else None
        tokens = chunks_of(keys.shape[-2] * ways, ways, (rank - step) % ways)
        for part in (1, 0):  # late keys first: so each query sees itself before anything else
            for chunk in (0, 1):
                yield Meeting(chunk, tokens[part], half(keys, part), half(sums, part))
        if sums is not None:
            sums = sums + going() if going is not None else sums
            going = pass_on(sums, group)
        keys = coming() if coming is not None else keys
    if grads is not None and going is not None:
        grads.copy_(going())


WAYS = {"allgather": gathered, "ring": passed_round}


def pass_on(x: Tensor, group: dist.ProcessGroup) -> Callable[[], Tensor]:
    """Send to the next process of the ring; what comes back waits for the same from the one before."""
    ranks, rank = dist.get_process_group_ranks(group), group.rank()
    arriving = torch.empty_like(x)
    works = dist.batch_isend_irecv(
        [
            dist.P2POp(dist.isend, x, ranks[(rank + 1) % len(ranks)], group),
            dist.P2POp(dist.irecv, arriving, ranks[rank - 1], group),
        ]
    )

    def wait(sent: Tensor = x) -> Tensor:  # which is held until it has left
        for work in works:
            work.wait()
        return arriving

    return wait


def half(x: Tensor | None, chunk: int) -> Any:
    """One of the two chunks of [..., 2C, E]."""
    return x.chunk(2, dim=-2)[chunk] if x is not None else None


# -- attention, as one operation that the compiler and recomputation need not look into --------------------------------


def _forward(
    q: Tensor, k: Tensor, v: Tensor, documents: Tensor | None, window: int | None, kind: str, group: str, scale: float
) -> tuple[Tensor, Tensor]:
    """As `attend_in_parts`, and the log-sum-exp [B, H, T/n]."""
    joined, sight = _resolve_process_group(group), Sight(window, documents)  # type: ignore[arg-type]
    own = chunks_of(q.shape[2] * joined.size(), joined.size(), joined.rank())
    found: list[tuple[Tensor, Tensor] | None] = [None, None]
    for meeting in WAYS[kind](torch.stack((k, v)), None, sight, joined):
        tile = sight.tile(own[meeting.chunk], meeting.tokens, q.device)
        if tile is not None:
            part = tile.attend(half(q, meeting.chunk), meeting.keys[0], meeting.keys[1], scale)
            found[meeting.chunk] = merge(found[meeting.chunk], part)
    out, lse = _like_results(q)
    for chunk, total in enumerate(found):
        assert total is not None
        half(out, chunk).copy_(total[0])
        lse.chunk(2, dim=-1)[chunk].copy_(total[1])
    return out, lse


def _backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, documents: Tensor | None,
    window: int | None, kind: str, group: str, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k and v. Every tile's are exact by themselves, given the whole's result and log-sum-exp."""
    joined, sight = _resolve_process_group(group), Sight(window, documents)  # type: ignore[arg-type]
    own = chunks_of(q.shape[2] * joined.size(), joined.size(), joined.rank())
    keys = torch.stack((k, v))
    dq, grads = torch.zeros_like(q, dtype=torch.float32), torch.zeros_like(keys, dtype=torch.float32)
    for meeting in WAYS[kind](keys, grads, sight, joined):
        tile = sight.tile(own[meeting.chunk], meeting.tokens, q.device)
        if tile is not None and meeting.grads is not None:
            chunk = meeting.chunk
            above, queries, result = (half(x, chunk) for x in (grad, q, out))
            sums, (key, value) = lse.chunk(2, dim=-1)[chunk], meeting.keys
            parts = tile.backward(above, queries, key, value, result, sums, scale)
            for total, part in zip((half(dq, chunk), *meeting.grads), parts, strict=True):
                total += part
    return tuple(torch.empty_like(x).copy_(total) for x, total in zip((q, k, v), (dq, *grads), strict=True))  # type: ignore[return-value]


def _like_results(q: Tensor) -> tuple[Tensor, Tensor]:
    """Room for both: the result lies in memory as the output matrix reads it, [B, T, H, E]."""
    return torch.empty_like(q.transpose(1, 2)).contiguous().transpose(1, 2), q.new_empty(
        q.shape[:3], dtype=torch.float32
    )


def _keep(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    q, k, v, documents, *ctx.how = inputs
    ctx.save_for_backward(q, k, v, *output, documents)


def _gradients(ctx: Any, grad: Tensor, _: Tensor) -> tuple:
    grads = torch.ops.weft.context_attention_backward(grad, *ctx.saved_tensors, *ctx.how)
    return (*grads, None, None, None, None, None)


_HOW = "Tensor? documents, int? window, str kind, str group, float scale"
_LIBRARY = torch.library.Library("weft", "DEF")
_LIBRARY.define(f"context_attention(Tensor q, Tensor k, Tensor v, {_HOW}) -> (Tensor, Tensor)")
_LIBRARY.define(
    "context_attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    f"{_HOW}) -> (Tensor, Tensor, Tensor)"
)
_LIBRARY.impl("context_attention", _forward, "CompositeExplicitAutograd")
_LIBRARY.impl("context_attention_backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake("weft::context_attention", lambda q, *_: _like_results(q), lib=_LIBRARY)
torch.library.register_fake(
    "weft::context_attention_backward",
    lambda grad, q, k, v, *_: tuple(torch.empty_like(x) for x in (q, k, v)),
    lib=_LIBRARY,
)
torch.library.register_autograd("weft::context_attention", _gradients, setup_context=_keep, lib=_LIBRARY)
