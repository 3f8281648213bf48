"""The work of `prepare`, cut into numbered parts: each encoded by one worker, landing by rename, never done twice.

Parts live in `OUT.parts/<plan digest>/00000.{bin,idx,json}`; the .json is written last and makes the part whole. The
digest covers the inputs (path, size, time), the tokenizer and every option that changes a byte, so a part of another
plan is never taken for one of this.
"""

import hashlib
import json
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from weft.data import corpus, tokenizer
from weft.data.encode import Encoder
from weft.data.indexed import IndexedWriter

BATCH = 1 << 20  # characters encoded together


@dataclass(frozen=True)
class Plan:
    """Everything that decides the bytes of the output, and the parts the work is cut into."""

    parts: tuple[tuple[corpus.Piece, ...], ...]
    times: tuple[int, ...]  # modification time of every file, ns
    tokenizer_digest: str
    eod: int | None
    key: str
    dtype: str

    @property
    def digest(self) -> str:
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:16]


@dataclass
class PartReport:
    """What one part came to."""

    documents: int = 0
    tokens: int = 0
    text_bytes: int = 0
    empty: int = 0
    max_token: int = -1
    skipped: list[str] = field(default_factory=list)


def group(pieces: Sequence[corpus.Piece], part_bytes: int) -> tuple[tuple[corpus.Piece, ...], ...]:
    """Neighbouring pieces joined until a part has about part_bytes; order is kept."""
    parts: list[list[corpus.Piece]] = []
    size = 0
    for piece in pieces:
        if not parts or size + piece.size > part_bytes:
            parts.append([])
            size = 0
        parts[-1].append(piece)
        size += piece.size
    return tuple(map(tuple, parts))


def done(prefix: Path) -> PartReport | None:
    """The report of a part that is whole on disk, else None."""
    try:
        record = json.loads(prefix.with_suffix(".json").read_text())
        sizes = [prefix.with_suffix(end).stat().st_size for end in (".bin", ".idx")]
    except (OSError, ValueError):
        return None
    return PartReport(**record["report"]) if sizes == record["sizes"] else None


@dataclass(frozen=True)
class Job:
    """What every worker needs: sent once, when it starts."""

    tokenizer_json: str
    tokenizer_path: str
    eod: int | None
    key: str
    dtype: str
    folder: str


class Worker:
    """Encodes parts, one after another, with one tokenizer and one cache."""

    def __init__(self, job: Job) -> None:
        self.job = job
        loaded = tokenizer.loads(job.tokenizer_json, job.tokenizer_path, job.eod, "")
        self.encoder = Encoder(loaded.hf, np.dtype(job.dtype))
        self.end = np.array([] if job.eod is None else [job.eod], job.dtype)

    def run(self, number: int, pieces: Sequence[corpus.Piece]) -> PartReport:
        """Writes part `number` and returns its report."""
        prefix = Path(self.job.folder) / f"{number:05d}"
        report = PartReport()
        with IndexedWriter(prefix, np.dtype(self.job.dtype)) as writer:
            for texts in self._batches(pieces, report.skipped):
                self._write(writer, texts, report)
        sizes = [prefix.with_suffix(end).stat().st_size for end in (".bin", ".idx")]
        write_json(prefix.with_suffix(".json"), {"report": asdict(report), "sizes": sizes})
        return report

    def _batches(self, pieces: Sequence[corpus.Piece], skipped: list[str]) -> Iterator[list[str]]:
        texts: list[str] = []
        size = 0
        for piece in pieces:
            for text in corpus.read(piece, self.job.key, skipped):
                texts.append(text)
                size += len(text)
                if size > BATCH:
                    yield texts
                    texts, size = [], 0
        yield texts

    def _write(self, writer: IndexedWriter, texts: Sequence[str], report: PartReport) -> None:
        for text, ids in zip(texts, self.encoder.encode(texts), strict=True):
            report.text_bytes += len(text) if text.isascii() else len(text.encode("utf-8"))
            if not len(ids):
                report.empty += 1  # a document of no tokens gets no end-of-document either, as in Megatron-LM
                continue
            document = np.concatenate([ids, self.end])
            writer.add(document)
            report.documents += 1
            report.tokens += len(document)
            report.max_token = max(report.max_token, int(document.max()))


def write_json(path: Path, content: object) -> None:
    """JSON that is there whole or not at all."""
    temp = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    with open(temp, "w", encoding="utf-8") as file:
        file.write(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(temp, path)


_worker: Worker | None = None


def start_worker(job: Job) -> None:
    """First call in a worker process: one thread (processes are the parallelism), and an end when the parent ends."""
    global _worker
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()  # a killed parent cannot stop its pool, whose processes would wait for ever
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
    _worker = Worker(job)


def run_part(number: int, pieces: Sequence[corpus.Piece]) -> PartReport:
    """One part, in a worker process."""
    assert _worker is not None
    return _worker.run(number, pieces)
