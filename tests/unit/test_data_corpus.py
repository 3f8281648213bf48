"""Documents out of files; no document lost, no bad line silent."""

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from weft.data import corpus


def documents(*inputs: Path, globs: tuple[str, ...] = (), size: int = 1 << 20, key: str = "text") -> list[str]:
    skipped: list[str] = []
    pieces = corpus.cut(corpus.find_files(inputs, globs), size)
    return [text for piece in pieces for text in corpus.read(piece, key, skipped)]


def test_folder(tmp_path: Path) -> None:
    for name, text in {
        "b.py": "b",
        "a/z.txt": "z",
        "a/y.md": "y",
        "c.bin": "no",
        ".git/x.txt": "no",
        "d.PY": "d",
        "lib/site-packages/f.py": "no",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "e.jsonl").write_text('{"text": "e"}\n')
    (tmp_path / "f.json").write_text('{"text": "f"}\n{"text": "g"}\n')
    assert documents(tmp_path) == ["y", "z", "b", "d", "e"]
    assert documents(tmp_path, globs=("*.py", "a/*.md")) == ["y", "b"]
    assert documents(tmp_path / "f.json") == documents(tmp_path, globs=("*.json",)) == ["f", "g"]
    assert documents(tmp_path / "c.bin") == ["no"]  # named by hand: text, whatever its suffix


def test_text_keeps_its_line_ends_and_loses_its_mark(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\n")
    assert documents(tmp_path / "a.txt") == ["one\r\ntwo\n"]


def test_undecodable_files_are_reported(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"ab\xff")
    skipped: list[str] = []
    (piece,) = corpus.cut([tmp_path / "a.txt"], 10)
    assert list(corpus.read(piece, "text", skipped)) == []
    assert skipped == [f"{tmp_path / 'a.txt'}: not UTF-8 at byte 2"]


@settings(max_examples=40, deadline=None)
@given(texts=st.lists(st.text(max_size=12), max_size=12), size=st.integers(1, 60), ends=st.booleans())
def test_any_cut_of_jsonl_gives_the_same_documents(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], size: int, ends: bool
) -> None:
    path = tmp_path_factory.mktemp("j") / "a.jsonl"
    lines = "\n".join(json.dumps({"text": t}) for t in texts)
    path.write_text(lines + "\n" * ends)
    clean = [t.encode("utf-8", "replace").decode() for t in texts]
    assert documents(path, size=size) == clean


def zst(raw: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(raw)
    return sink.getvalue().to_pybytes()


def test_packed_and_parquet(tmp_path: Path) -> None:
    texts = ["", "one\ntwo", "ü😀", *map(str, range(50))]
    lines = "\n".join(json.dumps({"t": t}) for t in texts).encode()
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines))
    (tmp_path / "a.jsonl.zst").write_bytes(zst(lines[:100]) + zst(lines[100:]))  # in frames, as pzstd writes
    pq.write_table(pa.table({"t": [*texts, None], "n": range(54)}), tmp_path / "b.parquet", row_group_size=7)
    assert documents(tmp_path / "a.jsonl.gz", key="t") == texts
    assert documents(tmp_path / "a.jsonl.zst", key="t") == texts
    for size in (1, 100, 1 << 20):
        assert documents(tmp_path / "b.parquet", key="t", size=size) == [*texts, ""]


def test_half_a_surrogate_becomes_the_replacement_character(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a\\ud83d b \\ud83d\\ude00 \\uD83D"}\n{"text": null}\n\n')
    assert documents(tmp_path / "a.jsonl") == ["a� b 😀 �", ""]


PACK = {".gz": gzip.compress, ".zst": zst}


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst"])
@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": ', r"a.jsonl(.gz|.zst)?:4: not a JSON object"),
        ('["text"]', r":4: a JSON object is needed on every line, this is a list; `jq -c '.\[\]' FILE"),
        ('[{"text": 1},', r":4: not a JSON object: .* makes lines of a list"),
        ('{"body": "x", "n": 1}', r":4: no key 'text', only 'body', 'n': name one with --key"),
        ('{"text": 5}', r":4: 'text' is not a string but a int"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, name: str, line: str, message: str) -> None:
    raw = ('{"text": "a"}\n\n{"text": "c"}\n' + line + "\n").encode()
    (tmp_path / name).write_bytes(PACK.get(Path(name).suffix, bytes)(raw))
    for size in (5, 20, 1000):
        with pytest.raises(ValueError, match=message):
            documents(tmp_path / name, size=size)


def test_bad_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nowhere does not exist"):
        documents(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"no file in .* has a known suffix"):
        documents(tmp_path)
    with pytest.raises(ValueError, match=r"no file in .* matches \*.x, \*.y"):
        documents(tmp_path, globs=("*.x", "*.y"))
    (tmp_path / "bad.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a"}\n' * 99)[:-9])
    with pytest.raises(ValueError, match=r"bad.jsonl.gz is damaged or cut short"):
        documents(tmp_path / "bad.jsonl.gz")
    for at in range(12, 60, 7):  # which of its checks it fails at differs
        flipped = bytearray(gzip.compress(b"".join(b'{"text": "%d"}\n' % i for i in range(999))))
        flipped[at] ^= 255
        (tmp_path / "flipped.jsonl.gz").write_bytes(flipped)
        with pytest.raises(ValueError, match=r"flipped.jsonl.gz"):
            documents(tmp_path / "flipped.jsonl.gz")
    (tmp_path / "bad.jsonl.zst").write_bytes(zst(b'{"text": "a"}\n' * 99)[:-3])
    with pytest.raises(ValueError, match=r"bad.jsonl.zst is damaged or cut short"):
        documents(tmp_path / "bad.jsonl.zst")
    (tmp_path / "bad.parquet").write_bytes(b"no")
    with pytest.raises(ValueError, match=r"bad.parquet cannot be read as parquet"):
        documents(tmp_path / "bad.parquet")
    (tmp_path / "settings.json").write_text('{\n  "text": "a"\n}\n')
    with pytest.raises(
        ValueError, match=r"settings.json:1: not a JSON object: .*; a .json is read by lines, and `jq -c"
    ):
        documents(tmp_path / "settings.json")
    for raw in (b'{"text": "\xff"}\n', b'{"text": "\xed\xa0\x80"}\n', '{"text": "a"}\n'.encode("utf-16")):
        (tmp_path / "utf.jsonl").write_bytes(raw)
        with pytest.raises(ValueError, match=r"utf.jsonl:1: not a JSON object: 'utf-8' codec"):
            documents(tmp_path / "utf.jsonl")
    pq.write_table(pa.table({"t": ["a"], "n": [1]}), tmp_path / "c.parquet")
    with pytest.raises(ValueError, match="no column 'text', only 't', 'n': name one with --key"):
        documents(tmp_path / "c.parquet")
    with pytest.raises(ValueError, match="column 'n' is not text but int64"):
        documents(tmp_path / "c.parquet", key="n")
