"""Sampler: how the next tokens are chosen from the logits, each row by its own request's settings."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from weft.serve.requests.request import COLD, Sampling, TokenLogprob
from weft.serve.requests.sequence import Sequence as Completion

PARTS = 32
"""Of a row of logits, see `highest`."""


def choose(logits: Tensor, completions: Sequence[Completion], texts: Sequence[Sequence[int]]) -> list[int]:
    """Logits [B, V] → one token id for each row.

    Args:
        texts: the tokens before each row's, prompt included.
    """
    numbers = [len(text) - len(one.request.prompt) for one, text in zip(completions, texts, strict=True)]
    return pick(adjust(logits, completions, texts), completions, numbers).tolist()


def pick(logits: Tensor, completions: Sequence[Completion], numbers: Sequence[int]) -> Tensor:
    """As `choose`, of logits that are adjusted: tokens [B], on their device. `numbers`: of each row's new token."""
    settings = [completion.request.sampling for completion in completions]
    greedy = [row for row, sampling in enumerate(settings) if sampling.temperature < COLD]
    if len(greedy) == len(settings):
        return highest(logits)
    chosen = logits.new_zeros(len(settings), dtype=torch.long)
    if greedy:
        rows = torch.tensor(greedy, device=logits.device)
        chosen[rows] = highest(logits[rows])
    drawn = [row for row, sampling in enumerate(settings) if sampling.temperature >= COLD]
    rows = torch.tensor(drawn, device=logits.device)
    draws = [completions[row].draw(numbers[row]) for row in drawn]
    chosen[rows] = draw(warp(logits[rows], [settings[row] for row in drawn]), draws)
    return chosen


def highest(logits: Tensor) -> Tensor:
    """[B, V] → the first id of each row's largest logit, [B]. On a CPU numpy is several times as fast as torch, and one row
    after the other stays in the cache. On a GPU torch has one block of threads for a row: here each has PARTS."""
    if logits.device.type != "cpu":
        if logits.shape[-1] % PARTS:
            return logits.max(dim=-1).indices
        best = logits.unflatten(-1, (PARTS, -1)).max(dim=-1)
        part = best.values.max(dim=-1, keepdim=True).indices
        return (best.indices.gather(-1, part) + part * (logits.shape[-1] // PARTS))[:, 0]
    return torch.tensor([int(row.float().numpy().argmax()) for row in logits.unbind()], dtype=torch.long)


def adjust(logits: Tensor, completions: Sequence[Completion], texts: Sequence[Sequence[int]]) -> Tensor:
    """Bias, penalties, no end before its time, and the form that a text must have.

    The same tensor comes back where no row asks for any.
    """
    copied = False
    for row, (completion, text) in enumerate(zip(completions, texts, strict=True)):
        sampling, num_prompt = completion.request.sampling, len(completion.request.prompt)
        early = len(text) - num_prompt < sampling.min_tokens and sampling.ends
        if not (early or sampling.bias or sampling.penalizes or completion.matcher):
            continue
        if not copied:
            logits, copied = logits.float().clone(), True
        if sampling.bias:
            ids = torch.tensor(list(sampling.bias), device=logits.device)
            logits[row, ids] += torch.tensor(list(sampling.bias.values()), device=logits.device)
        if sampling.penalizes:
            penalize(logits[row], sampling, text, num_prompt)
        if early:
            logits[row, torch.tensor(sampling.ends, device=logits.device)] = float("-inf")
        if completion.matcher:
            completion.matcher.forbid(logits[row])
    return logits


def penalize(logits: Tensor, sampling: Sampling, text: Sequence[int], num_prompt: int) -> None:
    """Lower the logits [V] of one row's repeated tokens, in place."""
    ids = torch.tensor(text, device=logits.device)
    if sampling.repetition_penalty != 1:
        seen = ids.unique()
        at = logits[seen]
        logits[seen] = torch.where(at > 0, at / sampling.repetition_penalty, at * sampling.repetition_penalty)
    if len(text) > num_prompt:
        new, times = ids[num_prompt:].unique(return_counts=True)
        logits[new] -= sampling.frequency_penalty * times + sampling.presence_penalty


def warp(logits: Tensor, settings: Sequence[Sampling]) -> Tensor:
    """Logits [B, V] → fp32 [B, V] over each row's temperature, -inf where top-k, top-p and min-p leave a token out."""

    def column(values: Sequence[float]) -> Tensor:
        return torch.tensor(values, device=logits.device)[:, None]

    logits = logits.float() / column([sampling.temperature for sampling in settings])
    vocab = logits.shape[-1]
    kept = [min(sampling.top_k or vocab, vocab) for sampling in settings]
    if min(kept) < vocab:
        best = logits.topk(max(k for k in kept if k < vocab)).values
        last = best.gather(1, column([min(k, best.shape[1]) - 1 for k in kept]).long())
        out = (logits < last) & (column(kept) < vocab)
        logits = logits.masked_fill(out, float("-inf"))
    if any(sampling.top_p < 1 for sampling in settings):
        top_p = column([sampling.top_p for sampling in settings])
        ordered = ascending(logits)
        cumulative = ordered.softmax(dim=-1).cumsum(dim=-1)
        first = torch.searchsorted(cumulative, 1 - top_p, right=True).clamp_(max=vocab - 1)  # that stays
        least = ordered.gather(1, first)
        out = logits < least
        if (tied := first - torch.searchsorted(ordered, least)).any():  # of equal ones the first ones go
            equal = logits == least
            out |= equal & (equal.cumsum(dim=-1) <= tied)
        logits = logits.masked_fill(out & (top_p < 1), float("-inf"))
    if any(sampling.min_p > 0 for sampling in settings):
        probabilities = logits.softmax(dim=-1)
        least = column([sampling.min_p for sampling in settings]) * probabilities.amax(dim=-1, keepdim=True)
        logits = logits.masked_fill(probabilities < least, float("-inf"))
    return logits


def ascending(values: Tensor) -> Tensor:
    """Each row of [B, V] in order. On a CPU numpy takes a twentieth of torch's time."""
    return torch.from_numpy(np.sort(values.numpy())) if values.device.type == "cpu" else values.sort(dim=-1).values


def draw(logits: Tensor, draws: Sequence[float]) -> Tensor:
    """Logits [B, V] → token ids [B], by one number in [0, 1) for each row, turned by the inverse of the cumulative
    distribution: a row depends on its own logits and number alone."""
    # cumulative sums over a large vocabulary lose a rare token in fp32; MPS has nothing wider
    wide = torch.float32 if logits.device.type == "mps" else torch.float64
    cumulative = logits.softmax(dim=-1).cumsum(dim=-1, dtype=wide)
    total = cumulative[:, -1:]
    target = torch.tensor(draws, dtype=wide, device=logits.device)[:, None] * total
    target = torch.minimum(target, torch.nextafter(total, torch.zeros_like(total)))  # rounding must not reach the total
    chosen = torch.searchsorted(cumulative, target, right=True)[:, 0]
    return chosen.clamp_(
        max=logits.shape[-1] - 1
    )  # where logits are no numbers, one beyond; who asked is told elsewhere


def logprobs_of(logits: Tensor, tokens: Sequence[int], counts: Sequence[int]) -> list[TokenLogprob]:
    """Logits [B, V] of each row's token, as log-probability; with the `counts` most probable ones of each row."""
    logits = logits.float()
    total = logits.logsumexp(dim=-1)
    ids = torch.tensor(tokens, device=logits.device)
    chosen = (logits.gather(1, ids[:, None])[:, 0] - total).tolist()
    most = max(counts)
    if not most:
        return [TokenLogprob(token, value) for token, value in zip(tokens, chosen, strict=True)]
    top = logits.topk(min(most, logits.shape[-1]))
    likely, values = top.indices.tolist(), (top.values - total[:, None]).tolist()
    return [
        TokenLogprob(token, value, tuple(zip(likely[row][:count], values[row][:count], strict=True)))
        for row, (token, value, count) in enumerate(zip(tokens, chosen, counts, strict=True))
    ]
