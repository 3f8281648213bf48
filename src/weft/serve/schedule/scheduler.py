"""Scheduler: which tokens of which sequences the next step computes. Torch-free.

One order decides everything: priority, then tenants' turns, then arrival. First every running sequence gets its next
token, then what is left of the step reads prompts, whole or in part. Where blocks run short, an earlier sequence takes
those of the last in the order, which computes its text again when there is room (preemption by recompute). The first of
all is never preempted, and has room to finish: so every step brings it nearer to its end, and then it is the next one's
turn.

Where texts of other tenants go on, one tenant's prompts have a share of the step's time (`courtesy.py`): be they many,
long, or given up before they are read, they do not stop what others are being told.

Where every layer sees a window of tokens only, a sequence gives back its blocks behind that while it runs.
"""

from __future__ import annotations

import time
from bisect import insort
from collections.abc import Iterator
from dataclasses import dataclass

from weft.serve.config import EngineConfig
from weft.serve.requests.sequence import Sequence
from weft.serve.schedule.blocks import Blocks
from weft.serve.schedule.courtesy import Courtesy
from weft.serve.schedule.room import Room
from weft.serve.schedule.turns import Turns


@dataclass(frozen=True)
class Work:
    """Tokens `start` to `stop` of a sequence, its draft included."""

    sequence: Sequence
    start: int
    stop: int

    @property
    def tokens(self) -> list[int]:
        tokens, draft = self.sequence.tokens, self.sequence.draft
        first = max(0, self.start - len(tokens))
        return tokens[self.start : self.stop] + draft[first : max(0, self.stop - len(tokens))]

    @property
    def is_last(self) -> bool:
        """Whether a new token follows."""
        return self.stop >= len(self.sequence.tokens)


class Scheduler:
    """All live sequences: `running` ones hold blocks, `waiting` ones do not. Both are kept in order.

    Attributes:
        planned: tokens of the present step, or of the last.
        courtesy: what tenants' prompts may take of the steps.
    """

    def __init__(self, blocks: Blocks, config: EngineConfig, window: int | None = None) -> None:
        """window: tokens that every layer of every model sees; None: all."""
        self.blocks, self.config = blocks, config
        self.room = Room(blocks.size, config.step_tokens, window)
        self.running: list[Sequence] = []
        self.waiting: list[Sequence] = []
        self.preemptions = self.planned = self._added = 0
        self.turns, self.courtesy = Turns(), Courtesy()

    def longest(self, num_tokens: int) -> int:
        """Of so many tokens, those that one sequence may have, alone in the cache."""
        return num_tokens if self.room.most(num_tokens) <= self.blocks.count else self.blocks.count * self.blocks.size

    def add(self, sequence: Sequence) -> None:
        self._added += 1
        sequence.order = (sequence.request.priority, self.turns.take(sequence.request.tenant), self._added)
        insort(self.waiting, sequence, key=_order)

    def remove(self, sequence: Sequence) -> None:
        """It has ended, however."""
        if sequence in self.running:
            self.running.remove(sequence)
            self._release(sequence)
        else:
            self.waiting.remove(sequence)

    def __iter__(self) -> Iterator[Sequence]:
        yield from self.running
        yield from self.waiting

    def __bool__(self) -> bool:
        return bool(self.running or self.waiting)

    def schedule(self) -> list[Work]:
        """The next step's work; the blocks for it are there."""
        left = self.config.step_tokens
        works: list[Work] = []
        decoding = [sequence for sequence in self.running if sequence.waiting == 1]
        reading = [sequence for sequence in self.running if sequence.waiting > 1]
        for sequence in decoding:
            left -= self._plan(sequence, left, works)
        self.courtesy.begin({work.sequence.request.tenant for work in works}, self.config.step_tokens - left)
        for sequence in reading:
            left -= self._read(sequence, left, works)
        for sequence in list(self.waiting):
            if left < 1:
                break
            if self._most(sequence, left) < 1:
                continue  # its tenant's share of this step is taken
            if not self._admit(sequence, works):
                break
            left -= self._read(sequence, left, works)
        self.planned = sum(work.stop - work.start for work in works)
        return works

    def computed(self, work: Work) -> None:
        """The keys and values of this work are in the cache; of a draft's, those of tokens that were taken."""
        sequence = work.sequence
        sequence.computed = min(work.stop, len(sequence.tokens) - 1)
        size, salt = self.blocks.size, sequence.request.shared_by
        full = self._shared(sequence, sequence.computed) // size
        for index in range(sequence.filled, full):
            before = sequence.blocks[index - 1] if index else None
            self.blocks.fill(sequence.blocks[index], before, sequence.tokens[index * size : (index + 1) * size], salt)
            sequence.filled = index + 1
        self._give_back(sequence)

    def _most(self, sequence: Sequence, left: int) -> int:
        """Of the `left` tokens of this step, those that a prompt may have; strides are taken whole."""
        return left if self.config.invariant else self.courtesy.most(sequence.request.tenant, left)

    def _read(self, sequence: Sequence, left: int, works: list[Work]) -> int:
        """Plan to compute a prompt, or as much of it as the step has room for; how many tokens."""
        count = self._plan(sequence, self._most(sequence, left), works)
        self.courtesy.took(sequence.request.tenant, count)
        return count

    def _plan(self, sequence: Sequence, left: int, works: list[Work]) -> int:
        """Add this sequence's work, of `left` tokens at most; how many there are."""
        if sequence not in self.running:
            return 0  # preempted in the meantime
        count = min(sequence.waiting + len(sequence.draft), left)
        if self.config.invariant:
            count = stride(sequence, self.config.stride)
            count = count if count <= left else 0
        if count < 1 or not self._make_room(sequence, sequence.computed + count, works):
            return 0
        works.append(Work(sequence, sequence.computed, sequence.computed + count))
        return count

    def _make_room(self, sequence: Sequence, num_tokens: int, works: list[Work]) -> bool:
        """Blocks for so many tokens, taken from the last in the order where none is free; False: from itself."""
        needed = self.room.blocks(num_tokens) - len(sequence.blocks)
        while needed > self.blocks.num_free:
            last = self.running[-1]
            self._preempt(last, works)
            if last is sequence:
                return False
        if needed > 0:
            sequence.blocks += self.blocks.take(needed, sequence.blocks[-1] if sequence.blocks else None)
        return True

    def _admit(self, sequence: Sequence, works: list[Work]) -> bool:
        """Let a waiting sequence run, if there is a place and room for all that it has: to stop half-way would be to
        compute for nothing. A sequence that comes before running ones in the order makes them give way."""
        if sequence.after is not None and not sequence.after.begun and sequence.after in self.running:
            return True  # its prompt is being computed; `_plan` passes over what does not run
        if len(self.running) >= self.config.max_sequences:
            if _order(self.running[-1]) < _order(sequence):
                return False
            self._preempt(self.running[-1], works)
        if not sequence.wants_prompt:
            num_shared = self._shared(sequence, len(sequence.tokens))
            sequence.blocks = self.blocks.match(sequence.tokens[: num_shared + 1], sequence.request.shared_by)
            kept = self._shared(sequence, len(sequence.blocks) * self.blocks.size) // self.blocks.size
            self.blocks.release(sequence.blocks[kept:])
            del sequence.blocks[kept:]
        sequence.computed, sequence.filled = len(sequence.blocks) * self.blocks.size, len(sequence.blocks)
        self._give_back(sequence)
        held = len(sequence.blocks) - sequence.given_back
        needed = self.room.most(len(sequence.tokens) + 1, sequence.computed) - held
        spare = sum(_order(other) < _order(sequence) for other in self.running)  # the next block of each
        while needed + spare > self.blocks.num_free:
            if not self.running or _order(self.running[-1]) < _order(sequence):
                if self.running:
                    self._release(sequence)
                    return False
                break  # alone: the engine took it in because it fits
            self._preempt(self.running[-1], works)
        if sequence.cached is None:
            sequence.cached, sequence.started = sequence.computed, time.monotonic()
        self.waiting.remove(sequence)
        insort(self.running, sequence, key=_order)
        return True

    def _shared(self, sequence: Sequence, num_tokens: int) -> int:
        """Of the first so many tokens, those whose keys and values are anybody's: all; or, where results must not depend
        on others, whole strides of the prompt."""
        if not self.config.invariant:
            return num_tokens
        return min(num_tokens, len(sequence.request.prompt)) // self.config.stride * self.config.stride

    def _preempt(self, sequence: Sequence, works: list[Work]) -> None:
        self.preemptions += 1
        self.running.remove(sequence)
        self._release(sequence)
        works[:] = [work for work in works if work.sequence is not sequence]
        insort(self.waiting, sequence, key=_order)

    def _give_back(self, sequence: Sequence) -> None:
        """Let go of the blocks that no further token sees. In the table, what it is padded with stands for them."""
        first, last = sequence.given_back, self.room.behind(sequence.computed)
        self.blocks.release(sequence.blocks[first:last])
        sequence.blocks[first:last] = [self.blocks.count] * (last - first)
        sequence.given_back = last

    def _release(self, sequence: Sequence) -> None:
        self.blocks.release(sequence.blocks[sequence.given_back :])
        sequence.blocks, sequence.draft = [], []
        sequence.computed = sequence.filled = sequence.given_back = 0


def _order(sequence: Sequence) -> tuple[int, int, int]:
    return sequence.order


def stride(sequence: Sequence, size: int) -> int:
    """Tokens that this sequence computes at once where that may depend on itself alone: of its prompt up to the next
    multiple of `size`; then one by one, the second time as the first."""
    left = len(sequence.request.prompt) - sequence.computed
    return min(size - sequence.computed % size, left) if left > 0 else 1
