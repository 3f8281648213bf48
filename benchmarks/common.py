"""What every benchmark needs: the machine, versions and commit beside each figure, ratios with their spread."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"


def machine() -> dict[str, Any]:
    """CPU, cores that this process may use, GPU where torch is loaded and sees one, and how busy it is now."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    found: dict[str, Any] = {
        "cpu": (names or [platform.processor() or platform.machine()])[0],
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "load": [round(load, 1) for load in os.getloadavg()],
    }
    torch = sys.modules.get("torch")
    if torch is not None:
        found["threads"] = torch.get_num_threads()
        if torch.cuda.is_available():
            found["gpu"] = torch.cuda.get_device_name()
    return found


def processes(pid: int) -> list[int]:
    """A process and all that it has begun, and they have; those that it began itself come first."""
    threads = Path(f"/proc/{pid}/task").iterdir()
    begun = [int(child) for thread in threads for child in (thread / "children").read_text().split()]
    return [pid, *begun, *(one for child in begun for one in processes(child)[1:])]


def versions(*packages: str) -> dict[str, str]:
    """Of Python and of the packages that are installed."""
    found = {"python": platform.python_version()}
    for package in ("weft", *packages):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str:
    """Of the checkout, with a + where tracked files have been changed since."""
    head, changed = (_git(*words) for words in (("rev-parse", "--short=12", "HEAD"), ("status", "--short", "-uno")))
    return head + "+" * bool(changed)


def _git(*arguments: str) -> str:
    if shutil.which("git") is None:
        return ""
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip()


def spread(values: Sequence[float], digits: int = 3) -> dict[str, float]:
    """Median, smallest and largest."""
    median, low, high = statistics.median(values), min(values), max(values)
    return {"median": round(median, digits), "min": round(low, digits), "max": round(high, digits)}


def alternate(sides: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Let the sides take turns, in the other order every second round: what each gives, round by round.

    What one round's sides give was measured beside each other in time; compare those.
    """
    found: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(rounds):
        for name in list(sides) if turn % 2 == 0 else list(sides)[::-1]:
            found[name].append(sides[name]())
    return found


def write(name: str, results: dict[str, Any], packages: Sequence[str] = ("torch",), folder: Path = RESULTS) -> Path:
    """`results/<name>.json`: the results, under where, when and with what they were measured."""
    head = {
        "command": " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit(),
        "machine": machine(),
        "versions": versions(*packages),
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(json.dumps(head | results, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return path


def measured(name: str) -> dict[str, Any]:
    """What `write` wrote the last time; nothing, where it never did."""
    path = RESULTS / f"{name}.json"
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return found


def shown(path: Path) -> Path:
    """A path as it is best told: from the checkout on, where it lies in it."""
    return path.relative_to(ROOT) if path.is_relative_to(ROOT) else path
