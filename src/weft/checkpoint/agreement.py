"""Agreement: stretches of work that succeed on every process or fail on every process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import distributed as dist
from torch.distributed import ProcessGroup

_LONGEST = 4000  # letters of one process's words about its failure


class ElsewhereError(RuntimeError):
    """This process's part went well; another's did not.

    `rank` is the one whose `words` these are, `kind` the name of its exception.
    """

    def __init__(self, rank: int, kind: str, words: str) -> None:
        super().__init__(f"rank {rank}: {words}")
        self.rank, self.kind, self.words = rank, kind, words


class LostError(RuntimeError):
    """Another process does not answer: it has died, or the time of the group has run out."""


class Agreement:
    """The processes of a gloo group, or this process alone where the group is None."""

    def __init__(self, group: ProcessGroup | None = None) -> None:
        self.group = group
        self.rank = dist.get_rank(group) if group is not None else 0
        self.world = dist.get_world_size(group) if group is not None else 1

    @contextmanager
    def together(self) -> Iterator[None]:
        """Nobody leaves before all have come to the end, and all leave with an error if one has met one.

        Raises:
            ElsewhereError: on the processes that met no error of their own.
            LostError: a process is gone.
        """
        words = ""
        try:
            yield
        except BaseException as error:
            words = f"{type(error).__name__}\n{error}"[:_LONGEST]
            raise
        finally:
            # also while an exception travels: the others learn of it instead of waiting for a process that is gone
            failures = [(rank, text) for rank, text in enumerate(self.texts(words)) if text]
        if failures:
            rank, text = failures[0]
            kind, _, told = text.partition("\n")
            raise ElsewhereError(rank, kind, told)

    def texts(self, text: str) -> list[str]:
        """What every process has to say, by rank. Plain bytes travel, nothing pickled."""
        if self.group is None:
            return [text]
        mine = text.encode()
        lengths = torch.zeros(self.world, dtype=torch.int64)
        lengths[self.rank] = len(mine)
        self._sum(lengths)
        longest = int(lengths.max())
        if longest == 0:
            return [""] * self.world
        letters = torch.zeros(self.world, longest, dtype=torch.uint8)
        letters[self.rank, : len(mine)] = torch.tensor(list(mine), dtype=torch.uint8)
        self._sum(letters)  # one row from each: the sum is all of them
        return [bytes(row[:length].tolist()).decode() for row, length in zip(letters, lengths.tolist(), strict=True)]

    def _sum(self, tensor: torch.Tensor) -> None:
        try:
            dist.all_reduce(tensor, group=self.group)
        except RuntimeError as error:
            raise LostError(f"another process no longer answers: {error}") from error
