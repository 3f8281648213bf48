"""The loader: sample number i is a pure function of (seed, i), so any rank can read any row of any step at any time.

Step s with global batch G holds the samples s·G … (s+1)·G-1. Nothing is remembered between calls: to resume is to call
with the position again, on however many ranks there are by then.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from weft.data import split as splits
from weft.data.blend import Blend
from weft.data.indexed import IndexedDataset
from weft.data.stream import Stream

IGNORED = -100  # a target that the loss leaves out; PyTorch's default ignore_index


@dataclass(frozen=True)
class Batch:
    """Rows of a global batch; all int64.

    Attributes:
        tokens: [B, T] ids.
        targets: [B, T] the next id, or -100 where the loss must not look.
        positions: [B, T] place in the document, from 0 at its start (or the row's); None without a document mask.
        documents: [B, T] number of the document within the row, from 0; None without a document mask.
        samples: [B] global sample numbers.
    """

    tokens: np.ndarray
    targets: np.ndarray
    positions: np.ndarray | None
    documents: np.ndarray | None
    samples: np.ndarray


@dataclass(frozen=True)
class Source:
    """What one data set gives to the run.

    Attributes:
        share: the part of all samples that come from it, 0 to 1.
    """

    path: str
    documents: int
    tokens: int
    samples_per_epoch: int
    share: float


class Loader:
    """Fixed-length packing across documents, over one data set or a weighted blend. Make it with `Loader.open`."""

    def __init__(
        self, streams: Sequence[Stream], blend: Blend, seed: int, global_batch: int, document_mask: bool, vocab: int
    ) -> None:
        self.streams, self.blend, self.seed = tuple(streams), blend, seed
        self.global_batch, self.document_mask, self.vocab = global_batch, document_mask, vocab
        self.seq = streams[0].seq

    @classmethod
    def open(
        cls,
        paths: Sequence[str],
        weights: Sequence[float] | None = None,
        *,
        seq: int,
        global_batch: int,
        seed: int,
        split: tuple[float, ...] = (1.0, 0.0, 0.0),
        part: splits.Part = "train",
        document_mask: bool = False,
        vocab: int,
        check_tokens: bool = True,
    ) -> "Loader":
        """Opens the data and makes every check there is, so that nothing can fail in the middle of a run.

        Args:
            paths: prefixes of `.bin/.idx` pairs, with or without the ending.
            weights: share of the samples for every path; default: by their number of samples.
            seq: T, tokens of a row.
            global_batch: G, rows of a step over all ranks.
            split: fractions of the documents for train, valid and test; any scale (969, 30, 1).
            part: which of the three.
            document_mask: positions restart at document starts, and no target crosses from one document into the next.
            vocab: size of the model's vocabulary.
            check_tokens: look for ids outside the vocabulary; the answer is the same on every rank, so one may do it.

        Raises:
            ValueError: a path, weight, split or size is wrong, or the data does not fit it; says what to change.
        """
        if not paths:
            raise ValueError("data.paths is empty: name at least one prefix made by `weft data prepare`")
        for name, value in (("seq", seq), ("global_batch", global_batch), ("vocab", vocab)):
            if value < 1:
                raise ValueError(f"{name} must be 1 or more, not {value}")
        streams = []
        for number, path in enumerate(paths):
            data = IndexedDataset(path)
            lo, hi = splits.bounds(data.num_documents, split, part)
            where = f"the {part} part (split {', '.join(f'{x:g}' for x in split)}) of {data.prefix}"
            streams.append(Stream(data, lo, hi, seq, seed, number, where))
            if check_tokens:
                data.check_vocab(vocab)
        shares = [float(stream.samples_per_epoch) for stream in streams] if weights is None else weights
        blend = Blend(shares, [stream.data.prefix for stream in streams], seed)
        return cls(streams, blend, seed, global_batch, document_mask, vocab)

    def batch(self, position: int, rows: range | None = None) -> Batch:
        """The step that begins after `position` samples, or some rows of it; reads these rows and no others.

        Args:
            position: samples consumed so far.
            rows: of 0 … G-1; default all.

        Raises:
            ValueError: rows or position lie outside, or an id lies outside the vocabulary.
        """
        rows = range(self.global_batch) if rows is None else rows
        if position < 0 or (len(rows) and not (min(rows) >= 0 and max(rows) < self.global_batch)):
            raise ValueError(
                f"rows {rows} at position {position} are not rows of a global batch of {self.global_batch}"
            )
        samples = position + np.arange(rows.start, rows.stop, rows.step, dtype=np.int64)
        tokens = np.empty((len(samples), self.seq + 1), np.int64)
        documents = np.empty_like(tokens)
        sets, indices = self.blend.locate(samples)
        for number in np.unique(sets):
            here = np.flatnonzero(sets == number)
            tokens[here], documents[here] = self.streams[number].read(indices[here])
        if len(tokens) and not (tokens.min() >= 0 and tokens.max() < self.vocab):
            paths = ", ".join(stream.data.prefix for stream in self.streams)
            raise ValueError(f"token id {tokens.max()} in {paths} is outside the vocabulary of {self.vocab}")
        return cut(tokens, documents if self.document_mask else None, samples)

    @property
    def sources(self) -> tuple[Source, ...]:
        """What every data set gives to the run, in the order of the paths."""
        total = sum(self.blend.quotas)
        return tuple(
            Source(s.data.prefix, s.num_documents, s.num_tokens, s.samples_per_epoch, quota / total)
            for s, quota in zip(self.streams, self.blend.quotas, strict=True)
        )

    @property
    def samples_per_epoch(self) -> int:
        """Samples of one pass over every data set (in a blend they do not all come round together)."""
        return sum(stream.samples_per_epoch for stream in self.streams)

    def state(self, position: int) -> dict[str, int]:
        """All that a checkpoint needs to keep: to resume, call `batch` with these samples as position."""
        return {"seed": self.seed, "samples": position, "global_batch": self.global_batch}

    def fingerprint(self) -> str:
        """A digest of what sample i means besides the seed: the data files, their shares and documents, and seq.

        A run that resumes with another fingerprint would see other samples; a checkpoint stores it to refuse that.
        """
        digest = hashlib.sha256(str(self.seq).encode())
        for stream, quota in zip(self.streams, self.blend.quotas, strict=True):
            span = f"|{quota}|{stream.num_documents}|{stream.num_tokens}|{stream.first_token}|"
            digest.update((span + stream.data.fingerprint()).encode())
        return digest.hexdigest()


def cut(tokens: np.ndarray, documents: np.ndarray | None, samples: np.ndarray) -> Batch:
    """Windows [B, T+1] → inputs and targets [B, T]; with the documents of a mask, [B, T+1], no target crosses from one
    into the next."""
    inputs, targets = np.ascontiguousarray(tokens[:, :-1]), tokens[:, 1:].copy()
    if documents is None:
        return Batch(inputs, targets, None, None, samples)
    targets[documents[:, 1:] != documents[:, :-1]] = IGNORED
    documents = np.ascontiguousarray(documents[:, :-1])
    place = np.broadcast_to(np.arange(documents.shape[1]), documents.shape)
    starts = np.where(np.diff(documents, axis=1, prepend=-1) != 0, place, 0)
    return Batch(inputs, targets, place - np.maximum.accumulate(starts, axis=1), documents, samples)
