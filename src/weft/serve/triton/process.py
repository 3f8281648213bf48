"""One process of Triton: started, asked, watched, ended. Torch-free."""

from __future__ import annotations

import http.client
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from weft.serve.triton.home import STAND_INS, STUB, Home
from weft.serve.triton.repository import LOADED, Model
from weft.serve.triton.tensors import AGAIN

LOOK_SECONDS, ASK_SECONDS = 0.1, 2.0
"""How often Triton's processes are looked at, and how often each model is asked for a token."""

HANG_SECONDS = 60.0
"""A model that has not answered for so long is taken for dead. A full queue is an answer."""

LOST_SECONDS = 20.0
"""How long after its models are loaded Triton may take to say so."""

FIRST = -(2**31)
"""The priority of what is asked: before all that wait."""

FOLLOW = "import ctypes, os, sys; ctypes.CDLL(None).prctl(1, 15); os.execv(sys.argv[1], sys.argv[1:])"
"""Become Triton, and be told to end (signal 15) should the process that began it be gone."""


PYTHON = ("python", *STAND_INS)
"""Backends that run stubs."""

SILENT = "does not answer"
NUMPY = "; this Triton's Python backend reads numpy 1 alone: give it numpy < 2, or leave --triton out"


class LostError(ValueError):
    """Triton crashed, or lost touch with a model while it loaded and now waits for ever; the next time it may go well.

    It asks the stub for a sign of life every second. On a machine that is very busy the sign can be late; then Triton
    wants the stub to end, does not tell it so, and waits for that; or it waits too long for a lock, and aborts.
    """


@dataclass(frozen=True)
class Addresses:
    """Where Triton listens."""

    host: str
    http: int
    grpc: int
    metrics: int

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.http}"

    def found(self) -> Addresses:
        """Each port 0 replaced by one that is free now.

        Raises:
            ValueError: a port is taken, by another program or another of the three, or the host is not this machine's.
        """
        with ExitStack() as held:
            ports = {
                name: held.enter_context(listen(self.host, name, getattr(self, name))).getsockname()[1]
                for name in ("http", "grpc", "metrics")
            }
        return replace(self, **ports)


class TritonProcess:
    """Begins at once; `wait_until_ready` next."""

    def __init__(
        self, home: Home, repository: Path, models: Sequence[Model], addresses: Addresses, drain_seconds: int
    ) -> None:
        self.models, self.addresses, self.drain_seconds = models, addresses, drain_seconds
        self.memory = f"weft-{secrets.token_hex(4)}-"  # names of its shared memory begin so
        self.loaded = Path(tempfile.mkdtemp(prefix="weft-triton-"))  # where models say that they are
        gpu = Path("/dev/nvidiactl").exists()
        command = [
            str(home.binary), f"--model-repository={repository}", f"--backend-directory={home.backends}",
            *(f"--{name}-address={addresses.host}" for name in ("http", "grpc", "metrics")),
            f"--http-port={addresses.http}", f"--grpc-port={addresses.grpc}", f"--metrics-port={addresses.metrics}",
            f"--exit-timeout-secs={drain_seconds}", "--log-info=false",
            *(f"--backend-config={backend},shm-region-prefix-name={self.memory}" for backend in PYTHON),
            *(f"--backend-config={backend},stub-timeout-seconds=600" for backend in PYTHON),  # large models load long
            *(["--disable-auto-complete-config"] if all(model.ours for model in models) else []),  # half the start
            *([] if gpu else ["--allow-gpu-metrics=false", "--pinned-memory-pool-byte-size=0"]),
        ]  # fmt: skip
        self.process = subprocess.Popen(
            [sys.executable, "-c", FOLLOW, *command], env={**os.environ, **home.env, LOADED: str(self.loaded)},
            stdin=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        self._stubs: dict[int, str] = {}
        self._answered, self._wrong = time.monotonic(), ""
        self._ended = threading.Event()

    def wait_until_ready(self, seconds: float, stop: threading.Event) -> None:
        """Until Triton says so, and each of weft's models has given a token: Triton says so of dead ones too.

        Raises:
            LostError: all models are loaded, and Triton does not know; or it crashed.
            ValueError: it ended, or took longer than `seconds`.
        """
        end = time.monotonic() + seconds
        names = {model.name for model in self.models if model.ours or model.backend in STAND_INS}
        lost = float("inf")
        while not stop.is_set():
            if (code := self.process.poll()) is not None:
                kind = LostError if code < 0 else ValueError
                raise kind(f"Triton ended with exit code {code} before it was ready: its own words are above")
            wrong = self._trouble()
            if not wrong:
                self._answered = time.monotonic()
                self._stubs = self._find_stubs()
                return
            if names <= {file.name for file in self.loaded.iterdir()} and len(names) == len(self.models):
                lost = min(lost, time.monotonic() + LOST_SECONDS)
            if time.monotonic() > lost:
                if SILENT in wrong:
                    raise LostError("Triton lost touch with its models while they loaded: the machine is too busy")
                hint = NUMPY if "tensor shape does not match" in wrong else ""
                raise ValueError(f"the models are loaded, but do not answer as they should: {wrong}{hint}")
            if time.monotonic() > end:
                raise ValueError(f"Triton is not ready after {seconds:.0f} s: {wrong}")
            stop.wait(LOOK_SECONDS)

    def watch(self, stop: threading.Event) -> str:
        """Until `stop` ("" comes back), or something is wrong, and what."""
        threading.Thread(target=self._keep_asking, name="weft-ask", daemon=True).start()
        while not stop.wait(LOOK_SECONDS):
            if (code := self.process.poll()) is not None:
                return f"Triton ended with exit code {code}"
            for pid, name in self._stubs.items():
                if not _runs(pid):
                    return f"the process that runs {name} died"
            if (silent := time.monotonic() - self._answered) > HANG_SECONDS:
                return f"no answer for {silent:.0f} s ({self._wrong})"
        return ""

    def end(self) -> None:
        """Let what is running finish, for `drain_seconds` at most."""
        self._ended.set()
        self.process.send_signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(self.drain_seconds + 15)
        self.kill()

    def kill(self) -> None:
        """End it and all that it began, now. Connections close, which ends streams that a dead model would leave open."""
        self._ended.set()
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        for left in Path("/dev/shm").glob(f"{self.memory}*"):
            left.unlink(missing_ok=True)
        shutil.rmtree(self.loaded, ignore_errors=True)

    def _keep_asking(self) -> None:
        while not self._ended.wait(ASK_SECONDS):
            self._wrong = self._trouble()
            if not self._wrong:
                self._answered = time.monotonic()

    def _trouble(self) -> str:
        """What is wrong now, or nothing."""
        try:
            status, answer = self._ask("GET", "/v2/health/ready")
            if status != 200:
                return f"Triton says {status} {answer}".strip()
            for model in self.models:
                if not model.ours:
                    continue
                body = {"input_ids": [0], "max_tokens": 1, "ignore_eos": True, "priority": FIRST}
                status, answer = self._ask("POST", f"/v2/models/{model.name}/generate", body)
                if status != 200 and AGAIN not in answer:  # it lives, but is full, or is coming back by itself
                    return f"{model.name} says {status} {answer}"
        except OSError as error:
            return f"{self.addresses.url} {SILENT}: {error}"
        return ""

    def _ask(self, method: str, path: str, body: object = None) -> tuple[int, str]:
        """Not through a proxy, whatever the environment says."""
        connection = http.client.HTTPConnection(self.addresses.host, self.addresses.http, timeout=HANG_SECONDS)
        try:
            connection.request(method, path, None if body is None else json.dumps(body))
            answer = connection.getresponse()
            return answer.status, answer.read(1000).decode(errors="replace")
        except http.client.HTTPException as error:
            raise OSError(f"it speaks no HTTP: {error!r}") from error
        finally:
            connection.close()

    def _find_stubs(self) -> dict[int, str]:
        """The processes that run Python models: process id → model, or backend."""
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                words = (folder / "cmdline").read_text("utf-8", "replace").split("\0")
            except OSError:  # it is gone meanwhile
                continue
            if Path(words[0]).name == STUB and any(word.startswith(self.memory) for word in words):
                place = Path(words[1]).parent  # a model's version, or a backend that is in Python
                found[int(folder.name)] = place.parent.name if place.name.isdigit() else place.name
        return found


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text("utf-8").rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def listen(host: str, name: str, port: int) -> socket.socket:
    try:
        return socket.create_server((host, port))
    except OSError as error:
        raise ValueError(
            f"--{name}-port: cannot listen on {host}:{port}: {error.strerror or error}; 0 takes a free one"
        ) from None
