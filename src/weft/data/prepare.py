"""`weft data prepare`: text in, one Megatron `.bin/.idx` out; parallel, repeatable, resumable.

The output is a pure function of inputs, tokenizer and options: neither the number of workers nor a kill and a second
start changes a byte.
"""

import os
import shutil
import signal
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from weft.data import corpus, parts, tokenizer
from weft.data.indexed import merge, strip, token_dtype
from weft.lock import alone

PART_BYTES = 1 << 20, 1 << 26  # a part is a 64th of the input, within these bounds


@dataclass(frozen=True)
class Report:
    """What came out; saved as `OUT.json`.

    Attributes:
        text_bytes: UTF-8 bytes of the documents (not of the JSON around them).
        empty: documents without a token, left out.
        skipped: files that are not UTF-8, each with the reason.
        seconds, tokens_per_second: of this run; parts found done cost nothing and are not counted.
        resumed_parts: parts that an earlier, interrupted run had finished.
        bin_bytes, bin_mtime_ns: which `.bin` this report, and its max_token, speaks of.
    """

    out: str
    documents: int
    tokens: int
    text_bytes: int
    empty: int
    skipped: list[str]
    max_token: int
    vocab: int
    eod: int | None
    dtype: str
    tokenizer: str
    tokenizer_digest: str
    seconds: float
    tokens_per_second: float
    workers: int
    parts: int
    resumed_parts: int
    bin_bytes: int
    bin_mtime_ns: int


def prepare(
    inputs: Sequence[str | Path],
    out: str | Path,
    tokenizer_path: str | Path,
    *,
    key: str = "text",
    globs: Sequence[str] = (),
    workers: int | None = None,
    eod: str | int | None = None,
    append_eod: bool = True,
    overwrite: bool = False,
    part_bytes: int | None = None,
    progress: bool = False,
) -> Report:
    """Encodes every document of the inputs, in order, into `OUT.bin` and `OUT.idx`.

    Args:
        inputs: files or folders; see `weft.data.corpus`.
        key: JSON field or parquet column of the text.
        globs: which files of a folder, in place of the known suffixes.
        workers: processes; default one per core.
        eod: the token that ends a document, text or id; default: what the tokenizer declares.
        append_eod: end every document with it.
        part_bytes: input per part; default a 64th of all, from 1 to 64 MiB.
        progress: a progress bar on stderr, where that is a terminal.

    Raises:
        ValueError: an input or option is wrong, the output exists, or nothing was left to write.
    """
    prefix = Path(strip(out))
    if workers is not None and workers < 1:
        raise ValueError(f"--workers must be 1 or more, not {workers}")
    if prefix.is_dir():
        raise ValueError(f"--out {out} is a folder: name the files in it, as {prefix / 'text'}")
    if eod is not None and not append_eod:
        raise ValueError(f"--eod {eod} and --no-eod: documents end with a token, or with none; leave one out")
    root, idx, binary = _beside(prefix, ".parts"), _beside(prefix, ".idx"), _beside(prefix, ".bin")
    # a .bin without .idx beside a parts folder is our own, of a run that ended between two renames
    if not overwrite and (idx.exists() or (binary.exists() and not root.exists())):
        raise ValueError(f"{idx if idx.exists() else binary} exists already: choose another --out, or --overwrite it")
    loaded = tokenizer.load(tokenizer_path, eod)
    if append_eod and loaded.eod is None:
        raise ValueError(
            f"{loaded.path} names no token that ends a document: give one with --eod, or --no-eod to go without"
        )
    plan = _plan(inputs, globs, part_bytes, loaded, loaded.eod if append_eod else None, key)
    workers = min(workers or len(os.sched_getaffinity(0)), len(plan.parts))
    with alone(root, f"another `weft data prepare` is writing this output now ({root} is locked)"):
        folder = root / plan.digest
        for stale in root.iterdir():
            if stale.is_dir() and stale != folder:
                shutil.rmtree(stale)
        folder.mkdir(exist_ok=True)
        start = time.perf_counter()
        reports, resumed = _encode(plan, folder, loaded, workers, progress)
        if not any(report.tokens for report in reports):
            shutil.rmtree(root)
            raise ValueError(f"the inputs hold no text, nothing was written{_why_none(reports)}")
        report = _finish(prefix, plan, folder, loaded, reports, resumed, time.perf_counter() - start, workers)
        shutil.rmtree(root)
    return report


def _beside(prefix: Path, end: str) -> Path:
    return prefix.with_name(prefix.name + end)


def _plan(
    inputs: Sequence[str | Path],
    globs: Sequence[str],
    part_bytes: int | None,
    loaded: tokenizer.Tokenizer,
    eod: int | None,
    key: str,
) -> parts.Plan:
    files = corpus.find_files(inputs, globs)
    if not files:
        raise ValueError("no input: name the files or folders to read")
    stats = [path.stat() for path in files]
    size = part_bytes or min(max(sum(stat.st_size for stat in stats) // 64, PART_BYTES[0]), PART_BYTES[1])
    return parts.Plan(
        parts=parts.group(corpus.cut([path.resolve() for path in files], size), size),
        times=tuple(stat.st_mtime_ns for stat in stats),
        tokenizer_digest=loaded.digest,
        eod=eod,
        key=key,
        dtype=token_dtype(loaded.vocab).str,
    )


def _encode(
    plan: parts.Plan, folder: Path, loaded: tokenizer.Tokenizer, workers: int, progress: bool
) -> tuple[list[parts.PartReport], set[int]]:
    """All parts, done before or now; returns their reports in order and the numbers of those done before."""
    found = {number: parts.done(folder / f"{number:05d}") for number in range(len(plan.parts))}
    reports = {number: report for number, report in found.items() if report is not None}
    resumed = set(reports)
    job = parts.Job(loaded.hf.to_str(), loaded.path, plan.eod, plan.key, plan.dtype, str(folder))
    todo = [number for number in range(len(plan.parts)) if number not in resumed]
    sizes = [sum(piece.size for piece in part) for part in plan.parts]
    with _bar(progress) as bar:
        task = bar.add_task("encoding", total=sum(sizes), completed=sum(sizes[number] for number in resumed))
        for number, report in _run(plan, todo, job, workers):
            reports[number] = report
            bar.update(task, advance=sizes[number])
    return [reports[number] for number in range(len(plan.parts))], resumed


def _run(plan: parts.Plan, todo: Sequence[int], job: parts.Job, workers: int) -> Iterator[tuple[int, parts.PartReport]]:
    if workers == 1 or len(todo) < 2:
        worker = parts.Worker(job)
        for number in todo:
            yield number, worker.run(number, plan.parts[number])
        return
    # spawn, not fork: the caller may have threads (torch, tokenizers), and a forked lock is a dead lock
    pool = ProcessPoolExecutor(workers, get_context("spawn"), parts.start_worker, (job,))
    try:
        with _no_interrupt():  # a worker that is still being imported would answer Ctrl-C with a traceback
            futures = {pool.submit(parts.run_part, number, plan.parts[number]): number for number in todo}
        for future in as_completed(futures):
            yield futures[future], future.result()
    except BrokenProcessPool:
        raise ValueError(
            "a worker process was killed, most often for lack of memory. Finished parts are kept: run the same "
            "command again, with fewer --workers"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def _no_interrupt() -> Iterator[None]:
    """SIGINT waits until the block ends; processes that are started in it never get one."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _why_none(reports: Sequence[parts.PartReport]) -> str:
    skipped = [line for report in reports for line in report.skipped]
    if not skipped:
        return ": every document is empty"
    if len(skipped) == 1:
        return f"; a file was skipped: {skipped[0]}"
    return f"; {len(skipped)} files were skipped, the first: {skipped[0]}"


def _bar(shown: bool) -> Progress:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    return Progress(*columns, console=console, disable=not shown or not console.is_terminal)


def _finish(
    prefix: Path,
    plan: parts.Plan,
    folder: Path,
    loaded: tokenizer.Tokenizer,
    reports: Sequence[parts.PartReport],
    resumed: set[int],
    seconds: float,
    workers: int,
) -> Report:
    """Merges the parts and puts data, report and index in place, the index last: where it is, all is."""
    skipped = [line for report in reports for line in report.skipped]
    start = time.perf_counter()
    merge([folder / f"{number:05d}" for number in range(len(reports))], folder / "merged")
    seconds += time.perf_counter() - start
    new = sum(report.tokens for number, report in enumerate(reports) if number not in resumed)
    stat = (folder / "merged.bin").stat()
    report = Report(
        out=str(prefix),
        documents=sum(report.documents for report in reports),
        tokens=sum(report.tokens for report in reports),
        text_bytes=sum(report.text_bytes for report in reports),
        empty=sum(report.empty for report in reports),
        skipped=skipped,
        max_token=max(report.max_token for report in reports),
        vocab=loaded.vocab,
        eod=plan.eod,
        dtype=token_dtype(loaded.vocab).name,
        tokenizer=loaded.path,
        tokenizer_digest=loaded.digest,
        seconds=round(seconds, 3),
        tokens_per_second=round(new / seconds, 1),
        workers=workers,
        parts=len(reports),
        resumed_parts=len(resumed),
        bin_bytes=stat.st_size,
        bin_mtime_ns=stat.st_mtime_ns,
    )
    _beside(prefix, ".idx").unlink(
        missing_ok=True
    )  # from here to the last rename there is no data set, never half of one
    os.replace(folder / "merged.bin", _beside(prefix, ".bin"))
    parts.write_json(_beside(prefix, ".json"), asdict(report))
    os.replace(folder / "merged.idx", _beside(prefix, ".idx"))
    return report
