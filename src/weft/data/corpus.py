"""Documents out of files: .txt and source files (one document each), .jsonl (also .gz and .zst), .parquet, and folders of
them.

A corpus is cut into `Piece`s: a whole file, or a range of lines or row groups of a large one. A piece is small, so that
it can be sent to a worker, and its documents are a pure function of it, so that the cut never changes the corpus.
"""

import gzip
import io
import itertools
import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

Kind = Literal["text", "jsonl", "packed", "parquet"]

_SUFFIXES = """
.txt .text .md .markdown .rst .tex .org .adoc .html .xml .csv .tsv .yaml .yml .toml .ini .cfg .sql .css .ipynb .py .pyi
.c .h .cc .cpp .cxx .hh .hpp .cu .cuh .java .kt .scala .go .rs .js .jsx .ts .tsx .rb .php .pl .lua .r .jl .m .swift .hs
.ml .ex .exs .erl .clj .lisp .el .sh .bash .zsh .ps1 .cmake .proto .vue .f90 .asm .s .v .sv
"""
TEXT_SUFFIXES = frozenset(_SUFFIXES.split())
LINES = (".jsonl", ".ndjson", ".json")
"""A .json that is data has an object on each line, as on the Hub; one that is not, as settings are, is told when read."""


@dataclass(frozen=True)
class Piece:
    """One file, or part of one.

    Attributes:
        start, stop: bytes of a .jsonl (its lines are those that begin in this range), row groups of a .parquet.
        size: bytes of input, for balancing and for the progress bar.
    """

    path: str
    kind: Kind
    start: int
    stop: int
    size: int


def kind_of(path: Path) -> Kind:
    """What a file holds, by its name; anything unknown is taken for text."""
    name = path.name.lower()
    if (inner := name.removesuffix(".gz").removesuffix(".zst")).endswith(LINES):
        return "jsonl" if inner == name else "packed"
    return "parquet" if name.endswith((".parquet", ".pq")) else "text"


INSTALLED = {"site-packages", "dist-packages", "node_modules"}
"""Folders of packages that somebody installed: none of the source that they lie in."""


def find_files(inputs: Sequence[str | Path], globs: Sequence[str] = ()) -> list[Path]:
    """The files of the inputs, in order; folders are walked in order of path. Hidden files and folders are left out, and
    those of INSTALLED; so is a .json, unless it is named: most are settings.

    Args:
        globs: patterns such as `*.py` that a file in a folder must match, in place of the known suffixes.

    Raises:
        ValueError: an input does not exist, or a folder holds no file that fits.
    """
    files: list[Path] = []
    for given in map(Path, inputs):
        if given.is_file():
            files.append(given)
        elif given.is_dir():
            inside = [p for p in sorted(given.rglob("*")) if p.is_file() and _wanted(p.relative_to(given), globs)]
            if not inside:
                what = (
                    f"matches {', '.join(globs)}" if globs else "has a known suffix (choose files with --glob '*.EXT')"
                )
                raise ValueError(f"no file in {given} {what}")
            files += inside
        else:
            raise ValueError(f"{given} does not exist: inputs are files or folders")
    return files


def _wanted(path: Path, globs: Sequence[str]) -> bool:
    if any(part.startswith(".") or part in INSTALLED for part in path.parts):
        return False
    if globs:
        return any(path.match(pattern) for pattern in globs)
    return path.suffix.lower() in TEXT_SUFFIXES or (kind_of(path) != "text" and path.suffix.lower() != ".json")


def cut(files: Sequence[Path], piece_bytes: int) -> list[Piece]:
    """Pieces of about piece_bytes; a text file, a packed one and a row group cannot be cut and stay whole."""
    pieces: list[Piece] = []
    for path in files:
        kind, size = kind_of(path), path.stat().st_size
        if kind == "jsonl":
            edges = [*range(0, size, piece_bytes), size]
            pieces += [Piece(str(path), kind, a, b, b - a) for a, b in itertools.pairwise(edges)]
        elif kind == "parquet":
            pieces += _cut_parquet(path, piece_bytes)
        else:
            pieces.append(Piece(str(path), kind, 0, size, size))
    return pieces


def _cut_parquet(path: Path, piece_bytes: int) -> Iterator[Piece]:
    about = _open_parquet(path).metadata
    start = size = 0
    for group in range(about.num_row_groups):
        size += about.row_group(group).total_byte_size
        if size >= piece_bytes or group == about.num_row_groups - 1:
            yield Piece(str(path), "parquet", start, group + 1, size)
            start, size = group + 1, 0


def _open_parquet(path: Path | str) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.ParquetFile(path, memory_map=True)
    except pa.ArrowInvalid as error:
        raise ValueError(f"{path} cannot be read as parquet: {error}") from error


def read(piece: Piece, key: str, skipped: list[str]) -> Iterator[str]:
    """The documents of a piece, in order.

    Args:
        key: the field of a JSON line or the column of a parquet file that holds the text; a null is an empty document.
        skipped: text files that are not UTF-8 are added here, with the reason.

    Raises:
        ValueError: a JSON line, a key or a column is wrong; names the file and the line.
    """
    if piece.kind == "text":
        try:
            yield Path(piece.path).read_bytes().decode("utf-8-sig")
        except UnicodeDecodeError as error:
            skipped.append(f"{piece.path}: not UTF-8 at byte {error.start}")
    elif piece.kind == "parquet":
        yield from _read_parquet(piece, key)
    elif piece.kind == "packed":
        try:
            with _unpack(piece.path) as file:
                for number, line in enumerate(file, 1):
                    yield from _parse(line, key, piece.path, number)
        except (EOFError, OSError, zlib.error) as error:
            raise ValueError(f"{piece.path} is damaged or cut short: {error}") from error
    else:
        with open(piece.path, "rb") as file:
            yield from _read_lines(file, piece, key)


def _unpack(path: str) -> BinaryIO:
    if path.lower().endswith(".gz"):
        return gzip.open(path, "rb")  # type: ignore[return-value]
    import pyarrow as pa

    return io.BufferedReader(pa.input_stream(path, compression="zstd"))


def _read_lines(file: BinaryIO, piece: Piece, key: str) -> Iterator[str]:
    at = 0
    if piece.start:  # the line that crosses the start belongs to the piece before
        at = file.seek(piece.start - 1)
        at += len(file.readline())
    while at < piece.stop and (line := file.readline()):
        try:
            yield from _parse(line, key, piece.path, 0)
        except ValueError:
            _parse(line, key, piece.path, _line_number(piece.path, at))  # again, now with its number
            raise
        at += len(line)


def _line_number(path: str, at: int) -> int:
    with open(path, "rb") as file:
        number = 1
        while at > 0 and (block := file.read(min(at, 1 << 24))):
            number += block.count(b"\n")
            at -= len(block)
    return number


def _parse(line: bytes, key: str, path: str, number: int) -> tuple[str, ...]:
    """The document of one line; none for a blank line."""
    if not line.strip():
        return ()
    try:
        # decoded here: of bytes, json lets half a surrogate pair through
        record = json.loads(line.decode().removeprefix("\ufeff"))
    except ValueError as error:  # bad JSON or bad UTF-8
        raise ValueError(f"{path}:{number}: not a JSON object: {error}{_into_lines(line, path)}") from error
    if not isinstance(record, dict):
        what = f"this is a {type(record).__name__}{_into_lines(line, path)}"
        raise ValueError(f"{path}:{number}: a JSON object is needed on every line, {what}")
    if key not in record:
        raise ValueError(f"{path}:{number}: no key {key!r}, only {', '.join(map(repr, record))}: name one with --key")
    text = record[key]
    if text is None:
        return ("",)
    if not isinstance(text, str):
        raise ValueError(f"{path}:{number}: {key!r} is not a string but a {type(text).__name__}")
    if b"\\ud" in line or b"\\uD" in line:  # half a surrogate pair is no character: U+FFFD takes its place
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return (text,)


def _into_lines(line: bytes, path: str) -> str:
    """What helps where a file is one large JSON value."""
    if line.lstrip().startswith(b"["):
        return "; `jq -c '.[]' FILE > FILE.jsonl` makes lines of a list"
    whole = path.lower().endswith(".json")
    return "; a .json is read by lines, and `jq -c . FILE > FILE.jsonl` makes one of a whole file" if whole else ""


def _read_parquet(piece: Piece, key: str) -> Iterator[str]:
    import pyarrow.types as types

    file = _open_parquet(piece.path)
    schema = file.schema_arrow
    if key not in schema.names:
        raise ValueError(
            f"{piece.path}: no column {key!r}, only {', '.join(map(repr, schema.names))}: name one with --key"
        )
    kind = schema.field(key).type
    if not (types.is_string(kind) or types.is_large_string(kind)):
        raise ValueError(f"{piece.path}: column {key!r} is not text but {kind}: name another with --key")
    for batch in file.iter_batches(1024, row_groups=range(piece.start, piece.stop), columns=[key]):
        for text in batch.column(0).to_pylist():
            yield text or ""
