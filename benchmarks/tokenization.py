"""Claim: `weft data prepare` encodes text several times faster than a pool that encodes one document at a time.

    python benchmarks/tokenization.py                    # the text: Python's own standard library; a BPE of 8,192
    python benchmarks/tokenization.py corpus.jsonl --tokenizer path/to/tokenizer

The peer does what Megatron-LM's `tools/preprocess_data.py` does: a `multiprocessing.Pool` of as many workers,
`imap` of JSON lines in chunks of 32, `tokenizer.encode` of one document, lists of ids sent back to the parent, which
writes. (It calls `tokenizers` directly; Megatron-LM goes through transformers, which adds to the cost.) Both sides read
the same JSON lines and pay for everything from start to closed files; their files must be equal to the byte.

A third side, "weft, plain", is weft without its word cache: what a tokenizer gets whose pre-tokenizer weft does not
know. The sides run in turn, `--repeats` times; ratios are of neighbours in time; min, median and max are printed.
CPU seconds (all processes, user and system) are counted too: on a machine with other work they are the fairer measure.

(Not named tokenize.py: beside a running script that would hide the standard library's own `tokenize`.)
"""

import argparse
import json
import multiprocessing
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import Regex, pre_tokenizers

from weft.data import corpus
from weft.data.encode import KNOWN
from weft.data.indexed import IndexedDataset, IndexedWriter, token_dtype
from weft.data.prepare import prepare
from weft.data.tokenizer import load, train_bpe

RESULTS = Path(__file__).parent / "results" / "tokenization.json"
Side = Callable[[Path, Path, Path, int], None]
_peer: Any = None


def start_peer(path: str) -> None:
    global _peer
    _peer = load(path)


def encode_one(line: str) -> list[int]:
    ids = _peer.hf.encode(json.loads(line)["text"], add_special_tokens=False).ids
    return [*ids, _peer.eod] if ids else []


def peer(source: Path, out: Path, tokenizer: Path, workers: int) -> None:
    with (
        multiprocessing.get_context("fork").Pool(workers, start_peer, (str(tokenizer),)) as pool,
        IndexedWriter(out, token_dtype(load(tokenizer).vocab)) as writer,
        open(source, encoding="utf-8") as lines,
    ):
        for ids in pool.imap(encode_one, lines, 32):
            if ids:
                writer.add(ids)


def weft(source: Path, out: Path, tokenizer: Path, workers: int) -> None:
    prepare([source], out, tokenizer, workers=workers)


def unknown_to_weft(tokenizer: Path, out: Path) -> Path:
    """The same tokenizer with its pre-tokenizer spelt differently, so that weft takes the plain way: the same ids."""
    hf = load(tokenizer).hf
    split = pre_tokenizers.Split(Regex(f"(?:{KNOWN[0]})"), "isolated")
    hf.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    out.mkdir()
    hf.save(str(out / "tokenizer.json"))
    return out


def standard_library(out: Path) -> Path:
    """The .py files of the running Python, tests included, installed packages not, as JSON lines."""
    root = Path(os.__file__).parent
    skipped: list[str] = []
    with open(out, "w", encoding="utf-8") as file:
        for path in sorted(root.rglob("*.py")):
            if "site-packages" not in path.parts:
                size = path.stat().st_size
                for text in corpus.read(corpus.Piece(str(path), "text", 0, size, size), "text", skipped):
                    file.write(json.dumps({"text": text}) + "\n")
    return out


def cpu_seconds() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def measure(side: Side, source: Path, out: Path, tok: Path, workers: int) -> tuple[float, float]:
    """Seconds of wall and of CPU."""
    for end in (".bin", ".idx", ".json"):
        Path(f"{out}{end}").unlink(missing_ok=True)
    start, cpu = time.perf_counter(), cpu_seconds()
    side(source, out, tok, workers)
    return time.perf_counter() - start, cpu_seconds() - cpu


def machine() -> dict[str, Any]:
    info = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return {"cpu": (names or [platform.processor()])[0], "cores": len(os.sched_getaffinity(0)), "load": os.getloadavg()}


def commit() -> str:
    here = Path(__file__).parent
    ran = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=False)
    dirty = subprocess.run(
        ["git", "status", "--porcelain", "../src/weft/data", "tokenization.py"], cwd=here, capture_output=True
    )
    return ran.stdout.strip() + ("+changes" if dirty.stdout else "")


def spread(values: list[float]) -> dict[str, float]:
    return {"min": min(values), "median": statistics.median(values), "max": max(values)}


def main() -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # as many cores as workers: no threads of the library's own
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("input", nargs="?", type=Path, help="a .jsonl file with key 'text'")
    parser.add_argument("--tokenizer", type=Path, help="default: a BPE of 8,192 trained on the standard library")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    options = parser.parse_args()

    with tempfile.TemporaryDirectory() as name:
        temp = Path(name)
        source = options.input or standard_library(temp / "source.jsonl")
        tok = options.tokenizer or Path(train_bpe(_texts(source), 8192, temp / "tok").path).parent
        sides: dict[str, tuple[Side, Path]] = {"weft": (weft, tok), "peer": (peer, tok)}
        if options.tokenizer is None:
            sides["weft, plain"] = (weft, unknown_to_weft(tok, temp / "plain"))
        times: dict[int, dict[str, list[float]]] = {w: {side: [] for side in sides} for w in options.workers}
        cpus: dict[int, dict[str, list[float]]] = {w: {side: [] for side in sides} for w in options.workers}
        for repeat in range(options.repeats):
            for workers in options.workers:
                order = list(sides) if repeat % 2 == 0 else list(sides)[::-1]
                for side in order:
                    run, with_tok = sides[side]
                    out = temp / side.replace(", ", "-")
                    wall, cpu = measure(run, source, out, with_tok, workers)
                    times[workers][side].append(wall)
                    cpus[workers][side].append(cpu)
                    print(f"{repeat + 1}: {workers} workers, {side}: {wall:.2f} s, CPU {cpu:.2f} s", flush=True)
                outputs = {side: _files(temp / side.replace(", ", "-")) for side in sides}
                assert all(files == outputs["peer"] for files in outputs.values()), "the sides wrote different files"
        tokens = IndexedDataset(temp / "weft").num_tokens
        size = source.stat().st_size

    results: dict[str, Any] = {
        "command": " ".join(["python", "benchmarks/tokenization.py", *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit(),
        "machine": machine(),
        "versions": {
            "python": platform.python_version(),
            "tokenizers": tokenizers.__version__,
            "numpy": np.__version__,
        },
        "input": {"bytes": size, "tokens": tokens, "repeats": options.repeats},
        "workers": {},
    }
    for workers, by_side in times.items():
        entry: dict[str, Any] = {"seconds": by_side, "cpu_seconds": cpus[workers]}
        entry["tokens_per_second"] = {side: spread([tokens / t for t in ts]) for side, ts in by_side.items()}
        for side in sides:
            if side != "peer":
                ratio = spread([p / t for p, t in zip(by_side["peer"], by_side[side], strict=True)])
                entry[f"{side} over peer"] = ratio
                speed = entry["tokens_per_second"][side]["median"]
                entry[f"{side} over peer, CPU"] = by_cpu = spread(
                    [p / t for p, t in zip(cpus[workers]["peer"], cpus[workers][side], strict=True)]
                )
                low, mid, high = ratio.values()
                print(
                    f"{workers} workers: {side} {speed:,.0f} tokens/s, {mid:.2f}x peer ({low:.2f} to {high:.2f});",
                    end=" ",
                )
                print(f"CPU {by_cpu['median']:.2f}x ({by_cpu['min']:.2f} to {by_cpu['max']:.2f})")
        results["workers"][str(workers)] = entry
    if {1, 2} <= times.keys():
        for side in sides:
            results[f"scaling of {side}, 1 to 2 workers"] = scaling = spread(
                [a / b for a, b in zip(times[1][side], times[2][side], strict=True)]
            )
            print(f"{side}: {scaling['median']:.2f}x from 1 to 2 workers")
    RESULTS.write_text(json.dumps(results, indent=2) + "\n")
    print(f"written: {RESULTS}")


def _texts(source: Path) -> list[str]:
    return [json.loads(line)["text"] for line in source.read_text(encoding="utf-8").splitlines()]


def _files(prefix: Path) -> tuple[bytes, bytes]:
    return Path(f"{prefix}.bin").read_bytes(), Path(f"{prefix}.idx").read_bytes()


if __name__ == "__main__":
    main()
