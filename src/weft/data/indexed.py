"""Megatron-LM's indexed token files: `PREFIX.bin` holds token ids back to back, `PREFIX.idx` where sequences begin.

Layout of `.idx`, little-endian (Megatron-LM, `megatron/core/datasets/indexed_dataset.py`):

    magic 9 bytes | version u64 = 1 | dtype code u8 | sequences S u64 | boundaries D u64
    S × int32 lengths in tokens | S × int64 byte offsets into .bin | D × int64 document boundaries, in sequences

The first boundary is 0 and the last is S, so there are D - 1 documents.
"""

import hashlib
import json
import os
import shutil
import struct
from array import array
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
DTYPES: dict[int, np.dtype[Any]] = {
    1: np.dtype("u1"),
    2: np.dtype("i1"),
    3: np.dtype("<i2"),
    4: np.dtype("<i4"),
    5: np.dtype("<i8"),
    8: np.dtype("<u2"),
}
CODES = {dtype: code for code, dtype in DTYPES.items()}
BLOCK = 1 << 22  # entries looked at together when a whole file is scanned


def token_dtype(vocab: int) -> np.dtype[Any]:
    """The type Megatron-LM stores ids in: uint16 below 65,500 tokens of vocabulary, else int32."""
    return DTYPES[8] if vocab < 65500 else DTYPES[4]


def strip(prefix: str | Path) -> str:
    """A data set's prefix, whether it was named `PREFIX`, `PREFIX.bin` or `PREFIX.idx`."""
    text = str(prefix)
    return text[:-4] if text.endswith((".bin", ".idx")) else text


class IndexedDataset:
    """A memory-mapped reader; opening checks everything that can be checked without reading `.bin`.

    Attributes:
        tokens: [num_tokens] every id of the file, in order, mapped and read-only.
        lengths: [S] int32, tokens in each sequence.
        documents: [D] int64, sequence number at which each document begins; the last entry is S.

    Raises:
        ValueError: a file is missing, empty, of another format or version, or the two do not belong together.
    """

    def __init__(self, prefix: str | Path) -> None:
        self.prefix = strip(prefix)
        self.bin_path, self.idx_path = Path(self.prefix + ".bin"), Path(self.prefix + ".idx")
        for path in (self.bin_path, self.idx_path):
            if not path.is_file():
                raise ValueError(f"{path} does not exist: make it with `weft data prepare ... --out {self.prefix}`")
        self.dtype, num_sequences, num_boundaries = self._read_header()

        index = np.memmap(self.idx_path, mode="r", dtype=np.uint8)
        at = HEADER.size
        ends = at + 4 * num_sequences, at + 12 * num_sequences, at + 12 * num_sequences + 8 * num_boundaries
        self.lengths = index[at : ends[0]].view("<i4")
        self._offsets = index[ends[0] : ends[1]].view("<i8")
        self.documents = index[ends[1] : ends[2]].view("<i8")
        self._check_index()
        self.tokens: np.ndarray = np.memmap(self.bin_path, mode="r", dtype=self.dtype)

    def _read_header(self) -> tuple[np.dtype[Any], int, int]:
        size = self.idx_path.stat().st_size
        with open(self.idx_path, "rb") as file:
            head = file.read(HEADER.size)
        if not head.startswith(MAGIC[: len(head)]) or not head:
            raise ValueError(
                f"{self.idx_path} is not a Megatron index: its first bytes are {head[:9]!r}, not {MAGIC!r}"
            )
        if len(head) < HEADER.size:
            raise ValueError(f"{self.idx_path} is cut short ({size} bytes): prepare or copy it again")
        _, version, code, num_sequences, num_boundaries = HEADER.unpack(head)
        if version != VERSION:
            raise ValueError(f"{self.idx_path} has index version {version}; weft reads version {VERSION}")
        if code not in DTYPES:
            raise ValueError(
                f"{self.idx_path} has dtype code {code}, which is no integer type: not a file of token ids"
            )
        expected = HEADER.size + 12 * num_sequences + 8 * num_boundaries
        if size != expected:
            kind = " (an index with modes, of multimodal data, is not read)" if size == expected + num_sequences else ""
            raise ValueError(
                f"{self.idx_path} should have {expected} bytes for {num_sequences} sequences and {num_boundaries} "
                f"document boundaries but has {size}: prepare or copy it again{kind}"
            )
        return DTYPES[code], num_sequences, num_boundaries

    def _check_index(self) -> None:
        """Offsets must follow from lengths, lengths from the size of `.bin`, boundaries must rise from 0 to S."""
        size, end = self.bin_path.stat().st_size, 0
        for at in range(0, len(self.lengths), BLOCK):
            lengths = self.lengths[at : at + BLOCK].astype(np.int64)
            stops = end + np.cumsum(lengths * self.dtype.itemsize)
            if (lengths < 0).any() or not np.array_equal(stops[:-1], self._offsets[at + 1 : at + BLOCK]):
                raise ValueError(f"{self.idx_path} is damaged: its offsets do not follow from its lengths")
            if self._offsets[at] != end:
                raise ValueError(f"{self.idx_path} is damaged: its offsets do not follow from its lengths")
            end = int(stops[-1])
        if end == 0:
            raise ValueError(f"{self.prefix} holds no tokens: prepare it again from inputs with text in them")
        if end != size:
            what = "cut short" if size < end else "longer than its index says"
            raise ValueError(
                f"{self.bin_path} is {what}: {self.idx_path} promises {end} bytes but there are {size}. "
                "The two are not of one run: prepare or copy both again"
            )
        rises = all(
            (np.diff(self.documents[a : a + BLOCK + 1]) >= 0).all() for a in range(0, len(self.documents), BLOCK)
        )
        if not (len(self.documents) > 1 and self.documents[0] == 0 and self.documents[-1] == len(self) and rises):
            raise ValueError(f"{self.idx_path} is damaged: document boundaries do not rise from 0 to {len(self)}")

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def num_documents(self) -> int:
        return len(self.documents) - 1

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)

    def __getitem__(self, i: int) -> np.ndarray:
        """Sequence i: [lengths[i]] ids."""
        return self.get(i)

    def get(self, i: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Ids start … stop of sequence i; nothing outside the sequence is ever returned."""
        if not -len(self) <= i < len(self):
            raise IndexError(f"{self.prefix} has {len(self)} sequences, there is no sequence {i}")
        at, length = int(self._offsets[i]) // self.dtype.itemsize, int(self.lengths[i])
        lo, hi, _ = slice(start, stop).indices(length)
        return self.tokens[at + lo : at + max(lo, hi)]

    def document_starts(self) -> np.ndarray:
        """[D] int64: the token at which each document begins; the last entry is num_tokens."""
        starts = np.full(len(self.documents), self.num_tokens, np.int64)
        inside = self.documents < len(self)
        starts[inside] = self._offsets[self.documents[inside]] // self.dtype.itemsize
        return starts

    def check_vocab(self, vocab: int) -> None:
        """Refuses ids outside 0 … vocab-1. Scans `.bin` unless the report of `prepare`, of this very file, answers.

        Raises:
            ValueError: naming the first sequence with a bad id.
        """
        limits = np.iinfo(self.dtype)
        if (limits.min >= 0 and limits.max < vocab) or self.report().get("max_token", vocab) < vocab:
            return
        for at in range(0, self.num_tokens, BLOCK):
            block = self.tokens[at : at + BLOCK]
            if block.max() >= vocab or block.min() < 0:
                token = at + int(np.argmax((block >= vocab) | (block < 0)))
                i = int(np.searchsorted(self._offsets, token * self.dtype.itemsize, side="right")) - 1
                raise ValueError(
                    f"{self.bin_path}: sequence {i} holds token id {int(self.tokens[token])}, outside the vocabulary "
                    f"of {vocab}. Prepare the data with the model's own tokenizer, or raise the model's vocab"
                )

    def report(self) -> dict[str, Any]:
        """What `prepare` said of exactly this `.bin` (same size, same time), from `PREFIX.json`; else nothing."""
        try:
            report = json.loads(Path(self.prefix + ".json").read_text())
            stat = self.bin_path.stat()
            return (
                dict(report)
                if (report["bin_bytes"], report["bin_mtime_ns"]) == (stat.st_size, stat.st_mtime_ns)
                else {}
            )
        except (OSError, ValueError, KeyError, TypeError):
            return {}  # no report, or somebody else's file

    def fingerprint(self) -> str:
        """A digest that changes with the data: header, sizes, both ends of both files and 64 blocks between.

        Costs a few hundred kilobytes of reading, whatever the size. The path is not part of it: data may move.
        """
        digest = hashlib.sha256()
        for path in (self.idx_path, self.bin_path):
            size = path.stat().st_size
            digest.update(struct.pack("<Q", size))
            with open(path, "rb") as file:
                for k in range(65):
                    file.seek(max(0, size - 4096) * k // 64)
                    digest.update(file.read(4096))
        return digest.hexdigest()


class IndexedWriter:
    """Writes `PREFIX.bin` and `PREFIX.idx`; both appear under their names only when it closes without an error.

    Example:
        with IndexedWriter("corpus", token_dtype(vocab)) as writer:
            writer.add([5, 1, 0])
    """

    def __init__(self, prefix: str | Path, dtype: np.dtype[Any]) -> None:
        self.prefix, self.dtype = strip(prefix), np.dtype(dtype)
        assert self.dtype in CODES, f"not a dtype of the format: {dtype}"
        self._lengths, self._documents = array("i"), array("q", [0])
        self._temp = f"{self.prefix}.tmp-{os.getpid()}"
        self._bin = open(self._temp + ".bin", "wb")  # noqa: SIM115 - closed by close() or __exit__

    def add(self, tokens: Sequence[int] | np.ndarray, lengths: Iterable[int] | None = None) -> None:
        """Appends one document of one sequence, or of several with the given lengths (they sum to len(tokens)).

        Raises:
            ValueError: an id does not fit the file's type, or lengths and tokens disagree.
        """
        ids = np.asarray(tokens)
        limits = np.iinfo(self.dtype)
        if ids.dtype != self.dtype and len(ids) and not (limits.min <= ids.min() and ids.max() <= limits.max):
            raise ValueError(f"{self.prefix}.bin stores {self.dtype}; ids {ids.min()} … {ids.max()} do not fit")
        sizes = [len(ids)] if lengths is None else list(lengths)
        if sum(sizes) != len(ids):
            raise ValueError(
                f"{self.prefix}: sequence lengths sum to {sum(sizes)} but the document has {len(ids)} tokens"
            )
        self._bin.write(ids.astype(self.dtype, copy=False).tobytes())
        self._lengths.extend(sizes)
        self._documents.append(len(self._lengths))

    def append(self, prefix: str | Path) -> None:
        """Appends another data set of the same type, whole: what Megatron-LM's `add_index` does."""
        part = strip(prefix)
        head = HEADER.unpack(Path(part + ".idx").read_bytes()[: HEADER.size])
        if DTYPES.get(head[2]) != self.dtype:
            raise ValueError(
                f"{part} stores {DTYPES.get(head[2])}, {self.prefix} stores {self.dtype}: they do not merge"
            )
        with open(part + ".idx", "rb") as file:
            file.seek(HEADER.size)
            base, num_sequences, num_boundaries = len(self._lengths), head[3], head[4]
            self._lengths.frombytes(file.read(4 * num_sequences))
            file.seek(8 * num_sequences, os.SEEK_CUR)
            boundaries = np.frombuffer(file.read(8 * num_boundaries), "<i8")
        self._documents.frombytes((boundaries[1:] + base).tobytes())
        with open(part + ".bin", "rb") as file:
            shutil.copyfileobj(file, self._bin, 1 << 24)

    def close(self) -> None:
        """Writes the index, syncs both files to disk and gives them their names, `.idx` last."""
        lengths = np.frombuffer(self._lengths, np.int32) if self._lengths else np.empty(0, np.int32)
        offsets = np.zeros(len(lengths), np.int64)
        np.cumsum(lengths[:-1].astype(np.int64) * self.dtype.itemsize, out=offsets[1:])
        header = HEADER.pack(MAGIC, VERSION, CODES[self.dtype], len(lengths), len(self._documents))
        with open(self._temp + ".idx", "wb") as file:
            for block in (header, lengths.tobytes(), offsets.tobytes(), self._documents.tobytes()):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
        self._bin.flush()
        os.fsync(self._bin.fileno())
        self._bin.close()
        Path(self.prefix + ".idx").unlink(missing_ok=True)  # never a new .bin beside an old .idx
        os.replace(self._temp + ".bin", self.prefix + ".bin")
        os.replace(self._temp + ".idx", self.prefix + ".idx")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self._bin.close()
            Path(self._temp + ".bin").unlink(missing_ok=True)


def merge(parts: Sequence[str | Path], out: str | Path) -> None:
    """Joins data sets of one type into one, in the given order; byte for byte what Megatron-LM's merging writes."""
    if not parts:
        raise ValueError(f"nothing to merge into {out}: name at least one data set")
    head = HEADER.unpack(Path(strip(parts[0]) + ".idx").read_bytes()[: HEADER.size])
    with IndexedWriter(out, DTYPES[head[2]]) as writer:
        for part in parts:
            writer.append(part)
