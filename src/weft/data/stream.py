"""One data set as an endless, shuffled sequence of samples of T+1 tokens."""

import functools
from dataclasses import dataclass

import numpy as np

from weft.data.indexed import IndexedDataset
from weft.data.order import Permutation, key, shuffle


@dataclass(frozen=True)
class Epoch:
    """One pass: documents in their order, as if written one after another.

    Attributes:
        starts: [documents] int64, where each document begins in the .bin, in tokens.
        ends: [documents] int64, where it ends in the stream of this epoch.
        order: of the samples.
    """

    starts: np.ndarray
    ends: np.ndarray
    order: Permutation


class Stream:
    """The documents lo … hi-1 of a data set, packed into samples.

    In epoch e the documents are laid end to end in an order shuffled by (seed, e) and cut into windows of T+1 tokens,
    each beginning with the last token of the one before, so that every token but the first is predicted once; the
    windows are then shuffled by (seed, e) as well. What remains at the end, at most T tokens, waits for the next epoch,
    where other documents stand there. Memory: 16 bytes for each document, for each of the two epochs kept.

    Raises:
        ValueError: there are fewer than T+1 tokens.
    """

    def __init__(self, data: IndexedDataset, lo: int, hi: int, seq: int, seed: int, name: object, where: str) -> None:
        self.data, self.seq, self.seed, self.name = data, seq, seed, name
        starts = data.document_starts()[lo : hi + 1]
        self._starts, self._lengths = starts[:-1], np.diff(starts)
        self.num_documents = hi - lo
        self.first_token = int(starts[0])
        self.num_tokens = int(starts[-1] - starts[0]) if hi > lo else 0
        if self.num_documents == 0:
            raise ValueError(
                f"{where} has no document ({data.prefix} has {data.num_documents}): give it a larger share of the split"
            )
        if self.num_tokens < seq + 1:
            raise ValueError(
                f"{where} has {self.num_tokens} tokens; one sample of seq {seq} needs {seq + 1}. "
                "Give it a larger share of the split, shorten seq, or prepare more text"
            )
        self.samples_per_epoch = (self.num_tokens - 1) // seq
        self._epoch = functools.lru_cache(maxsize=2)(self._lay_out)

    def _lay_out(self, epoch: int) -> Epoch:
        order = shuffle(self.num_documents, key("documents", self.seed, self.name, epoch))
        samples = Permutation(self.samples_per_epoch, key("samples", self.seed, self.name, epoch))
        return Epoch(self._starts[order], np.cumsum(self._lengths[order]), samples)

    def read(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Samples by their number, from 0 without end.

        Returns:
            tokens [n, T+1] int64, and documents [n, T+1] int64: of which document of the row each token is, from 0.
        """
        tokens = np.empty((len(indices), self.seq + 1), np.int64)
        documents = np.empty_like(tokens)
        epochs = indices // self.samples_per_epoch
        for epoch in np.unique(epochs):
            laid = self._epoch(int(epoch))
            rows = np.flatnonzero(epochs == epoch)
            windows = laid.order(indices[rows] % self.samples_per_epoch)
            for row, window in zip(rows, windows, strict=True):
                self._fill(laid, int(window) * self.seq, tokens[row], documents[row])
        return tokens, documents

    def _fill(self, epoch: Epoch, at: int, tokens: np.ndarray, documents: np.ndarray) -> None:
        """Copies the window that begins at token `at` of the epoch, document by document."""
        i = int(np.searchsorted(epoch.ends, at, side="right"))
        filled = number = 0
        while filled < len(tokens):
            left = int(epoch.ends[i]) - at - filled
            n = min(left, len(tokens) - filled)
            if n:  # documents without tokens take no number
                source = int(epoch.starts[i]) + self._length(epoch, i) - left
                tokens[filled : filled + n] = self.data.tokens[source : source + n]
                documents[filled : filled + n] = number
                filled, number = filled + n, number + 1
            i += 1

    @staticmethod
    def _length(epoch: Epoch, i: int) -> int:
        return int(epoch.ends[i]) - (int(epoch.ends[i - 1]) if i else 0)
