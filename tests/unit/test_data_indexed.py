"""Megatron's token files, byte for byte, and every way in which they can be wrong."""

import itertools
import json
import os
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from weft.data.indexed import DTYPES, IndexedDataset, IndexedWriter, merge, token_dtype

# Written by megatron-core 0.16.1: IndexedDatasetBuilder(…, dtype=DType.optimal_dtype(vocab)), add_document per document
# with the lengths of its sequences, finalize; "merged" by add_index of "small" and "other".
GOLDEN: dict[str, tuple[int, list[list[list[int]]], str, str]] = {
    "small": (
        65499,
        [[[5, 1, 0]], [[65498, 0]], [[7], [8, 9, 0]]],
        "050001000000daff00000700080009000000",
        "4d4d4944494458000001000000000000000804000000000000000400000000000000030000000200000001000000"
        "03000000000000000000000006000000000000000a000000000000000c000000000000000000000000000000010000"
        "000000000002000000000000000400000000000000",
    ),
    "large": (
        65500,
        [[[5, 1, 0]], [[65499, 0]]],
        "050000000100000000000000dbff000000000000",
        "4d4d4944494458000001000000000000000402000000000000000300000000000000030000000200000000000000"
        "000000000c00000000000000000000000000000001000000000000000200000000000000",
    ),
    "other": (
        65499,
        [[[11, 0]], [[12, 13, 14, 0]]],
        "0b0000000c000d000e000000",
        "4d4d4944494458000001000000000000000802000000000000000300000000000000020000000400000000000000"
        "000000000400000000000000000000000000000001000000000000000200000000000000",
    ),
}
MERGED = (
    "050001000000daff000007000800090000000b0000000c000d000e000000",
    "4d4d494449445800000100000000000000080600000000000000060000000000000003000000020000000100000003000000"
    "0200000004000000000000000000000006000000000000000a000000000000000c000000000000001200000000000000"
    "1600000000000000000000000000000001000000000000000200000000000000040000000000000005000000000000000600000000000000",
)


def write(prefix: Path, documents: list[list[list[int]]], vocab: int = 100) -> Path:
    with IndexedWriter(prefix, token_dtype(vocab)) as writer:
        for sequences in documents:
            writer.add([t for s in sequences for t in s], [len(s) for s in sequences])
    return prefix


def files(prefix: Path) -> tuple[bytes, bytes]:
    return Path(f"{prefix}.bin").read_bytes(), Path(f"{prefix}.idx").read_bytes()


@pytest.mark.parametrize("name", GOLDEN)
def test_bytes_are_megatrons(tmp_path: Path, name: str) -> None:
    vocab, documents, binary, index = GOLDEN[name]
    assert files(write(tmp_path / name, documents, vocab)) == (bytes.fromhex(binary), bytes.fromhex(index))


def test_merge_is_megatrons(tmp_path: Path) -> None:
    parts = [write(tmp_path / name, GOLDEN[name][1], GOLDEN[name][0]) for name in ("small", "other")]
    merge(parts, tmp_path / "merged")
    assert files(tmp_path / "merged") == (bytes.fromhex(MERGED[0]), bytes.fromhex(MERGED[1]))


def by_the_format(documents: list[list[list[int]]], code: int, letter: str) -> tuple[bytes, bytes]:
    """Both files from the description of the format, with struct alone."""
    sequences = [s for d in documents for s in d]
    size = struct.calcsize(letter)
    binary = b"".join(struct.pack(f"<{len(s)}{letter}", *s) for s in sequences)
    index = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, code, len(sequences), len(documents) + 1)
    index += b"".join(struct.pack("<i", len(s)) for s in sequences)
    index += b"".join(struct.pack("<q", size * sum(map(len, sequences[:k]))) for k in range(len(sequences)))
    index += b"".join(struct.pack("<q", sum(map(len, documents[:k]))) for k in range(len(documents) + 1))
    return binary, index


DOCUMENTS = st.lists(
    st.lists(st.lists(st.integers(0, 65498), max_size=5), min_size=1, max_size=3), min_size=1, max_size=6
)


@settings(max_examples=30, deadline=None)
@given(documents=DOCUMENTS, wide=st.booleans())
def test_round_trip(tmp_path_factory: pytest.TempPathFactory, documents: list[list[list[int]]], wide: bool) -> None:
    prefix = write(tmp_path_factory.mktemp("d") / "x", documents, 70000 if wide else 1000)
    assert files(prefix) == by_the_format(documents, 4 if wide else 8, "i" if wide else "H")
    sequences = [s for d in documents for s in d]
    if not any(sequences):
        with pytest.raises(ValueError, match="holds no tokens"):
            IndexedDataset(prefix)
        return
    data = IndexedDataset(f"{prefix}.bin")
    assert [data[i].tolist() for i in range(len(data))] == sequences
    assert data.lengths.tolist() == [len(s) for s in sequences]
    assert data.num_documents == len(documents)
    assert data.num_tokens == sum(map(len, sequences))
    starts = data.document_starts()
    assert [data.tokens[a:b].tolist() for a, b in itertools.pairwise(starts)] == [
        [t for s in d for t in s] for d in documents
    ]


def test_slices_stay_inside_their_sequence(tmp_path: Path) -> None:
    data = IndexedDataset(write(tmp_path / "x", [[[1, 2, 3]], [[4, 5]]]))
    assert data.get(0, 1).tolist() == [2, 3]
    assert data.get(0, 1, 99).tolist() == [2, 3]
    assert data.get(1, -1).tolist() == [5]
    assert data.get(1, 5, 2).tolist() == []
    assert data[-1].tolist() == [4, 5]
    with pytest.raises(IndexError, match="2 sequences, there is no sequence 2"):
        data[2]
    with pytest.raises(ValueError, match="read-only"):
        data[0][0] = 9


def test_nothing_appears_when_writing_fails(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="do not fit"), IndexedWriter(tmp_path / "x", token_dtype(9)) as writer:
        writer.add([70000])
    assert list(tmp_path.iterdir()) == []


def test_writer_refuses(tmp_path: Path) -> None:
    with IndexedWriter(tmp_path / "x", token_dtype(9)) as writer:
        with pytest.raises(ValueError, match=r"stores uint16; ids 1 … 70000 do not fit"):
            writer.add([1, 70000])
        with pytest.raises(ValueError, match="lengths sum to 3 but the document has 2 tokens"):
            writer.add([1, 2], [3])


def test_merge_refuses(tmp_path: Path) -> None:
    a, b = write(tmp_path / "a", [[[1]]], 9), write(tmp_path / "b", [[[1]]], 70000)
    with pytest.raises(ValueError, match=r"stores int32, .* stores uint16: they do not merge"):
        merge([a, b], tmp_path / "m")
    assert not (tmp_path / "m.bin").exists()
    with pytest.raises(ValueError, match="nothing to merge"):
        merge([], tmp_path / "m")


def patch(path: Path, at: int, new: bytes) -> None:
    raw = bytearray(path.read_bytes())
    raw[at : at + len(new)] = new
    path.write_bytes(bytes(raw))


@pytest.mark.parametrize(
    ("at", "new", "message"),
    [
        (0, b"NOTMAGIC\0", r"is not a Megatron index: its first bytes are b'NOTMAGIC"),
        (9, struct.pack("<Q", 2), "has index version 2; weft reads version 1"),
        (17, b"\x07", "dtype code 7, which is no integer type"),
        (18, struct.pack("<Q", 3), "should have 94 bytes for 3 sequences and 3 document boundaries but has 82"),
        (34, struct.pack("<i", 1), "offsets do not follow from its lengths"),
        (42, struct.pack("<q", 2), "offsets do not follow from its lengths"),
        (34, struct.pack("<ii", 0, 0), "offsets do not follow|holds no tokens"),
        (58, struct.pack("<q", 1), "document boundaries do not rise from 0 to 2"),
        (66, struct.pack("<q", 3), "document boundaries do not rise from 0 to 2"),
        (74, struct.pack("<q", 1), "document boundaries do not rise from 0 to 2"),
    ],
)
def test_damaged_index(tmp_path: Path, at: int, new: bytes, message: str) -> None:
    prefix = write(tmp_path / "x", [[[1, 2]], [[3]]])
    patch(Path(f"{prefix}.idx"), at, new)
    with pytest.raises(ValueError, match=message):
        IndexedDataset(prefix)


def test_wrong_sizes(tmp_path: Path) -> None:
    prefix = write(tmp_path / "x", [[[1, 2]], [[3]]])
    binary, index = files(prefix)
    for raw, message in (
        (binary[:-1], "is cut short: .* promises 6 bytes but there are 5"),
        (binary + b"\0", "longer"),
    ):
        Path(f"{prefix}.bin").write_bytes(raw)
        with pytest.raises(ValueError, match=message):
            IndexedDataset(prefix)
    Path(f"{prefix}.bin").write_bytes(binary)
    for raw, message in (
        (index[:20], r"is cut short \(20 bytes\)"),
        (index[:-4], "should have 82 bytes .* but has 78"),
        (index + b"\0\0", "multimodal"),
        (b"", "not a Megatron index"),
    ):
        Path(f"{prefix}.idx").write_bytes(raw)
        with pytest.raises(ValueError, match=message):
            IndexedDataset(prefix)


def test_missing_files(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"x.bin does not exist: make it with `weft data prepare"):
        IndexedDataset(tmp_path / "x")


def test_vocabulary_is_checked_and_the_report_cannot_lie(tmp_path: Path) -> None:
    prefix = write(tmp_path / "x", [[[1, 2]], [[3], [], [99, 4]]])
    data = IndexedDataset(prefix)
    data.check_vocab(100)
    with pytest.raises(ValueError, match=r"x.bin: sequence 3 holds token id 99, outside the vocabulary of 99"):
        data.check_vocab(99)
    stat = Path(f"{prefix}.bin").stat()
    report = {"bin_bytes": stat.st_size, "bin_mtime_ns": stat.st_mtime_ns, "max_token": 5}
    Path(f"{prefix}.json").write_text(json.dumps(report))
    data.check_vocab(99)  # believed: it was written for this file
    os.utime(f"{prefix}.bin", ns=(0, stat.st_mtime_ns + 1))
    with pytest.raises(ValueError, match="token id 99"):
        data.check_vocab(99)  # not of this file any more
    Path(f"{prefix}.json").write_text("[]")
    with pytest.raises(ValueError, match="token id 99"):
        data.check_vocab(99)


def test_negative_ids_are_found(tmp_path: Path) -> None:
    with IndexedWriter(tmp_path / "x", DTYPES[4]) as writer:
        writer.add([1, 2])
        writer.add(np.array([3, -1]))
    with pytest.raises(ValueError, match="sequence 1 holds token id -1"):
        IndexedDataset(tmp_path / "x").check_vocab(10)


def test_fingerprint_follows_the_data(tmp_path: Path) -> None:
    one, same, other = (write(tmp_path / n, [[[1, 2, k]]]) for n, k in (("a", 3), ("b", 3), ("c", 4)))
    prints = [IndexedDataset(p).fingerprint() for p in (one, same, other)]
    assert prints[0] == prints[1] != prints[2]
