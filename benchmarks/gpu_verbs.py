"""weft's own commands on a GPU, as a user types them, for benchmarks/gpu.py: whether each does its work.

The text is weft's own source. What the commands wrote and printed lies in verbs.tar.gz beside the results.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from weft.config.load import make_config
from weft.config.toml import config_toml
from weft.models.huggingface import config_from_shape

SOURCE = Path(__file__).parents[1] / "src" / "weft"
KEPT = ("*.txt", "*.toml", "*.json", "*.svg", "*.html", "*.gz", "run/log.jsonl")
"""Of the commands' folder, what goes into the archive."""
CLUSTER = "cluster.toml"
"""Where the measured machine lies for the sections after this one."""
PROMPTS = (
    "def __init__(self, ",
    "from __future__ import ",
    "    return ",
    "class ",
    '"""',
    "import torch",
    "raise ",
    "x",
)


def verbs(section: Any) -> None:
    with TemporaryDirectory() as temp:
        work = Verbs(section, Path(temp))
        try:
            for name, row in work.rows():
                section.row(name, row)
        finally:
            work.keep(section.folder / "verbs.tar.gz")


class Verbs:
    """A run and what is done with it, in one folder."""

    def __init__(self, section: Any, folder: Path) -> None:
        self.section, self.folder, self.sizes = section, folder, section.sizes
        self.device = section.device.type
        self.layout = "bf16" if section.tiny else "bf16.compile"
        self.environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(SOURCE.parent), *filter(None, sys.path)))}

    def rows(self) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
        yield "weft data", self.data
        yield "weft train --profile", self.train
        yield "weft train --resume", self.resume
        yield "weft profile report", self.report
        yield "weft verify checkpoint", partial(self.told, "verify", "checkpoint", "run")
        for dtype in ("fp32", "bf16"):
            yield (
                f"weft verify serve, {dtype}",
                partial(self.told, "verify", "serve", "run", "--dtype", dtype, "--device", self.device),
            )
        yield (
            "weft export huggingface --verify",
            partial(self.told, "export", "huggingface", "run", "exported", "--verify"),
        )
        yield "weft generate", self.generate
        yield "weft serve --compile", self.serve
        yield "weft plan calibrate --quick", self.calibrate
        yield "weft plan layouts", self.plan
        yield "weft verify layout", self.verify_layout
        yield "weft verify resume", self.verify_resume
        yield "weft tune", self.tune

    # -- one each ----------------------------------------------------------------------------------------------------

    def data(self) -> dict[str, Any]:
        files = (str(SOURCE), "--glob", "*.py")
        self.weft("data", "tokenizer", *files, "--vocab", str(self.sizes.verbs.vocab), "--out", "tokenizer")
        self.weft("data", "prepare", *files, "--tokenizer", "tokenizer", "--out", "text")
        settings = {
            "run": "run",
            "model": self.sizes.verbs,
            "layout": self.layout,
            "data": {"paths": ["text"], "tokenizer": "tokenizer"},
            "schedule": {"warmup": 2},
            "train": {"steps": 16, "global_batch": self.sizes.verbs_batch, "device": self.device},
            "checkpoint": {"every": 8},
        }
        (self.folder / "run.toml").write_text(config_toml(make_config(settings)), encoding="utf-8")
        config = json.dumps(config_from_shape(self.sizes.verbs))
        (self.folder / "config.json").write_text(config, encoding="utf-8")
        return {"told": "text, tokenizer, settings"}

    def train(self) -> dict[str, Any]:
        self.weft("train", "run.toml", "--profile", "10:12")
        return self.learnt(16)

    def resume(self) -> dict[str, Any]:
        self.weft("train", "run.toml", "--resume", "--steps", "24")
        return self.learnt(24)

    def learnt(self, steps: int) -> dict[str, Any]:
        lines = [json.loads(line) for line in (self.folder / "run/log.jsonl").read_text(encoding="utf-8").splitlines()]
        steps_of = [line for line in lines if "tokens_per_second" in line]
        assert steps_of[-1]["step"] == steps, steps_of[-1]
        first, last = steps_of[0]["loss"], steps_of[-1]["loss"]
        assert last < first, f"it did not learn: loss {first} and then {last}"
        best = max(line["tokens_per_second"] for line in steps_of)
        return {
            "told": f"loss {first:.3f} → {last:.3f}, {best:.0f} tokens/s at best",
            "losses": [first, last],
            "best": best,
        }

    def report(self) -> dict[str, Any]:
        text = self.weft("profile", "report", "run", "--html", "profile.html", "--trace", "trace.json.gz")
        assert "products" in text or "matmul" in text or "GEMM" in text, text[:500]
        return {"told": next((line.strip() for line in text.splitlines() if line.strip()), ""), "text": text}

    def verify_resume(self) -> dict[str, Any]:
        return self.told("verify", "resume", "run.toml", "--steps", "3", "--set", "checkpoint.every=0")

    def verify_layout(self) -> dict[str, Any]:
        return self.told("verify", "layout", "single", "full.mb1", "run.toml", "--steps", "2")

    def generate(self) -> dict[str, Any]:
        text = self.weft("generate", "run", PROMPTS[0], "--max-tokens", "32", "--device", self.device)
        return {"told": repr(text[:80]), "text": text}

    def calibrate(self) -> dict[str, Any]:
        began = time.monotonic()
        self.weft("plan", "calibrate", "--quick", "--processes", "1", "--device", self.device, "--out", "cluster.toml")
        shutil.copy(self.folder / "cluster.toml", self.section.folder / CLUSTER)
        return {"told": f"{time.monotonic() - began:.0f} s"}

    def plan(self) -> dict[str, Any]:
        text = self.weft(
            "plan", "layouts", "config.json", "--cluster", "cluster.toml", "--batch", str(self.sizes.verbs_batch),
            "--seq", str(self.sizes.verbs.max_seq),
        )  # fmt: skip
        return {
            "told": next((line.strip() for line in text.splitlines() if "single" in line or "mb" in line), text[:80]),
            "text": text,
        }

    def tune(self) -> dict[str, Any]:
        self.weft(
            "tune", "run.toml", "--cluster", "cluster.toml", "--top", "3", "--steps", "4", "--limit", "60",
            "--out", "tuned.toml",
        )  # fmt: skip
        table = json.loads((self.folder / "tuned.json").read_text(encoding="utf-8"))
        return {"told": f"{len(table['rows'])} trials", "table": table}

    def serve(self) -> dict[str, Any]:
        with self.server("--compile") as (url, started):
            alone = [ask(url, prompt) for prompt in PROMPTS]
            with ThreadPoolExecutor(len(PROMPTS)) as pool:
                began = time.monotonic()
                together = list(pool.map(partial(ask, url), PROMPTS))
                seconds = time.monotonic() - began
        same = sum(a == b for a, b in zip(alone, together, strict=True))
        return {"told": f"ready in {started:.1f} s; {len(PROMPTS)} texts at once {seconds * 1e3:.0f} ms, {same} as alone",
                "started_s": started, "same": same, "texts": together}  # fmt: skip

    # -- with what ---------------------------------------------------------------------------------------------------

    def weft(self, *arguments: str, limit: float = 150.0) -> str:
        """What a command prints; it is kept, too."""
        command = [sys.executable, "-m", "weft", *arguments]
        done = subprocess.run(
            command, cwd=self.folder, env=self.environment | {"COLUMNS": "150"}, capture_output=True, text=True,
            timeout=limit, check=False,
        )  # fmt: skip
        name = re.sub(r"\W+", "-", " ".join(arguments[:3]))[:60]
        (self.folder / f"{name}.txt").write_text(
            f"$ weft {' '.join(arguments)}\n{done.stdout}\n{done.stderr}", encoding="utf-8"
        )
        if done.returncode:
            last = [line for line in (done.stderr + done.stdout).strip().splitlines() if line.strip()]
            raise RuntimeError(f"weft {' '.join(arguments[:3])} ended with {done.returncode}: {last[-1] if last else ''}"
                               f"\n{done.stdout[-1500:]}\n{done.stderr[-1500:]}")  # fmt: skip
        return done.stdout

    def told(self, *arguments: str) -> dict[str, Any]:
        """A proof: its last line is its verdict."""
        text = self.weft(*arguments)
        return {
            "told": [line for line in text.strip().splitlines() if line.strip()][-1].strip()[:150],
            "text": text[-3000:],
        }

    @contextmanager
    def server(self, *more: str) -> Iterator[tuple[str, float]]:
        """Its address, and how long it took to be ready."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command = [sys.executable, "-m", "weft", "serve", "run", "--port", str(port), "--device", self.device, *more]
        log, began = self.folder / "serve.txt", time.monotonic()
        with log.open("w") as out:
            server = subprocess.Popen(command, cwd=self.folder, env=self.environment, stdout=out, stderr=out)
        try:
            url = f"http://127.0.0.1:{port}"
            while not ready(url):
                if server.poll() is not None or time.monotonic() - began > 120:
                    raise RuntimeError(f"the server is not ready: {log.read_text(encoding='utf-8')[-2000:]}")
                time.sleep(0.1)
            yield url, time.monotonic() - began
            server.send_signal(signal.SIGTERM)
            if code := server.wait(30):
                raise RuntimeError(f"the server ended with {code}: {log.read_text(encoding='utf-8')[-2000:]}")
        finally:
            server.kill()

    def keep(self, path: Path) -> None:
        with tarfile.open(path, "w:gz") as archive:
            for pattern in KEPT:
                for file in self.folder.glob(pattern):
                    archive.add(file, file.relative_to(self.folder))


def ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/v2/health/ready", timeout=2) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def ask(url: str, prompt: str) -> str:
    body = json.dumps({"model": "run", "prompt": prompt, "max_tokens": 48, "temperature": 0}).encode()
    request = urllib.request.Request(f"{url}/v1/completions", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        text: str = json.load(answer)["choices"][0]["text"]
    return text
