"""safetensors files by region: the library reads what weft writes, bit for bit, and weft trusts no header."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from weft.checkpoint.shards import plan_shards, shard_index
from weft.checkpoint.tensors import DTYPES, MAX_HEADER, Entry, TensorFile, create


def numbers(sizes: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    if dtype == torch.bool:
        return torch.randint(2, sizes, generator=generator).bool()
    if dtype.is_floating_point:
        return torch.randn(sizes, generator=generator).to(dtype)
    return torch.randint(0, 100, sizes, generator=generator).to(dtype)


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


SIZES = [(3, 5), (), (0, 4), (7,), (2, 3, 4), (1, 9)]


def test_every_dtype_and_rank_passes_between_weft_and_the_library(tmp_path: Path) -> None:
    tensors = {f"{name}.{n}": numbers(sizes, dtype) for name, dtype in DTYPES.items() for n, sizes in enumerate(SIZES)}
    entries = [Entry(name, tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()]
    create(tmp_path / "ours", entries)
    with TensorFile(tmp_path / "ours", writable=True) as file:
        for name, tensor in tensors.items():
            assert file.write(name, tensor) == hashlib.sha256(raw(tensor)).hexdigest() == file.digest(name)
        file.sync()
    save_file(tensors, tmp_path / "theirs", {"format": "pt"})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    loaded = load_file(tmp_path / "ours")
    with TensorFile(tmp_path / "theirs") as file:
        assert file.entries.keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert (loaded[name].dtype, loaded[name].shape) == (tensor.dtype, tensor.shape)
            assert raw(loaded[name]) == raw(tensor)
            assert file.read(name).dtype == tensor.dtype
            assert raw(file.read(name)) == raw(tensor)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_box_is_a_slice(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    path = tmp_path_factory.mktemp("box") / "file"
    sizes = tuple(data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=4)))
    edges = [sorted(data.draw(st.tuples(st.integers(0, n), st.integers(0, n)))) for n in sizes]
    start, stop = tuple(a for a, _ in edges), tuple(b for _, b in edges)
    box = tuple(map(slice, start, stop))
    dtype = data.draw(st.sampled_from([torch.bfloat16, torch.float32, torch.int64, torch.uint8]))
    whole, part = numbers(sizes, dtype), numbers(tuple(b - a for a, b in edges), dtype, seed=1)
    create(path, [Entry("before", (3,), torch.int16), Entry("x", sizes, dtype), Entry("after", (3,), torch.int8)])
    with TensorFile(path, writable=True) as file:
        file.write("x", whole)
        assert torch.equal(file.read("x", start, stop), whole[box])
        assert file.digest("x", start, stop) == hashlib.sha256(raw(whole[box])).hexdigest()
        assert file.write("x", part, start, stop) == hashlib.sha256(raw(part)).hexdigest()
        assert file.digest("x", start, stop) == hashlib.sha256(raw(part)).hexdigest()
        whole[box] = part
        assert torch.equal(file.read("x"), whole)
        assert not file.read("before").any()
        assert not file.read("after").any()


def _write_share(path: Path, rank: int, world: int) -> None:
    """Columns of one tensor and rows of another, of two bytes each: neighbours share pages."""
    with TensorFile(path, writable=True) as file:
        columns, rows = numbers((300, 64), torch.bfloat16), numbers((64, 300), torch.bfloat16, seed=1)
        for column in range(rank, 64, world):
            file.write("columns", columns[:, column : column + 1], (0, column), (300, column + 1))
            file.write("rows", rows[column : column + 1], (column, 0), (column + 1, 300))


def test_processes_that_write_at_once_make_the_file_that_one_makes(tmp_path: Path) -> None:
    entries = [Entry("columns", (300, 64), torch.bfloat16), Entry("rows", (64, 300), torch.bfloat16)]
    for name in ("one", "many"):
        create(tmp_path / name, entries)
    _write_share(tmp_path / "one", 0, 1)
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_write_share, args=(tmp_path / "many", rank, 4)) for rank in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    assert (tmp_path / "many").read_bytes() == (tmp_path / "one").read_bytes()
    assert raw(load_file(tmp_path / "many")["columns"]) == raw(numbers((300, 64), torch.bfloat16))


def test_a_created_file_takes_no_room_until_it_is_written(tmp_path: Path) -> None:
    create(tmp_path / "file", [Entry("x", (1 << 20, 1024), torch.float32)])
    stat = (tmp_path / "file").stat()
    assert stat.st_size > 4 << 30
    assert stat.st_blocks * 512 < 1 << 20
    with pytest.raises(FileExistsError):
        create(tmp_path / "file", [])


def test_boxes_outside_and_unknown_tensors_are_refused(tmp_path: Path) -> None:
    create(tmp_path / "file", [Entry("x", (4, 4), torch.float32)])
    with TensorFile(tmp_path / "file") as file:
        for start, stop in [((0, 0), (5, 4)), ((-1, 0), (4, 4)), ((3, 0), (2, 4)), ((0,), (4,))]:
            with pytest.raises(ValueError, match=r"x is \[4, 4\].*does not lie inside"):
                file.read("x", start, stop)
        with pytest.raises(ValueError, match="holds no tensor 'y'"):
            file.read("y")


def _file(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def _entry(**change: Any) -> dict[str, Any]:
    return {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | change}


TWO = {"dtype": "U8", "shape": [4], "data_offsets": [4, 8]}
HOSTILE: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "too short"),
    "short": (b"1234567", "too short"),
    "length beyond the file": (_file({}, length=1 << 40), "claims"),
    "length beyond the limit": (_file({}, length=MAX_HEADER + 1), "claims"),
    "length of all ones": (b"\xff" * 8 + b"{}", "claims"),
    "not JSON": (_file(b"{nonsense"), "is not the JSON"),
    "not UTF-8": (_file(b'{"\xff": 1}'), "is not the JSON"),
    "deep": (_file(b"[" * 100_000), "is not the JSON"),
    "huge number": (_file(b'{"a": ' + b"9" * 10_000 + b"}"), "is not the JSON"),
    "a list": (_file([]), "is not a table"),
    "a pickle": (b"\x80\x04\x95\x1a\x00\x00\x00\x00" + b"\x00" * 40, "claims|JSON"),
    "doubled name": (_file(b'{"a": {}, "a": {}}'), "twice"),
    "metadata not text": (_file({"__metadata__": {"a": 1}}), "__metadata__"),
    "metadata not a table": (_file({"__metadata__": 1}), "__metadata__"),
    "entry not a table": (_file({"a": 3}), "must have dtype"),
    "missing key": (_file({"a": {"dtype": "F32", "shape": []}}), "must have dtype"),
    "further key": (_file(_entry(evil=1), b"\0" * 8), "nothing else"),
    "unknown dtype": (_file(_entry(dtype="F31"), b"\0" * 8), "has dtype 'F31'"),
    "dtype of another kind": (_file(_entry(dtype=["F32"]), b"\0" * 8), "has dtype"),
    "negative size": (_file(_entry(shape=[-2]), b"\0" * 8), "must be counts"),
    "fractional size": (_file(_entry(shape=[2.0]), b"\0" * 8), "must be counts"),
    "boolean size": (_file(_entry(shape=[True, 2]), b"\0" * 8), "must be counts"),
    "no list of sizes": (_file(_entry(shape=2), b"\0" * 8), "must be counts"),
    "sizes that overflow": (_file(_entry(shape=[1 << 62, 1 << 62]), b"\0" * 8), "is F32"),
    "one offset": (_file(_entry(data_offsets=[0]), b"\0" * 8), "must be counts"),
    "backwards": (_file(_entry(data_offsets=[8, 0]), b"\0" * 8), "lies in -8"),
    "too few bytes": (_file(_entry(data_offsets=[0, 4]), b"\0" * 4), "so 8 bytes, but it lies in 4"),
    "beyond the end": (_file(_entry(), b"\0" * 7), "header describes"),
    "bytes left over": (_file(_entry(), b"\0" * 9), "header describes"),
    "gap at the start": (_file(_entry(data_offsets=[8, 16]), b"\0" * 16), "leaves a gap"),
    "overlap": (_file(_entry() | {"b": TWO}, b"\0" * 8), "overlaps"),
    "gap": (_file(_entry() | {"b": TWO | {"data_offsets": [9, 13]}}, b"\0" * 13), "leaves a gap"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_headers_are_named_errors(name: str, tmp_path: Path) -> None:
    content, said = HOSTILE[name]
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(ValueError, match=said):
        TensorFile(tmp_path / "file")


def test_no_damage_to_a_header_gets_past(tmp_path: Path) -> None:
    """Any byte of the header changed: refused as a ValueError, or the file still describes tensors inside itself."""
    save_file({"a": torch.zeros(3, 4), "b": torch.ones(2, dtype=torch.bfloat16)}, tmp_path / "file")
    good = (tmp_path / "file").read_bytes()
    rng, refused, accepted = random.Random(0), 0, 0
    for _ in range(400):
        bad = bytearray(good)
        for _ in range(rng.choice([1, 1, 2])):
            bad[rng.randrange(len(good) - 52)] = rng.randrange(256)
        (tmp_path / "file").write_bytes(bad)
        try:
            with TensorFile(tmp_path / "file") as file:
                for name in file.entries:
                    file.read(name)
        except ValueError as error:
            refused += str(tmp_path) in str(error)
        else:
            accepted += 1
    assert refused + accepted == 400
    assert refused > 200


def test_a_file_cut_while_it_is_read_is_named(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(3000)}, tmp_path / "file")
    with TensorFile(tmp_path / "file") as file:
        with (tmp_path / "file").open("rb+") as other:
            other.truncate(1000)
        with pytest.raises(ValueError, match="ended at byte 1000"):
            file.read("a")


@pytest.mark.parametrize(
    ("max_bytes", "expected"),
    [
        (1000, {"model.safetensors": "abcd"}),
        (56, {"model.safetensors": "abcd"}),
        (55, {"model-00001-of-00002.safetensors": "abc", "model-00002-of-00002.safetensors": "d"}),
        (16, {"model-00001-of-00003.safetensors": "a", "model-00002-of-00003.safetensors": "bc",
              "model-00003-of-00003.safetensors": "d"}),
        (1, {f"model-0000{n}-of-00004.safetensors": name for n, name in enumerate("abcd", start=1)}),
    ],
)  # fmt: skip
def test_shards_fill_in_order(max_bytes: int, expected: dict[str, str]) -> None:
    entry: Callable[[str, int], Entry] = lambda name, count: Entry(name, (count,), torch.float32)  # noqa: E731
    entries = [entry("a", 4), entry("b", 1), entry("c", 1), entry("d", 8)]
    shards = plan_shards(entries, max_bytes)
    assert {file: "".join(item.name for item in shard) for file, shard in shards.items()} == expected
    index = shard_index(shards)
    assert index["metadata"]["total_size"] == 56
    assert index["weight_map"] == {name: file for file, names in expected.items() for name in names}


def test_a_shard_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        plan_shards([], 0)
